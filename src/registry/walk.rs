//! What a manifest reaches, and what of it is lacking in a store. Nothing that a manifest or a
//! segment claims is believed: a manifest of a few megabytes may name terabytes, so each segment is
//! read once however often it is named, and few walks go on at once. Blocks.

use mainstay_agent::transfer::{
    CHUNK_LEN, Id, Manifest, SEGMENT_CHUNKS, TransferError, ZERO_CHUNK, check_segment,
    chunk_len_at, segment_ids,
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

impl super::RegistryService {
    /// Look at everything `digest` reaches.
    pub(super) async fn walk(&self, digest: Id) -> Result<Reach, WalkError> {
        let stopped = |e: String| WalkError::Storage(StorageError::Stopped(e));
        let turn = self.walks.acquire().await;
        let _turn = turn.map_err(|e| stopped(e.to_string()))?;
        let chunks = self.chunks.clone();
        match tokio::task::spawn_blocking(move || reach(&chunks, &digest)).await {
            Ok(reached) => reached,
            Err(e) => Err(stopped(e.to_string())),
        }
    }
}

/// Look at everything `digest` reaches.
fn reach(chunks: &ChunkStore, digest: &Id) -> Result<Reach, WalkError> {
    let Some(bytes) = get(chunks, digest)? else {
        return Ok(Reach::Names(vec![*digest]));
    };
    let manifest = Manifest::parse(&bytes)?;
    let mut absent = HashSet::new();
    let mut seen = HashSet::new();
    // Segments all of whose chunks were looked at as whole ones.
    let mut walked = HashSet::new();
    let mut known = Known {
        lacking: Vec::new(),
        held_bytes: 0,
        total_bytes: 0,
        manifest,
    };
    for file in &known.manifest.files {
        for (at, segment) in file.segment_digests()?.iter().enumerate() {
            let first = at as u64 * SEGMENT_CHUNKS as u64;
            // Only a file's last chunk is shorter than the others.
            let whole = (first + SEGMENT_CHUNKS as u64) * CHUNK_LEN <= file.size;
            if absent.contains(segment) || (whole && walked.contains(segment)) {
                continue;
            }
            let Some(bytes) = get(chunks, segment)? else {
                absent.insert(*segment);
                continue;
            };
            check_segment(file, at, &bytes)?;
            if whole {
                walked.insert(*segment);
            }
            for (number, id) in (first..).zip(segment_ids(&bytes)) {
                let len = chunk_len_at(file.size, number);
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

/// Mark everything that `digest` reaches as needed, as far as it is known here; `walked` are segments
/// that were marked already. `false`: not all names are known here (or they are of a later release).
pub(super) fn keep(
    chunks: &ChunkStore,
    digest: &Id,
    walked: &mut HashSet<Id>,
) -> Result<bool, StorageError> {
    let Some(bytes) = get(chunks, digest)? else {
        // If it is damaged it is needed nevertheless.
        chunks.keep(&[ChunkId(*digest)]);
        return Ok(false);
    };
    let Ok(manifest) = Manifest::parse(&bytes) else {
        return Ok(false);
    };
    let mut whole = true;
    for file in &manifest.files {
        let Ok(segments) = file.segment_digests() else {
            return Ok(false);
        };
        for segment in segments {
            whole &= keep_segment(chunks, &segment, walked)?;
        }
    }
    Ok(whole)
}

/// The same for one segment.
pub(super) fn keep_segment(
    chunks: &ChunkStore,
    segment: &Id,
    walked: &mut HashSet<Id>,
) -> Result<bool, StorageError> {
    if walked.contains(segment) {
        return Ok(true);
    }
    let Some(bytes) = get(chunks, segment)? else {
        chunks.keep(&[ChunkId(*segment)]);
        return Ok(false);
    };
    walked.insert(*segment);
    let ids: Vec<ChunkId> = segment_ids(&bytes).map(ChunkId).collect();
    chunks.keep(&ids);
    Ok(true)
}

/// A chunk's bytes. One that turns out damaged is not held any more, and so will be fetched again.
pub(super) fn get(chunks: &ChunkStore, id: &Id) -> Result<Option<bytes::Bytes>, StorageError> {
    match chunks.get(&ChunkId(*id)) {
        Err(StorageError::Corrupt { .. }) => Ok(None),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_storage::chunks::{Codec, Record};

    fn put(chunks: &ChunkStore, bytes: Vec<u8>) -> Id {
        let id = *blake3::hash(&bytes).as_bytes();
        let record = Record {
            id: ChunkId(id),
            codec: Codec::Raw,
            raw_len: u32::try_from(bytes.len()).unwrap(),
            data: bytes.into(),
        };
        chunks.put(vec![record]).unwrap();
        id
    }

    #[test]
    fn a_segment_named_many_times_is_counted_once_and_its_last_place_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let chunks = ChunkStore::open(dir.path()).unwrap();
        let chunk_len = usize::try_from(CHUNK_LEN).unwrap();
        let held = put(&chunks, vec![1; chunk_len]);
        let absent = [9; 32];
        let mut names = vec![held; SEGMENT_CHUNKS - 1];
        names.push(absent);
        let segment = put(&chunks, names.concat());
        let look = |size: u64| {
            let manifest = serde_json::json!({"version": 1, "files": [{
                "name": "d", "format": "raw", "size": size,
                "segments": vec![hex::encode(segment); 1000],
            }]});
            reach(&chunks, &put(&chunks, manifest.to_string().into_bytes()))
        };
        let full = 1000 * SEGMENT_CHUNKS as u64 * CHUNK_LEN;
        let Reach::Known(known) = look(full).unwrap() else {
            panic!("all names are there");
        };
        assert_eq!(known.lacking, [absent]);
        assert_eq!(
            (known.held_bytes, known.total_bytes),
            (CHUNK_LEN, 2 * CHUNK_LEN)
        );
        // A file that ends inside the last of them: walked again, with its own lengths.
        assert!(matches!(look(full - 1), Ok(Reach::Known(_))));
        let short = full - CHUNK_LEN - 1;
        assert!(matches!(look(short), Err(WalkError::Invalid(_))));
    }
}
