//! Replication: every member ends with every tag, whatever happens to disks and members meanwhile.

use super::*;
use mainstay_agent::transfer::WireRecord;
use mainstay_agent::transfer::api::{Answer, REPLICAS, Replica, TagReplicas};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_comes_late_or_lost_its_disk_gets_everything() {
    let cluster = Cluster::new(3);
    let mut members = vec![cluster.serve(1, true).await, cluster.serve(2, true).await];
    let image = cluster.file("image");
    write_image(&image, 2);
    let spec = spec("t", "v1", Durability::Majority);
    assert!(
        push(&[&members[0].url], &image, &spec)
            .await
            .unwrap()
            .tag
            .visible
    );
    eventually("two hold it", || cluster.holders("t") == 2).await;
    members.push(cluster.serve(3, true).await);
    eventually("the late one as well", || cluster.holders("t") == 3).await;

    // Its disk is lost; what it said does not count any more until it is true again.
    members.pop();
    std::fs::remove_dir_all(cluster.chunk_dir(3)).unwrap();
    let lost = cluster.serve(3, false).await;
    let before = lost.service.chunks().stats().chunks;
    assert_eq!(before, 0);
    drop(lost);
    let mut applied = cluster.shared.status.subscribe();
    let again = cluster.serve(3, true).await;
    let full = members[0].service.chunks().stats().chunks;
    let mut withdrawn = false;
    while again.service.chunks().stats().chunks < full || cluster.holders("t") < 3 {
        withdrawn |= cluster.holders("t") == 2;
        tokio::time::timeout(Duration::from_secs(30), applied.changed())
            .await
            .unwrap()
            .unwrap();
    }
    assert!(withdrawn, "it took back its claim first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_that_a_reader_meets_is_healed_from_another_member() {
    let cluster = Cluster::new(2);
    let members = cluster.serve_all().await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    std::fs::write(&image, noise(4, 2 << 20)).unwrap();
    let published = push(
        &[&members[0].url],
        &image,
        &spec("t", "v1", Durability::All),
    )
    .await
    .unwrap();
    let pack = cluster.chunk_dir(1).join("pack-00000001.mspk");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&pack)
        .unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    pull(&[&members[0].url], &published.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&image, &copy);
    let full = members[1].service.chunks().stats().chunks;
    eventually("whole again", || {
        members[0].service.chunks().stats().chunks == full && cluster.holders("t") == 2
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_says_who_has_what() {
    let cluster = Cluster::new(3);
    let mut members = vec![cluster.serve(1, true).await, cluster.serve(2, true).await];
    members.push(cluster.serve(3, false).await);
    let image = cluster.file("image");
    std::fs::write(&image, noise(4, 2 << 20)).unwrap();
    push(
        &[&members[0].url],
        &image,
        &spec("t", "v1", Durability::Majority),
    )
    .await
    .unwrap();
    members[2].stop();
    let url = format!("{}{REPLICAS}?template=t&tag=v1", members[1].url);
    let answer: Answer<Vec<Replica>> = client()
        .get(&url)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let rows = answer.body.unwrap();
    let states: Vec<&str> = rows.iter().map(|r| r.state.as_str()).collect();
    assert_eq!(states, ["complete", "complete", "unknown"], "{rows:?}");
    assert!(!rows[2].message.is_empty() && rows[2].name == "c3");
    let unknown = client()
        .get(url.replace("tag=v1", "tag=v9"))
        .send()
        .await
        .unwrap();
    assert!(unknown.text().await.unwrap().contains("Not found"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bytes_anywhere_is_told_and_a_deleted_tag_is_left_alone() {
    let cluster = Cluster::new(2);
    let mut holder = cluster.serve(1, false).await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(4, 1 << 20)).unwrap();
    let published = push(&[&holder.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
    holder.stop();
    let other = cluster.serve(2, true).await;
    let url = format!("{}{REPLICAS}?template=t&local=1", other.url);
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let answer: Answer<Vec<Replica>> = client()
            .get(&url)
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        let row = answer.body.unwrap().remove(0);
        if row.state == "missing" && row.message.contains("no member could send") {
            break;
        }
        assert!(Instant::now() < until, "{row:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let id = mainstay_model::TemplateId::from(published.tag.template_id);
    let delete = Command::DeleteTemplate { id };
    Fake(Arc::clone(&cluster.shared))
        .submit(crate::stamp::command_id(), delete)
        .await
        .unwrap();
    eventually("forgotten", || other.service.progress.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_room_takes_nothing_until_it_has_some() {
    let cluster = Cluster::new(3);
    cluster.shared.full.lock().insert(3);
    let members = cluster.serve_all().await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(7, 2 << 20)).unwrap();
    let spec = spec("t", "v1", Durability::Majority);
    let record = WireRecord {
        id: [0; 32],
        codec: 0,
        raw_len: 0,
        data: Vec::new().into(),
    };
    let refused = client()
        .put(format!("{}{}", members[2].url, api::CHUNKS))
        .body(WireRecord::frame_all(&[record]))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 507);
    push(&[&members[0].url], &image, &spec).await.unwrap();
    eventually("two hold it", || cluster.holders("t") == 2).await;
    assert_eq!(members[2].service.chunks().stats().chunks, 0);
    cluster.shared.full.lock().clear();
    eventually("the third as well", || cluster.holders("t") == 3).await;
}

/// Member 2 took the first copy and was wiped and replaced by 4 before anyone had another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copy_of_a_member_that_was_replaced_does_not_count() {
    let cluster = Cluster::new(3);
    let mut two = cluster.serve(2, false).await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(4, 1 << 20)).unwrap();
    let spec = PushSpec {
        wait: Duration::ZERO,
        ..spec("t", "v1", Durability::Majority)
    };
    let first = push(&[&two.url], &image, &spec).await.unwrap();
    assert!(!first.tag.visible);
    two.stop();
    cluster.shared.urls.lock().remove(&MemberId(2));
    cluster.shared.status.send_modify(|s| {
        let voter = s.members.remove(&2).unwrap();
        let learner = MemberStatus {
            role: Role::Learner,
            ..voter
        };
        s.members.insert(4, learner);
    });
    let one = cluster.serve(1, false).await;
    let again = push(&[&one.url], &image, &spec).await.unwrap();
    assert_eq!(again.tag.holders.len(), 2);
    assert!(!again.tag.visible, "one copy is no majority: {again:?}");

    // Nor does a learner's count, before it has its vote.
    let _four = cluster.serve(4, true).await;
    eventually("the learner holds it", || cluster.holders("t") == 3).await;
    let visible = || {
        let state = cluster.shared.state.lock();
        let mut tags = state.templates.values().flat_map(|t| t.tags.values());
        tags.all(|t| t.visible)
    };
    assert!(!visible());
    cluster.shared.status.send_modify(|s| {
        s.members.get_mut(&4).unwrap().role = Role::Voter;
    });
    eventually("its vote makes the majority", visible).await;
}

/// However many commands there are, and however many tags: only what changed is looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replication_looks_at_what_changed_and_at_nothing_else() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(3, 100_000)).unwrap();
    for n in 0..30 {
        let spec = spec("t", &format!("v{n}"), Durability::All);
        push(&[&member.url], &image, &spec).await.unwrap();
    }
    let figures = || member.service.figures().replication;
    let catalog = Fake(Arc::clone(&cluster.shared));
    // Each look is behind a command of its own: once so many have passed, all before them was seen.
    let looks_behind = async |count: u64| {
        for _ in 0..count {
            let looks = figures().looks;
            let noop = catalog.submit(crate::stamp::command_id(), Command::Noop);
            noop.await.unwrap();
            eventually("it looked", || figures().looks > looks).await;
        }
    };
    looks_behind(2).await;
    let before = figures();
    assert!(before.looked_at >= 30, "{before:?}");
    looks_behind(20).await;
    let rested = figures();
    assert!(rested.looks >= before.looks + 20);
    let seen = |f: ReplicationFigures| (f.looked_at, f.whole_looks, f.lacking);
    assert_eq!(seen(rested), seen(before), "nothing of its own changed");
    let next = spec("t", "next", Durability::All);
    push(&[&member.url], &image, &next).await.unwrap();
    eventually("the new one was looked at", || {
        figures().looked_at > before.looked_at
    })
    .await;
    let after = figures();
    assert_eq!(after.whole_looks, before.whole_looks);
    assert!(after.looked_at <= before.looked_at + 2, "{after:?}");

    // What a snapshot brings is looked at as a whole.
    {
        let mut state = cluster.shared.state.lock();
        let mut installed = State::import(state.export().into_iter()).unwrap();
        installed.succeed(&state);
        *state = installed;
    }
    cluster.shared.status.send_modify(|s| s.applied += 1);
    eventually("a whole look", || {
        figures().whole_looks == before.whole_looks + 1
    })
    .await;
    assert!(figures().looked_at >= after.looked_at + 31);
}

/// A way to `target` on which each connection brings back no more than so many bytes a second.
async fn slow_line(target: &str, rate: usize) -> (String, JoinHandle<()>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let target = target.trim_start_matches("http://").to_owned();
    let serve = async move {
        while let Ok((inbound, _)) = listener.accept().await {
            let outbound = TcpStream::connect(&target).await.unwrap();
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = inbound.into_split();
                let (mut from_server, mut to_server) = outbound.into_split();
                let up = tokio::io::copy(&mut from_client, &mut to_server);
                let down = async {
                    let mut buffer = vec![0; rate / 10];
                    while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                        if to_client.write_all(&buffer[..n]).await.is_err() {
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                };
                tokio::select! { _ = up => (), () = down => () }
            });
        }
    };
    (url, tokio::spawn(serve))
}

/// One of two holders is a hundred times slower: the other one sends what it has not sent. What only the
/// slow one has still comes from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_source_loses_its_turns_to_a_faster_one() {
    let cluster = Cluster::new(3);
    let (one, two) = (cluster.serve(1, false).await, cluster.serve(2, false).await);
    let image = cluster.file("image");
    let mut bytes = noise(5, 48 << 20);
    bytes.retain(|b| *b != 0);
    std::fs::write(&image, &bytes).unwrap();
    for member in [&one, &two] {
        let spec = spec("t", "v1", Durability::One);
        push(&[&member.url], &image, &spec).await.unwrap();
    }
    assert_eq!(cluster.holders("t"), 2);
    let direct = cluster.shared.urls.lock()[&MemberId(2)].clone();
    let (slow, line) = slow_line(&direct, 128 << 10).await;
    cluster.shared.urls.lock().insert(MemberId(2), slow);
    let third = cluster.serve(3, true).await;
    // Alone, the slow line would take minutes for its half.
    eventually("the third has it", || cluster.holders("t") == 3).await;
    let fetched = third.service.figures().replication.fetched_bytes;
    assert!(fetched < bytes.len() as u64 * 11 / 10, "{fetched}");

    std::fs::write(&image, noise(6, 400_000)).unwrap();
    let spec = spec("only", "v1", Durability::One);
    push(&[&two.url], &image, &spec).await.unwrap();
    eventually("from the slow one", || cluster.holders("only") == 2).await;
    line.abort();
}

/// What somebody waits for does not wait for what a member that was away catches up with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_push_is_copied_beside_the_long_ones() {
    let cluster = Cluster::new(2);
    let one = cluster.serve(1, false).await;
    let image = cluster.file("image");
    for n in 1..=3 {
        std::fs::write(&image, noise(n, 12 << 20)).unwrap();
        let spec = spec("a", &format!("v{n}"), Durability::One);
        push(&[&one.url], &image, &spec).await.unwrap();
    }
    let direct = cluster.shared.urls.lock()[&MemberId(1)].clone();
    let (slow, line) = slow_line(&direct, 64 << 10).await;
    cluster.shared.urls.lock().insert(MemberId(1), slow);
    let two = cluster.serve(2, true).await;
    eventually("it copies", || {
        two.service.figures().replication.lacking == 3 && !two.service.progress.is_empty()
    })
    .await;
    std::fs::write(&image, noise(9, 100_000)).unwrap();
    let pushed = push(&[&one.url], &image, &spec("z", "v1", Durability::All)).await;
    assert!(pushed.unwrap().tag.is_held());
    assert_eq!(cluster.holders("a"), 1, "the long ones still go on");
    line.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_keep_the_rate_they_are_given() {
    let cluster = Cluster {
        upkeep: Upkeep {
            replicate_rate: 1 << 20,
            ..Upkeep::default()
        },
        ..Cluster::new(2)
    };
    let holder = cluster.serve(1, false).await;
    let image = cluster.file("image");
    // Does not compress: 3 MiB on the wire, 16 chunks a request would be less than one request.
    let mut bytes = noise(5, 9 << 20);
    bytes.retain(|b| *b != 0);
    std::fs::write(&image, &bytes).unwrap();
    let published = push(&[&holder.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
    let begin = Instant::now();
    let other = cluster.serve(2, true).await;
    eventually("the other has it", || cluster.holders("t") == 2).await;
    let took = begin.elapsed();
    let fetched = other.service.figures().replication.fetched_bytes;
    assert!(fetched > published.sent_bytes * 9 / 10, "{fetched}");
    let least = Duration::from_secs_f64(fetched as f64 / f64::from(1 << 20));
    assert!(
        took + Duration::from_millis(200) >= least,
        "{took:?} for {fetched} bytes"
    );
}

/// A row for each tag and member, from one member's mouth; what is missing says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_of_all_tags_are_told_at_once() {
    let cluster = Cluster::new(3);
    let mut members = vec![cluster.serve(1, true).await, cluster.serve(2, true).await];
    let image = cluster.file("image");
    for tag in ["v1", "v2"] {
        std::fs::write(&image, noise(tag.len() as u64, 1 << 20)).unwrap();
        let spec = spec("t", tag, Durability::Majority);
        push(&[&members[0].url], &image, &spec).await.unwrap();
    }
    cluster.shared.full.lock().insert(3);
    members.push(cluster.serve(3, true).await);
    let url = format!("{}{REPLICAS}?template=t&all=1", members[0].url);
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let tags: Vec<TagReplicas> = super::collect::ask(false, url.clone()).await;
        let states = |tag: &TagReplicas| {
            let states = tag.replicas.iter().map(|r| r.state.clone());
            states.collect::<Vec<_>>()
        };
        let as_expected = tags.len() == 2
            && tags.iter().all(|tag| {
                tag.visible
                    && states(tag) == ["complete", "complete", "missing"]
                    && tag.replicas[2].name == "c3"
                    && tag.replicas[2].message.contains("no room")
            });
        if as_expected {
            break;
        }
        assert!(Instant::now() < until, "{tags:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.shared.full.lock().clear();
    eventually("all have both", || {
        let state = cluster.shared.state.lock();
        let mut tags = state.templates.values().flat_map(|t| t.tags.values());
        tags.all(|tag| tag.holders.len() == 3)
    })
    .await;
}
