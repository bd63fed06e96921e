//! A chunk's form on disk: a 56-byte header and the data. Knows no files.
//!
//! ```text
//! 0  magic "MSCK"   4 codec (0 raw, 1 zstd, 255 padding)   5 zero x3
//! 8  raw_len u32    12 stored_len u32                      16 id, 32 bytes
//! 48 CRC-32 of the data                                    52 CRC-32 of bytes 0..52
//! ```
//! Integers are little-endian. Padding is a record of zeros that fills a batch up to a whole block.

use super::{CHUNK_LEN_MAX, ChunkId, Codec, Record};
use crate::{Result, StorageError};
use bytes::Bytes;

pub(super) const HEADER_LEN: usize = 56;
pub(super) const MAGIC: [u8; 4] = *b"MSCK";
const PADDING: u8 = 255;
/// Compressed data is kept only if it is at least this much smaller: 1/20.
const WORTH_IT: usize = 20;

/// What a header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// `None`: padding.
    pub codec: Option<Codec>,
    pub raw_len: u32,
    pub stored_len: u32,
    pub id: ChunkId,
    pub data_crc: u32,
}

impl Header {
    /// The header of a chunk.
    pub(super) fn of(record: &Record) -> Self {
        Self {
            codec: Some(record.codec),
            raw_len: record.raw_len,
            // `verify` refused anything that does not fit.
            stored_len: u32::try_from(record.data.len()).unwrap_or(u32::MAX),
            id: record.id,
            data_crc: crc32fast::hash(&record.data),
        }
    }

    /// The header of `zeros` bytes of padding.
    pub(super) fn padding(zeros: &[u8]) -> Self {
        Self {
            codec: None,
            raw_len: 0,
            stored_len: u32::try_from(zeros.len()).unwrap_or(u32::MAX),
            id: ChunkId([0; 32]),
            data_crc: crc32fast::hash(zeros),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = self.codec.map_or(PADDING, |c| c as u8);
        out[8..12].copy_from_slice(&self.raw_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.stored_len.to_le_bytes());
        out[16..48].copy_from_slice(&self.id.0);
        out[48..52].copy_from_slice(&self.data_crc.to_le_bytes());
        let crc = crc32fast::hash(&out[..52]);
        out[52..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None`: these bytes are not a header.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_LEN] = bytes.get(..HEADER_LEN)?.try_into().ok()?;
        if bytes[..4] != MAGIC || crc32fast::hash(&bytes[..52]) != word(bytes, 52) {
            return None;
        }
        let codec = match bytes[4] {
            PADDING => None,
            other => Some(Codec::from_byte(other)?),
        };
        let mut id = [0; 32];
        id.copy_from_slice(&bytes[16..48]);
        Some(Self {
            codec,
            raw_len: word(bytes, 8),
            stored_len: word(bytes, 12),
            id: ChunkId(id),
            data_crc: word(bytes, 48),
        })
    }

    /// Does `data` belong to this header?
    pub(super) fn matches(&self, data: &[u8]) -> bool {
        data.len() == self.stored_len as usize && crc32fast::hash(data) == self.data_crc
    }
}

fn word(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Codec {
    /// From its byte on disk and on the wire.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

impl Record {
    /// Name and compress `raw` (kept as it is where compression gains less than 5%).
    pub fn encode(raw: &[u8]) -> Result<Self> {
        let id = ChunkId::of(raw);
        let refused = || StorageError::BadDigest(format!("{id} (too long)"));
        let raw_len = u32::try_from(raw.len()).map_err(|_| refused())?;
        if raw.len() > CHUNK_LEN_MAX {
            return Err(refused());
        }
        match zstd::bulk::compress(raw, 1) {
            Ok(small) if small.len() + raw.len() / WORTH_IT <= raw.len() => Ok(Self {
                id,
                codec: Codec::Zstd,
                raw_len,
                data: small.into(),
            }),
            _ => Ok(Self {
                id,
                codec: Codec::Raw,
                raw_len,
                data: Bytes::copy_from_slice(raw),
            }),
        }
    }

    /// The uncompressed bytes, if they are what the name says. Never allocates more than
    /// [`CHUNK_LEN_MAX`], whatever the record claims.
    pub fn verify(&self) -> Result<Bytes> {
        let bad = |why: &str| StorageError::BadDigest(format!("{} ({why})", self.id));
        let raw_len = self.raw_len as usize;
        if raw_len > CHUNK_LEN_MAX || self.data.len() > CHUNK_LEN_MAX {
            return Err(bad("longer than a chunk may be"));
        }
        let raw = match self.codec {
            Codec::Raw => self.data.clone(),
            Codec::Zstd => zstd::bulk::decompress(&self.data, raw_len)
                .map_err(|_| bad("cannot be decompressed to its length"))?
                .into(),
        };
        if raw.len() != raw_len {
            return Err(bad("not as long as it claims"));
        }
        if ChunkId::of(&raw) != self.id {
            return Err(bad("other bytes"));
        }
        Ok(raw)
    }
}
