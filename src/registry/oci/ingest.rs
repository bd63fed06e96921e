//! Bytes of any shape, as they arrive, into chunks: cut, hashed, compressed and stored while the next
//! ones are on their way. What was stored is durable; what it is called is not decided here.
//!
//! May be dropped or left alone at any await: what was taken in stays counted, and the next call
//! goes on behind it; after [`Ingest::finish`] has begun it takes no more bytes, only another `finish`.
//!
//! ```text
//! begin -> append .. append -> pause or finish -> end      a request that was taken
//!                     |-> an error -> back                 as it was before the request
//! ```

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
#[derive(Default)]
pub(in crate::registry) struct Ingest {
    /// Bytes taken in.
    len: u64,
    /// Those that are not being stored yet.
    tail: BytesMut,
    /// Full segments so far.
    segments: Vec<Id>,
    work: Place,
    /// Keeps what was stored: it has no name before the end.
    lease: Option<Lease>,
    /// The last chunk, which may be short, was or is being stored.
    closing: bool,
    /// Where it was when the request under way began.
    mark: Option<Box<Mark>>,
}

/// Where the work on an ingest's bytes is.
enum Place {
    Here(Work),
    /// A batch has it.
    Running(JoinHandle<Result<Work, Failure>>),
    /// A batch that failed took it: only `back` helps.
    Lost,
}

impl Default for Place {
    fn default() -> Self {
        Self::Here(Work::default())
    }
}

/// What all bytes so far come to.
#[derive(Default)]
struct Work {
    sha: sha2::Sha256,
    /// Chunks of the segment that is not full.
    ids: Vec<Id>,
    /// Segments that this batch made full.
    closed: Vec<Id>,
}

/// What it takes to go back.
struct Mark {
    len: u64,
    tail: BytesMut,
    segments: usize,
    sha: sha2::Sha256,
    ids: Vec<Id>,
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

impl Ingest {
    /// Bytes taken in so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// A failed write took what it had: nothing can follow but [`Ingest::back`].
    pub(super) fn broken(&self) -> bool {
        matches!(self.work, Place::Lost)
    }

    /// A request begins.
    pub(in crate::registry) async fn begin(&mut self) {
        // Of a request whose client has gone. If that failed, it was not answered, and is undone.
        if self.settle().await.is_err() {
            self.back();
        }
        if let Place::Here(work) = &self.work {
            self.mark = Some(Box::new(Mark {
                len: self.len,
                tail: self.tail.clone(),
                segments: self.segments.len(),
                sha: work.sha.clone(),
                ids: work.ids.clone(),
            }));
        }
    }

    /// The request has ended well: there is no way back before it.
    pub(in crate::registry) fn end(&mut self) {
        self.mark = None;
    }

    /// The request failed: all is as it was when it began. What it stored is nobody's.
    pub(in crate::registry) fn back(&mut self) {
        let Some(mark) = self.mark.take() else {
            return;
        };
        let mark = *mark;
        if let Some(lease) = &self.lease {
            lease.so_far(&[], &mark.ids);
        }
        (self.len, self.tail, self.closing) = (mark.len, mark.tail, false);
        self.segments.truncate(mark.segments);
        self.work = Place::Here(Work {
            sha: mark.sha,
            ids: mark.ids,
            closed: Vec::new(),
        });
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

    /// The client pauses, maybe for good: keep less than a chunk in memory, and all else on disk.
    pub(in crate::registry) async fn pause(
        &mut self,
        service: &Arc<RegistryService>,
    ) -> Result<(), OciError> {
        self.settle().await?;
        let whole = self.tail.len() / CHUNK * CHUNK;
        if whole > 0 {
            // In room of its own: the batch keeps the whole of what they share.
            let rest = BytesMut::from(&self.tail[whole..]);
            let mut batch = std::mem::replace(&mut self.tail, rest);
            batch.truncate(whole);
            self.start(service, batch.freeze(), false)?;
            self.settle().await?;
        }
        Ok(())
    }

    /// No more comes: everything is durable, and this is what it is. May be asked again.
    pub(in crate::registry) async fn finish(
        &mut self,
        service: &Arc<RegistryService>,
    ) -> Result<(Sha256, FileEntry), OciError> {
        self.closing = true;
        self.settle().await?;
        let batch = self.tail.split().freeze();
        self.start(service, batch, true)?;
        self.settle().await?;
        let Place::Here(work) = &self.work else {
            return Err(Failure::Stopping.into());
        };
        let digest = Sha256(work.sha.clone().finalize().into());
        let file = FileEntry {
            name: super::file_name(&digest),
            format: "raw".to_owned(),
            size: self.len,
            segments: self.segments.iter().map(hex::encode).collect(),
        };
        Ok((digest, file))
    }

    /// Wait for the batch under way.
    async fn settle(&mut self) -> Result<(), Failure> {
        let Place::Running(running) = &mut self.work else {
            return Ok(());
        };
        let done = running.await;
        self.work = Place::Lost;
        let mut work = done.map_err(|_| Failure::Stopping)??;
        if let Some(lease) = &self.lease {
            lease.so_far(&work.closed, &work.ids);
        }
        self.segments.append(&mut work.closed);
        self.work = Place::Here(work);
        Ok(())
    }

    fn start(
        &mut self,
        service: &Arc<RegistryService>,
        batch: Bytes,
        last: bool,
    ) -> Result<(), Failure> {
        let Place::Here(work) = std::mem::replace(&mut self.work, Place::Lost) else {
            return Err(Failure::Stopping);
        };
        self.lease
            .get_or_insert_with(|| service.leases.begin(service.collect.grace));
        let service = Arc::clone(service);
        self.work = Place::Running(tokio::spawn(async move {
            let room = service.room_for(batch.len() as u64).await;
            let _room = room.map_err(Failure::Full)?;
            let turn = service.writers.acquire().await;
            let _turn = turn.map_err(|_| Failure::Stopping)?;
            let chunks = service.chunks.clone();
            let stored = tokio::task::spawn_blocking(move || store(&chunks, work, &batch, last));
            let stored = stored.await.map_err(|_| Failure::Stopping)?;
            let (work, new) = stored.map_err(Failure::Storage)?;
            service.send_ahead(new);
            Ok(work)
        }));
        Ok(())
    }
}

/// Blocks. What was stored besides.
fn store(
    chunks: &ChunkStore,
    mut work: Work,
    batch: &[u8],
    last: bool,
) -> Result<(Work, Vec<Record>), StorageError> {
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
    chunks.put(records.clone())?;
    Ok((work, records))
}

fn close_segment(work: &mut Work, records: &mut Vec<Record>) -> Result<(), StorageError> {
    let record = Record::encode(work.ids.as_flattened())?;
    work.closed.push(record.id.0);
    work.ids.clear();
    records.push(record);
    Ok(())
}
