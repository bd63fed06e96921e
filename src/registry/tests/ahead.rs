//! What a client sends to one member reaches others before anything is committed; nothing depends on it.

use super::collect::{cluster_by_hand, gc};
use super::oci::{digest, post_blob};
use super::*;
use mainstay_agent::transfer::WireRecord;

fn sends_ahead(cluster: Cluster) -> Cluster {
    let upkeep = Upkeep {
        send_ahead: true,
        ..cluster.upkeep
    };
    Cluster { upkeep, ..cluster }
}

fn held(member: &TestMember) -> u64 {
    member.service.chunks().stats().chunks
}

fn sent(member: &TestMember) -> AheadFigures {
    member.service.figures().ahead
}

/// Nobody copies here: what the others hold was sent ahead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_is_on_other_disks_before_it_is_copied() {
    let cluster = sends_ahead(Cluster::new(3));
    let (one, two) = (cluster.serve(1, false).await, cluster.serve(2, false).await);
    let mut three = cluster.serve(3, false).await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(1, 24 << 20)).unwrap();
    let pushed = push(&[&two.url], &image, &spec("t", "v1", Durability::One)).await;
    let pushed = pushed.unwrap();
    let all = held(&two);
    assert!(all > 300, "{all}");
    eventually("the others have it", || {
        held(&one) == all && held(&three) == all
    })
    .await;
    eventually("it was counted", || sent(&two).chunks == 2 * all).await;
    assert!(
        sent(&two).bytes >= 2 * pushed.sent_bytes,
        "{:?}",
        sent(&two)
    );
    assert_eq!(
        cluster.holders("t"),
        1,
        "a copy counts when it was looked at"
    );
    // Who was sent something does not send it on.
    assert_eq!((sent(&one).chunks, sent(&three).chunks), (0, 0));

    // Looked at, it is a copy: nothing is fetched for it.
    three.stop();
    let copier = cluster.serve(3, true).await;
    eventually("it is a copy", || cluster.holders("t") == 2).await;
    assert_eq!(copier.service.figures().replication.fetched_chunks, 0);

    // What is there already is not sent again, to nobody.
    let again = push(&[&one.url], &image, &spec("u", "v1", Durability::One)).await;
    again.unwrap();
    assert_eq!(sent(&one).chunks, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_is_sent_ahead_too() {
    let cluster = sends_ahead(Cluster::of_artifacts(2).await);
    let (one, two) = (cluster.serve(1, false).await, cluster.serve(2, false).await);
    let blob = noise(5, 20 << 20);
    let status = post_blob(&one, "a/b", &blob, &digest(&blob)).await;
    assert_eq!(status, 201);
    let all = held(&one);
    assert!(all > 300, "{all}");
    // But for the record that names its chunks, which is of the one upload.
    eventually("the other has it", || held(&two) == all - 1).await;
}

/// Five members: the next two get it, the others copy it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_five_members_two_are_sent_it() {
    let cluster = sends_ahead(Cluster::new(5));
    let mut members = Vec::new();
    for id in 1..=5 {
        members.push(cluster.serve(id, false).await);
    }
    let image = cluster.file("image");
    std::fs::write(&image, noise(2, 3 << 20)).unwrap();
    let pushed = push(
        &[&members[3].url],
        &image,
        &spec("t", "v1", Durability::One),
    )
    .await;
    pushed.unwrap();
    let all = held(&members[3]);
    eventually("5 and 1 have it", || {
        held(&members[4]) == all && held(&members[0]) == all
    })
    .await;
    eventually("it was counted", || sent(&members[3]).chunks == 2 * all).await;
    assert_eq!((held(&members[1]), held(&members[2])), (0, 0));
}

/// One is full and one is gone: the push does not notice, and they copy it when they can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_depends_on_who_cannot_take_it() {
    let cluster = sends_ahead(Cluster::new(3));
    let (one, two) = (cluster.serve(1, true).await, cluster.serve(2, true).await);
    let mut three = cluster.serve(3, true).await;
    three.stop();
    cluster.shared.full.lock().insert(2);
    let image = cluster.file("image");
    std::fs::write(&image, noise(3, 12 << 20)).unwrap();
    let pushed = push(&[&one.url], &image, &spec("t", "v1", Durability::One)).await;
    pushed.unwrap();
    assert_eq!((held(&two), sent(&one).chunks), (0, 0));
    cluster.shared.full.lock().clear();
    let _three = cluster.serve(3, true).await;
    eventually("all have it", || cluster.holders("t") == 3).await;
    assert_eq!(held(&two), held(&one));
}

/// What a client began and left is collected where it was sent as it is where it was pushed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_ahead_for_nothing_is_collected() {
    let cluster = sends_ahead(cluster_by_hand(2));
    let (one, two) = (cluster.serve(1, true).await, cluster.serve(2, true).await);
    let records: Vec<_> = (0..200)
        .map(|n| WireRecord::encode(&noise(n, 60_000)))
        .collect();
    let body = WireRecord::frame_all(&records);
    let url = format!("{}{}", one.url, api::CHUNKS);
    let put = client().put(url).body(body).send().await.unwrap();
    assert!(put.status().is_success());
    eventually("both have it", || held(&one) == 200 && held(&two) == 200).await;
    // A step of the stores' clocks: what was used in the same one counts as used now.
    cluster.pass(Duration::from_secs(1));
    for member in [&one, &two] {
        let begun = gc(member).await;
        assert_eq!((begun.waiting_chunks, begun.dead_chunks), (200, 0));
    }
    cluster.pass(Duration::from_secs(25 * 3600));
    for member in [&one, &two] {
        assert_eq!(gc(member).await.removed_chunks, 200);
        assert_eq!(held(member), 0);
    }
}

/// Copies that are to keep off the line are not sent ahead either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_rate_nothing_is_sent_ahead() {
    let mut cluster = sends_ahead(Cluster::new(2));
    cluster.upkeep.replicate_rate = 64 << 20;
    let (one, two) = (cluster.serve(1, false).await, cluster.serve(2, false).await);
    let image = cluster.file("image");
    std::fs::write(&image, noise(4, 1 << 20)).unwrap();
    let pushed = push(&[&one.url], &image, &spec("t", "v1", Durability::One)).await;
    pushed.unwrap();
    assert_eq!((held(&two), sent(&one)), (0, AheadFigures::default()));
}
