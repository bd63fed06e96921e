//! Durable bytes. Knows no HTTP, no consensus library, no VM.
//!
//! * [`log`]: the Raft log, vote and marks: one write-ahead log, one ordered writer thread.
//! * [`engine`]: the key-value store of the applied state (sled; memory for tests).
//! * [`snapshot`]: checksummed snapshot files.
//! * [`datadir`]: a data directory's identity, format version and lock.
//! * [`chunks`]: content-addressed chunks in append-only packs.
//!
//! "Durable" always means: the bytes and what is needed to find them were fsynced.

pub mod chunks;
pub mod datadir;
pub mod engine;
pub mod error;
pub mod log;
pub mod snapshot;

pub use error::{Result, StorageError};
