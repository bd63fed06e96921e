//! A small file beside the store that says how many commits are durable. It is written after each commit
//! is durable and never synced: it may lag, not lead. So it costs nothing, and a store that comes back with
//! fewer commits than it says has lost some.

use super::layout::{encode_durable, parse_durable};
use crate::Result;
use crate::disk::{Disk, DiskFile, io_error};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Its name.
const NAME: &str = "durable";

/// The file, open.
#[derive(Debug)]
pub(super) struct Durable {
    path: PathBuf,
    file: Arc<dyn DiskFile>,
}

impl Durable {
    /// Open or create; returns what it says. One that does not verify says nothing.
    pub(super) fn open(disk: &dyn Disk, dir: &Path) -> Result<(Self, u64)> {
        let path = dir.join(NAME);
        if !path.exists() {
            let file = disk.create(&path).map_err(io_error("create", &path))?;
            return Ok((Self { path, file }, 0));
        }
        let file = disk.open(&path).map_err(io_error("open", &path))?;
        let bytes = std::fs::read(&path).map_err(io_error("read", &path))?;
        let commits = parse_durable(&bytes).unwrap_or_else(|| {
            tracing::warn!(path = %path.display(), "damaged: how many commits were durable is not known; it is written anew");
            0
        });
        Ok((Self { path, file }, commits))
    }

    /// So many commits are durable.
    pub(super) fn note(&self, commits: u64) -> Result<()> {
        self.file
            .write_all_at(&encode_durable(commits), 0)
            .map_err(io_error("write", &self.path))
    }
}
