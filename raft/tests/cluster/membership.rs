//! Learners, voters, removal, leader transfer, and peers that do not belong.

use crate::support::{BOUND, Cluster, command, eventually, member};
use mainstay_raft::transport::memory::Way;
use mainstay_raft::{GroupError, Member, Role};
use std::time::Duration;

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
async fn a_leader_hands_over_before_it_is_removed() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let term = cluster.nodes[&leader].group().status().term;
    // Asked of the leader itself.
    let group = cluster.nodes[&leader].group().clone();
    let watch = group.watch();
    group.remove(leader).await.unwrap();
    let status = watch.borrow().clone();
    let next = status.leader.expect("it knows who leads now");
    assert_ne!(next, leader);
    // One term, one election: not a timeout after the leader had gone.
    assert_eq!(status.term, term + 1);
    let members = cluster.nodes[&next].group().status().members;
    assert!(
        members.len() == 2 && !members.contains_key(&leader),
        "{members:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_of_a_moment_does_not_refuse_for_those_it_has_not_heard_yet() {
    let cluster = Cluster::founded(3, |_| {}).await;
    // Each time the next leader is asked at once, from the former one.
    for _ in 0..5 {
        let old = cluster.leader().await;
        let group = cluster.nodes[&old].group();
        group.transfer_leader(None).await.unwrap();
        let other = cluster.ids().into_iter().find(|id| *id != old).unwrap();
        group.may_remove(other).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_voter_stays() {
    let mut cluster = Cluster::founded(1, |_| {}).await;
    let group = cluster.nodes[&1].group().clone();
    cluster.add(2, false).await;
    group.add_learner(2, member(2)).await.unwrap();
    for error in [group.remove(1).await, group.may_remove(1).await] {
        let error = error.unwrap_err();
        assert!(
            matches!(&error, GroupError::Refused(why) if why.contains("m1 is the only voter")),
            "{error}"
        );
    }
    cluster.put(1, "a", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_want_one_name_do_not_both_get_it() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let named = |id: u64| Member {
        name: "twin".into(),
        ..member(id)
    };
    let asks = (11..=18).map(|id| {
        let group = cluster.nodes[&(1 + id % 3)].group().clone();
        async move { group.add_learner(id, named(id)).await }
    });
    let answers = futures::future::join_all(asks).await;
    let added = answers.iter().filter(|a| a.is_ok()).count();
    assert_eq!(added, 1, "{answers:?}");
    for error in answers.into_iter().filter_map(Result::err) {
        assert!(
            matches!(&error, GroupError::Refused(why) if why.contains("the name twin")),
            "{error}"
        );
    }
    let group = cluster.nodes[&cluster.leader_among(&[1, 2, 3]).await].group();
    let twins = group.status().members;
    assert_eq!(
        twins.values().filter(|m| m.member.name == "twin").count(),
        1
    );
    // Nor does a new one get an address that the others dial for another.
    let squatter = Member {
        peer_url: member(2).peer_url,
        ..member(20)
    };
    let error = group.add_learner(20, squatter).await.unwrap_err();
    assert!(
        error.to_string().contains("address of member m2"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_addresses_let_nobody_in() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let group = cluster.nodes[&2].group();
    let error = group.update(9, member(9)).await.unwrap_err();
    assert!(
        matches!(&error, GroupError::Refused(why) if why.contains("not, or no longer")),
        "{error}"
    );
    let moved = Member {
        api_url: "http://elsewhere:8090".into(),
        ..member(3)
    };
    group.update(3, moved.clone()).await.unwrap();
    group.update(3, moved.clone()).await.unwrap();
    let renamed = Member {
        name: "m2".into(),
        ..moved.clone()
    };
    let error = group.update(3, renamed).await.unwrap_err();
    assert!(error.to_string().contains("the name m2"), "{error}");
    cluster
        .wait(1, "see it", |s| s.members[&3].member == moved)
        .await;
    // A repetition that comes after the removal brings nobody back.
    group.remove(3).await.unwrap();
    let error = group.update(3, member(3)).await.unwrap_err();
    assert!(error.to_string().contains("no longer"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_comes_and_goes_is_not_promoted() {
    let mut cluster = Cluster::founded(3, |config| {
        config.promote_after = Duration::from_secs(2);
    })
    .await;
    cluster.add(4, false).await;
    let leader = cluster.leader_among(&[1, 2, 3]).await;
    let group = cluster.nodes[&leader].group().clone();
    group.add_learner(4, member(4)).await.unwrap();
    let asking = group.clone();
    let promotion = tokio::spawn(async move { asking.promote(4).await });
    // Between two absences it is there for less than it must be.
    for _ in 0..3 {
        eventually("hear it", || group.answering().contains(&4)).await;
        cluster.net.isolate(4, &[1, 2, 3], true);
        eventually("lose it", || !group.answering().contains(&4)).await;
        // Long enough for one of the leader's looks, which are 50 ms apart, to fall into it.
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert_eq!(group.status().members[&4].role, Role::Learner);
        cluster.net.isolate(4, &[1, 2, 3], false);
    }
    let back = std::time::Instant::now();
    promotion.await.unwrap().unwrap();
    assert!(
        back.elapsed() >= Duration::from_secs(2),
        "{:?}",
        back.elapsed()
    );
    assert_eq!(group.status().members[&4].role, Role::Voter);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_a_dead_voter_a_learner_that_answers_is_promoted() {
    let mut cluster = Cluster::founded(2, |_| {}).await;
    cluster.add(3, false).await;
    let leader = cluster.leader_among(&[1, 2]).await;
    let group = cluster.nodes[&leader].group().clone();
    group.add_learner(3, member(3)).await.unwrap();
    group.promote(3).await.unwrap();
    cluster.add(4, false).await;
    group.add_learner(4, member(4)).await.unwrap();
    eventually("hear it", || group.answering().contains(&4)).await;
    // Two of three voters are left, and three of four will be: it makes the group safer.
    let gone = if leader == 1 { 2 } else { 1 };
    cluster.halt(gone).await;
    eventually("lose it", || !group.answering().contains(&gone)).await;
    group.promote(4).await.unwrap();
    cluster.put(leader, "a", 1).await;
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
    let silent = format!("silent: member m{}", rest[0]);
    assert!(
        matches!(&error, GroupError::Refused(why) if why.contains("majority") && why.contains(&silent)),
        "{error}"
    );
    // To ask is the same, and changes nothing.
    let asked = group.may_remove(rest[1]).await.unwrap_err();
    assert_eq!(asked.to_string(), error.to_string());
    group.may_remove(rest[0]).await.unwrap();
    assert_eq!(group.status().members.len(), 3);
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
async fn a_learner_that_does_not_answer_is_not_promoted() {
    let mut cluster = Cluster::founded(3, |_| {}).await;
    cluster.add(4, false).await;
    let leader = cluster.leader_among(&[1, 2, 3]).await;
    let group = cluster.nodes[&leader].group().clone();
    group.add_learner(4, member(4)).await.unwrap();
    cluster.put(leader, "a", 1).await;
    // It has caught up, and then it goes.
    assert_eq!(cluster.get(4, "a").await, 1);
    cluster.halt(4).await;
    eventually("notice the loss", || !group.answering().contains(&4)).await;
    let soon = Duration::from_secs(1);
    let promoted = tokio::time::timeout(soon, group.promote(4)).await;
    assert!(promoted.is_err(), "{promoted:?}");
    assert_eq!(group.status().members[&4].role, Role::Learner);
    cluster.start(4).await;
    group.promote(4).await.unwrap();
    assert_eq!(group.status().members[&4].role, Role::Voter);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_moves_is_found_by_the_same_leader() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let term = cluster.nodes[&leader].group().status().term;
    let moving = if leader == 1 { 2 } else { 1 };
    let group = cluster.nodes[&leader].group();
    cluster.net.place(moving, "memory:elsewhere");
    eventually("lose it", || !group.answering().contains(&moving)).await;
    cluster.put(leader, "a", 1).await;
    let elsewhere = Member {
        peer_url: "memory:elsewhere".into(),
        ..member(moving)
    };
    group.add_learner(moving, elsewhere).await.unwrap();
    eventually("hear it again", || group.answering().contains(&moving)).await;
    let machine = &cluster.nodes[&moving].machine;
    eventually("catch up", || machine.get("a") == 1).await;
    let status = group.status();
    assert_eq!((status.leader, status.term), (Some(leader), term));
    assert_eq!(status.members[&moving].role, Role::Voter);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_its_leader_left_half_done_is_finished() {
    let mut cluster = Cluster::founded(4, |_| {}).await;
    // Time to act while messages are under way.
    let delay = Duration::from_millis(30);
    for a in cluster.ids() {
        for b in cluster.ids() {
            cluster.net.set(a, b, Way { cut: false, delay });
        }
    }
    cluster.converge().await;
    let leader = cluster.leader().await;
    let group = cluster.nodes[&leader].group().clone();
    let rest: Vec<u64> = cluster.ids().into_iter().filter(|o| *o != leader).collect();
    let leaving = rest[2];
    let before = group.status().last_log;
    let remover = group.clone();
    let removal = tokio::spawn(async move { remover.remove(leaving).await });
    // One entry for both sets of voters, committed; the second, for the new set, leaves nobody.
    cluster
        .wait(leader, "append the second step", |s| {
            s.last_log == before + 2
        })
        .await;
    cluster.net.isolate(leader, &cluster.ids(), true);
    let last = |id: u64| cluster.nodes[&id].group().status().last_log;
    if rest.iter().any(|id| last(*id) > before + 1) {
        println!("too late on this machine: the second step was under way to all");
    }
    cluster.halt(leader).await;
    removal.abort();
    for a in &rest {
        for b in &rest {
            cluster.net.set(*a, *b, Way::default());
        }
    }
    for id in &rest[..2] {
        cluster
            .wait(*id, "forget the removed", |s| {
                s.leader.is_some() && !s.members.contains_key(&leaving)
            })
            .await;
    }
    cluster.put(rest[0], "a", 1).await;
    assert_eq!(cluster.get(rest[1], "a").await, 1);
}

/// Right after its election a leader has not heard of everyone: what it cannot judge it does not refuse.
async fn hand_over(cluster: &Cluster, to: Option<u64>) {
    let handed = cluster.nodes[&1].group().transfer_leader(to).await;
    handed.unwrap();
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
            hand_over(&cluster, None).await;
            cluster
                .wait(1, "another leader", |s| s.leader.is_some_and(|l| l != old))
                .await;
        }
        let leader = cluster.leader().await;
        let to = if leader == 3 { 2 } else { 3 };
        hand_over(&cluster, Some(to)).await;
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
    let soon = Duration::from_secs(2);
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
