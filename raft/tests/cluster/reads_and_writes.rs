//! Proposals and read barriers from every member, duplicates, many proposers.

use crate::support::{BOUND, Cluster, command, eventually, number, padded};
use mainstay_raft::GroupError;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_from_every_member_are_read_on_every_other() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let mut sum = 0;
    for round in 0..5 {
        for writer in cluster.ids() {
            sum += round + writer;
            assert_eq!(cluster.put(writer, "a", round + writer).await, sum);
            for reader in cluster.ids() {
                assert_eq!(cluster.get(reader, "a").await, sum, "read on {reader}");
            }
        }
    }
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_member_alone_is_a_group() {
    let cluster = Cluster::founded(1, |_| {}).await;
    assert_eq!(cluster.put(1, "a", 7).await, 7);
    assert_eq!(cluster.get(1, "a").await, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn founding_again_changes_nothing() {
    let cluster = Cluster::founded(3, |_| {}).await;
    cluster.put(1, "a", 1).await;
    cluster.found().await;
    assert_eq!(cluster.get(2, "a").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_through_two_members_takes_effect_once() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let same = command(77, "a", 5);
    let (first, second) = tokio::join!(
        cluster.nodes[&1].group().propose(same.clone(), BOUND),
        cluster.nodes[&2].group().propose(same.clone(), BOUND),
    );
    assert_eq!((number(&first.unwrap()), number(&second.unwrap())), (5, 5));
    cluster.converge().await;
    assert_eq!(cluster.nodes[&3].machine.get("a"), 5);
    assert_eq!(
        cluster.nodes[&3].machine.applied_commands(),
        2,
        "it was in the log twice"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_a_proposal_has_no_effect_and_says_so() {
    let cluster = Cluster::new(3, |_| {}).await;
    let soon = Duration::from_millis(100);
    let error = cluster.nodes[&1]
        .group()
        .propose(command(1, "a", 1), soon)
        .await
        .unwrap_err();
    assert!(matches!(error, GroupError::NoLeader), "{error}");
    let error = cluster.nodes[&1]
        .group()
        .read_barrier(soon)
        .await
        .unwrap_err();
    assert!(matches!(error, GroupError::NoLeader), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_beyond_the_limit_is_refused_and_a_large_one_passes() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let follower = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    for via in [leader, follower] {
        let group = cluster.nodes[&via].group();
        let error = group
            .propose(padded(1, "a", 1, 9 << 20), BOUND)
            .await
            .unwrap_err();
        assert!(matches!(error, GroupError::Refused(_)), "{error}");
        let large = padded(cluster.command_id() + 1, "a", 1, 7 << 20);
        group.propose(large, BOUND).await.unwrap();
    }
    cluster.converge().await;
    assert_eq!(cluster.nodes[&follower].machine.get("a"), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_proposers_on_all_members() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let each = 100;
    let started = Instant::now();
    let proposers = (0..64u64).map(|i| {
        let cluster = &cluster;
        async move {
            for _ in 0..each {
                cluster.put(1 + i % 3, "a", 1).await;
            }
        }
    });
    futures::future::join_all(proposers).await;
    let took = started.elapsed();
    println!("{} writes by 64 proposers in {took:?}", 64 * each);
    cluster.converge().await;
    assert_eq!(cluster.get(2, "a").await, 64 * each);
}

/// The answers to what a leader sent before its members elected another one arrive while a read waits whose
/// own questions do not: they say nothing about it. It holds with and without the order that
/// `raft/src/transport/pipeline.rs` keeps: that has its own tests, and no test of a whole group fails without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_from_before_an_election_confirm_no_read() {
    let cluster = Cluster::founded(3, |_| {}).await;
    cluster.put(1, "a", 1).await;
    cluster.converge().await;
    let old = cluster.leader().await;
    let others: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != old).collect();
    // It is heard by one of them, and hears nobody.
    cluster.net.cut(others[0], old, true);
    cluster.net.isolate(old, &others[1..], true);
    let before = cluster.nodes[&others[0]].group().status().last_log;
    let group = cluster.nodes[&old].group().clone();
    let write = command(cluster.command_id(), "a", 1);
    let writing = tokio::spawn({
        let group = group.clone();
        async move { group.propose(write, BOUND).await }
    });
    eventually("the write has arrived", || {
        cluster.nodes[&others[0]].group().status().last_log > before
    })
    .await;
    // From here on what it sends waits as well, among it what the read asks.
    cluster.net.cut(old, others[0], true);
    let reading = tokio::spawn(async move { group.read_barrier(BOUND).await });
    let new = cluster.leader_among(&others).await;
    cluster.put(new, "a", 10).await;
    cluster.net.cut(others[0], old, false);
    let early = tokio::time::timeout(Duration::from_millis(800), reading).await;
    assert!(!matches!(early, Ok(Ok(Ok(_)))), "answered: {early:?}");
    for other in others {
        cluster.net.isolate(old, &[other], false);
    }
    writing.await.unwrap().unwrap();
    assert_eq!(cluster.get(old, "a").await, 12);
    cluster.converge().await;
}
