//! Snapshots by log bytes, purges, members that are too far behind for the log.

use crate::support::{BOUND, Cluster, Disk, eventually, member, padded};
use mainstay_raft::GroupConfig;
use mainstay_raft::transport::memory::Way;
use mainstay_storage::log::Log;
use std::time::Duration;

fn small_logs(config: &mut GroupConfig) {
    config.snapshot_log_bytes = 64 << 10;
    config.keep_entries = 10;
}

/// Write until the leader has purged what a new member would need.
async fn write_until_purged(cluster: &Cluster) -> u64 {
    let leader = cluster.leader().await;
    let start = cluster.nodes[&leader].memory_log().state().last.unwrap();
    let mut writes = 0;
    let purged = || {
        cluster.nodes[&leader]
            .memory_log()
            .state()
            .purged
            .is_some_and(|p| p.0 > start)
    };
    while !purged() {
        let batch = (0..50).map(|_| {
            let command = padded(cluster.command_id(), "a", 1, 1000);
            cluster.nodes[&leader]
                .group()
                .propose(command, crate::support::BOUND)
        });
        for answer in futures::future::join_all(batch).await {
            answer.unwrap();
            writes += 1;
        }
        assert!(writes < 100_000, "never purged");
    }
    writes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_far_behind_catches_up_by_snapshot() {
    let mut cluster = Cluster::founded(3, small_logs).await;
    cluster.put(1, "b", 5).await;
    let leader = cluster.leader().await;
    let behind = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    cluster.net.isolate(behind, &cluster.ids(), true);
    let writes = write_until_purged(&cluster).await;
    cluster.net.isolate(behind, &cluster.ids(), false);
    assert_eq!(cluster.get(behind, "a").await, writes);
    assert!(
        cluster.nodes[&behind].machine.applied_commands() < writes,
        "not from the log"
    );
    cluster.converge().await;
    // What it installed is what it starts from.
    cluster.halt(behind).await;
    cluster.start(behind).await;
    assert_eq!(cluster.get(behind, "a").await, writes);
    assert_eq!(cluster.nodes[&behind].machine.get("b"), 5);
    cluster.put(behind, "a", 1).await;
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_member_on_files_joins_by_snapshot_and_votes() {
    let mut cluster = Cluster::founded(2, small_logs).await;
    let writes = write_until_purged(&cluster).await;
    cluster.add(3, true).await;
    cluster.nodes[&1]
        .group()
        .add_learner(3, member(3))
        .await
        .unwrap();
    cluster.nodes[&2].group().promote(3).await.unwrap();
    assert_eq!(cluster.get(3, "a").await, writes);
    let status = cluster.nodes[&3].group().status();
    assert_eq!(status.members.len(), 3);
    assert!(
        status
            .members
            .values()
            .all(|m| m.role == mainstay_raft::Role::Voter)
    );
    // With it, the group survives the loss of another.
    cluster.halt(1).await;
    cluster.put(3, "a", 1).await;
    cluster.converge().await;
    cluster.halt(3).await;
    cluster.start(3).await;
    assert_eq!(cluster.get(3, "a").await, writes + 1);
}

/// Is a snapshot under way to this member?
fn receiving(cluster: &Cluster, id: u64) -> bool {
    let Ok(files) = std::fs::read_dir(cluster.nodes[&id].snapshots()) else {
        return false;
    };
    let mut names = files.flatten().map(|f| f.file_name());
    names.any(|name| name.to_string_lossy().ends_with(".incoming"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_killed_while_its_snapshot_arrives_joins_in_the_end() {
    let mut cluster = Cluster::founded(2, small_logs).await;
    let writes = write_until_purged(&cluster).await;
    cluster.add(3, true).await;
    // So slow that the snapshot can be met on its way.
    let delay = Duration::from_millis(100);
    let way = |delay| Way { cut: false, delay };
    for id in [1, 2] {
        cluster.net.set(id, 3, way(delay));
        cluster.net.set(3, id, way(delay));
    }
    let adding = cluster.nodes[&1].group().clone();
    adding.add_learner(3, member(3)).await.unwrap();
    for _ in 0..3 {
        eventually("a snapshot is under way", || receiving(&cluster, 3)).await;
        cluster.halt(3).await;
        assert_eq!(cluster.put(1, "b", 0).await, 0, "the others go on");
        cluster.start(3).await;
    }
    for id in [1, 2] {
        cluster.net.set(id, 3, Way::default());
        cluster.net.set(3, id, Way::default());
    }
    cluster.nodes[&2].group().promote(3).await.unwrap();
    assert_eq!(cluster.get(3, "a").await, writes);
    assert!(
        cluster.nodes[&3].machine.applied_commands() < writes,
        "not from the log"
    );
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_stays_bounded_under_writes() {
    let cluster = Cluster::founded(3, small_logs).await;
    for _ in 0..3 {
        write_until_purged(&cluster).await;
    }
    for node in cluster.running() {
        let Disk::Memory { log, .. } = &node.disk else {
            unreachable!()
        };
        eventually("a short log on every member", || {
            let state = log.state();
            let kept = state.last.unwrap_or(0) - state.purged.as_ref().map_or(0, |p| p.0);
            kept < 1000
        })
        .await;
    }
    cluster.converge().await;
}

/// While a snapshot is on its way over a thin line, and while its receiver catches up behind it, the log
/// moves on by far more than is kept. It ends all the same, with the one snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_over_a_thin_line_ends_once() {
    let mut cluster = Cluster::new(1, small_logs).await;
    cluster.halt(1).await;
    cluster.bytes_per_s = Some(400 << 10);
    cluster.start(1).await;
    cluster.found().await;
    // State: a key for each command. About 2 MB of it: five seconds on the line.
    for part in 0..20_u64 {
        let fill = (0..1000).map(|n| {
            let key = format!("{:064}", part * 1000 + n);
            let command = padded(cluster.command_id(), &key, 1, 0);
            cluster.nodes[&1].group().propose(command, BOUND)
        });
        for answer in futures::future::join_all(fill).await {
            answer.unwrap();
        }
    }
    // Slowly: what a fast machine writes behind the last snapshot would take the line minutes.
    let purged = || cluster.nodes[&1].memory_log().state().purged;
    while purged().is_none() {
        cluster.put(1, "v", 1).await;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    cluster.add(2, false).await;
    let leader = cluster.nodes[&1].group().clone();
    let log = || cluster.nodes[&1].memory_log().state();
    let kept_from = log().purged.unwrap().0;
    let learner = crate::support::member(2);
    leader.add_learner(2, learner).await.unwrap();
    let writing = async {
        for n in 0.. {
            let id = cluster.command_id();
            leader
                .propose(padded(id, "w", 1, 1000), BOUND)
                .await
                .unwrap();
            if n % 8 == 0 && cluster.nodes[&2].machine.get("w") > 0 {
                return;
            }
            // Slower than the line, or nobody could ever catch up.
            tokio::time::sleep(std::time::Duration::from_millis(25)).await;
        }
    };
    tokio::time::timeout(BOUND * 2, writing).await.unwrap();
    leader.promote(2).await.unwrap();
    cluster.converge().await;
    assert!(log().last.unwrap() > kept_from + 100, "the log moved on");
    let received = cluster.nodes[&2].machine.imports();
    assert_eq!(received, 1, "one snapshot is enough");
}
