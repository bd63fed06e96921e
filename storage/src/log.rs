//! The Raft log: opaque entries by index, the vote, the committed and purge marks.
//!
//! One ordered writer thread owns every change: write, `fdatasync`, then the callbacks in order.
//! The vote and the log go through the same queue. Appends that wait are written together and
//! share one `fdatasync`.

mod index;
mod memory;
mod pace;
mod record;
mod recover;
mod segment;
mod wal;
mod writer;

pub use memory::MemoryLog;
pub use pace::{Pace, SLOW};
pub use wal::{Wal, WalOptions};

use crate::Result;
use bytes::Bytes;
use std::ops::Range;

/// Largest entry, vote or mark; more is refused.
pub const BYTES_LEN_MAX: usize = 512 << 20;

/// Called once, in queue order, after the change is durable (or has failed for good).
pub type Done = Box<dyn FnOnce(Result<()>) + Send>;

/// One entry; `bytes` are the consensus layer's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Position.
    pub index: u64,
    /// Opaque.
    pub bytes: Bytes,
}

/// What is in the log now. Indexes are inclusive; `None` = nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogState {
    /// First entry present.
    pub first: Option<u64>,
    /// Last entry present.
    pub last: Option<u64>,
    /// Everything up to here was purged; the bytes are the caller's mark (its log id).
    pub purged: Option<(u64, Bytes)>,
    /// Last saved vote.
    pub vote: Option<Bytes>,
    /// Last saved committed mark (a hint; may lag).
    pub committed: Option<Bytes>,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// A log. Implementations: [`Wal`] (files), [`MemoryLog`] (tests). Changes return at once, are
/// visible to `read` at once, and call `done` when durable. After a failure every later change fails.
pub trait Log: Send + Sync + 'static {
    /// What is there.
    fn state(&self) -> LogState;
    /// How fast the disk under it is.
    fn pace(&self) -> Pace;
    /// Entries in the range that are present, in order, at most about `max_bytes` of them (at least one).
    fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogEntry>>;
    /// Append entries with consecutive indexes after the last one (after the purge mark when the log is
    /// empty; anywhere in a log that never held anything). Anything else is refused as
    /// [`crate::StorageError::Misuse`] and changes nothing.
    fn append(&self, entries: Vec<LogEntry>, done: Done);
    /// Save the vote.
    fn save_vote(&self, vote: Bytes, done: Done);
    /// Remember the committed mark; needs no sync of its own.
    fn save_committed(&self, mark: Option<Bytes>, done: Done);
    /// Remove every entry after `index` (all entries when `None`).
    fn truncate_after(&self, index: Option<u64>, done: Done);
    /// Remove every entry up to and including `index` (which may lie beyond the last one: a snapshot was
    /// installed), and remember `mark`. At or below the present purge mark it does nothing.
    fn purge(&self, index: u64, mark: Bytes, done: Done);
}
