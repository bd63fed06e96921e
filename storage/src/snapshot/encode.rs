//! The bytes of a snapshot, made piece by piece: for a file, or for a stream. Knows no file.

use super::file::{END, ENTRY, LEN_MAX, header};
use crate::{Result, StorageError};

/// Appends the pieces of one snapshot to a buffer that the caller empties whenever it likes, of which
/// it changes nothing.
#[derive(Debug)]
pub struct SnapshotEncoder {
    hasher: Box<blake3::Hasher>,
    count: u64,
    last: Option<Vec<u8>>,
}

impl SnapshotEncoder {
    /// Append the header.
    pub fn begin(meta: &[u8], out: &mut Vec<u8>) -> Result<Self> {
        let header = header(meta)?;
        let mut hasher = Box::new(blake3::Hasher::new());
        hasher.update(&header);
        out.extend_from_slice(&header);
        Ok(Self {
            hasher,
            count: 0,
            last: None,
        })
    }

    /// Append one entry. Keys must ascend.
    pub fn entry(&mut self, key: &[u8], value: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if self.last.as_deref().is_some_and(|last| last >= key) {
            return Err(StorageError::Misuse("snapshot keys must ascend".into()));
        }
        let from = out.len();
        out.push(ENTRY);
        out.extend_from_slice(&length(key.len())?.to_le_bytes());
        out.extend_from_slice(&u64::from(length(value.len())?).to_le_bytes());
        out.extend_from_slice(key);
        out.extend_from_slice(value);
        self.hasher.update(&out[from..]);
        self.count += 1;
        let last = self.last.get_or_insert_with(Vec::new);
        last.clear();
        last.extend_from_slice(key);
        Ok(())
    }

    /// Append the end.
    pub fn end(mut self, out: &mut Vec<u8>) {
        let from = out.len();
        out.push(END);
        out.extend_from_slice(&self.count.to_le_bytes());
        self.hasher.update(&out[from..]);
        out.extend_from_slice(self.hasher.finalize().as_bytes());
    }
}

/// A length as it stands in the file.
pub(super) fn length(len: usize) -> Result<u32> {
    u32::try_from(len)
        .ok()
        .filter(|len| u64::from(*len) <= LEN_MAX)
        .ok_or_else(|| {
            StorageError::Misuse(format!(
                "{len} bytes in one snapshot field; at most {LEN_MAX} are allowed"
            ))
        })
}
