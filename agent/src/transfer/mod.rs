//! Moving images: the manifest, the framing of chunks, and the client that pushes a file to a
//! registry or pulls it from any of several, in parallel, verified and resumable. Shared by the
//! agent, the command line and the controller. Refuses to know how chunks are stored.
//!
//! A file is cut into 64 KiB chunks named by BLAKE3; a chunk of zeros is named by 32 zero bytes and
//! is never stored or sent. The names of 2048 consecutive chunks, one after the other, are a *segment*,
//! itself a chunk. A *manifest* is a small JSON document that lists each file's segments; it is a chunk
//! too, and its digest is what a tag names.
//!
//! * `frame`: records on the wire, for client and server.
//! * `manifest`: the document, and what is refused in one.
//! * `api`: paths and JSON bodies of the transfer protocol.
//! * `source`: one registry over HTTP.
//! * `image`: the local file: holes, hashing, aligned writes.
//! * `pull`, `push`: the two directions. `hunt`: how a pull gets the chunks that it lacks, `batch`: where it
//!   turns to next for some of them (pure), `sources`: the members.
//! * `holding`: what of an image is here, for the next tag and for other nodes.

pub mod api;
mod batch;
mod frame;
mod holding;
mod hunt;
mod image;
mod manifest;
mod pull;
mod push;
mod source;
mod sources;
#[cfg(test)]
mod tests;

pub use batch::node_url;
pub use frame::{RECORD_LEN_MAX, Unframer, WireRecord};
pub use holding::{Holding, MEMORY_NAMES_FILE, NAMES_FILE};
pub use image::name_of;
pub use manifest::{
    FileEntry, MACHINE_FILE, MEMORY_FILE, Manifest, SIZE_MAX, check_segment, chunk_len_at, hex_id,
    segment_ids,
};
pub use pull::{Company, pull_among, pull_file};
pub use push::{Published, PushSpec, content_of, push_file};
pub use source::read_records_into;

/// Bytes of a file chunk.
pub const CHUNK_LEN: u64 = 64 << 10;
/// Chunks named by one segment.
pub const SEGMENT_CHUNKS: usize = 2048;
/// Name of a chunk of zeros: never stored, never sent.
pub const ZERO_CHUNK: [u8; 32] = [0; 32];
/// Chunks of one request: 8 MiB before compression.
pub(crate) const BATCH_CHUNKS: usize = 128;
/// Requests under way at once.
pub(crate) const CONNECTIONS: usize = 4;

/// BLAKE3 of a chunk's uncompressed bytes.
pub type Id = [u8; 32];

/// Why bytes did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// No source had it; the text lists what each said.
    #[error("no registry could serve it: {0}")]
    Unavailable(String),
    /// What arrived is not what was asked for.
    #[error("{0}")]
    Invalid(String),
    /// The registry said no; the text says why.
    #[error("{0}")]
    Refused(String),
    /// The local disk failed.
    #[error("local disk: {0}")]
    Io(#[from] std::io::Error),
}
