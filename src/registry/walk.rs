//! What a manifest reaches, and what of it is lacking in a store. Nothing that a manifest or a
//! segment claims is believed. Blocks.

use mainstay_agent::transfer::{
    Id, Manifest, TransferError, ZERO_CHUNK, check_segment, chunk_len_at, segment_ids,
};
use mainstay_storage::StorageError;
use mainstay_storage::chunks::{ChunkId, ChunkStore};
use std::collections::HashSet;

/// How far a store is with one manifest.
#[derive(Debug)]
pub(super) enum Reach {
    /// These (the manifest itself, or segments) must come before more can be said.
    Names(Vec<Id>),
    /// All names are known.
    Known(Known),
}

/// A manifest with all its segments.
#[derive(Debug)]
pub(super) struct Known {
    pub manifest: Manifest,
    /// Chunks not held, each once, in the order of the files.
    pub lacking: Vec<Id>,
    /// Bytes of the chunks held and of all chunks (each once; zeros are not counted).
    pub held_bytes: u64,
    pub total_bytes: u64,
}

/// Why a walk cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum WalkError {
    /// No copy of these bytes could ever be right.
    #[error("{0}")]
    Invalid(#[from] TransferError),
    /// The disk failed.
    #[error("{0}")]
    Storage(#[from] StorageError),
}

/// Look at everything `digest` reaches.
pub(super) fn reach(chunks: &ChunkStore, digest: &Id) -> Result<Reach, WalkError> {
    let Some(bytes) = get(chunks, digest)? else {
        return Ok(Reach::Names(vec![*digest]));
    };
    let manifest = Manifest::parse(&bytes)?;
    let mut absent = HashSet::new();
    let mut seen = HashSet::new();
    let mut known = Known {
        lacking: Vec::new(),
        held_bytes: 0,
        total_bytes: 0,
        manifest,
    };
    for file in &known.manifest.files {
        let mut number = 0;
        for (at, segment) in file.segment_digests()?.iter().enumerate() {
            let Some(bytes) = get(chunks, segment)? else {
                absent.insert(*segment);
                continue;
            };
            check_segment(file, at, &bytes)?;
            for id in segment_ids(&bytes) {
                let len = chunk_len_at(file.size, number);
                number += 1;
                if id == ZERO_CHUNK || !absent.is_empty() {
                    continue;
                }
                let held = held(chunks, &id, len)?;
                if seen.insert(id) {
                    known.total_bytes += len;
                    if held {
                        known.held_bytes += len;
                    } else {
                        known.lacking.push(id);
                    }
                }
            }
        }
    }
    if absent.is_empty() {
        return Ok(Reach::Known(known));
    }
    Ok(Reach::Names(absent.into_iter().collect()))
}

/// Is it held, with the length that its place in the file needs?
fn held(chunks: &ChunkStore, id: &Id, len: u64) -> Result<bool, WalkError> {
    match chunks.raw_len(&ChunkId(*id)) {
        None => Ok(false),
        Some(held) if u64::from(held) == len => Ok(true),
        Some(held) => Err(WalkError::Invalid(TransferError::Invalid(format!(
            "chunk {} has {held} bytes, its place in the file {len}",
            hex::encode(id)
        )))),
    }
}

/// A chunk's bytes. One that turns out damaged is not held any more, and so will be fetched again.
pub(super) fn get(chunks: &ChunkStore, id: &Id) -> Result<Option<bytes::Bytes>, StorageError> {
    let id = ChunkId(*id);
    match chunks.get(&id) {
        Err(StorageError::Corrupt { detail, .. }) => {
            tracing::error!(chunk = %id, detail, "a stored chunk is damaged; it will be fetched again");
            chunks.forget(&id);
            Ok(None)
        }
        other => other,
    }
}
