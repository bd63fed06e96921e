//! The log in files: the part that callers see. Changes become visible under one lock, which also gives
//! them their place in the queue; a writer thread makes them durable. Knows no record format.

use super::index::{Index, Slot, Source};
use super::pace::{Meter, Pace};
use super::segment::{self, Segment};
use super::writer::{Change, Op, Writer};
use super::{BYTES_LEN_MAX, Done, Log, LogEntry, LogState, recover};
use crate::disk::{Disk, RealDisk, create_dir_durable, io_error};
use crate::{Result, StorageError};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Sizes of a [`Wal`], and the disk under it.
#[derive(Clone, Debug)]
pub struct WalOptions {
    /// A segment that reached this length is followed by a new one.
    pub segment_bytes: u64,
    /// Newest entries are kept in memory up to this many bytes (and all that are not written yet).
    pub cache_bytes: usize,
    /// About the most that is written before one sync: bounds the memory and the wait of the first in line.
    pub batch_bytes: usize,
    /// The file is lengthened ahead of the records in steps of this many bytes. A sync within the length
    /// that the file has already writes data only; one that lengthens it waits for the file system's
    /// journal as well, which took half as long again and had the worst outliers.
    pub ahead_bytes: u64,
    /// Where the files are.
    pub disk: Arc<dyn Disk>,
}

impl Default for WalOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            cache_bytes: 16 << 20,
            batch_bytes: 4 << 20,
            ahead_bytes: 1 << 20,
            disk: Arc::new(RealDisk),
        }
    }
}

/// The write-ahead log: segment files in one directory, one writer thread. Dropping it writes what is
/// queued, and waits for that.
#[derive(Debug)]
pub struct Wal {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

/// What callers and the writer share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) inner: Mutex<Inner>,
    pub(super) wake: Condvar,
    pub(super) meter: Meter,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) index: Index,
    pub(super) queue: VecDeque<Op>,
    /// Files that hold entries, for readers.
    pub(super) segments: BTreeMap<u64, Segment>,
    pub(super) disk_bytes: u64,
    pub(super) stopped: Option<String>,
    pub(super) closing: bool,
    next_ticket: u64,
}

impl Wal {
    /// Open or create the log in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, WalOptions::default())
    }

    /// Open or create with other sizes or another disk.
    pub fn open_with(dir: &Path, options: WalOptions) -> Result<Self> {
        create_dir_durable(&*options.disk, dir)?;
        let found = recover::recover(&*options.disk, dir, options.cache_bytes)?;
        let index = found.index;
        let mut writer = Writer::new(dir, options, found.segments, &index);
        if writer.segments.is_empty() {
            writer.start_segment(found.next_number)?;
        }
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                index,
                queue: VecDeque::new(),
                segments: writer
                    .segments
                    .iter()
                    .map(|s| (s.number, s.clone()))
                    .collect(),
                disk_bytes: writer.disk_bytes(),
                stopped: None,
                closing: false,
                next_ticket: 1,
            }),
            wake: Condvar::new(),
            meter: Meter::default(),
        });
        let for_writer = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("log-writer".into())
            .spawn(move || writer.run(&for_writer))
            .map_err(io_error("start the writer thread for", dir))?;
        Ok(Self {
            shared,
            writer: Some(writer),
        })
    }

    /// Make a change visible and queue it; refusals wait their turn too, so that callbacks stay in order.
    fn change(&self, done: Done, change: impl FnOnce(&mut Inner) -> Result<Change>) {
        let mut inner = self.shared.inner.lock();
        let change = match &inner.stopped {
            Some(why) => Err(StorageError::Stopped(why.clone())),
            None => change(&mut inner),
        };
        let change = change.unwrap_or_else(Change::Refused);
        inner.queue.push_back(Op { change, done });
        drop(inner);
        self.shared.wake.notify_one();
    }
}

impl Inner {
    fn append(&mut self, entries: Vec<LogEntry>) -> Result<Change> {
        let mut next = self.index.next();
        for entry in &entries {
            if next.is_some_and(|next| next != entry.index) {
                return Err(StorageError::Misuse(format!(
                    "append of entry {}, but the log continues at {next:?}",
                    entry.index
                )));
            }
            check_len(&entry.bytes)?;
            next = Some(entry.index + 1);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        for entry in &entries {
            let slot = Slot {
                ticket,
                len: u32::try_from(entry.bytes.len()).unwrap_or(u32::MAX),
                ..Slot::default()
            };
            self.index.push(entry.clone(), slot);
        }
        Ok(Change::Append { ticket, entries })
    }

    fn purge(&mut self, index: u64, mark: Bytes) -> Result<Change> {
        check_len(&mark)?;
        if !self.index.purges(index) {
            return Ok(Change::Nothing);
        }
        self.index.purge(index, mark.clone());
        Ok(Change::Purge { index, mark })
    }
}

fn check_len(bytes: &Bytes) -> Result<()> {
    if bytes.len() > BYTES_LEN_MAX {
        return Err(StorageError::Misuse(format!(
            "{} bytes in one log record; at most {BYTES_LEN_MAX} are allowed",
            bytes.len()
        )));
    }
    Ok(())
}

impl Log for Wal {
    fn state(&self) -> LogState {
        let inner = self.shared.inner.lock();
        inner.index.state(inner.disk_bytes)
    }

    fn pace(&self) -> Pace {
        self.shared.meter.pace()
    }

    fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogEntry>> {
        let inner = self.shared.inner.lock();
        let plan: Vec<_> = inner
            .index
            .plan(range, max_bytes)
            .into_iter()
            .map(|(index, source)| match source {
                Source::Memory(bytes) => (index, Ok(bytes)),
                Source::File(slot) => (
                    index,
                    Err((slot, inner.segments.get(&slot.segment).cloned())),
                ),
            })
            .collect();
        drop(inner);
        // A file that is deleted now can still be read: it is open.
        plan.into_iter()
            .map(|(index, source)| {
                let bytes = match source {
                    Ok(bytes) => bytes,
                    Err((slot, Some(segment))) => {
                        segment::read_entry(&segment, slot.offset, slot.len as usize, index)?
                    }
                    Err((slot, None)) => {
                        return Err(StorageError::Stopped(format!(
                            "entry {index} is in segment {}, which is not open",
                            slot.segment
                        )));
                    }
                };
                Ok(LogEntry { index, bytes })
            })
            .collect()
    }

    fn append(&self, entries: Vec<LogEntry>, done: Done) {
        self.change(done, |inner| inner.append(entries));
    }

    fn save_vote(&self, vote: Bytes, done: Done) {
        self.change(done, |inner| {
            check_len(&vote)?;
            inner.index.vote = Some(vote.clone());
            Ok(Change::Vote(vote))
        });
    }

    fn save_committed(&self, mark: Option<Bytes>, done: Done) {
        self.change(done, |inner| {
            mark.as_ref().map_or(Ok(()), check_len)?;
            inner.index.committed.clone_from(&mark);
            Ok(Change::Committed(mark))
        });
    }

    fn truncate_after(&self, index: Option<u64>, done: Done) {
        self.change(done, |inner| {
            inner.index.truncate_after(index);
            Ok(Change::Truncate(index))
        });
    }

    fn purge(&self, index: u64, mark: Bytes, done: Done) {
        self.change(done, |inner| inner.purge(index, mark));
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.shared.inner.lock().closing = true;
        self.shared.wake.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
        {
            // The last owner may be a callback, on the writer itself: then nobody can wait for it.
            drop(writer.join());
        }
    }
}
