//! The one thread that changes the files: takes everything that is queued, writes it at once, syncs once,
//! then calls back in order. The first failure is the last thing it does to the files.

use super::index::{Index, Slot};
use super::record::{HEADER_LEN, Place, Record, Start};
use super::segment::{self, Segment};
use super::wal::{Inner, Shared, WalOptions};
use super::{Done, LogEntry};
use crate::disk::io_error;
use crate::{Result, StorageError};
use bytes::Bytes;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// The write buffer is given back when a batch made it larger than this.
const BUFFER_KEPT_MAX: usize = 8 << 20;

/// A queued change.
pub(super) struct Op {
    pub(super) change: Change,
    pub(super) done: Done,
}

/// What to write for it.
pub(super) enum Change {
    Append {
        ticket: u64,
        entries: Vec<LogEntry>,
    },
    Vote(Bytes),
    Committed(Option<Bytes>),
    Truncate(Option<u64>),
    Purge {
        index: u64,
        mark: Bytes,
    },
    /// Already so.
    Nothing,
    /// Changed nothing; the caller hears why when its turn comes.
    Refused(StorageError),
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Op").finish_non_exhaustive()
    }
}

impl Change {
    fn bytes(&self) -> usize {
        match self {
            Self::Append { entries, .. } => {
                entries.iter().map(|e| e.bytes.len() + HEADER_LEN + 8).sum()
            }
            _ => HEADER_LEN,
        }
    }
}

/// State of the writer thread. The last of `segments` is the one being written.
pub(super) struct Writer {
    dir: PathBuf,
    options: WalOptions,
    pub(super) segments: VecDeque<Segment>,
    /// What a new segment's first record must say.
    start: Start,
    /// Offset in the newest segment below which everything was synced.
    durable: u64,
    /// Length of the newest segment's file: beyond its records are zeros.
    length: u64,
    /// The file says so itself (a record with that offset was written).
    marked: bool,
    buffer: Vec<u8>,
    placed: Vec<(u64, Slot)>,
}

