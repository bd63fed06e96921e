//! Chunks on the wire: records one after the other, nothing between or around them.
//!
//! ```text
//! id, 32 bytes | codec u8 (0 raw, 1 zstd) | raw_len u32 | stored_len u32 | data, stored_len bytes
//! ```
//! Integers are little-endian. A body that ends inside a record was cut off.

use super::{Id, TransferError};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::cell::RefCell;
use zstd::bulk::{Compressor, Decompressor};

/// Longest chunk, uncompressed or stored.
pub const RECORD_LEN_MAX: usize = 8 << 20;
const HEADER_LEN: usize = 41;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// Compressed data is sent only if it is at least this much smaller: 1/20.
const WORTH_IT: usize = 20;

thread_local! {
    /// Made once for each thread, not for each chunk.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn compress(raw: &[u8]) -> std::io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|kept| {
        let mut compressor = kept.take().map_or_else(|| Compressor::new(1), Ok)?;
        let small = compressor.compress(raw);
        *kept = Some(compressor);
        small
    })
}

fn decompress(data: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let mut decompressor = kept.take().map_or_else(Decompressor::new, Ok)?;
        let got = decompressor.decompress_to_buffer(data, out);
        *kept = Some(decompressor);
        got
    })
}

/// A chunk as it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireRecord {
    /// Claimed name.
    pub id: Id,
    /// 0 raw, 1 zstd.
    pub codec: u8,
    /// Uncompressed length.
    pub raw_len: u32,
    /// Stored bytes.
    pub data: Bytes,
}

impl WireRecord {
    /// Name and compress. `raw` is at most [`RECORD_LEN_MAX`] long.
    pub fn encode(raw: &[u8]) -> Self {
        let id = *blake3::hash(raw).as_bytes();
        let raw_len = u32::try_from(raw.len()).unwrap_or(u32::MAX);
        match compress(raw) {
            Ok(small) if small.len() + raw.len() / WORTH_IT <= raw.len() => Self {
                id,
                codec: ZSTD,
                raw_len,
                data: small.into(),
            },
            _ => Self {
                id,
                codec: RAW,
                raw_len,
                data: Bytes::copy_from_slice(raw),
            },
        }
    }

    /// A chunk as it is, under a name that was checked.
    pub(super) fn raw(id: Id, data: Bytes) -> Self {
        Self {
            id,
            codec: RAW,
            raw_len: u32::try_from(data.len()).unwrap_or(u32::MAX),
            data,
        }
    }

    /// Decompress into `out`, which must be exactly as long as the chunk, and check the name.
    pub fn decode_into(&self, out: &mut [u8]) -> Result<(), TransferError> {
        let bad =
            |why: &str| TransferError::Invalid(format!("chunk {} {why}", hex::encode(self.id)));
        if self.raw_len as usize != out.len() {
            return Err(bad("has another length than it should"));
        }
        match self.codec {
            RAW if self.data.len() == out.len() => out.copy_from_slice(&self.data),
            ZSTD => {
                let got = decompress(&self.data, out);
                if got.ok() != Some(out.len()) {
                    return Err(bad("cannot be decompressed to its length"));
                }
            }
            _ => return Err(bad("has an unknown form")),
        }
        if blake3::hash(out).as_bytes() != &self.id {
            return Err(bad("does not hash to its name"));
        }
        Ok(())
    }

    /// The chunk's bytes, checked. Allocates no more than [`RECORD_LEN_MAX`].
    pub fn decode(&self) -> Result<Vec<u8>, TransferError> {
        if self.raw_len as usize > RECORD_LEN_MAX {
            return Err(TransferError::Invalid(
                "a chunk claims to be over 8 MiB".to_owned(),
            ));
        }
        let mut out = vec![0; self.raw_len as usize];
        self.decode_into(&mut out)?;
        Ok(out)
    }

    /// Bytes on the wire.
    pub fn framed_len(&self) -> usize {
        HEADER_LEN + self.data.len()
    }

    /// What stands before the data.
    pub fn header(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEADER_LEN);
        out.put_slice(&self.id);
        out.put_u8(self.codec);
        out.put_u32_le(self.raw_len);
        out.put_u32_le(u32::try_from(self.data.len()).unwrap_or(u32::MAX));
        out.freeze()
    }

    /// Several records as one body.
    pub fn frame_all<'a>(records: impl IntoIterator<Item = &'a Self>) -> Bytes {
        let records: Vec<&Self> = records.into_iter().collect();
        let len = records.iter().map(|record| record.framed_len()).sum();
        let mut out = BytesMut::with_capacity(len);
        for record in records {
            out.put_slice(&record.header());
            out.put_slice(&record.data);
        }
        out.freeze()
    }
}

/// Cuts a stream of bytes into records. Holds at most one unfinished record.
#[derive(Debug, Default)]
pub struct Unframer {
    gathered: BytesMut,
}

impl Unframer {
    /// More bytes have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.gathered.extend_from_slice(bytes);
    }

    /// The next whole record, if it is there.
    pub fn next_record(&mut self) -> Result<Option<WireRecord>, TransferError> {
        if self.gathered.len() < HEADER_LEN {
            return Ok(None);
        }
        let mut head = &self.gathered[..HEADER_LEN];
        let mut id = [0; 32];
        head.copy_to_slice(&mut id);
        let codec = head.get_u8();
        let raw_len = head.get_u32_le();
        let stored_len = head.get_u32_le() as usize;
        if stored_len > RECORD_LEN_MAX || raw_len as usize > RECORD_LEN_MAX || codec > ZSTD {
            return Err(TransferError::Invalid(
                "not a record: unknown form, or a chunk over 8 MiB".to_owned(),
            ));
        }
        if self.gathered.len() < HEADER_LEN + stored_len {
            self.gathered
                .reserve(HEADER_LEN + stored_len - self.gathered.len());
            return Ok(None);
        }
        self.gathered.advance(HEADER_LEN);
        let data = self.gathered.split_to(stored_len).freeze();
        Ok(Some(WireRecord {
            id,
            codec,
            raw_len,
            data,
        }))
    }

    /// The stream has ended: was it whole?
    pub fn finish(&self) -> Result<(), TransferError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        Err(TransferError::Invalid(
            "the body ends inside a record".to_owned(),
        ))
    }
}
