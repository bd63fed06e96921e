//! Content-addressed chunks (BLAKE3 of the uncompressed bytes) in append-only packs.
//! Nothing is held before it is verified and fsynced. Refuses to know what the chunks mean.
//!
//! * `record`: a chunk's form on disk, and the check that it is what it claims to be.
//! * `backend`: where packs live, behind one trait. `local`: as files in a directory.
//! * `bucket`: as objects in a bucket that several members share.
//! * `direct`: appending to a file with aligned direct writes.
//! * `pack`: naming, creating and scanning files of packs.
//! * `index`: where each chunk is; index files of full packs.
//! * `writer`: the one thread that writes; concurrent puts share its fsync.
//! * `collect`: gives back the room of chunks that nothing needs.
//! * `ages`: how long dead chunks have been dead, over a clean restart.
//! * `shared`: what all of these look at.
//! * `verify`: reads everything again, and finds what is damaged.
//!
//! ```text
//! put -> verify (caller's thread) -> queue -> write batch -> fdatasync -> index -> answer
//! ```
//! A crash between any two of these steps loses only what was not yet answered.
//!
//! No call of the store tells that a chunk is held without marking it as used in the same step: what
//! was told is kept for as long as the collector's grace, whatever the collector is doing.

mod ages;
mod backend;
mod behind;
mod bucket;
mod collect;
mod direct;
mod index;
mod local;
mod pack;
mod read;
mod record;
mod shared;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

pub use bucket::{Bucket, Members, SharedOptions};
pub use collect::{Mark, Survey, Swept};
pub use index::{Clock, Sum};
pub use verify::{Checked, Place, Rounds, Verifier};

use crate::disk::{Disk, RealDisk};
use crate::{Result, StorageError};
use bytes::Bytes;
use index::{Entry, Location};
use parking_lot::Mutex;
use shared::Shared;
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

/// Largest uncompressed chunk (a manifest of a very large disk); file chunks are [`CHUNK_LEN`].
pub const CHUNK_LEN_MAX: usize = 8 << 20;
/// Length of a file's chunks (the last may be shorter).
pub const CHUNK_LEN: usize = 64 << 10;
/// A pack that has grown to this length is sealed. Offsets in a pack fit 32 bits.
const PACK_LEN: u64 = 1 << 30;
/// A pack with less waste than this is not rewritten for it.
const WASTE_MIN: u64 = 1 << 20;
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
    /// Packs.
    pub packs: u64,
    /// Bytes of the packs: stored bytes, and what is not needed any more.
    pub pack_bytes: u64,
    /// Chunks that were found damaged and have not been put again.
    pub damaged: u64,
}

/// What [`ChunkStore::records`] found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// In the order they lie on disk. What is not held is absent.
    pub records: Vec<Record>,
    /// Were held by name, but the bytes on disk are bad: not held any more.
    pub damaged: Vec<ChunkId>,
}

/// How a store is opened.
#[derive(Clone)]
pub struct ChunkOptions {
    /// Length at which packs are sealed, below 2 GiB.
    pub pack_len: u64,
    /// Where the files live.
    pub disk: Arc<dyn Disk>,
    /// By which the collector's grace is measured.
    pub clock: Clock,
}