impl Writer {
    pub(super) fn new(
        dir: &Path,
        options: WalOptions,
        segments: VecDeque<Segment>,
        index: &Index,
    ) -> Self {
        Self {
            dir: dir.to_path_buf(),
            options,
            start: Start {
                oldest: segments.front().map_or(0, |s| s.number),
                vote: index.vote.clone(),
                committed: index.committed.clone(),
                purged: index.purged.clone(),
            },
            durable: segments.back().map_or(0, |s| s.len),
            length: segments.back().map_or(0, |s| s.len),
            marked: false,
            segments,
            buffer: Vec::new(),
            placed: Vec::new(),
        }
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.len).sum()
    }

    /// Until the log is dropped.
    pub(super) fn run(mut self, shared: &Shared) {
        while let Some(mut ops) = next_batch(shared, self.options.batch_bytes) {
            shared.meter.begin();
            let written = catch_unwind(AssertUnwindSafe(|| self.write(&mut ops)))
                .unwrap_or_else(|_| Err(StorageError::Stopped("the log writer panicked".into())));
            shared.meter.end();
            let written = written.map(|gone| self.publish(shared, gone));
            match written {
                Ok(gone) => {
                    call_back(ops);
                    segment::delete(&*self.options.disk, &self.dir, &gone);
                    if let Err(error) = self.mark_when_idle(shared) {
                        return fail(shared, Vec::new(), error);
                    }
                }
                Err(error) => return fail(shared, ops, error),
            }
        }
        if let Err(error) = self.seal() {
            tracing::warn!(%error, "cannot seal the log at close; nothing is lost");
        }
    }

    /// Make a batch durable; returns the segments that are not needed any more.
    fn write(&mut self, ops: &mut [Op]) -> Result<Vec<Segment>> {
        if self.active().len >= self.options.segment_bytes {
            self.seal()?;
            self.start_segment(self.active().number + 1)?;
        }
        let last_committed = ops
            .iter()
            .rposition(|op| matches!(op.change, Change::Committed(_)));
        let mut sync = false;
        for (i, op) in ops.iter().enumerate() {
            match &op.change {
                Change::Append { ticket, entries } => self.put_entries(*ticket, entries),
                Change::Vote(vote) => {
                    self.start.vote = Some(vote.clone());
                    self.put(&Record::Vote(vote.clone()));
                }
                Change::Committed(mark) => {
                    self.start.committed.clone_from(mark);
                    if Some(i) == last_committed {
                        self.put(&Record::Committed(mark.clone()));
                    }
                    continue;
                }
                Change::Truncate(after) => self.put(&Record::Truncate(*after)),
                Change::Purge { index, mark } => self.put_purge(*index, mark),
                Change::Nothing | Change::Refused(_) => continue,
            }
            sync = true;
        }
        self.flush(sync)?;
        Ok(self.unneeded())
    }

    fn put_entries(&mut self, ticket: u64, entries: &[LogEntry]) {
        for entry in entries {
            let slot = Slot {
                ticket,
                segment: self.active().number,
                offset: self.end(),
                len: u32::try_from(entry.bytes.len()).unwrap_or(u32::MAX),
            };
            self.placed.push((entry.index, slot));
            self.put(&Record::Entry(entry.index, entry.bytes.clone()));
            let highest = &mut self.active_mut().highest;
            *highest = (*highest).max(Some(entry.index));
        }
    }

    fn put_purge(&mut self, index: u64, mark: &Bytes) {
        let newest = self.active().number;
        let oldest = self
            .segments
            .iter()
            .find(|s| s.highest.is_some_and(|h| h > index))
            .map_or(newest, |s| s.number);
        self.start.purged = Some((index, mark.clone()));
        self.start.oldest = oldest;
        self.put(&Record::Purge {
            index,
            oldest,
            mark: mark.clone(),
        });
    }

    fn put(&mut self, record: &Record) {
        let place = Place {
            segment: self.active().number,
            offset: self.end(),
            durable: self.durable,
        };
        record.encode(place, &mut self.buffer);
        self.marked = true;
    }

    /// Write the buffer at the end of the newest segment.
    fn flush(&mut self, sync: bool) -> Result<()> {
        if !self.buffer.is_empty() {
            self.lengthen()?;
            let active = self.active();
            active
                .file
                .write_all_at(&self.buffer, active.len)
                .map_err(io_error("write", &active.path))?;
            self.active_mut().len += self.buffer.len() as u64;
            self.buffer.clear();
            self.buffer.shrink_to(BUFFER_KEPT_MAX);
        }
        if sync {
            let active = self.active();
            active
                .file
                .sync_data()
                .map_err(io_error("sync", &active.path))?;
            self.durable = self.active().len;
            self.marked = false;
        }
        Ok(())
    }

    /// Make room for the buffer ahead of its records; see [`WalOptions::ahead_bytes`].
    fn lengthen(&mut self) -> Result<()> {
        if self.end() <= self.length {
            return Ok(());
        }
        let length = self.end().next_multiple_of(self.options.ahead_bytes.max(1));
        let active = self.active();
        active
            .file
            .set_len(length)
            .map_err(io_error("lengthen", &active.path))?;
        self.length = length;
        Ok(())
    }

    /// Close a batch under the lock: readers learn the places.
    fn publish(&mut self, shared: &Shared, gone: Vec<Segment>) -> Vec<Segment> {
        let mut inner = shared.inner.lock();
        for (index, slot) in self.placed.drain(..) {
            inner.index.place(index, slot);
        }
        inner.index.evict(self.options.cache_bytes);
        for segment in &gone {
            inner.segments.remove(&segment.number);
        }
        let active = self.active();
        inner
            .segments
            .entry(active.number)
            .or_insert_with(|| active.clone());
        inner.disk_bytes = self.disk_bytes();
        gone
    }

    fn unneeded(&mut self) -> Vec<Segment> {
        let oldest = self.start.oldest;
        let keep = self.segments.partition_point(|s| s.number < oldest);
        self.segments.drain(..keep).collect()
    }

    /// When nobody waits, say in the file that it is durable up to here: damage there is then told from
    /// a torn write even in the last batch. Not synced: it rides along with the next batch.
    fn mark_when_idle(&mut self, shared: &Shared) -> Result<()> {
        if self.marked || !shared.inner.lock().queue.is_empty() {
            return Ok(());
        }
        self.put(&Record::Synced);
        self.flush(false)
    }

    /// Make everything durable and say so in the file, which ends there.
    fn seal(&mut self) -> Result<()> {
        if self.durable < self.active().len {
            self.flush(true)?;
        }
        self.put(&Record::Synced);
        self.flush(false)?;
        let active = self.active();
        active
            .file
            .set_len(active.len)
            .map_err(io_error("shorten", &active.path))?;
        self.length = self.active().len;
        self.flush(true)
    }

    pub(super) fn start_segment(&mut self, number: u64) -> Result<()> {
        if self.segments.is_empty() {
            self.start.oldest = number;
        }
        let start = self.start.clone();
        let segment = segment::create(&*self.options.disk, &self.dir, number, start)?;
        self.durable = segment.len;
        self.length = segment.len;
        self.marked = false;
        self.segments.push_back(segment);
        Ok(())
    }

    fn end(&self) -> u64 {
        self.active().len + self.buffer.len() as u64
    }

    fn active(&self) -> &Segment {
        self.segments
            .back()
            .expect("open creates the first segment, and the newest is never unneeded")
    }

    fn active_mut(&mut self) -> &mut Segment {
        self.segments
            .back_mut()
            .expect("open creates the first segment, and the newest is never unneeded")
    }
}

