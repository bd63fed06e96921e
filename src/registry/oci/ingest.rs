//! Bytes of any shape, as they arrive, into chunks: cut, hashed, compressed and stored while the next
//! ones are on their way. What was stored is durable; what it is called is not decided here.
//!
//! May be dropped or left alone at any await: what was taken in stays counted, and the next call
//! goes on behind it; after [`Ingest::finish`] has begun it takes no more bytes, only another `finish`.

use super::error::{OciError, bad_size, full, unavailable};
use crate::registry::RegistryService;
use crate::registry::roots::Lease;
use bytes::{Bytes, BytesMut};
use mainstay_agent::transfer::{
    CHUNK_LEN, FileEntry, Id, SEGMENT_CHUNKS, SIZE_MAX, ZERO_CHUNK, name_of,
};
use mainstay_model::ids::Sha256;
use mainstay_storage::StorageError;
use mainstay_storage::chunks::{ChunkId, ChunkStore, Record};
use sha2::Digest as _;
use std::sync::Arc;
use tokio::task::JoinHandle;

/// Bytes that are hashed and stored together.
const BATCH: usize = 4 << 20;
const CHUNK: usize = CHUNK_LEN as usize;

/// One blob on its way in.
pub(in crate::registry) struct Ingest {
    /// Bytes taken in.
    len: u64,
    /// Those that are not being stored yet.
    tail: BytesMut,
    /// `None` while a batch has it.
    work: Option<Box<Work>>,
    running: Option<JoinHandle<Result<Box<Work>, Failure>>>,
    /// Keeps what was stored: it has no name before the end.
    lease: Option<Lease>,
    /// The last chunk, which may be short, was or is being stored.
    closing: bool,
}

/// What all bytes so far come to.
#[derive(Default)]
struct Work {
    sha: sha2::Sha256,
    /// Chunks of the segment that is not full.
    ids: Vec<Id>,
    segments: Vec<Id>,
}

/// Why bytes were not stored.
enum Failure {
    Full(String),
    Storage(StorageError),
    Stopping,
}

impl From<Failure> for OciError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Full(why) => full(why),
            Failure::Storage(e) => e.into(),
            Failure::Stopping => unavailable("this member is stopping, or the upload was broken"),
        }
    }
}

impl Default for Ingest {
    fn default() -> Self {
        Self {
            len: 0,
            tail: BytesMut::new(),
            work: Some(Box::default()),
            running: None,
            lease: None,
            closing: false,
        }
    }
}

impl Ingest {
    /// Bytes taken in so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// A failed write took what it had: nothing can follow.
    pub(super) fn broken(&self) -> bool {
        self.work.is_none() && self.running.is_none()
    }

    /// Take in more.
    pub(in crate::registry) async fn append(
        &mut self,
        service: &Arc<RegistryService>,
        piece: &[u8],
    ) -> Result<(), OciError> {
        if piece.is_empty() {
            return Ok(());
        }
        if self.closing {
            return Err(bad_size("this upload is being closed and takes no more"));
        }
        let len = self.len + piece.len() as u64;
        if len > SIZE_MAX {
            return Err(bad_size(format!("a blob has at most {SIZE_MAX} bytes")));
        }
        self.tail.extend_from_slice(piece);
        self.len = len;
        while self.tail.len() >= BATCH {
            self.settle().await?;
            let batch = self.tail.split_to(BATCH).freeze();
            self.start(service, batch, false)?;
        }
        Ok(())
    }

    /// The client pauses, maybe for good: keep less than a chunk in memory.
    pub(in crate::registry) async fn pause(
        &mut self,
        service: &Arc<RegistryService>,
    ) -> Result<(), OciError> {
        let whole = self.tail.len() / CHUNK * CHUNK;
        if whole > 0 {
            self.settle().await?;
            // In room of its own: the batch keeps the whole of what they share.
            let rest = BytesMut::from(&self.tail[whole..]);
            let mut batch = std::mem::replace(&mut self.tail, rest);
            batch.truncate(whole);
            self.start(service, batch.freeze(), false)?;
        }
        Ok(())
    }

    /// No more comes: everything is durable, and this is what it is.
    pub(in crate::registry) async fn finish(
        &mut self,
        service: &Arc<RegistryService>,
    ) -> Result<(Sha256, FileEntry), OciError> {
        self.closing = true;
        self.settle().await?;
        let batch = self.tail.split().freeze();
        self.start(service, batch, true)?;
        self.settle().await?;
        let work = self.work.take().ok_or(Failure::Stopping)?;
        let digest = Sha256(work.sha.finalize().into());
        let file = FileEntry {
            name: super::file_name(&digest),
            format: "raw".to_owned(),
            size: self.len,
            segments: work.segments.iter().map(hex::encode).collect(),
        };
        Ok((digest, file))
    }

    /// Wait for the batch under way.
    async fn settle(&mut self) -> Result<(), Failure> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let done = running.await;
        self.running = None;
        let work = done.map_err(|_| Failure::Stopping)??;
        if let Some(lease) = &self.lease {
            lease.so_far(&work.segments, &work.ids);
        }
        self.work = Some(work);
        Ok(())
    }

    fn start(
        &mut self,
        service: &Arc<RegistryService>,
        batch: Bytes,
        last: bool,
    ) -> Result<(), Failure> {
        let work = self.work.take().ok_or(Failure::Stopping)?;
        self.lease
            .get_or_insert_with(|| service.leases.begin(service.collect.grace));
        let service = Arc::clone(service);
        self.running = Some(tokio::spawn(async move {
            (service.room)().map_err(Failure::Full)?;
            let turn = service.writers.acquire().await;
            let _turn = turn.map_err(|_| Failure::Stopping)?;
            let chunks = service.chunks.clone();
            let stored = tokio::task::spawn_blocking(move || store(&chunks, work, &batch, last));
            let stored = stored.await.map_err(|_| Failure::Stopping)?;
            stored.map_err(Failure::Storage)
        }));
        Ok(())
    }
}

/// Blocks.
fn store(
    chunks: &ChunkStore,
    mut work: Box<Work>,
    batch: &[u8],
    last: bool,
) -> Result<Box<Work>, StorageError> {
    work.sha.update(batch);
    let mut records = Vec::new();
    for piece in batch.chunks(CHUNK) {
        let id = name_of(piece);
        if id != ZERO_CHUNK && !chunks.contains(&ChunkId(id)) {
            records.push(Record::encode(piece)?);
        }
        work.ids.push(id);
        if work.ids.len() == SEGMENT_CHUNKS {
            close_segment(&mut work, &mut records)?;
        }
    }
    if last && !work.ids.is_empty() {
        close_segment(&mut work, &mut records)?;
    }
    chunks.put(records)?;
    Ok(work)
}

fn close_segment(work: &mut Work, records: &mut Vec<Record>) -> Result<(), StorageError> {
    let record = Record::encode(work.ids.as_flattened())?;
    work.segments.push(record.id.0);
    work.ids.clear();
    records.push(record);
    Ok(())
}
