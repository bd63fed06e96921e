//! A data directory whose member does not run, and cannot: the group has lost its majority, or the disk has
//! damaged what was on it. Knows what such a directory holds and how it becomes one that a member starts on.
//!
//! * [`recover`]: the last one left becomes a cluster of its own. Talks to nobody.
//! * [`repair`]: a damaged one joins the living members again, with a new identity and its old chunks.
//! * [`known`]: where the other members were, for whoever has to ask them.
//!
//! Both mark the directory before they change it and remove the mark when all is in place: a crash leaves
//! the old directory, or the new one, or the mark, which says which command to run again.

pub mod known;
pub mod recover;
pub mod repair;

use anyhow::{Context as _, bail};
use mainstay_storage::datadir::DataDir;
use mainstay_storage::engine::SledEngine;
use mainstay_storage::log::Wal;
use mainstay_storage::snapshot::SnapshotDir;
use std::path::Path;
use std::sync::Arc;

/// The stores of a member that does not run. Opening them does what any start does first: the end of a
/// write that a crash tore is cut off.
pub struct Stores {
    log: Wal,
    engine: SledEngine,
    snapshots: Arc<SnapshotDir>,
}

impl Stores {
    fn open(dir: &DataDir) -> mainstay_storage::Result<Self> {
        Ok(Self {
            log: Wal::open(&dir.path("log"))?,
            engine: SledEngine::open(&dir.path("state"))?,
            snapshots: Arc::new(SnapshotDir::open(&dir.path("snapshots"))?),
        })
    }
}

/// Lock a directory that must exist, and refuse one that another command than `verb` left half way.
fn attach(root: &Path, verb: &str) -> anyhow::Result<DataDir> {
    if !root.join("identity").exists() && !root.join("unfinished").exists() {
        bail!(
            "{} is not the data directory of a member: give the path that its --data-dir names",
            root.display()
        );
    }
    let dir = DataDir::attach(root)
        .with_context(|| format!("cannot use --data-dir {}", root.display()))?;
    if let Some(other) = dir.unfinished()?
        && !other.starts_with(verb)
    {
        bail!(
            "{} was left half way by another command: run that again: `{other}`",
            root.display()
        );
    }
    Ok(dir)
}
