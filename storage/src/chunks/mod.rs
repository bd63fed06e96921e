//! Content-addressed chunks (BLAKE3 of the uncompressed bytes) in append-only packs.
//! Nothing is held before it is verified and fsynced. Refuses to know what the chunks mean.
//!
//! * `record`: a chunk's form on disk, and the check that it is what it claims to be.
//! * `direct`: appending to a pack with aligned direct writes.
//! * `pack`: naming, creating and scanning packs.
//! * `index`: where each chunk is; index files of full packs.
//! * `writer`: the one thread that writes; concurrent puts share its fsync.
//!
//! ```text
//! put -> verify (caller's thread) -> queue -> write batch -> fdatasync -> index -> answer
//! ```
//! A crash between any two of these steps loses only what was not yet answered.

mod direct;
mod index;
mod pack;
mod read;
mod record;
#[cfg(test)]
mod tests;
mod writer;

use crate::{Result, StorageError};
use bytes::Bytes;
use index::Index;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// Largest uncompressed chunk (a manifest of a very large disk); file chunks are [`CHUNK_LEN`].
pub const CHUNK_LEN_MAX: usize = 8 << 20;
/// Length of a file's chunks (the last may be shorter).
pub const CHUNK_LEN: usize = 64 << 10;
/// A pack that has grown to this length is sealed. Offsets in a pack fit 32 bits.
const PACK_LEN: u64 = 1 << 30;
/// Puts that may wait for the writer; more block their callers.
const QUEUE_LEN: usize = 64;

/// BLAKE3 of a chunk's uncompressed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// The name of these bytes.
    pub fn of(raw: &[u8]) -> Self {
        Self(*blake3::hash(raw).as_bytes())
    }
}

impl std::fmt::Display for ChunkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutReport {
    /// Chunks written.
    pub stored: u64,
    /// Chunks that were already there.
    pub known: u64,
    /// Bytes written.
    pub bytes: u64,
}

/// Figures of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkStats {
    /// Chunks held.
    pub chunks: u64,
    /// Stored bytes.
    pub stored_bytes: u64,
}

/// What [`ChunkStore::records`] found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// In the order they lie on disk. What is not held is absent.
    pub records: Vec<Record>,
    /// Held by name, but the bytes on disk are bad.
    pub damaged: Vec<ChunkId>,
}

/// The store. Cheap to clone; calls block.
#[derive(Clone, Debug)]
pub struct ChunkStore {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    queue: Option<mpsc::SyncSender<writer::Job>>,
    thread: Option<JoinHandle<()>>,
}

/// What readers and the writer share.
pub(crate) struct Shared {
    dir: PathBuf,
    index: Index,
    readers: Mutex<read::Readers>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkStore")
            .field("dir", &self.shared.dir)
            .finish_non_exhaustive()
    }
}

impl ChunkStore {
    /// Open or create. Scans what is not indexed; a torn tail is cut off.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_with(dir, PACK_LEN)
    }

    /// The same with another length at which packs are sealed (below 2 GiB).
    pub fn open_with(dir: &Path, pack_len: u64) -> Result<Self> {
        let (index, active) = pack::open_all(dir)?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            index,
            readers: Mutex::new(read::Readers::default()),
        });
        let writer = writer::Writer::new(Arc::clone(&shared), active, pack_len.min(2 << 30))?;
        let (queue, jobs) = mpsc::sync_channel(QUEUE_LEN);
        let thread = std::thread::Builder::new()
            .name("chunk-writer".to_owned())
            .spawn(move || writer.run(&jobs))
            .map_err(io("start the writer of", dir))?;
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                queue: Some(queue),
                thread: Some(thread),
            }),
        })
    }

    /// Is it held (verified and durable)?
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.inner.shared.index.get(id).is_some()
    }

    /// Uncompressed length of a chunk that is held.
    pub fn raw_len(&self, id: &ChunkId) -> Option<u32> {
        self.inner.shared.index.get(id).map(|at| at.raw_len)
    }

    /// Verify every record, write those not yet held, fsync: all are durable on return. One bad
    /// record refuses the whole batch ([`crate::StorageError::BadDigest`]).
    pub fn put(&self, records: Vec<Record>) -> Result<PutReport> {
        for record in &records {
            record.verify()?;
        }
        let total = records.len() as u64;
        let mut seen = HashSet::with_capacity(records.len());
        let fresh: Vec<Record> = records
            .into_iter()
            .filter(|r| !self.contains(&r.id) && seen.insert(r.id))
            .collect();
        if fresh.is_empty() {
            return Ok(PutReport {
                known: total,
                ..PutReport::default()
            });
        }
        let (reply, answer) = mpsc::sync_channel(1);
        let stopped = || StorageError::Stopped("the chunk writer has ended".to_owned());
        let queue = self.inner.queue.as_ref().ok_or_else(stopped)?;
        queue
            .send(writer::Job {
                records: fresh,
                reply,
            })
            .map_err(|_| stopped())?;
        let mut report = answer.recv().map_err(|_| stopped())??;
        report.known = total - report.stored;
        Ok(report)
    }

    /// A chunk's uncompressed bytes, verified; `None` if not held.
    pub fn get(&self, id: &ChunkId) -> Result<Option<Bytes>> {
        let Some(record) = self.record(id)? else {
            return Ok(None);
        };
        record
            .verify()
            .map(Some)
            .map_err(|_| StorageError::Corrupt {
                path: self.inner.shared.dir.clone(),
                detail: format!(
                    "chunk {id} does not hash to its name; fetch it from another member"
                ),
            })
    }

    /// A chunk in stored form, for sending on (the receiver verifies).
    pub fn record(&self, id: &ChunkId) -> Result<Option<Record>> {
        self.inner.shared.read(id)
    }

    /// Those of these chunks that are held, read with few large reads.
    pub fn records(&self, ids: &[ChunkId]) -> Result<Found> {
        self.inner.shared.read_many(ids)
    }

    /// Stop claiming to hold a chunk whose bytes turned out bad, so that a good copy can be put.
    /// Until then a restart may find it again, and find it bad again.
    pub fn forget(&self, id: &ChunkId) {
        self.inner.shared.index.remove(id);
    }

    /// Figures.
    pub fn stats(&self) -> ChunkStats {
        self.inner.shared.index.stats()
    }

    /// Free and total bytes of the file system it lies on.
    pub fn disk(&self) -> Result<(u64, u64)> {
        let dir = &self.inner.shared.dir;
        let stat = rustix::fs::statvfs(dir).map_err(|e| io("look at", dir)(e.into()))?;
        Ok((
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        ))
    }
}

impl Drop for Inner {
    /// The writer finishes what is queued.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // A writer that panicked has nothing more to say: its queue already refused.
            let _ = thread.join();
        }
    }
}

/// Names what was done to what, for an error of the operating system.
pub(crate) fn io(
    action: &'static str,
    path: &Path,
) -> impl Fn(std::io::Error) -> StorageError + use<> {
    let path = path.to_owned();
    move |source| StorageError::Io {
        action,
        path: path.clone(),
        source,
    }
}
