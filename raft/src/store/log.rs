//! The Raft log, vote and committed mark over [`mainstay_storage::log::Log`]: entries to bytes and
//! back, durability callbacks to the consensus core. Knows no state machine.
//!
//! Ordering is the log's promise: votes, appends, truncations and purges go through one queue, so
//! only the vote is waited for here; everything later in the queue implies everything before it.

use super::fault::{FaultCell, chain};
use crate::codec;
use crate::types::{Entry, LogId, Types, Vote};
use mainstay_storage::StorageError;
use mainstay_storage::log::{Log, LogEntry, Pace};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, entry::RaftEntry};
use parking_lot::{Condvar, Mutex};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// One replication message carries about this many bytes of entries.
const REPLICATE_BYTES: usize = 512 << 10;
/// Entries are read for applying in portions of about this size.
const APPLY_BYTES: usize = 1 << 20;
/// The committed mark is only a hint (it spares a restarted member a wait): written this often.
const COMMITTED_EVERY: Duration = Duration::from_millis(200);

/// Counts log changes issued and made durable, so that a checkpoint can wait until the log has
/// caught up with what was applied from it.
///
/// A follower applies what the *group* committed, which its own disk may not have yet. A checkpoint
/// ahead of the durable log would leave a hole, or entries of an older leader at applied positions,
/// after a power cut. So the checkpoint waits for every log change issued before it looked.
#[derive(Debug, Default)]
pub(crate) struct LogProgress {
    issued: AtomicU64,
    done: Mutex<Progress>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    durable: u64,
    failed: bool,
}

impl LogProgress {
    fn issue(&self) -> u64 {
        self.issued.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn complete(&self, ticket: u64, ok: bool) {
        let mut done = self.done.lock();
        done.durable = done.durable.max(ticket);
        done.failed |= !ok;
        self.moved.notify_all();
    }

    /// The latest change issued.
    pub(crate) fn issued(&self) -> u64 {
        self.issued.load(Ordering::SeqCst)
    }

    /// Block until everything up to `ticket` is durable; false when the log has failed.
    pub(crate) fn wait(&self, ticket: u64) -> bool {
        let mut done = self.done.lock();
        while done.durable < ticket && !done.failed {
            self.moved.wait(&mut done);
        }
        !done.failed
    }
}

#[derive(Debug)]
struct Cache {
    vote: Option<Vote>,
    committed: Option<LogId>,
    committed_written: Option<Instant>,
}

struct Shared {
    log: Arc<dyn Log>,
    cache: Mutex<Cache>,
    progress: Arc<LogProgress>,
    /// Bytes appended since this process started.
    appended: AtomicU64,
    fault: FaultCell,
}

/// A cheap handle; all of them see the same log.
#[derive(Clone)]
pub(crate) struct LogStore {
    shared: Arc<Shared>,
}

impl LogStore {
    pub(crate) fn open(log: Arc<dyn Log>, fault: FaultCell) -> io::Result<Self> {
        let state = log.state();
        let cache = Cache {
            vote: state.vote.as_deref().map(codec::decode_vote).transpose()?,
            committed: state
                .committed
                .as_deref()
                .map(codec::decode_log_id)
                .transpose()?,
            committed_written: None,
        };
        let shared = Shared {
            log,
            cache: Mutex::new(cache),
            progress: Arc::new(LogProgress::default()),
            appended: AtomicU64::new(0),
            fault,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    pub(crate) fn progress(&self) -> Arc<LogProgress> {
        self.shared.progress.clone()
    }

    pub(crate) fn vote(&self) -> Option<Vote> {
        self.shared.cache.lock().vote
    }

    /// The last position the log speaks for: its last entry, or what it was purged up to.
    pub(crate) fn end(&self) -> Option<u64> {
        let state = self.shared.log.state();
        state.last.max(state.purged.map(|(index, _)| index))
    }

    /// Lose what comes after `index`, and wait until it is lost; nor know of a commit behind `committed`:
    /// a member that did would notice.
    #[cfg(feature = "seeded-bugs")]
    pub(crate) fn forget_after(&self, index: u64, committed: Option<LogId>) {
        self.shared.cache.lock().committed = committed;
        let ticket = self.shared.progress.issue();
        self.shared
            .log
            .truncate_after(Some(index), self.done(ticket));
        self.shared.progress.wait(ticket);
    }

    /// Bytes of entries appended since this process started.
    pub(crate) fn appended_bytes(&self) -> u64 {
        self.shared.appended.load(Ordering::Relaxed)
    }

    /// How fast the disk under it is.
    pub(crate) fn pace(&self) -> Pace {
        self.shared.log.pace()
    }

    /// Bytes the log takes on disk.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.shared.log.state().disk_bytes
    }

    fn read_some(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let entries = self
            .shared
            .log
            .read(start..end, max_bytes)
            .map_err(|e| self.failed(&e))?;
        entries
            .into_iter()
            .map(|raw| {
                let entry = codec::decode_entry(raw.bytes)?;
                if entry.log_id.index != raw.index {
                    let text = format!("entry {} says it is {}", raw.index, entry.log_id);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                Ok(entry)
            })
            .collect()
    }

    fn read_all(&self, mut start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut all = Vec::new();
        while start < end {
            let some = self.read_some(start, end, APPLY_BYTES)?;
            let Some(last) = some.last() else { break };
            start = last.log_id.index + 1;
            all.extend(some);
        }
        Ok(all)
    }

    /// Entries to apply, from `at` on. A hole would be applied as if nothing had been there.
    fn read_portion(&self, at: u64, end: u64) -> io::Result<Vec<Entry>> {
        let some = self.read_some(at, end, APPLY_BYTES)?;
        for (expected, entry) in (at..).zip(&some) {
            if entry.log_id.index != expected {
                return Err(self.hole(expected));
            }
        }
        let last = || self.shared.log.state().last;
        if some.is_empty() && last().is_some_and(|last| at <= last) {
            return Err(self.hole(at));
        }
        Ok(some)
    }

    fn hole(&self, index: u64) -> io::Error {
        let text = format!("entry {index} is missing before the log's end");
        self.shared.fault.raise(format!("log: {text}"));
        io::Error::new(io::ErrorKind::InvalidData, text)
    }

    fn failed(&self, error: &StorageError) -> io::Error {
        let text = chain(error);
        self.shared.fault.raise(format!("log: {text}"));
        io::Error::other(text)
    }

    /// A callback for a change nobody waits for: it only keeps count.
    fn done(&self, ticket: u64) -> mainstay_storage::log::Done {
        let store = self.clone();
        Box::new(move |result| {
            if let Err(e) = &result {
                store.failed(e);
            }
            store.shared.progress.complete(ticket, result.is_ok());
        })
    }

    fn log_id_at(&self, index: u64) -> io::Result<LogId> {
        let found = self.read_some(index, index + 1, 1)?;
        let entry = found
            .first()
            .ok_or_else(|| io::Error::other(format!("no entry {index}")))?;
        Ok(entry.log_id)
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&i) => i,
        Bound::Excluded(&i) => i + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&i) => i.saturating_add(1),
        Bound::Excluded(&i) => i,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        self.read_all(start, end)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.shared.cache.lock().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read_some(start, end, REPLICATE_BYTES)
    }

