//! A file's bytes out of its chunks, from any place to any other. What this member lacks comes from
//! others on the way, verified and kept; nothing leaves that does not hash to its name.

use crate::registry::transfer::TAKE_MAX;
use crate::registry::{RegistryService, answer, walk};
use axum::body::{Body, Bytes};
use futures::StreamExt as _;
use mainstay_agent::transfer::{
    CHUNK_LEN, FileEntry, Id, SEGMENT_CHUNKS, ZERO_CHUNK, check_segment, chunk_len_at, segment_ids,
};
use mainstay_model::MemberId;
use mainstay_model::ids::Sha256;
use mainstay_storage::chunks::{ChunkId, ChunkStore};
use sha2::Digest as _;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Chunks that are read and sent together.
const PIECE_CHUNKS: u64 = 32;
/// Chunks that are fetched together when one of a piece is not here: 8 MiB, on disk and not in memory.
const FETCH_CHUNKS: usize = 128;
static ZEROS: [u8; CHUNK_LEN as usize] = [0; CHUNK_LEN as usize];

/// What `Range` asks of `size` bytes. `None`: nothing that is understood, so everything is sent;
/// an error: nothing that is there.
pub(super) fn range(text: &str, size: u64) -> Option<Result<Range<u64>, ()>> {
    let (first, last) = text.trim().strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let range = match (first.trim(), last.trim()) {
        ("", last) => size.saturating_sub(number(last)?)..size,
        (first, "") => number(first)?..size,
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return None;
            }
            first..last.saturating_add(1).min(size)
        }
    };
    Some(if range.is_empty() { Err(()) } else { Ok(range) })
}

/// Bytes `range` of `file` as a body. An error before the first of them is told; a later one cuts it off.
pub(super) async fn stream(
    service: Arc<RegistryService>,
    file: FileEntry,
    holders: Vec<MemberId>,
    range: Range<u64>,
) -> Result<Body, String> {
    let mut reader = Reader {
        service,
        file,
        holders,
        segment: None,
    };
    let mut pieces = match range.is_empty() {
        true => Vec::new(),
        false => reader.read(range.clone()).await?,
    };
    let (sender, receiver) = mpsc::channel::<std::io::Result<Bytes>>(2);
    tokio::spawn(async move {
        let mut at = range.start;
        loop {
            for bytes in pieces {
                at += bytes.len() as u64;
                // A client that takes nothing keeps what is ready for it in memory.
                let sent = tokio::time::timeout(TAKE_MAX, sender.send(Ok(bytes))).await;
                if !matches!(sent, Ok(Ok(()))) {
                    return;
                }
            }
            if at >= range.end {
                return;
            }
            pieces = match reader.read(at..range.end).await {
                Ok(pieces) => pieces,
                Err(why) => {
                    tracing::error!(why, blob = reader.file.name, "could not read a blob");
                    // Nobody to tell it to: whoever asked has gone.
                    let _ = sender.send(Err(std::io::Error::other(why))).await;
                    return;
                }
            };
        }
    });
    let stream = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    // What wraps a body may ask once more after its end.
    Ok(Body::from_stream(stream.fuse()))
}

/// All of a small file.
pub(super) async fn whole(
    service: &Arc<RegistryService>,
    file: FileEntry,
    holders: Vec<MemberId>,
) -> Result<Vec<u8>, String> {
    let size = file.size;
    let mut reader = Reader {
        service: Arc::clone(service),
        file,
        holders,
        segment: None,
    };
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        for piece in reader.read(out.len() as u64..size).await? {
            out.extend_from_slice(&piece);
        }
    }
    Ok(out)
}

struct Reader {
    service: Arc<RegistryService>,
    file: FileEntry,
    holders: Vec<MemberId>,
    /// The segment that was read last.
    segment: Option<(usize, Vec<Id>)>,
}

