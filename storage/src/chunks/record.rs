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
use std::cell::RefCell;
use zstd::bulk::{Compressor, Decompressor};

pub(super) const HEADER_LEN: usize = 56;
pub(super) const MAGIC: [u8; 4] = *b"MSCK";
const PADDING: u8 = 255;
/// Compressed data is kept only if it is at least this much smaller: 1/20.
const WORTH_IT: usize = 20;
/// A thread keeps no more room for decompressed bytes than this.
const SCRATCH_KEPT: usize = 1 << 20;

thread_local! {
    /// Made once for each thread, not for each chunk.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn compress(raw: &[u8]) -> std::io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|kept| {
        let mut compressor = kept.take().map_or_else(|| Compressor::new(1), Ok)?;
        let small = compressor.compress(raw);
        *kept = Some(compressor);
        small
    })
}

/// Into `out`, which is replaced; an error also where that would be more than `len` bytes.
fn decompress(data: &[u8], len: usize, out: &mut Vec<u8>) -> std::io::Result<()> {
    out.clear();
    out.reserve(len);
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let mut decompressor = kept.take().map_or_else(Decompressor::new, Ok)?;
        let got = decompressor.decompress_to_buffer(data, out);
        *kept = Some(decompressor);
        got.map(drop)
    })
}

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
        match compress(raw) {
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
        self.check_lens()?;
        let raw = match self.codec {
            Codec::Raw => self.data.clone(),
            Codec::Zstd => {
                let mut out = Vec::new();
                self.decompress(&mut out)?;
                out.into()
            }
        };
        self.check_name(&raw)?;
        Ok(raw)
    }

    /// The same for who does not need the bytes.
    pub(super) fn check(&self) -> Result<()> {
        self.check_lens()?;
        if self.codec == Codec::Raw {
            return self.check_name(&self.data);
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let checked = self
                .decompress(scratch)
                .and_then(|()| self.check_name(scratch));
            if scratch.capacity() > SCRATCH_KEPT {
                *scratch = Vec::new();
            }
            checked
        })
    }

    fn bad(&self, why: &str) -> StorageError {
        StorageError::BadDigest(format!("{} ({why})", self.id))
    }

    fn check_lens(&self) -> Result<()> {
        match self.raw_len as usize > CHUNK_LEN_MAX || self.data.len() > CHUNK_LEN_MAX {
            true => Err(self.bad("longer than a chunk may be")),
            false => Ok(()),
        }
    }

    fn decompress(&self, out: &mut Vec<u8>) -> Result<()> {
        decompress(&self.data, self.raw_len as usize, out)
            .map_err(|_| self.bad("cannot be decompressed to its length"))
    }

    fn check_name(&self, raw: &[u8]) -> Result<()> {
        if raw.len() != self.raw_len as usize {
            return Err(self.bad("not as long as it claims"));
        }
        match ChunkId::of(raw) == self.id {
            true => Ok(()),
            false => Err(self.bad("other bytes")),
        }
    }
}
