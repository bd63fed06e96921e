//! A member's data directory: who it belongs to, which format it has, and the lock on it.

use crate::Result;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Who this data directory belongs to. Written once, fsynced; `cluster_id` is filled in at founding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random, nonzero; never reused: a wiped directory gets another.
    pub member_id: u64,
    /// The member's name in the member list.
    pub name: String,
    /// The cluster it is part of; `None` until founded or joined.
    pub cluster_id: Option<String>,
    /// Release that created it.
    pub created_by: String,
    /// The founding protocol's promise and acceptance, opaque here.
    pub founding: Option<Vec<u8>>,
}

/// An open, locked data directory with its sub-directories:
/// `log/`, `state/`, `snapshots/`, `chunks/`.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// Open or create and lock. `fresh` makes the identity of a new directory. Refuses a directory
    /// of another format version or of another program, with a sentence that says what to do.
    pub fn open(root: &Path, fresh: impl FnOnce() -> Identity) -> Result<(Self, Identity)> {
        let _ = (root, fresh);
        todo!()
    }
    /// Replace the identity file; durable on return.
    pub fn save(&self, identity: &Identity) -> Result<()> {
        let _ = identity;
        todo!()
    }
    /// Path of a sub-directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}
