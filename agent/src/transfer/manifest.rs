//! The manifest: what a tag is made of. Nothing in one is believed before it was checked here.

use super::{CHUNK_LEN, Id, RECORD_LEN_MAX, SEGMENT_CHUNKS, TransferError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The file with the memory of a suspended VM.
pub const MEMORY_FILE: &str = "memory.state";
/// The file that says to which machine the memory belongs; a chunk at most.
pub const MACHINE_FILE: &str = "machine.json";

/// Files of one manifest: an OCI artifact with all its blobs is one.
const FILES_MAX: usize = 1024;
/// Characters of a file name.
const NAME_MAX: usize = 128;
/// Logical bytes of a file: a manifest of more would not fit a chunk.
pub const SIZE_MAX: u64 = 14 << 40;
/// Logical bytes of all files together.
const TOTAL_MAX: u64 = 16 << 40;
/// Logical bytes named by one segment.
const SEGMENT_LEN: u64 = CHUNK_LEN * SEGMENT_CHUNKS as u64;

/// What a tag is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version, 1.
    pub version: u32,
    /// Its files.
    pub files: Vec<FileEntry>,
}

/// One file of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Plain name without a path, e.g. `disk.qcow2`.
    pub name: String,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Logical length.
    pub size: u64,
    /// Digest (hex) of each segment, in order.
    pub segments: Vec<String>,
}

impl Manifest {
    /// Read one and check everything that can be checked without its segments.
    pub fn parse(bytes: &[u8]) -> Result<Self, TransferError> {
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|e| TransferError::Invalid(format!("not a manifest: {e}")))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The bytes whose digest names it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TransferError> {
        self.check()?;
        let bytes = serde_json::to_vec(self).map_err(|e| TransferError::Invalid(e.to_string()))?;
        if bytes.len() > RECORD_LEN_MAX {
            return Err(TransferError::Invalid(
                "the manifest is over 8 MiB".to_owned(),
            ));
        }
        Ok(bytes)
    }

    /// Logical bytes of all files.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|f| f.size).sum()
    }

    /// Where memory and machine of a suspended VM stand, if there is one. The disk stands first, as always. An
    /// error if they are not what they should be.
    pub fn saved(&self) -> Result<Option<(usize, usize)>, TransferError> {
        let find = |name: &str| self.files.iter().position(|f| f.name == name);
        let bad = |why: &str| Err(TransferError::Invalid(format!("manifest refused: {why}")));
        match (find(MEMORY_FILE), find(MACHINE_FILE)) {
            (None, None) => Ok(None),
            (Some(0), _) | (_, Some(0)) => bad("the disk of a suspended VM stands first"),
            (Some(memory), Some(machine)) => {
                if self.files[memory].size == 0 || self.files[memory].format != "raw" {
                    return bad("a memory is a raw file of some bytes");
                }
                if !(1..=CHUNK_LEN).contains(&self.files[machine].size) {
                    return bad("the description of a machine has 1 to 65536 bytes");
                }
                Ok(Some((memory, machine)))
            }
            _ => bad("a memory and its machine come together"),
        }
    }

    fn check(&self) -> Result<(), TransferError> {
        let bad = |why: String| Err(TransferError::Invalid(format!("manifest refused: {why}")));
        if self.version != 1 {
            return bad(format!("version {} is not known, 1 is", self.version));
        }
        if self.files.is_empty() || self.files.len() > FILES_MAX {
            return bad(format!(
                "{} files, 1 to {FILES_MAX} are allowed",
                self.files.len()
            ));
        }
        let names: BTreeSet<&str> = self.files.iter().map(|f| f.name.as_str()).collect();
        if names.len() != self.files.len() {
            return bad("two files have the same name".to_owned());
        }
        self.files.iter().try_for_each(FileEntry::check)?;
        // No overflow: each was checked to be far from it.
        if self.size() > TOTAL_MAX {
            return bad(format!(
                "{} bytes, at most {TOTAL_MAX} are allowed",
                self.size()
            ));
        }
        Ok(())
    }
}

impl FileEntry {
    /// Chunks it consists of.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(CHUNK_LEN)
    }

    /// One name for its bytes, whatever it is called: BLAKE3 of its length and its segments' digests, hex.
    pub fn content(&self) -> Result<String, TransferError> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.size.to_le_bytes());
        hasher.update(self.segment_digests()?.as_flattened());
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Segment digests as bytes.
    pub fn segment_digests(&self) -> Result<Vec<Id>, TransferError> {
        self.segments.iter().map(|s| hex_id(s)).collect()
    }

    fn check(&self) -> Result<(), TransferError> {
        let bad = |why: String| {
            Err(TransferError::Invalid(format!(
                "manifest refused: file {:?}: {why}",
                self.name
            )))
        };
        if !plain_name(&self.name) {
            return bad(format!(
                "a name is 1 to {NAME_MAX} letters, digits, '.', '-', '_' and does not begin with '.'"
            ));
        }
        if self.format != "qcow2" && self.format != "raw" {
            return bad(format!(
                "format {:?} is not known, qcow2 and raw are",
                self.format
            ));
        }
        if self.size > SIZE_MAX {
            return bad(format!(
                "{} bytes, at most {SIZE_MAX} are allowed",
                self.size
            ));
        }
        let expected = self.size.div_ceil(SEGMENT_LEN);
        if self.segments.len() as u64 != expected {
            return bad(format!(
                "{} segments, its size needs {expected}",
                self.segments.len()
            ));
        }
        self.segment_digests().map(|_| ())
    }
}

/// A name that is safe as the last part of a path on any system.
fn plain_name(name: &str) -> bool {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !name.is_empty() && name.len() <= NAME_MAX && !name.starts_with('.') && name.bytes().all(safe)
}

/// A digest from its 64 hex digits.
pub fn hex_id(text: &str) -> Result<Id, TransferError> {
    let mut id = [0; 32];
    hex::decode_to_slice(text, &mut id)
        .map_err(|_| TransferError::Invalid(format!("{text:?} is not a digest (64 hex digits)")))?;
    Ok(id)
}

/// Is this segment's length right for segment `number` of `file`?
pub fn check_segment(file: &FileEntry, number: usize, bytes: &[u8]) -> Result<(), TransferError> {
    let before = number as u64 * SEGMENT_CHUNKS as u64;
    let chunks = file
        .chunks()
        .saturating_sub(before)
        .min(SEGMENT_CHUNKS as u64);
    if bytes.len() as u64 == chunks * 32 {
        return Ok(());
    }
    Err(TransferError::Invalid(format!(
        "segment {number} of {} names {} bytes of digests, {} are due",
        file.name,
        bytes.len(),
        chunks * 32
    )))
}

/// Chunk names of a segment.
pub fn segment_ids(bytes: &[u8]) -> impl Iterator<Item = Id> + '_ {
    bytes.chunks_exact(32).filter_map(|c| c.try_into().ok())
}

/// Length of chunk `number` of a file of `size` bytes.
pub fn chunk_len_at(size: u64, number: u64) -> u64 {
    size.saturating_sub(number.saturating_mul(CHUNK_LEN))
        .min(CHUNK_LEN)
}
