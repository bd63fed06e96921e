//! Entries that a log lacks in its middle must not be passed over.

use super::fault::FaultCell;
use super::log::LogStore;
use crate::codec::{LogIdV1, encode_entry};
use crate::types::{Entry, Payload};
use bytes::Bytes;
use futures::StreamExt;
use mainstay_storage::Result;
use mainstay_storage::log::{Done, Log, LogEntry, LogState, MemoryLog, Pace};
use openraft::RaftLogReader;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// A log that has lost some entries.
struct Holed(MemoryLog, Range<u64>);

impl Log for Holed {
    fn state(&self) -> LogState {
        self.0.state()
    }
    fn pace(&self) -> Pace {
        self.0.pace()
    }
    fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogEntry>> {
        let mut found = self.0.read(range, max_bytes)?;
        found.retain(|entry| !self.1.contains(&entry.index));
        Ok(found)
    }
    fn append(&self, entries: Vec<LogEntry>, done: Done) {
        self.0.append(entries, done);
    }
    fn save_vote(&self, vote: Bytes, done: Done) {
        self.0.save_vote(vote, done);
    }
    fn save_committed(&self, mark: Option<Bytes>, done: Done) {
        self.0.save_committed(mark, done);
    }
    fn truncate_after(&self, index: Option<u64>, done: Done) {
        self.0.truncate_after(index, done);
    }
    fn purge(&self, index: u64, mark: Bytes, done: Done) {
        self.0.purge(index, mark, done);
    }
}

/// Read `range` of the entries 0 to 9 without those in `hole`; the fault raised, if any.
async fn read(hole: Range<u64>, range: Range<u64>) -> (io::Result<Vec<u64>>, Option<String>) {
    let log = MemoryLog::new();
    let entries = (0..10).map(|index| {
        let id = LogIdV1 {
            term: 1,
            leader: 1,
            index,
        };
        let entry = Entry {
            log_id: id.into(),
            payload: Payload::Blank,
        };
        LogEntry {
            index,
            bytes: encode_entry(&entry),
        }
    });
    log.append(entries.collect(), Box::new(|done| done.unwrap()));
    let fault = FaultCell::new();
    let mut store = LogStore::open(Arc::new(Holed(log, hole)), fault.clone()).unwrap();
    let items: Vec<io::Result<Entry>> = store.entries_stream(range).await.collect().await;
    let read = items.into_iter().map(|e| Ok(e?.log_id.index)).collect();
    (read, fault.get())
}

#[tokio::test]
async fn a_hole_is_an_error_and_ends_the_member() {
    // At the start, in the middle, to the end of what is asked for, all of it.
    for hole in [2..3, 4..6, 6..8, 2..8] {
        let (entries, fault) = read(hole.clone(), 2..8).await;
        assert!(entries.is_err(), "{hole:?}: {entries:?}");
        let text = format!("entry {} is missing", hole.start);
        assert!(fault.is_some_and(|why| why.contains(&text)), "{hole:?}");
    }
}

#[tokio::test]
async fn what_is_not_asked_for_or_not_there_yet_is_no_hole() {
    let (entries, fault) = read(8..9, 2..8).await;
    assert_eq!((entries.unwrap(), fault), ((2..8).collect(), None));
    let (entries, fault) = read(0..0, 5..100).await;
    assert_eq!((entries.unwrap(), fault), ((5..10).collect(), None));
}
