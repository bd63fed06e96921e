//! Content-addressed chunks (BLAKE3 of the uncompressed bytes) in append-only packs.
//! Nothing is held before it is verified and fsynced.

use crate::Result;
use bytes::Bytes;
use std::path::Path;

/// Largest uncompressed chunk (a manifest of a very large disk); file chunks are [`CHUNK_LEN`].
pub const CHUNK_LEN_MAX: usize = 8 << 20;
/// Length of a file's chunks (the last may be shorter).
pub const CHUNK_LEN: usize = 64 << 10;

/// BLAKE3 of a chunk's uncompressed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub [u8; 32]);

/// How a record's data is stored and sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// zstd.
    Zstd = 1,
}

/// A chunk in its stored (and sent) form.
#[derive(Clone, Debug)]
pub struct Record {
    /// Claimed name; verified before it is written.
    pub id: ChunkId,
    /// Form of `data`.
    pub codec: Codec,
    /// Uncompressed length.
    pub raw_len: u32,
    /// Stored bytes.
    pub data: Bytes,
}

/// What a `put` did.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutReport {
    /// Chunks written.
    pub stored: u64,
    /// Chunks that were already there.
    pub known: u64,
    /// Bytes written.
    pub bytes: u64,
}

/// Figures of a store.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChunkStats {
    /// Chunks held.
    pub chunks: u64,
    /// Stored bytes.
    pub stored_bytes: u64,
}

/// The store. Cheap to clone; calls block.
#[derive(Clone, Debug)]
pub struct ChunkStore {}

impl ChunkStore {
    /// Open or create. Scans what is not indexed; a torn tail is cut off.
    pub fn open(dir: &Path) -> Result<Self> {
        let _ = dir;
        todo!()
    }
    /// Is it held (verified and durable)?
    pub fn contains(&self, id: &ChunkId) -> bool {
        let _ = id;
        todo!()
    }
    /// Verify every record, write those not yet held, fsync: all are durable on return. One bad
    /// record refuses the whole batch ([`crate::StorageError::BadDigest`]).
    pub fn put(&self, records: Vec<Record>) -> Result<PutReport> {
        let _ = records;
        todo!()
    }
    /// A chunk's uncompressed bytes, verified; `None` if not held.
    pub fn get(&self, id: &ChunkId) -> Result<Option<Bytes>> {
        let _ = id;
        todo!()
    }
    /// A chunk in stored form, for sending on (the receiver verifies).
    pub fn record(&self, id: &ChunkId) -> Result<Option<Record>> {
        let _ = id;
        todo!()
    }
    /// Figures.
    pub fn stats(&self) -> ChunkStats {
        todo!()
    }
}
