//! Collection and verification of a served registry, with a clock that the test moves.

use super::*;
use mainstay_agent::transfer::api::{
    Answer, Collection, GC, MISSING, PUBLISH, REPLICAS, Replica, SCRUB,
};
use mainstay_agent::transfer::{MACHINE_FILE, MEMORY_FILE, WireRecord};
use mainstay_model::command::TagSelector;
use serde::de::DeserializeOwned;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Nothing by itself: the tests say when.
fn by_hand() -> Upkeep {
    let usual = Upkeep::default();
    Upkeep {
        collect: CollectConfig {
            every: None,
            ..usual.collect
        },
        scrub: ScrubConfig {
            rate: 0,
            ..usual.scrub
        },
        send_ahead: false,
        ..usual
    }
}

pub(super) fn cluster_by_hand(size: u64) -> Cluster {
    Cluster {
        upkeep: by_hand(),
        ..Cluster::new(size)
    }
}

pub(super) async fn ask<T: DeserializeOwned>(post: bool, url: String) -> T {
    let client = client();
    let request = if post {
        client.post(url)
    } else {
        client.get(url)
    };
    let answer: Answer<T> = request.send().await.unwrap().json().await.unwrap();
    answer.body.unwrap()
}

async fn gc_with(member: &TestMember, query: &str) -> Collection {
    let asked: CollectionStatus = ask(true, format!("{}{GC}{query}", member.url)).await;
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let now: CollectionStatus = ask(false, format!("{}{GC}", member.url)).await;
        if now.done >= asked.asked {
            return now.last.unwrap();
        }
        assert!(Instant::now() < until, "{now:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(super) async fn gc(member: &TestMember) -> Collection {
    gc_with(member, "").await
}

async fn scrub(member: &TestMember) -> ScrubStatus {
    let asked: ScrubStatus = ask(true, format!("{}{SCRUB}", member.url)).await;
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let now: ScrubStatus = ask(false, format!("{}{SCRUB}", member.url)).await;
        if now.done >= asked.asked {
            return now;
        }
        assert!(Instant::now() < until, "{now:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn replica(member: &TestMember, template: &str) -> Replica {
    let url = format!("{}{REPLICAS}?template={template}&local=1", member.url);
    let mut rows: Vec<Replica> = ask(false, url).await;
    rows.remove(0)
}

async fn delete_tag(cluster: &Cluster, template: &str, tag: &str) {
    // A step of the stores' clocks: what was used in the same one counts as used now.
    cluster.pass(Duration::from_secs(1));
    let id = {
        let state = cluster.shared.state.lock();
        let found = state.templates.values().find(|t| t.name == template);
        found.unwrap().id.clone()
    };
    let selector = TagSelector::Name(tag.to_owned());
    Fake(Arc::clone(&cluster.shared))
        .submit(
            crate::stamp::command_id(),
            Command::DeleteTag { id, selector },
        )
        .await
        .unwrap();
}

/// Status of a publish of what is there.
async fn publish(member: &TestMember, manifest: &str) -> u16 {
    let body = serde_json::json!({
        "template": "again", "tag": "v1", "manifest": manifest, "durability": "one",
    });
    let request = client().post(format!("{}{PUBLISH}", member.url));
    let answer = request.body(body.to_string()).send().await.unwrap();
    answer.status().as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_tag_gives_its_room_back_after_the_grace_and_no_other_loses_a_chunk() {
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    let (one, two, copy) = (cluster.file("1"), cluster.file("2"), cluster.file("copy"));
    let (mine, shared, other) = (noise(1, 6 << 20), noise(2, 2 << 20), noise(3, 2 << 20));
    std::fs::write(&one, [&mine[..], &shared].concat()).unwrap();
    std::fs::write(&two, [&shared[..], &other].concat()).unwrap();
    let first = push(&[&member.url], &one, &spec("t", "v1", Durability::All))
        .await
        .unwrap();
    let second = push(&[&member.url], &two, &spec("t", "v2", Durability::All))
        .await
        .unwrap();
    cluster.pass(DAY * 3);
    let all_live = gc(&member).await;
    assert_eq!((all_live.waiting_chunks, all_live.dead_chunks), (0, 0));
    let full = member.service.chunks().stats();

    delete_tag(&cluster, "t", "v1").await;
    let begun = gc(&member).await;
    assert_eq!((begun.dead_chunks, begun.removed_chunks), (0, 0));
    // 96 chunks of its own, its segment, its manifest.
    assert_eq!(begun.waiting_chunks, 98);
    cluster.pass(DAY / 2);
    pull(&[&member.url], &first.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&one, &copy);
    // The pull has used them: their grace begins again.
    cluster.pass(DAY - Duration::from_secs(60));
    assert_eq!(gc(&member).await.removed_chunks, 0);
    cluster.pass(DAY + Duration::from_secs(60));
    let dry = gc_with(&member, "?dry_run=1").await;
    assert_eq!((dry.dead_chunks, dry.removed_chunks), (98, 0));
    assert!(dry.reclaimable_bytes > 4 << 20, "{dry:?}");
    let done = gc(&member).await;
    assert_eq!(
        (done.removed_chunks, done.live_chunks),
        (98, full.chunks - 98)
    );
    let stats = member.service.chunks().stats();
    assert!(done.freed_bytes > 4 << 20 && stats.pack_bytes == full.pack_bytes - done.freed_bytes);
    std::fs::remove_file(&copy).unwrap();
    pull(&[&member.url], &second.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&two, &copy);
}

/// The race that matters: told "I have it", a client publishes what a collection has removed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_told_to_be_there_is_there_for_the_grace_and_a_publish_after_it_is_refused() {
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(5, 4 << 20)).unwrap();
    let spec = spec("t", "v1", Durability::All);
    let published = push(&[&member.url], &image, &spec).await.unwrap();
    let manifest = published.tag.manifest;
    delete_tag(&cluster, "t", "v1").await;
    gc(&member).await;
    cluster.pass(DAY);
    // Dead, and ready to go; asked about just before.
    let bytes = std::fs::read(&image).unwrap();
    let mut names: Vec<u8> = Vec::new();
    for chunk in bytes.chunks(65536) {
        names.extend(WireRecord::encode(chunk).id);
    }
    let request = client()
        .post(format!("{}{MISSING}", member.url))
        .body(names);
    let flags = request.send().await.unwrap().bytes().await.unwrap();
    assert!(flags.iter().all(|f| *f == 0), "all are there");
    let swept = gc(&member).await;
    // The segment and the manifest were not asked about.
    assert!(swept.removed_chunks <= 2, "{swept:?}");
    cluster.pass(DAY - Duration::from_secs(1));
    gc(&member).await;
    let again = push(&[&member.url], &image, &spec).await.unwrap();
    assert!(again.sent_chunks <= 2, "{again:?}");

    delete_tag(&cluster, "t", "v1").await;
    gc(&member).await;
    cluster.pass(DAY + Duration::from_secs(1));
    assert!(gc(&member).await.removed_chunks >= 64);
    assert_eq!(publish(&member, &manifest).await, 409);
    assert!(cluster.shared.state.lock().templates.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_not_up_to_date_or_does_not_know_all_names_collects_nothing() {
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    let (image, other) = (cluster.file("image"), cluster.file("other"));
    std::fs::write(&image, noise(6, 2 << 20)).unwrap();
    std::fs::write(&other, noise(7, 2 << 20)).unwrap();
    push(&[&member.url], &image, &spec("t", "v1", Durability::All))
        .await
        .unwrap();
    let kept = push(&[&member.url], &other, &spec("kept", "v1", Durability::All))
        .await
        .unwrap();
    delete_tag(&cluster, "t", "v1").await;
    gc(&member).await;
    cluster.pass(DAY * 2);
    cluster.shared.cut_off.store(true, Ordering::Relaxed);
    let refused = gc(&member).await;
    assert!(refused.refused.contains("up to date"), "{refused:?}");
    assert_eq!(refused.removed_chunks, 0);
    cluster.shared.cut_off.store(false, Ordering::Relaxed);

    // Its manifest is spoilt, and nobody else has it: what it names is not known any more.
    let manifest = mainstay_agent::transfer::hex_id(&kept.tag.manifest).unwrap();
    spoil(&cluster, 1, &[manifest]);
    scrub(&member).await;
    let refused = gc(&member).await;
    assert!(refused.refused.contains("kept v1"), "{refused:?}");
    eventually("told to be damaged", || {
        member.service.broken.lock().len() == 1
    })
    .await;
    let row = replica(&member, "kept").await;
    assert_eq!(row.state, "damaged", "{row:?}");
    assert!(row.message.contains("damaged on its disk"), "{row:?}");
    delete_tag(&cluster, "kept", "v1").await;
    let done = gc(&member).await;
    assert!(
        done.refused.is_empty() && done.removed_chunks >= 34,
        "{done:?}"
    );
}

/// Flip a bit in the data of these chunks, on the disk of a member.
pub(super) fn spoil(cluster: &Cluster, member: u64, ids: &[[u8; 32]]) {
    for entry in std::fs::read_dir(cluster.chunk_dir(member)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "mspk") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for id in ids {
            // A header: magic, 12 bytes, the name; the data are 56 bytes behind its start.
            let header = bytes
                .windows(48)
                .position(|w| &w[..4] == b"MSCK" && w[16..] == *id);
            if let Some(at) = header {
                file.write_all_at(&[bytes[at + 60] ^ 4], at as u64 + 60)
                    .unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spoilt_chunks_are_found_told_and_fetched_again() {
    let cluster = cluster_by_hand(2);
    let members = cluster.serve_all().await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    let bytes = noise(8, 4 << 20);
    std::fs::write(&image, &bytes).unwrap();
    let published = push(
        &[&members[0].url],
        &image,
        &spec("t", "v1", Durability::All),
    )
    .await
    .unwrap();
    let ids: Vec<[u8; 32]> = bytes
        .chunks(65536)
        .step_by(3)
        .map(|c| WireRecord::encode(c).id)
        .collect();
    // No room: what was found cannot be healed at once.
    cluster.shared.full.lock().insert(1);
    spoil(&cluster, 1, &ids);
    let found = scrub(&members[0]).await;
    assert_eq!(found.round_damaged, ids.len() as u64, "{found:?}");
    assert!(found.round_chunks >= 66);
    eventually("taken back", || cluster.holders("t") == 1).await;
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let row = replica(&members[0], "t").await;
        assert_eq!(row.state, "damaged", "{row:?}");
        assert!(row.message.contains("damaged on its disk"), "{row:?}");
        // Nobody can heal it, and that is told.
        if row.message.contains("no room") {
            break;
        }
        assert!(Instant::now() < until, "{row:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(members[0].service.figures().broken_tags, 1);
    cluster.shared.full.lock().clear();
    eventually("whole again", || cluster.holders("t") == 2).await;
    eventually("nothing is broken", || {
        members[0].service.figures().broken_tags == 0
    })
    .await;
    assert_eq!(members[0].service.chunks().stats().damaged, 0);
    assert_eq!(replica(&members[0], "t").await.state, "complete");
    assert_eq!(scrub(&members[0]).await.round_damaged, 0);
    pull(&[&members[0].url], &published.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&image, &copy);
}

/// Disk, memory and machine of one tag: what two tags share is stored once, found when it is spoilt, and kept
/// when one of them goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_memory_is_stored_mended_and_kept_like_a_disk() {
    let cluster = cluster_by_hand(2);
    let members = cluster.serve_all().await;
    know_suspended(&cluster);
    let (disk, mut memory) = (noise(11, 2 << 20), noise(12, 4 << 20));
    std::fs::write(cluster.file("disk"), &disk).unwrap();
    let mut tags = Vec::new();
    for tag in ["v1", "v2"] {
        // One page is not what it was.
        memory[1 << 20..][..4096].copy_from_slice(&noise(13 + tags.len() as u64, 4096));
        let names = [MEMORY_FILE, MACHINE_FILE];
        let beside = names.map(|name| (name.to_owned(), cluster.file(&format!("{tag}-{name}"))));
        std::fs::write(&beside[0].1, &memory).unwrap();
        std::fs::write(&beside[1].1, format!("{{\"of\":{tag:?}}}")).unwrap();
        let spec = PushSpec {
            beside: beside.to_vec(),
            ..spec("t", tag, Durability::All)
        };
        let pushed = push(&[&members[0].url], &cluster.file("disk"), &spec).await;
        tags.push(pushed.unwrap());
    }
    // A chunk of the memory and its machine, the segments of both, and the manifest.
    assert_eq!(tags[1].sent_chunks, 5, "{tags:?}");

    let ids: Vec<[u8; 32]> = memory
        .chunks(65536)
        .step_by(3)
        .map(|c| WireRecord::encode(c).id)
        .collect();
    spoil(&cluster, 1, &ids);
    let found = scrub(&members[0]).await;
    assert_eq!(found.round_damaged, ids.len() as u64, "{found:?}");
    eventually("whole again", || {
        cluster.holders("t") == 2 && members[0].service.chunks().stats().damaged == 0
    })
    .await;

    delete_tag(&cluster, "t", "v1").await;
    gc(&members[0]).await;
    cluster.pass(DAY * 3);
    // Too little of a pack for it to be rewritten.
    let done = gc(&members[0]).await;
    assert!(done.refused.is_empty(), "{done:?}");
    assert_eq!((done.dead_chunks, done.removed_chunks), (5, 0), "{done:?}");
    let copy = cluster.file("copy");
    let (urls, manifest) = ([members[0].url.clone()], &tags[1].tag.manifest);
    for (at, bytes) in [&disk, &memory].into_iter().enumerate() {
        let pulled = pull_file(&client(), &urls, manifest, at, &copy, &|_, _| ()).await;
        assert_eq!(pulled.unwrap().files.len(), 3);
        assert!(std::fs::read(&copy).unwrap() == *bytes, "file {at}");
    }
}

/// What clients name by SHA-256: kept while a manifest or an upload names it, and gone with the last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_and_an_unnamed_blob_are_kept_and_go_with_their_names() {
    use super::oci::{digest, get, post_blob, put_image};
    let cluster = Cluster {
        upkeep: by_hand(),
        ..Cluster::of_artifacts(1).await
    };
    let member = cluster.serve(1, true).await;
    let (layer, loose) = (noise(9, 2 << 20), noise(10, 2 << 20));
    for bytes in [&layer, &loose] {
        assert_eq!(post_blob(&member, "a", bytes, &digest(bytes)).await, 201);
    }
    assert_eq!(put_image(&member, "a", &layer).await.0, 201);
    // An upload that pauses for days: its chunks have no name yet.
    let body = reqwest::Body::from(noise(11, 8 << 20));
    let url = format!("{}/v2/a/blobs/uploads/", member.url);
    let begun = client().post(url).send().await.unwrap();
    let place = begun.headers()["location"].to_str().unwrap().to_owned();
    let url = if place.starts_with('/') {
        format!("{}{place}", member.url)
    } else {
        place
    };
    let patched = client().patch(&url).body(body).send().await.unwrap();
    assert_eq!(patched.status(), 202);
    for _ in 0..2 {
        cluster.pass(DAY + Duration::from_secs(1));
        assert_eq!(gc(&member).await.removed_chunks, 0);
    }
    let whole = noise(11, 8 << 20);
    let join = if url.contains('?') { '&' } else { '?' };
    let closing = format!("{url}{join}digest={}", digest(&whole));
    assert_eq!(client().put(closing).send().await.unwrap().status(), 201);
    for bytes in [&layer, &loose, &whole] {
        let path = format!("/v2/a/blobs/{}", digest(bytes));
        assert!(get(&member, &path).await == (200, bytes.clone()));
    }

    // The names of the uploads are forgotten: what the artifact names stays.
    member.service.names.expire(u64::MAX).unwrap();
    cluster.pass(Duration::from_secs(1));
    gc(&member).await;
    cluster.pass(DAY + Duration::from_secs(1));
    assert!(gc(&member).await.removed_chunks >= 128 + 32);
    let path = format!("/v2/a/blobs/{}", digest(&layer));
    assert!(get(&member, &path).await == (200, layer.clone()));
    let delete = {
        let state = cluster.shared.state.lock();
        let digest = state.repositories["a"].artifacts.keys().next().copied();
        Command::DeleteArtifact {
            repository: "a".to_owned(),
            digest: digest.unwrap(),
        }
    };
    Fake(Arc::clone(&cluster.shared))
        .submit(crate::stamp::command_id(), delete)
        .await
        .unwrap();
    cluster.pass(Duration::from_secs(1));
    gc(&member).await;
    cluster.pass(DAY + Duration::from_secs(1));
    let last = gc(&member).await;
    assert!(
        last.removed_chunks >= 32 && last.live_chunks == 0,
        "{last:?}"
    );
}
