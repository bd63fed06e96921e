//! Pushing: interrupted anywhere, lied to, failing over.

use super::*;
use mainstay_agent::transfer::api::{CHUNKS, MISSING, PUBLISH};
use mainstay_agent::transfer::{FileEntry, Manifest, WireRecord};

/// Chunks of one request times requests at once: what may be under way when a connection is cut.
const IN_FLIGHT: u64 = 128 * 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_over_a_breaking_line_ends_and_repeats_only_what_was_in_flight() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    write_image(&image, 1);
    let limits = vec![
        0, 300, 70_000, 1_000_003, 2_500_000, 5_000_000, 400_000, 3_000_000,
    ];
    let proxy = Proxy::new(&member.url, limits).await;
    let spec = spec("t", "v1", Durability::All);
    let published = push(&[&proxy.url], &image, &spec).await.unwrap();
    assert!(published.tag.visible);
    assert!(
        proxy.cuts.load(Ordering::Relaxed) >= 6,
        "the line did break"
    );
    let unique = member.service.chunks().stats().chunks;
    assert!(
        published.sent_chunks <= unique + 8 * IN_FLIGHT,
        "{published:?} for {unique}"
    );
    pull(&[&member.url], &published.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&image, &copy);

    let again = push(&[&member.url], &image, &spec).await.unwrap();
    assert_eq!(
        (again.sent_chunks, again.tag.number),
        (0, published.tag.number)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_push_goes_on_where_it_was() {
    for stop_after in [1, 9, 17] {
        let cluster = Cluster::new(1);
        let member = cluster.serve(1, true).await;
        let image = cluster.file("image");
        write_image(&image, stop_after);
        let spec = spec("t", "v1", Durability::One);
        let (url, path, first) = (member.url.clone(), image.clone(), spec.clone());
        let killed = tokio::spawn(async move { push(&[&url], &path, &first).await.map(|_| ()) });
        let chunks = member.service.chunks();
        eventually("some chunks stored", || {
            chunks.stats().chunks >= stop_after * 16
        })
        .await;
        killed.abort();
        let before = chunks.stats().chunks;
        let published = push(&[&member.url], &image, &spec).await.unwrap();
        let after = chunks.stats().chunks;
        assert!(
            published.sent_chunks <= after - before,
            "{published:?}: {before} of {after}"
        );
    }
}

/// The client dies, and goes on through another member while the first one still runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_member_holds_is_not_sent_again() {
    let cluster = Cluster::new(2);
    let (first, second) = (cluster.serve(1, false).await, cluster.serve(2, false).await);
    let image = cluster.file("image");
    write_image(&image, 11);
    let spec = spec("t", "v1", Durability::One);
    let sent = push(&[&first.url], &image, &spec).await.unwrap();
    assert!(sent.sent_chunks > 300);
    let again = push(&[&second.url], &image, &spec).await.unwrap();
    assert_eq!(again.sent_chunks, 0, "all of it came from the other member");
    assert_eq!(again.tag.holders.len(), 2);
    let (one, two) = (first.service.chunks(), second.service.chunks());
    assert_eq!(one.stats().chunks, two.stats().chunks);
}

/// Copies that are asked for later are waited for, and who waits in vain is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_copies_of_a_tag_that_is_visible_already_are_waited_for() {
    let cluster = Cluster::new(3);
    let members = [cluster.serve(1, true).await, cluster.serve(2, true).await];
    let image = cluster.file("image");
    write_image(&image, 13);
    let majority = spec("t", "v1", Durability::Majority);
    let first = push(&[&members[0].url], &image, &majority).await.unwrap();
    assert!(first.tag.is_held());
    eventually("two hold it", || cluster.holders("t") == 2).await;

    let all = |wait| PushSpec {
        wait,
        ..spec("t", "v1", Durability::All)
    };
    let short = all(Duration::from_secs(1));
    let again = push(&[&members[0].url], &image, &short).await.unwrap();
    assert!(again.tag.visible && !again.tag.is_held(), "{:?}", again.tag);
    assert_eq!((again.tag.copies, again.tag.copies_needed), (Some(2), 3));

    let (url, path, long) = (
        members[0].url.clone(),
        image.clone(),
        all(Duration::from_secs(30)),
    );
    let waits = tokio::spawn(async move { push(&[&url], &path, &long).await.unwrap() });
    let _third = cluster.serve(3, true).await;
    let held = waits.await.unwrap();
    assert!(held.tag.is_held(), "{:?}", held.tag);
    assert_eq!(held.tag.copies, Some(3));
}

