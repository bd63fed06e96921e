//! What can go wrong with durable bytes.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = StorageError> = std::result::Result<T, E>;

/// A fault of the disk or of what is on it. Never a refusal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The operating system said no.
    #[error("{action} {path}")]
    Io {
        /// Verb, e.g. "write".
        action: &'static str,
        /// Object.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Bytes on disk are not what was written.
    #[error("{path} is damaged: {detail}")]
    Corrupt {
        /// Where.
        path: PathBuf,
        /// What was found, and what to do.
        detail: String,
    },
    /// The directory belongs to something else, or to another release.
    #[error("{0}")]
    Foreign(String),
    /// Another process has it.
    #[error(
        "{0} is in use by another process; stop that one first, or give this one a directory of its own"
    )]
    Locked(PathBuf),
    /// A previous write failed; nothing more is accepted.
    #[error("storage stopped after an earlier failure: {0}")]
    Stopped(String),
    /// The caller broke a rule of the interface; nothing was changed.
    #[error("refused: {0}")]
    Misuse(String),
    /// Bytes do not hash to the name they came with.
    #[error("chunk {0} does not match its digest")]
    BadDigest(String),
}

/// What a person does about damage that this member cannot repair by itself.
pub(crate) const REPAIR_HINT: &str = "this member's copy cannot be trusted; the other members hold the data: \
    stop it, run `mainstay member replace` and let it join again with an empty data directory";

impl StorageError {
    /// Damage found at `path`; says what to do.
    pub(crate) fn corrupt(path: &std::path::Path, detail: impl std::fmt::Display) -> Self {
        Self::Corrupt {
            path: path.to_path_buf(),
            detail: format!("{detail}; {REPAIR_HINT}"),
        }
    }
}
