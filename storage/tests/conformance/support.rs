//! Helpers: waiting for callbacks with a bound, a small deterministic random generator.

use bytes::Bytes;
use mainstay_storage::Result;
use mainstay_storage::log::{Done, Log, LogEntry, Wal, WalOptions};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

/// Nothing here takes this long.
pub(crate) const BOUND: Duration = Duration::from_secs(30);

/// Start a change and wait for its callback.
pub(crate) fn wait(start: impl FnOnce(Done)) -> Result<()> {
    let (tx, rx) = mpsc::channel();
    start(Box::new(move |result| {
        drop(tx.send(result));
    }));
    rx.recv_timeout(BOUND).expect("the callback never came")
}

pub(crate) fn append(log: &dyn Log, from: u64, payloads: &[&[u8]]) -> Result<()> {
    let entries = (from..)
        .zip(payloads)
        .map(|(index, bytes)| entry(index, bytes))
        .collect();
    wait(|done| log.append(entries, done))
}

pub(crate) fn entry(index: u64, bytes: &[u8]) -> LogEntry {
    LogEntry {
        index,
        bytes: Bytes::copy_from_slice(bytes),
    }
}

pub(crate) fn all(log: &dyn Log) -> Vec<LogEntry> {
    log.read(0..u64::MAX, usize::MAX).unwrap()
}

/// Small segments and a small cache, so that every path is taken.
pub(crate) fn small(dir: &Path) -> Wal {
    Wal::open_with(dir, small_options()).unwrap()
}

pub(crate) fn small_options() -> WalOptions {
    WalOptions {
        segment_bytes: 700,
        cache_bytes: 100,
        ahead_bytes: 300,
        ..WalOptions::default()
    }
}

/// xorshift: the same numbers in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A directory in memory where there is one: these tests check the order of writes and syncs, not the
/// speed of a disk.
pub(crate) fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}