/// A member that hangs is asked once, and then left alone for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_does_not_wait_for_a_member_that_hangs() {
    let cluster = Cluster::new(2);
    let member = cluster.serve(1, false).await;
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", deaf.local_addr().unwrap());
    cluster.shared.urls.lock().insert(MemberId(2), url);
    let image = cluster.file("image");
    write_image(&image, 12);
    let begin = Instant::now();
    push(&[&member.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
    // Seven units, four at once: each would wait a second.
    assert!(member.service.shy.lock().contains_key(&MemberId(2)));
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_changed_chunk_costs_a_chunk() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    let image = cluster.file("image");
    write_image(&image, 5);
    push(&[&member.url], &image, &spec("t", "v1", Durability::All))
        .await
        .unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap();
    file.write_all_at(b"changed", 100 << 20).unwrap();
    let next = push(&[&member.url], &image, &spec("t", "v2", Durability::All))
        .await
        .unwrap();
    // The chunk, its segment, the manifest.
    assert_eq!((next.sent_chunks, next.tag.number), (3, 1));
    // The same name for other bytes.
    file.write_all_at(b"again", 100 << 20).unwrap();
    let taken = push(&[&member.url], &image, &spec("t", "v2", Durability::All))
        .await
        .unwrap_err();
    assert!(
        matches!(&taken, TransferError::Refused(why) if why.contains("v2")),
        "{taken}"
    );
}

#[tokio::test]
async fn a_dead_member_is_passed_over() {
    let cluster = Cluster::new(3);
    let mut members = cluster.serve_all().await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(3, 1 << 20)).unwrap();
    members[0].stop();
    let urls: Vec<&str> = members.iter().map(|m| m.url.as_str()).collect();
    let published = push(&urls, &image, &spec("t", "v1", Durability::Majority))
        .await
        .unwrap();
    assert!(published.tag.visible, "two of three hold it");
}

#[tokio::test]
async fn bad_records_are_refused_and_nothing_is_published_that_is_not_whole() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let good = WireRecord::encode(&noise(1, 65536));
    let mut bad = WireRecord::encode(&noise(2, 65536));
    bad.id[0] ^= 1;
    let url = |path: &str| format!("{}{path}", member.url);
    let body = WireRecord::frame_all([&good, &bad]);
    let cut = body.slice(..body.len() - 1);
    for body in [
        body,
        cut,
        "not a record at all, but long enough to look like one".into(),
    ] {
        let answer = client().put(url(CHUNKS)).body(body).send().await.unwrap();
        assert_eq!(answer.status(), 400);
        assert_eq!(member.service.chunks().stats().chunks, 0);
    }
    let answer = client()
        .post(url(MISSING))
        .body(vec![0; 33])
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    let answer = client()
        .post(url(MISSING))
        .body(vec![1; 65537 * 32])
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    let asked = [&[0; 32][..], &good.id].concat();
    let answer = client()
        .post(url(MISSING))
        .body(asked)
        .send()
        .await
        .unwrap();
    assert_eq!(
        answer.bytes().await.unwrap()[..],
        [0, 1],
        "zeros are everywhere"
    );

    // A manifest whose chunk is not there, then one whose chunk has another length.
    let segment = WireRecord::encode(&good.id);
    for (size, status) in [(65536, 409), (65535, 409), (65535, 400), (65536, 200)] {
        let manifest = manifest_of("disk.img", size, &segment);
        let mut records = vec![segment.clone(), manifest.clone()];
        if status != 409 {
            records.push(good.clone());
        }
        assert_eq!(put(&member, &records).await, 200);
        let answer = publish(&member, "t", "v1", &manifest.id).await;
        assert_eq!(answer.0, status, "{}", answer.1);
    }
}

