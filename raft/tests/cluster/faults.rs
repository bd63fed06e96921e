//! Partitions, crashes, broken disks and machines.

use crate::support::{BOUND, Cluster, command, eventually, member};
use mainstay_raft::GroupError;
use mainstay_raft::transport::memory::Way;
use std::time::Duration;

fn others(cluster: &Cluster, id: u64) -> Vec<u64> {
    cluster.ids().into_iter().filter(|o| *o != id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_leader_is_replaced_and_follows_after_healing() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let old = cluster.leader().await;
    cluster.put(old, "a", 1).await;
    cluster.net.isolate(old, &cluster.ids(), true);
    let rest = others(&cluster, old);
    // The old leader may append, but neither acknowledge nor serve a read.
    let alone = cluster.nodes[&old].group();
    let soon = Duration::from_millis(1500);
    let (write, read) = tokio::join!(
        alone.propose(command(900, "a", 100), soon),
        alone.read_barrier(soon)
    );
    assert!(
        matches!(write, Err(GroupError::Unknown | GroupError::NoLeader)),
        "{write:?}"
    );
    assert!(read.is_err(), "a read in a minority: {read:?}");
    let new = cluster.leader_among(&rest).await;
    assert_eq!(cluster.put(new, "a", 10).await, 11);
    assert_eq!(cluster.get(rest[0], "a").await, 11);
    cluster.net.isolate(old, &cluster.ids(), false);
    cluster
        .wait(old, "follow the new leader", |s| s.leader == Some(new))
        .await;
    cluster.converge().await;
    let sum = cluster.get(old, "a").await;
    assert_eq!(
        sum, 11,
        "what the minority appended was never acknowledged and is gone"
    );
    cluster.put(old, "a", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_follower_does_not_disturb_the_leader() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let lonely = others(&cluster, leader)[0];
    let term = cluster.nodes[&leader].group().status().term;
    cluster.net.isolate(lonely, &cluster.ids(), true);
    for _ in 0..200 {
        cluster.put(leader, "a", 1).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.net.isolate(lonely, &cluster.ids(), false);
    assert_eq!(cluster.get(lonely, "a").await, 200);
    let status = cluster.nodes[&lonely].group().status();
    assert_eq!(
        (status.leader, status.term),
        (Some(leader), term),
        "pre-vote keeps the term"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hears_nobody_gives_way() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let old = cluster.leader().await;
    // It can speak and not hear: its heartbeats alone must not keep it in office.
    for other in others(&cluster, old) {
        cluster.net.cut(other, old, true);
    }
    let rest = others(&cluster, old);
    let new = cluster.leader_among(&rest).await;
    cluster.put(new, "a", 3).await;
    for other in others(&cluster, old) {
        cluster.net.cut(other, old, false);
    }
    assert_eq!(cluster.get(old, "a").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_and_breaking_network_loses_nothing() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let slow = Way {
        cut: false,
        delay: Duration::from_millis(15),
    };
    for a in cluster.ids() {
        for b in cluster.ids() {
            cluster.net.set(a, b, slow);
        }
    }
    for round in 0..30 {
        cluster.put(1 + round % 3, "a", 1).await;
        cluster.net.reset(1 + round % 3, 1 + (round + 1) % 3);
    }
    cluster.converge().await;
    assert_eq!(cluster.get(3, "a").await, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_member_comes_back_from_its_files() {
    let mut cluster = Cluster::new(2, |_| {}).await;
    cluster.add(3, true).await;
    cluster.found().await;
    for _ in 0..50 {
        cluster.put(3, "a", 1).await;
    }
    cluster.halt(3).await;
    for _ in 0..50 {
        cluster.put(1, "b", 1).await;
    }
    cluster.start(3).await;
    assert_eq!(cluster.get(3, "b").await, 50);
    assert_eq!(cluster.nodes[&3].machine.get("a"), 50);
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_crash_and_every_acknowledged_write_is_back() {
    let mut cluster = Cluster::founded(3, |_| {}).await;
    for round in 0..3 {
        for _ in 0..40 {
            cluster.put(1 + round, "a", 1).await;
        }
        for id in cluster.ids() {
            cluster.halt(id).await;
        }
        for id in cluster.ids() {
            cluster.start(id).await;
        }
        cluster.leader().await;
        assert_eq!(cluster.get(3, "a").await, 40 * (round + 1));
    }
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_stop_leaves_nothing_to_apply_again() {
    let mut cluster =
        Cluster::founded(1, |c| c.checkpoint_interval = Duration::from_secs(3600)).await;
    for _ in 0..20 {
        cluster.put(1, "a", 1).await;
    }
    cluster.nodes[&1].group().shutdown().await;
    cluster.net.detach(1);
    cluster.nodes.get_mut(&1).unwrap().group = None;
    cluster.start(1).await;
    assert_eq!(cluster.get(1, "a").await, 20);
    assert_eq!(
        cluster.nodes[&1].machine.applied_commands(),
        0,
        "the last checkpoint had it all"
    );
    // And a crash leaves all of it to the log.
    cluster.put(1, "a", 1).await;
    cluster.halt(1).await;
    cluster.start(1).await;
    assert_eq!(cluster.get(1, "a").await, 21);
    assert_eq!(cluster.nodes[&1].machine.applied_commands(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_disk_stops_the_member_and_only_it() {
    let cluster = Cluster::founded(3, |_| {}).await;
    cluster.put(1, "a", 1).await;
    let leader = cluster.leader().await;
    cluster.nodes[&leader].memory_log().stop("the disk is gone");
    let group = cluster.nodes[&leader].group();
    let write = group.propose(command(500, "a", 1), BOUND).await;
    // It may have reached the others before the disk failed here.
    assert!(matches!(write, Err(GroupError::Unknown)), "{write:?}");
    let status = cluster
        .wait(leader, "show the fault", |s| s.fault.is_some())
        .await;
    assert!(status.fault.unwrap().contains("the disk is gone"));
    let write = group.propose(command(501, "a", 1), BOUND).await;
    assert!(matches!(write, Err(GroupError::Stopped(_))), "{write:?}");
    let rest = others(&cluster, leader);
    cluster.leader_among(&rest).await;
    cluster.put(rest[0], "b", 2).await;
    assert_eq!(cluster.get(rest[1], "b").await, 2);
    let read = cluster.nodes[&leader].group().read_barrier(BOUND).await;
    assert!(matches!(read, Err(GroupError::Stopped(_))), "{read:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_no_machine_understands_stops_who_applies_it() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let write = cluster.nodes[&1]
        .group()
        .propose("poison".into(), Duration::from_secs(5))
        .await;
    assert!(write.is_err());
    // The leader stops, and the next one. The last may never be told that the entry is committed:
    // alone it elects nobody.
    let stopped = || {
        let faults = cluster.nodes.values().map(|n| n.group().status().fault);
        let undecodable = |f: &String| f.contains("cannot be decoded");
        faults.flatten().filter(undecodable).count()
    };
    eventually("a majority stopped", || stopped() >= 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_the_machine_refuses_to_read_never_reaches_the_log() {
    let cluster = Cluster::founded(3, |_| {}).await;
    for id in cluster.ids() {
        let group = cluster.nodes[&id].group();
        let error = group.propose("unreadable".into(), BOUND).await.unwrap_err();
        assert!(
            matches!(&error, GroupError::Refused(why) if why == "that is no command"),
            "{error}"
        );
    }
    cluster.put(1, "a", 1).await;
    cluster.converge().await;
    for node in cluster.running() {
        assert_eq!(node.machine.applied_commands(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_is_gone_stays_out_until_it_is_replaced() {
    let mut cluster = Cluster::new(2, |_| {}).await;
    cluster.add(3, true).await;
    cluster.found().await;
    for _ in 0..20 {
        cluster.put(3, "a", 1).await;
    }
    // Clean, so that the state says what was applied.
    cluster.nodes[&3].group().shutdown().await;
    cluster.net.detach(3);
    cluster.nodes.get_mut(&3).unwrap().group = None;
    let log = cluster.nodes[&3].dir.path().join("log");
    std::fs::remove_dir_all(&log).unwrap();
    for _ in 0..2 {
        let error = cluster.try_start(3).await.unwrap_err();
        assert!(
            matches!(&error, GroupError::Stopped(why) if why.contains("`mainstay member repair --data-dir ")),
            "{error}"
        );
    }
    // What it is told to do works; the group never needed what was lost.
    cluster.nodes[&1].group().remove(3).await.unwrap();
    cluster.add(4, true).await;
    let group = cluster.nodes[&1].group();
    group.add_learner(4, member(4)).await.unwrap();
    group.promote(4).await.unwrap();
    assert_eq!(cluster.get(4, "a").await, 20);
}

/// So long that a test which waits for a lease fails.
fn patient(config: &mut mainstay_raft::GroupConfig) {
    config.election = (BOUND, BOUND * 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_process_ended_is_replaced_without_waiting_for_its_lease() {
    let mut cluster = Cluster::founded(3, patient).await;
    for round in 1..=3 {
        let old = cluster.leader().await;
        let rest = others(&cluster, old);
        for &id in &rest {
            cluster.get(id, "a").await;
        }
        let term = cluster.nodes[&old].group().status().term;
        cluster.halt(old).await;
        let new = cluster.leader_among(&rest).await;
        assert_eq!(cluster.put(new, "a", 1).await, round);
        assert!(cluster.nodes[&new].group().status().term > term);
        cluster.start(old).await;
        assert_eq!(cluster.get(old, "a").await, round);
    }
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_two_of_five_gone_the_rest_elect_at_once() {
    let mut cluster = Cluster::founded(5, patient).await;
    let old = cluster.leader().await;
    cluster.put(old, "a", 1).await;
    // The one whose turn would be first is gone as well.
    let first = others(&cluster, old)[0];
    cluster.halt(first).await;
    cluster.put(old, "a", 1).await;
    cluster.halt(old).await;
    let rest: Vec<u64> = cluster.running().map(|n| n.id).collect();
    let new = cluster.leader_among(&rest).await;
    assert_eq!(cluster.put(new, "a", 1).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_one_member_cannot_reach_stays_because_the_others_hear_it() {
    let cluster = Cluster::founded(3, patient).await;
    let leader = cluster.leader().await;
    let term = cluster.nodes[&leader].group().status().term;
    let misled = others(&cluster, leader)[0];
    // It is told that the leader's process has ended, again and again, and believes it.
    cluster.net.refuse(misled, leader, true);
    cluster.net.refuse(leader, misled, true);
    for n in 1..=20 {
        cluster.net.reset(leader, misled);
        assert_eq!(cluster.put(leader, "a", 1).await, n);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.net.refuse(misled, leader, false);
    cluster.net.refuse(leader, misled, false);
    assert_eq!(cluster.get(misled, "a").await, 20);
    for id in cluster.ids() {
        let status = cluster.nodes[&id].group().status();
        assert_eq!((status.leader, status.term), (Some(leader), term), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_not_fit_leaves_the_succession_to_one_that_is() {
    let mut cluster = Cluster::founded(3, patient).await;
    let old = cluster.leader().await;
    let rest = others(&cluster, old);
    for &id in &rest {
        cluster.get(id, "a").await;
    }
    // Its turn would be first.
    let reason = mainstay_raft::Unfit::Reluctant("a test".into());
    cluster.nodes[&rest[0]].group().unfit("test", Some(reason));
    cluster.halt(old).await;
    assert_eq!(cluster.leader_among(&rest).await, rest[1]);
    assert_eq!(cluster.put(rest[0], "a", 1).await, 1);
}
