//! Members compare their states: the one that holds another one knows it, and says so.

use crate::support::{BOUND, Cluster};
use mainstay_raft::{Agreement, GroupError};
use std::time::Duration;

async fn agreement(cluster: &Cluster, id: u64, cond: impl FnMut(&Agreement) -> bool) -> Agreement {
    let mut watch = cluster.nodes[&id].group().agreement();
    let waited = tokio::time::timeout(BOUND, watch.wait_for(cond)).await;
    let seen = waited.ok().and_then(Result::ok).map(|seen| seen.clone());
    seen.unwrap_or_else(|| panic!("member {id}: {:?}", watch.borrow()))
}

/// Members that were loaded from disk, from a snapshot and by applying are compared and agree.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_agree_say_up_to_where() {
    let mut cluster = Cluster::founded(3, |config| {
        config.snapshot_log_bytes = 16 << 10;
        config.keep_entries = 10;
    })
    .await;
    for n in 0..1200 {
        cluster.put(1, &format!("key{}", n % 50), n).await;
    }
    cluster.halt(2).await;
    cluster.start(2).await;
    cluster.add(4, false).await;
    cluster.nodes[&1]
        .group()
        .add_learner(4, crate::support::member(4))
        .await
        .unwrap();
    cluster.put(1, "a", 1).await;
    cluster.converge().await;
    let applied = cluster.nodes[&1].group().digest().0;
    for id in 1..=4 {
        let seen = agreement(&cluster, id, |seen| seen.agreed >= Some(applied)).await;
        assert!(seen.differing.is_empty(), "{id}: {seen:?}");
        assert!(!seen.diverged);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_differs_answers_no_reads_and_is_named() {
    let mut cluster = Cluster::founded(3, |_| {}).await;
    cluster.put(1, "a", 1).await;
    let leader = cluster.leader().await;
    let odd = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    cluster.nodes[&odd].machine.spoil();
    cluster.put(leader, "a", 1).await;
    agreement(&cluster, odd, |seen| seen.diverged).await;
    let read = cluster.nodes[&odd].group().read_barrier(BOUND).await;
    assert!(
        matches!(&read, Err(GroupError::Diverged(why)) if why.contains("member repair")),
        "{read:?}"
    );
    for id in cluster.ids().into_iter().filter(|id| *id != odd) {
        let seen = agreement(&cluster, id, |seen| !seen.differing.is_empty()).await;
        assert!(!seen.diverged, "{id}: {seen:?}");
        assert_eq!(seen.differing.keys().collect::<Vec<_>>(), [&odd]);
    }
    // It goes on voting and logging; writes through it get the leader's answers.
    assert_eq!(cluster.put(odd, "a", 1).await, 3);
    assert_eq!(cluster.get(leader, "a").await, 3);
    // Its disk holds what it applied: a restart does not help, and it says so again.
    let group = cluster.nodes[&odd].group().clone();
    group.shutdown().await;
    drop(group);
    cluster.halt(odd).await;
    cluster.start(odd).await;
    agreement(&cluster, odd, |seen| seen.diverged).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_differs_hands_over_and_does_not_come_back() {
    let cluster = Cluster::founded(3, |_| {}).await;
    cluster.put(1, "a", 1).await;
    let odd = cluster.leader().await;
    cluster.nodes[&odd].machine.spoil();
    cluster.put(odd, "a", 1).await;
    agreement(&cluster, odd, |seen| seen.diverged).await;
    let right: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != odd).collect();
    for id in &right {
        let moved = |s: &mainstay_raft::Status| s.leader.is_some_and(|leader| leader != odd);
        cluster.wait(*id, "another leader", moved).await;
    }
    // What a client is told from now on is the majority's.
    assert_eq!(cluster.put(odd, "a", 1).await, 3);
    let group = cluster.nodes[&right[0]].group();
    let back = group.transfer_leader(Some(odd)).await;
    assert!(back.is_err(), "it took the lead again");
    assert_ne!(cluster.leader().await, odd);
}

/// Whatever was applied when, positions where states can be compared are shared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_compared_while_writes_go_on() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let follower = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    let mut watch = cluster.nodes[&follower].group().agreement();
    let agreed = async {
        let first = watch
            .wait_for(|seen| seen.agreed.is_some())
            .await
            .unwrap()
            .agreed;
        watch
            .wait_for(|seen| seen.agreed > first.map(|at| at + 1000))
            .await
            .unwrap();
    };
    let writes = async {
        loop {
            let batch = (0..64).map(|n| cluster.put(leader, if n % 2 == 0 { "a" } else { "b" }, 1));
            futures::future::join_all(batch).await;
        }
    };
    tokio::select! {
        () = agreed => {}
        () = writes => {}
        () = tokio::time::sleep(BOUND + Duration::from_secs(10)) => panic!("never compared"),
    }
}