#[tokio::test]
async fn path_tricks_in_names_are_refused() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let good = WireRecord::encode(&noise(1, 100));
    let segment = WireRecord::encode(&good.id);
    for name in [
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "..",
        ".hidden",
        "a\0b",
        "",
    ] {
        let manifest = manifest_of(name, 100, &segment);
        assert_eq!(
            put(&member, &[good.clone(), segment.clone(), manifest.clone()]).await,
            200
        );
        let answer = publish(&member, "t", "v1", &manifest.id).await;
        assert_eq!(answer.0, 400, "{name:?}: {}", answer.1);
    }
    let manifest = manifest_of("disk.img", 100, &segment);
    assert_eq!(put(&member, std::slice::from_ref(&manifest)).await, 200);
    for name in [
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        " x",
        "a\nb",
        &"x".repeat(129),
    ] {
        for (template, tag) in [(name, "v1"), ("t", name)] {
            let answer = publish(&member, template, tag, &manifest.id).await;
            assert_eq!(answer.0, 400, "{name:?}: {}", answer.1);
        }
    }
    assert!(cluster.shared.state.lock().templates.is_empty());
    assert_eq!(
        publish(&member, "ci base", "v1+b:2", &manifest.id).await.0,
        200
    );
}

fn manifest_of(name: &str, size: u64, segment: &WireRecord) -> WireRecord {
    let manifest = Manifest {
        version: 1,
        files: vec![FileEntry {
            name: name.to_owned(),
            format: "raw".to_owned(),
            size,
            segments: vec![hex::encode(segment.id)],
        }],
    };
    WireRecord::encode(&serde_json::to_vec(&manifest).unwrap())
}

async fn put(member: &TestMember, records: &[WireRecord]) -> u16 {
    let url = format!("{}{CHUNKS}", member.url);
    let request = client().put(url).body(WireRecord::frame_all(records));
    request.send().await.unwrap().status().as_u16()
}

async fn publish(member: &TestMember, template: &str, tag: &str, manifest: &[u8]) -> (u16, String) {
    let body = serde_json::json!({
        "template": template, "tag": tag, "manifest": hex::encode(manifest), "durability": "one",
    });
    let url = format!("{}{PUBLISH}", member.url);
    let answer = client()
        .post(url)
        .body(body.to_string())
        .send()
        .await
        .unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// The only member with a copy is wiped before anyone has another one: the client, which still has the bytes, brings
/// them to the next member instead of waiting for copies of nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_whose_only_copy_is_lost_is_pushed_again() {
    let cluster = Cluster::new(3);
    let (one, two) = (cluster.serve(1, false).await, cluster.serve(2, false).await);
    let image = cluster.file("image");
    std::fs::write(&image, noise(7, 2 << 20)).unwrap();
    let urls = [one.url.clone(), two.url.clone()];
    let pushing = tokio::spawn(async move {
        let urls = urls.each_ref().map(String::as_str);
        push(&urls, &image, &spec("t", "v1", Durability::Majority)).await
    });
    eventually("one has it", || cluster.holders("t") == 1).await;
    let lost = {
        let state = cluster.shared.state.lock();
        let template = state.templates.values().next().unwrap();
        let tag = template.tags.values().next().unwrap();
        Command::ReportHeld {
            template: template.id.clone(),
            number: tag.number,
            manifest: tag.content.manifest,
            member: MemberId(1),
            held: false,
            voters: BTreeSet::new(),
        }
    };
    let catalog = Fake(Arc::clone(&cluster.shared));
    let reported = catalog.submit(crate::stamp::command_id(), lost).await;
    reported.unwrap();
    let holders = || {
        let state = cluster.shared.state.lock();
        let template = state.templates.values().next().unwrap();
        template.tags.values().next().unwrap().holders.clone()
    };
    eventually("two has it", || holders() == [MemberId(2)].into()).await;
    let _three = cluster.serve(3, true).await;
    let pushed = pushing.await.unwrap().unwrap();
    assert!(
        pushed.tag.is_held() && pushed.tag.visible,
        "{:?}",
        pushed.tag
    );
    assert!(holders().is_superset(&[MemberId(2), MemberId(3)].into()));
}
