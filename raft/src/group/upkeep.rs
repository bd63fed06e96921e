//! What a member does by itself: watches for faults, publishes its status, follows the membership's
//! addresses, makes snapshots by log bytes and purges the log when nobody needs it.

use super::status::{answers, status_of};
use super::{Inner, SHUT_DOWN, Status};
use crate::types::Types;
use openraft::RaftMetrics;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::Fatal;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// The published status changes no more often than this: it names every member, and each change
/// wakes whoever looks at the applied state.
const STATUS_EVERY: Duration = Duration::from_millis(5);
/// Snapshots, purges and unfinished changes are looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The log is kept for members that are catching up until it is this long.
const HELD_BYTES_MAX: u64 = 4 << 30;
/// Looks at an unfinished membership change before it is finished here.
const UNFINISHED_LOOKS: u32 = 6;

pub(super) fn spawn(
    inner: &Arc<Inner>,
    leader: watch::Sender<Option<u64>>,
    status: watch::Sender<Status>,
) {
    tokio::spawn(follow(inner.clone(), leader));
    tokio::spawn(publish(inner.clone(), status));
    tokio::spawn(guard(inner.clone()));
    let upkeep = inner.clone();
    tokio::spawn(async move {
        let cancel = upkeep.cancel.clone();
        cancel.run_until_cancelled(look_after(&upkeep)).await;
    });
}

/// A fault ends consensus here; so does the end of the last handle.
async fn guard(inner: Arc<Inner>) {
    let mut fault = inner.fault.watch();
    tokio::select! {
        _ = fault.wait_for(Option::is_some) => {}
        () = inner.cancel.cancelled() => {}
    }
    if inner.stopping.load(std::sync::atomic::Ordering::SeqCst) {
        return;
    }
    // Idempotent, and the error says only that the core has ended already.
    let _ = inner.raft.shutdown().await;
    inner.peers.close();
    inner.cancel.cancel();
    let checkpointer = inner.checkpointer.clone();
    // Joins a thread: off the runtime.
    let _ = tokio::task::spawn_blocking(move || checkpointer.stop(false)).await;
}

/// Who leads, and where members are: requests wait for it, so it is told at once.
async fn follow(inner: Arc<Inner>, leader: watch::Sender<Option<u64>>) {
    let mut server = inner.raft.server_metrics();
    let mut fault = inner.fault.watch();
    let mut members = None;
    loop {
        let faulty = fault.borrow_and_update().is_some();
        let now = {
            let server = server.borrow_and_update();
            if members.as_ref() != Some(server.membership_config.log_id()) {
                members = Some(*server.membership_config.log_id());
                let nodes = server.membership_config.membership().nodes();
                inner
                    .peers
                    .update(nodes.map(|(id, m)| (*id, m.clone())).collect());
            }
            server.current_leader.filter(|_| !faulty)
        };
        leader.send_if_modified(|seen| std::mem::replace(seen, now) != now);
        if faulty {
            return;
        }
        tokio::select! {
            changed = server.changed() => if changed.is_err() {
                // The core has ended; why, becomes a fault.
                let _ = fault.changed().await;
            },
            _ = fault.changed() => {}
        }
    }
}

async fn publish(inner: Arc<Inner>, status: watch::Sender<Status>) {
    let mut metrics = inner.raft.metrics();
    let mut applied = inner.applied.clone();
    let mut fault = inner.fault.watch();
    let mut fitness = inner.fitness.watch();
    loop {
        let now = {
            let metrics = metrics.borrow_and_update();
            if let Err(e) = &metrics.running_state {
                // The core ends by a fault of its own, a panic, or because it was told to.
                let asked = matches!(e, Fatal::Stopped);
                if asked {
                    inner.fault.close(SHUT_DOWN);
                } else {
                    inner.fault.raise(e.to_string());
                }
            }
            fitness.mark_unchanged();
            let applied = *applied.borrow_and_update();
            status_of(&metrics, applied, &inner.fault, &inner.fitness)
        };
        let ended = now.fault.is_some();
        status.send_if_modified(|seen| {
            let changed = *seen != now;
            *seen = now;
            changed
        });
        if ended {
            return;
        }
        tokio::time::sleep(STATUS_EVERY).await;
        tokio::select! {
            // A closed channel shows in the next look at the metrics.
            _ = metrics.changed() => {}
            _ = applied.changed() => {}
            _ = fault.changed() => {}
            _ = fitness.changed() => {}
        }
    }
}

async fn look_after(inner: &Inner) {
    // What an earlier process left in the log counts.
    let mut covered: Option<u64> = None;
    let mut log_at_start = inner.log.disk_bytes();
    let mut unfinished = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let metrics = {
            let metrics = inner.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.clone()
        };
        let appended = inner.log.appended_bytes();
        let since = log_at_start + appended - covered.unwrap_or(0).min(appended);
        if since >= inner.config.snapshot_log_bytes && worth_a_snapshot(&metrics) {
            tracing::info!(log_bytes = since, "snapshot due");
            if inner.raft.trigger().snapshot().await.is_err() {
                return;
            }
            covered = Some(appended);
            log_at_start = 0;
        }
        purge(inner, &metrics).await;
        let joint = metrics
            .membership_config
            .membership()
            .get_joint_config()
            .len()
            > 1;
        unfinished = if joint && inner.leads() {
            unfinished + 1
        } else {
            0
        };
        if unfinished >= UNFINISHED_LOOKS {
            inner.finish_change().await;
            unfinished = 0;
        }
    }
}

/// The log that a member which answers still has to receive: purged under it, it would need a snapshot, and
/// while that is on its way more log than is kept piles up, and so on for ever. Bounded: beyond
/// [`HELD_BYTES_MAX`] of log it is the snapshot after all.
fn needed(inner: &Inner, metrics: &RaftMetrics<Types>) -> Option<u64> {
    if inner.log.disk_bytes() > HELD_BYTES_MAX {
        return None;
    }
    let lease = inner.config.election.1;
    let all = metrics.replication.as_ref()?.iter();
    all.filter(|(id, _)| **id != metrics.id && answers(metrics, **id, lease))
        .filter_map(|(_, matched)| matched.map(|id| id.index))
        .min()
}

fn worth_a_snapshot(metrics: &RaftMetrics<Types>) -> bool {
    let index = |id: Option<crate::types::LogId>| id.map_or(0, |id| id.index);
    index(metrics.last_applied) > index(metrics.snapshot)
}

/// Purge what the snapshot covers, less what is kept for slow members, unless a snapshot is on its
/// way to one: it will need the log right behind that snapshot.
async fn purge(inner: &Inner, metrics: &RaftMetrics<Types>) {
    let Some(snapshot) = metrics.snapshot else {
        return;
    };
    let Some(upto) = snapshot.index.checked_sub(inner.config.keep_entries) else {
        return;
    };
    let upto = upto.min(needed(inner, metrics).unwrap_or(upto));
    let purged = metrics.purged.map_or(0, |id| id.index);
    // In steps worth a file: not one entry at a time while the kept range slides.
    let step = (inner.config.keep_entries / 4).max(1);
    if upto < purged + step || inner.peers.sending_snapshot() {
        return;
    }
    // The core refuses what it still sends, and says so itself when it has ended.
    let _ = inner.raft.trigger().purge_log(upto).await;
}
