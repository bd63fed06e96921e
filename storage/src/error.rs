//! What can go wrong with durable bytes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    /// Where the bytes are kept for us does not answer as it should: nothing is known to be done.
    #[error("could not {action}")]
    Unavailable {
        /// Verb and object.
        action: &'static str,
        /// Cause.
        #[source]
        source: Arc<std::io::Error>,
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

/// The data directory that `path`, a part of it or a file in one, lies in.
pub fn data_dir(path: &Path) -> &Path {
    let part = |dir: &&Path| {
        let name = dir.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| crate::datadir::PARTS.contains(&name))
    };
    // The part itself, or a file in it; the identity lies beside the parts.
    let beside = path.ends_with("identity");
    let mut near = path.ancestors().take(if beside { 0 } else { 2 });
    let root = match near.find(part) {
        Some(part) => part.parent(),
        None => path.parent(),
    };
    root.unwrap_or(Path::new("."))
}

/// What a person does about damage, found at `path`, that this member cannot repair by itself. The command
/// is complete: it names the data directory that `path` is in.
pub fn repair_hint(path: &Path) -> String {
    let root = data_dir(path);
    format!(
        "this member's copy cannot be trusted; the other members hold the data: \
         run `mainstay member repair --data-dir {}`, then start this member again",
        root.display()
    )
}

impl StorageError {
    /// Damage found at `path`; says what to do.
    pub(crate) fn corrupt(path: &Path, detail: impl std::fmt::Display) -> Self {
        Self::Corrupt {
            path: path.to_path_buf(),
            detail: format!("{detail}; {}", repair_hint(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_names_the_data_directory() {
        let hint = |path: &str| repair_hint(Path::new(path));
        for path in [
            "/d/log/1.wal",
            "/d/log",
            "/d/state",
            "/d/snapshots/1.snap",
            "/d/identity",
        ] {
            assert!(hint(path).contains("--data-dir /d`"), "{path}");
        }
        assert!(hint("/log/state/identity").contains("--data-dir /log/state`"));
        assert!(hint("/state/c1/log/1.wal").contains("--data-dir /state/c1`"));
    }
}