impl Default for ChunkOptions {
    fn default() -> Self {
        let opened = Instant::now();
        Self {
            pack_len: PACK_LEN,
            disk: Arc::new(RealDisk),
            clock: Arc::new(move || opened.elapsed()),
        }
    }
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
    /// Held by the one sweep that is under way.
    sweeping: Mutex<()>,
    /// The next opening shall know how long dead chunks have been dead.
    keeps_ages: AtomicBool,
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
        Self::open_with(dir, ChunkOptions::default())
    }

    /// The same, otherwise than usual.
    pub fn open_with(dir: &Path, options: ChunkOptions) -> Result<Self> {
        let ChunkOptions {
            pack_len,
            disk,
            clock,
        } = options;
        let (packs, index) = local::LocalPacks::open(&disk, dir, pack_len, clock)?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            disk,
            index,
            backend: Box::new(packs),
            bad: Mutex::default(),
            waste_min: (pack_len / 8).min(WASTE_MIN),
        });
        Self::start(shared)
    }

    /// Packs in a bucket that others share; `dir` holds copies of their indexes, and of what was read
    /// and written lately. Asks the bucket nothing: see [`ChunkStore::greet`].
    pub fn open_shared(
        dir: &Path,
        bucket: Arc<dyn Bucket>,
        options: &SharedOptions,
    ) -> Result<Self> {
        if !dir.is_dir() {
            std::fs::create_dir_all(dir).map_err(io("create", dir))?;
        }
        let (packs, index) = bucket::BucketPacks::open(dir, bucket, options)?;
        Self::start(Arc::new(Shared {
            dir: dir.to_owned(),
            disk: Arc::new(RealDisk),
            index,
            backend: Box::new(packs),
            bad: Mutex::default(),
            waste_min: (options.pack_len / 8).min(WASTE_MIN),
        }))
    }

    /// Do members share what this one stores?
    pub fn shared(&self) -> bool {
        self.inner.shared.backend.common().is_some()
    }

    /// Ask the bucket whose it is: `Foreign` if it is another cluster's, `Unavailable` if it does not
    /// answer (a later call asks again). Nothing to do for a store on a disk.
    pub fn greet(&self) -> Result<()> {
        let common = self.inner.shared.backend.common();
        common.map_or(Ok(()), bucket::BucketPacks::greet)
    }

    /// Learn what other members have put into a shared bucket; those of `wanted` that are not held
    /// then. The others count as used now.
    pub fn adopt(&self, wanted: &[ChunkId]) -> Result<Vec<ChunkId>> {
        let wanted = wanted.to_vec();
        self.ask(|reply| writer::Job::Adopt(wanted, reply))
    }

    /// Delete from a shared bucket what nobody relies on any more, and what interrupted work left.
    /// Does nothing for a store on a disk.
    pub fn tidy(&self, members: &Members) -> Result<()> {
        let members = members.clone();
        self.ask(|reply| writer::Job::Tidy(members, reply))
    }

    fn start(shared: Arc<Shared>) -> Result<Self> {
        let writer = writer::Writer::new(Arc::clone(&shared));
        let (queue, jobs) = mpsc::sync_channel(QUEUE_LEN);
        let thread = std::thread::Builder::new()
            .name("chunk-writer".to_owned())
            .spawn(move || writer.run(&jobs))
            .map_err(io("start the writer of", &shared.dir))?;
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                queue: Some(queue),
                thread: Some(thread),
                sweeping: Mutex::default(),
                keeps_ages: AtomicBool::new(false),
            }),
        })
    }

    /// Is it held (verified and durable)? If so, it counts as used now.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.inner.shared.index.touch(id).is_some()
    }

    /// Uncompressed length of a chunk that is held; it counts as used now.
    pub fn raw_len(&self, id: &ChunkId) -> Option<u32> {
        self.inner.shared.index.touch(id).map(|at| at.raw_len)
    }

    /// Verify every record, write those not yet held, fsync: all are durable on return. One bad
    /// record refuses the whole batch ([`crate::StorageError::BadDigest`]).
    pub fn put(&self, records: Vec<Record>) -> Result<PutReport> {
        for record in &records {
            record.check()?;
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
        let job = |reply| {
            writer::Job::Put(writer::Put {
                records: fresh,
                reply,
            })
        };
        let mut report = self.ask(job)?;
        report.known = total - report.stored;
        Ok(report)
    }

    /// Stored and uncompressed length of a chunk that is held; it counts as used now.
    pub fn lens(&self, id: &ChunkId) -> Option<(u32, u32)> {
        let at = self.inner.shared.index.touch(id)?;
        Some((at.stored_len, at.raw_len))
    }

    /// When the last user of the store goes, write down how long dead chunks have been dead. Only where
    /// no release runs afterwards that does not know of it: such a one would leave the list to rot.
    pub fn keep_ages(&self) {
        self.inner.keeps_ages.store(true, Ordering::Relaxed);
    }

    /// Have the writer do something.
    fn ask<T>(&self, job: impl FnOnce(writer::Reply<T>) -> writer::Job) -> Result<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(job(reply))?;
        answer.recv().map_err(|_| stopped())?
    }

    fn send(&self, job: writer::Job) -> Result<()> {
        let queue = self.inner.queue.as_ref().ok_or_else(stopped)?;
        queue.send(job).map_err(|_| stopped())
    }

    /// No index file may name these any more. If that fails a restart finds them, and finds them
    /// bad again.
    fn strike(&self, damaged: Vec<Entry>) {
        if !damaged.is_empty()
            && let Err(error) = self.ask(|reply| writer::Job::Strike(damaged, reply))
        {
            tracing::error!(error = %local::chain(&error), "could not take damaged chunks out of an index file; a restart finds them again");
        }
    }

    /// A chunk's uncompressed bytes, verified; `None` if not held.
    pub fn get(&self, id: &ChunkId) -> Result<Option<Bytes>> {
        let Some((record, at)) = self.read(id)? else {
            return Ok(None);
        };
        record.verify().map(Some).map_err(|_| {
            if self.inner.shared.quarantine(id, &at) {
                self.strike(vec![(*id, at)]);
            }
            self.corrupt(id, "does not hash to its name")
        })
    }

    /// A chunk in stored form, for sending on (the receiver verifies).
    pub fn record(&self, id: &ChunkId) -> Result<Option<Record>> {
        Ok(self.read(id)?.map(|(record, _)| record))
    }

    /// One record; `Corrupt` if its bytes are not what was written.
    fn read(&self, id: &ChunkId) -> Result<Option<(Record, Location)>> {
        let mut seen = self.inner.shared.read_many(std::slice::from_ref(id))?;
        if seen.damaged.is_empty() {
            return Ok(seen.records.pop());
        }
        self.strike(seen.damaged);
        Err(self.corrupt(id, "fails its checksum"))
    }

    fn corrupt(&self, id: &ChunkId, why: &str) -> StorageError {
        StorageError::Corrupt {
            path: self.inner.shared.dir.clone(),
            detail: format!("chunk {id} {why}; fetch it from another member"),
        }
    }

    /// Those of these chunks that are held, read with few large reads.
    pub fn records(&self, ids: &[ChunkId]) -> Result<Found> {
        let seen = self.inner.shared.read_many(ids)?;
        let damaged = seen.damaged.iter().map(|(id, _)| *id).collect();
        self.strike(seen.damaged);
        let records = seen.records.into_iter().map(|(record, _)| record);
        Ok(Found {
            records: records.collect(),
            damaged,
        })
    }

    /// Figures.
    pub fn stats(&self) -> ChunkStats {
        let shared = &self.inner.shared;
        let held = shared.index.held();
        let (packs, pack_bytes) = shared.packs().total();
        ChunkStats {
            chunks: held.chunks,
            stored_bytes: held.bytes,
            packs,
            pack_bytes,
            damaged: shared.bad.lock().len() as u64,
        }
    }

    /// Those of these chunks that were found damaged here and have not been put again.
    pub fn damaged(&self, ids: &[ChunkId]) -> Vec<ChunkId> {
        let bad = self.inner.shared.bad.lock();
        let damaged = ids.iter().filter(|id| bad.contains_key(id));
        damaged.copied().collect()
    }

    /// What a pack holds, as its index file or the writer has it.
    fn entries(&self, number: u32) -> Result<Vec<Entry>> {
        let shared = &self.inner.shared;
        match shared.backend.entries(number) {
            Ok(entries) => Ok(entries),
            // Removed meanwhile, or lost: then all that was in it will be found bad.
            Err(error) if read::gone(&error) => Ok(shared.index.in_pack(number)),
            Err(error) => Err(error),
        }
    }

    /// The directory it lies in.
    pub fn dir(&self) -> &Path {
        &self.inner.shared.dir
    }

    /// Free and total bytes of the file system it lies on.
    pub fn disk(&self) -> Result<(u64, u64)> {
        local::file_system(&self.inner.shared.dir)
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
        // In a bucket others look after the same packs: there the grace begins anew.
        let alone = self.shared.backend.common().is_none();
        if alone && self.keeps_ages.load(Ordering::Relaxed) {
            let ages = self.shared.index.ages();
            if let Err(error) = ages::save(&*self.shared.disk, &self.shared.dir, &ages) {
                tracing::warn!(%error, "the grace of dead chunks begins anew");
            }
        }
    }
}

fn stopped() -> StorageError {
    StorageError::Stopped("the chunk writer has ended".to_owned())
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
