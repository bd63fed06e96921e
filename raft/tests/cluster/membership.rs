//! Learners, voters, removal, leader transfer, and peers that do not belong.

use crate::support::{BOUND, Cluster, command, eventually, member};
use mainstay_raft::{GroupError, Role};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_is_added_promoted_and_removed_through_followers() {
    let mut cluster = Cluster::founded(3, |_| {}).await;
    cluster.put(1, "a", 1).await;
    cluster.add(4, false).await;
    let leader = cluster.leader_among(&[1, 2, 3]).await;
    let follower = if leader == 1 { 2 } else { 1 };
    let via = cluster.nodes[&follower].group().clone();
    via.add_learner(4, member(4)).await.unwrap();
    via.add_learner(4, member(4)).await.unwrap();
    cluster
        .wait(4, "learn of itself", |s| {
            s.members.get(&4).is_some_and(|m| m.role == Role::Learner)
        })
        .await;
    assert_eq!(cluster.get(4, "a").await, 1, "a learner serves reads");
    cluster.put(4, "a", 1).await;
    via.promote(4).await.unwrap();
    via.promote(4).await.unwrap();
    cluster
        .wait(4, "vote", |s| {
            s.members.get(&4).is_some_and(|m| m.role == Role::Voter)
        })
        .await;
    via.remove(4).await.unwrap();
    via.remove(4).await.unwrap();
    cluster
        .wait(follower, "forget it", |s| !s.members.contains_key(&4))
        .await;
    assert_eq!(cluster.put(follower, "a", 1).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_can_be_removed() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let rest: Vec<u64> = cluster
        .ids()
        .into_iter()
        .filter(|id| *id != leader)
        .collect();
    cluster.nodes[&rest[0]]
        .group()
        .remove(leader)
        .await
        .unwrap();
    let new = cluster.leader_among(&rest).await;
    assert_ne!(new, leader);
    cluster.put(rest[1], "a", 1).await;
    let status = cluster.nodes[&rest[0]].group().status();
    assert!(!status.members.contains_key(&leader), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removal_is_refused_when_it_would_lose_the_majority() {
    let mut cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let rest: Vec<u64> = cluster
        .ids()
        .into_iter()
        .filter(|id| *id != leader)
        .collect();
    cluster.halt(rest[0]).await;
    // Until the leader's last news of it is older than a lease, it still counts as there.
    let group = cluster.nodes[&leader].group();
    eventually("notice the loss", || !group.answering().contains(&rest[0])).await;
    let error = cluster.nodes[&leader]
        .group()
        .remove(rest[1])
        .await
        .unwrap_err();
    assert!(
        matches!(&error, GroupError::Refused(why) if why.contains("majority")),
        "{error}"
    );
    // Removing the dead one is the right move, and works.
    cluster.nodes[&rest[1]]
        .group()
        .remove(rest[0])
        .await
        .unwrap();
    cluster.put(leader, "a", 1).await;
    let alone = cluster.nodes[&leader].group();
    assert_eq!(alone.status().members.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_is_not_promoted() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let error = cluster.nodes[&2].group().promote(9).await.unwrap_err();
    assert!(
        matches!(&error, GroupError::Refused(why) if why.contains("learner")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_under_load() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let writers = async {
        for i in 0..300 {
            cluster.put(1 + i % 3, "a", 1).await;
        }
    };
    let transfers = async {
        for _ in 0..3 {
            let old = cluster.leader().await;
            cluster.nodes[&1]
                .group()
                .transfer_leader(None)
                .await
                .unwrap();
            cluster
                .wait(1, "another leader", |s| s.leader.is_some_and(|l| l != old))
                .await;
        }
        let leader = cluster.leader().await;
        let to = if leader == 3 { 2 } else { 3 };
        cluster.nodes[&1]
            .group()
            .transfer_leader(Some(to))
            .await
            .unwrap();
        cluster
            .wait(1, "the wanted leader", |s| s.leader == Some(to))
            .await;
    };
    tokio::join!(writers, transfers);
    assert_eq!(cluster.get(2, "a").await, 300);
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_cluster_is_refused_with_words() {
    let mut cluster = Cluster::founded(1, |_| {}).await;
    cluster.tune = |config| config.cluster_id = "other".into();
    cluster.add(2, false).await;
    let stranger = cluster.nodes[&2].group();
    // Founded as if member 1 were in its own cluster: it must never get member 1's vote.
    let both = [(1, member(1)), (2, member(2))].into();
    stranger.initialize(both).await.unwrap();
    let soon = std::time::Duration::from_secs(2);
    let error = stranger
        .propose(command(1, "a", 1), soon)
        .await
        .unwrap_err();
    assert!(matches!(error, GroupError::NoLeader), "{error}");
    cluster.put(1, "a", 1).await;
    let term = cluster.nodes[&1].group().status().term;
    assert_eq!(term, 1, "the stranger's vote requests were not heard");
    assert!(
        cluster.nodes[&1]
            .group()
            .propose(command(9, "a", 1), BOUND)
            .await
            .is_ok()
    );
}