/// Wait for work; `None` = the log is being dropped and everything was written.
fn next_batch(shared: &Shared, bytes_max: usize) -> Option<Vec<Op>> {
    let mut inner = shared.inner.lock();
    while inner.queue.is_empty() {
        if inner.closing {
            return None;
        }
        shared.wake.wait(&mut inner);
    }
    Some(take(&mut inner, bytes_max))
}

fn take(inner: &mut Inner, bytes_max: usize) -> Vec<Op> {
    let mut bytes = 0;
    let count = inner
        .queue
        .iter()
        .take_while(|op| {
            let fits = bytes < bytes_max;
            bytes += op.change.bytes();
            fits
        })
        .count();
    inner.queue.drain(..count).collect()
}

fn call_back(ops: Vec<Op>) {
    for op in ops {
        let result = match op.change {
            Change::Refused(error) => Err(error),
            _ => Ok(()),
        };
        answer(op.done, result);
    }
}

/// A callback that panics must not take the others with it.
fn answer(done: Done, result: Result<()>) {
    if catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
        tracing::error!("a callback of the log panicked");
    }
}

/// Nothing is written any more. What could not be written, and everything after it, is answered so.
fn fail(shared: &Shared, ops: Vec<Op>, error: StorageError) {
    let why = describe(&error);
    tracing::error!(error = %why, "the log stopped: a write failed and is never retried");
    shared.inner.lock().stopped = Some(why.clone());
    for op in ops {
        answer(op.done, Err(StorageError::Stopped(why.clone())));
    }
    while let Some(ops) = next_batch(shared, usize::MAX) {
        for op in ops {
            answer(op.done, Err(StorageError::Stopped(why.clone())));
        }
    }
}

/// The whole chain in one line: the answer to later changes carries no source.
fn describe(error: &StorageError) -> String {
    match error {
        StorageError::Io { source, .. } => format!("{error}: {source}"),
        StorageError::Stopped(why) => why.clone(),
        other => other.to_string(),
    }
}
