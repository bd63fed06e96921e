//! Snapshot files: a header (format version, caller's meta), keys and values, a checksum at the end.
//! Written to a temporary name, fsynced, renamed, directory fsynced; a reader verifies while it reads.

use crate::Result;
use std::path::{Path, PathBuf};

/// A directory that keeps the newest snapshot file (and at most one being written or received).
#[derive(Debug)]
pub struct SnapshotDir {
    dir: PathBuf,
}

impl SnapshotDir {
    /// Open or create; removes what a crash left half written.
    pub fn open(dir: &Path) -> Result<Self> {
        let _ = dir;
        todo!()
    }
    /// Write a whole snapshot, durable on return, and drop older ones. `name` is the snapshot id.
    pub fn write(
        &self,
        name: &str,
        meta: &[u8],
        entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
    ) -> Result<PathBuf> {
        let _ = (name, meta, entries, &self.dir);
        todo!()
    }
    /// A fresh path to receive a snapshot into; [`SnapshotDir::adopt`] makes it current.
    pub fn incoming(&self, name: &str) -> PathBuf {
        let _ = name;
        todo!()
    }
    /// Verify a received file and make it the current one, durable on return.
    pub fn adopt(&self, incoming: &Path, name: &str) -> Result<PathBuf> {
        let _ = (incoming, name);
        todo!()
    }
    /// The newest whole snapshot: path and meta.
    pub fn current(&self) -> Result<Option<(PathBuf, Vec<u8>)>> {
        todo!()
    }
}

/// A verified snapshot in memory.
#[derive(Debug)]
pub struct SnapshotContent {
    /// Caller's meta.
    pub meta: Vec<u8>,
    /// Keys and values in key order.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Read and verify a snapshot file (checksum over everything) before anything of it is used.
pub fn read(path: &Path) -> Result<SnapshotContent> {
    let _ = path;
    todo!()
}