    /// In portions: a member that starts far behind must not hold its whole log in memory.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl futures::Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let portions =
            futures::stream::unfold((self.clone(), start), move |(store, at)| async move {
                if at >= end {
                    return None;
                }
                match store.read_portion(at, end) {
                    Ok(some) => {
                        let next = some.last()?.log_id.index + 1;
                        Some((some.into_iter().map(Ok).collect::<Vec<_>>(), (store, next)))
                    }
                    Err(e) => Some((vec![Err(e)], (store, end))),
                }
            });
        use futures::StreamExt as _;
        Box::pin(portions.flat_map(futures::stream::iter))
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let state = self.shared.log.state();
        let purged = state
            .purged
            .map(|(_, mark)| codec::decode_log_id(&mark))
            .transpose()?;
        let last = match state.last {
            Some(index) => Some(self.log_id_at(index)?),
            None => purged,
        };
        Ok(LogState {
            last_purged_log_id: purged,
            last_log_id: last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (tx, rx) = oneshot::channel();
        let done = Box::new(move |result| {
            let _ = tx.send(result);
        });
        self.shared.log.save_vote(codec::encode_vote(vote), done);
        match rx.await {
            Ok(Ok(())) => {
                self.shared.cache.lock().vote = Some(*vote);
                Ok(())
            }
            Ok(Err(e)) => Err(self.failed(&e)),
            Err(_) => Err(io::Error::other("the log's writer is gone")),
        }
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        {
            let mut cache = self.shared.cache.lock();
            cache.committed = committed;
            if cache
                .committed_written
                .is_some_and(|at| at.elapsed() < COMMITTED_EVERY)
            {
                return Ok(());
            }
            cache.committed_written = Some(Instant::now());
        }
        let ticket = self.shared.progress.issue();
        self.shared
            .log
            .save_committed(committed.map(codec::encode_log_id), self.done(ticket));
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.shared.cache.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<LogEntry> = entries
            .into_iter()
            .map(|e| LogEntry {
                index: e.index(),
                bytes: codec::encode_entry(&e),
            })
            .collect();
        let bytes: u64 = entries.iter().map(|e| e.bytes.len() as u64).sum();
        self.shared.appended.fetch_add(bytes, Ordering::Relaxed);
        let ticket = self.shared.progress.issue();
        let store = self.clone();
        let done = Box::new(move |result: mainstay_storage::Result<()>| {
            store.shared.progress.complete(ticket, result.is_ok());
            callback.io_completed(result.map_err(|e| store.failed(&e)));
        });
        self.shared.log.append(entries, done);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let ticket = self.shared.progress.issue();
        self.shared
            .log
            .truncate_after(last.map(|id| id.index), self.done(ticket));
        Ok(())
    }

    /// The core purges only what a durable snapshot covers, and snapshots are made only of
    /// checkpointed state (see `store::checkpoint`): nothing purged is ever needed again.
    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let ticket = self.shared.progress.issue();
        self.shared
            .log
            .purge(upto.index, codec::encode_log_id(upto), self.done(ticket));
        Ok(())
    }
}