impl Reader {
    /// The first bytes of `range`, up to 2 MiB of them.
    async fn read(&mut self, range: Range<u64>) -> Result<Vec<Bytes>, String> {
        let first = range.start / CHUNK_LEN;
        let segment = first / SEGMENT_CHUNKS as u64;
        let until = (first + PIECE_CHUNKS)
            .min((segment + 1) * SEGMENT_CHUNKS as u64)
            .min(range.end.div_ceil(CHUNK_LEN));
        let names = self
            .names(usize::try_from(segment).unwrap_or(usize::MAX))
            .await?;
        let inside = |chunk: u64| usize::try_from(chunk % SEGMENT_CHUNKS as u64).unwrap_or(0);
        let from = inside(first);
        let count = usize::try_from(until - first).unwrap_or(0);
        let ids = names
            .get(from..from + count)
            .ok_or("the blob's names end before its bytes")?
            .to_vec();
        let wanted = range.end.div_ceil(CHUNK_LEN) - first;
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        let ahead = &names[from..names.len().min(from + wanted.min(FETCH_CHUNKS))];
        let ahead: Vec<Id> = ahead
            .iter()
            .copied()
            .filter(|id| *id != ZERO_CHUNK)
            .collect();
        let size = self.file.size;
        let chunks = self.chunks(&ids, &ahead).await?;
        let mut out = Vec::with_capacity(chunks.len());
        for ((number, id), bytes) in (first..).zip(&ids).zip(chunks) {
            let len = chunk_len_at(size, number);
            // Zeros have no length of their own.
            if bytes.len() as u64 != len && *id != ZERO_CHUNK {
                return Err(format!("chunk {number} has another length than its place"));
            }
            let begin = number * CHUNK_LEN;
            let skip = range.start.saturating_sub(begin).min(len);
            let end = (range.end - begin).min(len);
            let part = |at: u64| usize::try_from(at).unwrap_or(0);
            out.push(bytes.slice(part(skip)..part(end)));
        }
        Ok(out)
    }

    async fn names(&mut self, number: usize) -> Result<&[Id], String> {
        if self.segment.as_ref().is_none_or(|(at, _)| *at != number) {
            let digests = self.file.segment_digests().map_err(|e| e.to_string())?;
            let digest = *digests.get(number).ok_or("the blob has fewer segments")?;
            let bytes = self.service.chunk(digest, &self.holders).await?;
            check_segment(&self.file, number, &bytes).map_err(|e| e.to_string())?;
            self.segment = Some((number, segment_ids(&bytes).collect()));
        }
        Ok(self.segment.as_ref().map_or(&[], |(_, ids)| ids.as_slice()))
    }

    /// These chunks' bytes, in order; if one is not here, it is fetched with those `ahead`.
    async fn chunks(&self, ids: &[Id], ahead: &[Id]) -> Result<Vec<Bytes>, String> {
        for _ in 0..2 {
            let (chunks, wanted) = (self.service.chunks.clone(), ids.to_vec());
            let got = tokio::task::spawn_blocking(move || {
                let get = |id: &Id| match *id == ZERO_CHUNK {
                    true => Ok(Some(Bytes::from_static(&ZEROS))),
                    false => walk::get(&chunks, id),
                };
                wanted.iter().map(get).collect::<Result<Vec<_>, _>>()
            });
            let got = got.await.map_err(|e| e.to_string())?;
            let got = got.map_err(|e| answer::chain(&e))?;
            if got.iter().all(Option::is_some) {
                return Ok(got.into_iter().flatten().collect());
            }
            let turn = self.service.read_through.acquire().await;
            let _turn = turn.map_err(|e| e.to_string())?;
            let sources = self.service.sources(&self.holders, 0);
            let (rest, said) = self.service.fetch(ahead, &sources).await;
            if rest.iter().any(|id| ids.contains(id)) {
                let (count, said) = (rest.len(), said.join("; "));
                return Err(format!("no member could send {count} chunks: {said}"));
            }
        }
        Err("its chunks do not stay: see the log for damage on this disk".to_owned())
    }
}

/// SHA-256 of a file whose chunks are all here. Blocks.
pub(super) fn hash(chunks: &ChunkStore, file: &FileEntry) -> Result<Sha256, String> {
    let mut sha = sha2::Sha256::new();
    let get = |id: &Id| {
        let got = chunks.get(&ChunkId(*id)).map_err(|e| answer::chain(&e))?;
        got.ok_or_else(|| format!("chunk {} is not here", hex::encode(id)))
    };
    let digests = file.segment_digests().map_err(|e| e.to_string())?;
    for (at, segment) in digests.iter().enumerate() {
        let names = get(segment)?;
        check_segment(file, at, &names).map_err(|e| e.to_string())?;
        let first = at as u64 * SEGMENT_CHUNKS as u64;
        for (number, id) in (first..).zip(segment_ids(&names)) {
            let len = usize::try_from(chunk_len_at(file.size, number)).unwrap_or(0);
            if id == ZERO_CHUNK {
                sha.update(&ZEROS[..len]);
                continue;
            }
            let bytes = get(&id)?;
            if bytes.len() != len {
                return Err(format!("chunk {number} has another length than its place"));
            }
            sha.update(&bytes);
        }
    }
    Ok(Sha256(sha.finalize().into()))
}
