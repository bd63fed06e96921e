//! A pack as one object: written once, whole, and never changed. Its index is its end, so that there is
//! no moment with the one and without the other.
//!
//! ```text
//! "MAINSTAY-PACK\0\0" 02 | records, as in a file of packs | index, as in an index file | "MSCF" version u32 | offset of the index u64
//! ```

use super::super::index::{self, Entry, Location};
use super::super::record::{HEADER_LEN, Header};
use super::super::{CHUNK_LEN_MAX, Record};
use super::Bucket;
use crate::{Result, StorageError};
use bytes::Bytes;
use std::io;

/// First bytes; the last is the format version.
const HEAD: [u8; 16] = *b"MAINSTAY-PACK\0\0\x02";
const TAIL_MAGIC: [u8; 4] = *b"MSCF";
const TAIL_VERSION: u32 = 1;
const TAIL: usize = 16;
/// Read of an object's end at first: the index of a usual pack and its tail.
const FIRST_READ: u64 = 128 << 10;

/// The object, and where each record is in it.
pub(super) fn encode(records: &[&Record], number: u32) -> Result<(Vec<u8>, Vec<Entry>)> {
    let len: usize = records.iter().map(|r| r.data.len() + HEADER_LEN).sum();
    let mut out = Vec::with_capacity(HEAD.len() + len + records.len() * index::ENTRY + 64);
    out.extend_from_slice(&HEAD);
    let mut entries = Vec::with_capacity(records.len());
    for record in records {
        let header = Header::of(record);
        let offset = u32::try_from(out.len())
            .map_err(|_| StorageError::Misuse("a pack of more than 4 GiB".to_owned()))?;
        let at = Location {
            pack: number,
            offset,
            stored_len: header.stored_len,
            raw_len: header.raw_len,
        };
        entries.push((record.id, at));
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(&record.data);
    }
    let offset = out.len() as u64;
    out.extend_from_slice(&index::encode(offset, &entries));
    out.extend_from_slice(&TAIL_MAGIC);
    out.extend_from_slice(&TAIL_VERSION.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    Ok((out, entries))
}

/// What an object of this size holds: by its end, or, if that is damaged, by all of it.
/// `NotFound`: there is no such object.
pub(super) fn entries(
    bucket: &dyn Bucket,
    key: &str,
    size: u64,
    number: u32,
) -> io::Result<Vec<Entry>> {
    let from = size.saturating_sub(FIRST_READ);
    let end = bucket.get(key, from..size)?;
    if let Some(offset) = index_offset(&end) {
        let whole = match offset.checked_sub(from) {
            Some(skip) => end.slice(usize::try_from(skip).unwrap_or(end.len()).min(end.len())..),
            None => bucket.get(key, offset..size)?,
        };
        let rows = &whole[..whole.len().saturating_sub(TAIL)];
        if let Some((_, entries)) = index::parse(rows, number) {
            return Ok(entries);
        }
    }
    tracing::error!(
        pack = key,
        "a pack in the bucket has no good index: reading all of it"
    );
    Ok(scan(&bucket.get(key, 0..size)?, number))
}

fn index_offset(end: &[u8]) -> Option<u64> {
    let tail = end.last_chunk::<TAIL>()?;
    let good = tail[..4] == TAIL_MAGIC && tail[4..8] == TAIL_VERSION.to_le_bytes();
    let offset = u64::from_le_bytes(tail[8..].try_into().ok()?);
    good.then_some(offset)
}

/// The good records from the beginning on; behind the first bad header nothing is looked for.
fn scan(body: &Bytes, number: u32) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = HEAD.len();
    while let Some(header) = body.get(at..).and_then(Header::decode) {
        let stored = header.stored_len as usize;
        let (from, to) = (at + HEADER_LEN, at + HEADER_LEN + stored);
        let Some(data) = body.get(from..to) else {
            break;
        };
        if stored <= CHUNK_LEN_MAX && header.codec.is_some() && header.matches(data) {
            let place = Location {
                pack: number,
                offset: u32::try_from(at).unwrap_or(u32::MAX),
                stored_len: header.stored_len,
                raw_len: header.raw_len,
            };
            entries.push((header.id, place));
        }
        at = to;
    }
    entries
}
