//! A member whose files are put back to an older state has forgotten what it acknowledged: those that know
//! of it do not listen to it, and it stops and says why.

use crate::support::{Cluster, eventually};
use mainstay_raft::Status;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Member 3, on files; the others have a leader without it if they need one.
const VICTIM: u64 = 3;

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(done.unwrap().success());
}

/// A group in which another than the victim leads, and what the victim's files were early on. Since
/// then it has acknowledged 50 entries, and is halted.
async fn forgetful() -> (Cluster, tempfile::TempDir) {
    let mut cluster = Cluster::new(2, |_| {}).await;
    cluster.add(VICTIM, true).await;
    cluster.found().await;
    cluster.put(1, "a", 1).await;
    cluster.converge().await;
    cluster.halt(VICTIM).await;
    let kept = tempfile::tempdir().unwrap();
    copy(&files(&cluster), &kept.path().join("old"));
    cluster.start(VICTIM).await;
    for _ in 0..50 {
        cluster.put(1, "a", 1).await;
    }
    if cluster.leader().await == VICTIM {
        let group = cluster.nodes[&VICTIM].group().clone();
        group.transfer_leader(None).await.unwrap();
    }
    cluster.put(1, "a", 1).await;
    cluster.converge().await;
    (cluster, kept)
}

fn files(cluster: &Cluster) -> PathBuf {
    cluster.nodes[&VICTIM].files()
}

fn put_back(cluster: &Cluster, kept: &tempfile::TempDir) {
    std::fs::remove_dir_all(files(cluster)).unwrap();
    copy(&kept.path().join("old"), &files(cluster));
}

fn says_so(status: &Status) -> bool {
    let why = status.fault.as_deref().unwrap_or_default();
    why.contains("put back to an older state") && why.contains("member repair --force")
}

/// In a debug build the core itself would stop the *leader*.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_that_heard_its_acknowledgements_does_not_take_it_for_what_it_was() {
    let (mut cluster, kept) = forgetful().await;
    let leader = cluster.leader().await;
    let last = cluster.nodes[&leader].group().status().last_log;
    eventually("everything is acknowledged by it", || {
        let status = cluster.nodes[&leader].group().status();
        status.members[&VICTIM].matched >= Some(last)
    })
    .await;
    cluster.halt(VICTIM).await;
    put_back(&cluster, &kept);
    // Twice: it does not get better by itself.
    for _ in 0..2 {
        cluster.start(VICTIM).await;
        cluster.wait(VICTIM, "it stops", says_so).await;
        cluster.halt(VICTIM).await;
        cluster.put(1, "a", 1).await;
    }
    assert_eq!(cluster.get(leader, "a").await, 54);
}

/// The leader is gone, and with its vote the other one would lead without what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_remember_what_it_said_of_itself() {
    let (mut cluster, kept) = forgetful().await;
    let leader = cluster.leader().await;
    let other = 3 - leader;
    // A checkpoint, and a second in which positions are told.
    let last = cluster.nodes[&leader].group().status().applied;
    eventually("the other one knows how far it is", || {
        cluster.nodes[&other].group().witnessed(VICTIM) >= Some(last)
    })
    .await;
    cluster.halt(VICTIM).await;
    cluster.halt(leader).await;
    put_back(&cluster, &kept);
    cluster.start(VICTIM).await;
    cluster.wait(VICTIM, "it stops", says_so).await;
    assert!(!cluster.nodes[&other].group().status().is_leader());
    cluster.halt(VICTIM).await;
    cluster.start(leader).await;
    assert_eq!(cluster.get(other, "a").await, 52);
}

/// Whoever comes back with what it had is believed: after a crash, and as the others restart as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_is_no_older_state() {
    let (mut cluster, _kept) = forgetful().await;
    for id in [VICTIM, 1, VICTIM, 2, VICTIM] {
        cluster.halt(id).await;
        cluster.put(if id == 1 { 2 } else { 1 }, "a", 1).await;
        cluster.start(id).await;
        cluster.converge().await;
    }
    assert_eq!(cluster.get(VICTIM, "a").await, 57);
}
