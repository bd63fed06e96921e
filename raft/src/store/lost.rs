//! Is the log next to an applied state the one that it was applied from? Knows no peer.
//!
//! A log that was deleted or emptied takes the member's vote and acknowledged entries with it. Back
//! in the group, it could vote twice in a term and elect a leader that lacks what was acknowledged.
//! The applied state gives it away: nothing is checkpointed before the log under it is durable (see
//! [`checkpoint`](super::checkpoint)), the vote before any entry.

use super::log::LogStore;
use super::snapshot::open_current;
use crate::codec::Mark;
use mainstay_storage::StorageError;
use mainstay_storage::snapshot::{SnapshotDir, verify};
use std::io;
use std::sync::Arc;

/// Must this member stay out of the group? `mark`: what the engine held at the start.
pub(crate) fn lost(log: &LogStore, mark: &Mark, snapshots: &Arc<SnapshotDir>) -> io::Result<bool> {
    let Some(applied) = mark.applied else {
        return Ok(false);
    };
    if log.vote().is_none() {
        return Ok(true);
    }
    if log.end() >= Some(applied.index) {
        return Ok(false);
    }
    // A crash between installing a snapshot and purging the log up to it: the core does that now.
    let current = open_current(snapshots)?.and_then(|s| s.meta.last_log_id);
    Ok(current != Some(applied))
}

/// Discard a snapshot file that is damaged. State and log, which go together (see [`lost`]), hold what is in
/// it, so it is made again; a newer one, whose installation was cut short, comes again from the leader.
pub(crate) fn heal(snapshots: &SnapshotDir) -> mainstay_storage::Result<()> {
    let path = match snapshots.current() {
        Ok(None) => return Ok(()),
        Ok(Some((path, _))) => match verify(&path) {
            Err(StorageError::Corrupt { .. }) => path,
            other => return other.map(drop),
        },
        Err(StorageError::Corrupt { path, .. }) => path,
        Err(other) => return Err(other),
    };
    snapshots.discard(&path)
}

/// What to do about it, in words.
pub(crate) fn advice(snapshots: &SnapshotDir) -> String {
    format!(
        "the log lost entries that were durable; {}",
        mainstay_storage::error::repair_hint(snapshots.path())
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{LogIdV1, encode_log_id, encode_vote};
    use crate::store::fault::FaultCell;
    use crate::types::{LogId, Vote};
    use mainstay_storage::log::{Log, LogEntry, MemoryLog};

    fn id(index: u64) -> LogId {
        LogIdV1 {
            term: 1,
            leader: 1,
            index,
        }
        .into()
    }

    fn mark(index: u64) -> Mark {
        Mark {
            applied: Some(id(index)),
            ..Mark::default()
        }
    }

    fn log(vote: bool, entries: u64, purged: Option<u64>) -> LogStore {
        let log = MemoryLog::new();
        if vote {
            log.save_vote(encode_vote(&Vote::new(1, 1)), Box::new(drop));
        }
        let entries = (0..entries).map(|index| LogEntry {
            index,
            bytes: bytes::Bytes::new(),
        });
        log.append(entries.collect(), Box::new(drop));
        if let Some(index) = purged {
            log.purge(index, encode_log_id(id(index)), Box::new(drop));
        }
        LogStore::open(Arc::new(log), FaultCell::new()).unwrap()
    }

    #[test]
    fn a_log_that_ends_before_the_applied_state_is_told_from_a_cut_install() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Arc::new(SnapshotDir::open(dir.path()).unwrap());
        let is_lost = |log: &LogStore, mark: &Mark| lost(log, mark, &snapshots).unwrap();
        assert!(!is_lost(&log(false, 0, None), &Mark::default()), "new");
        assert!(!is_lost(&log(true, 8, None), &mark(7)));
        assert!(!is_lost(&log(true, 8, Some(7)), &mark(7)), "all purged");
        assert!(is_lost(&log(false, 8, None), &mark(7)), "no vote");
        assert!(is_lost(&log(true, 7, None), &mark(7)), "one entry short");
        assert!(is_lost(&log(true, 7, Some(6)), &mark(7)), "purged, short");
        assert!(is_lost(&log(true, 0, None), &mark(0)), "empty");
        snapshots
            .write("s", &mark(7).encode(), &mut std::iter::empty())
            .unwrap();
        assert!(!is_lost(&log(true, 3, None), &mark(7)), "a cut install");
        assert!(
            is_lost(&log(true, 3, None), &mark(8)),
            "beyond the snapshot"
        );
        assert!(is_lost(&log(false, 3, None), &mark(7)), "no vote, snapshot");
    }

    #[test]
    fn the_advice_names_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("c1");
        let snapshots = SnapshotDir::open(&root.join("snapshots")).unwrap();
        let command = format!("`mainstay member repair --data-dir {}`", root.display());
        assert!(advice(&snapshots).contains(&command));
    }

    #[test]
    fn a_damaged_snapshot_is_discarded_and_a_good_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = SnapshotDir::open(dir.path()).unwrap();
        heal(&snapshots).unwrap();
        let entries = [(b"k".to_vec(), vec![7; 100])];
        for byte in [0, 30, 100] {
            let path = snapshots
                .write("s", &mark(7).encode(), &mut entries.clone().into_iter())
                .unwrap();
            heal(&snapshots).unwrap();
            assert!(path.exists() && !snapshots.lacking());
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[byte] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            heal(&snapshots).unwrap();
            assert!(!path.exists() && snapshots.lacking(), "byte {byte}");
        }
    }
}
