//! Moving images: the manifest, the framing of chunks, and the client that pulls a file from any of
//! several registries in parallel, verified and resumable. Shared by the agent, the command line and
//! the controller.
//!
//! A file is cut into 64 KiB chunks named by BLAKE3; a chunk of zeros is named by 32 zero bytes and
//! is never stored or sent. The names of 2048 consecutive chunks, one after the other, are a *segment*,
//! itself a chunk. A *manifest* is a small JSON document that lists each file's segments; it is a chunk
//! too, and its digest is what a tag names.

use serde::{Deserialize, Serialize};
use std::path::Path;

/// Bytes of a file chunk.
pub const CHUNK_LEN: u64 = 64 << 10;
/// Chunks named by one segment.
pub const SEGMENT_CHUNKS: usize = 2048;

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

/// Why bytes did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// No source had it; the text lists what each said.
    #[error("no registry could serve it: {0}")]
    Unavailable(String),
    /// What arrived is not what was asked for.
    #[error("{0}")]
    Invalid(String),
    /// The local disk failed.
    #[error("local disk: {0}")]
    Io(#[from] std::io::Error),
}

/// Fetch the manifest with this digest (hex) and make `dest` equal to its file `index`, from any of
/// `registries` (base URLs), in parallel, every chunk verified. Whole chunks that `dest` already has
/// (from an interrupted pull) are kept. `dest` is fsynced on return. `progress(done, total)` in bytes.
pub async fn pull_file(
    client: &reqwest::Client,
    registries: &[String],
    manifest: &str,
    index: usize,
    dest: &Path,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<Manifest, TransferError> {
    let _ = (client, registries, manifest, index, dest, progress);
    todo!()
}
