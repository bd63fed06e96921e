//! Durable bytes. Knows no HTTP, no consensus library, no VM.
//!
//! * [`log`]: the Raft log, vote and marks: one write-ahead log, one ordered writer thread.
//! * [`engine`]: the key-value store of the applied state (sled; memory for tests).
//! * [`snapshot`]: checksummed snapshot files.
//! * [`datadir`]: a data directory's identity, format version and lock.
//! * [`disk`]: the file operations all of that rests on, so that tests can cut the power.
//! * [`reserve`]: room kept for log and state when others fill the disk.
//! * [`chunks`]: content-addressed chunks in append-only packs.
//! * [`blobs`]: names of uploaded blobs.
//!
//! "Durable" always means: the bytes and what is needed to find them were fsynced.

pub mod blobs;
pub mod chunks;
pub mod datadir;
pub mod disk;
pub mod engine;
mod entries;
pub mod error;
pub mod log;
pub mod reserve;
pub mod snapshot;

pub use entries::UntilError;
pub use error::{Result, StorageError};
