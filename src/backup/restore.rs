//! A new cluster from a saved snapshot: fills a fresh data directory, on which the first member of that
//! cluster starts. Talks to nobody.
//!
//! ```text
//! checked -> marked as unfinished -> state, log position -> identity -> mark removed
//! ```
//! A crash in between leaves the mark: no member starts there, and the same command begins anew.

use super::inspect::{Inspected, inspect};
use crate::founding::{Charter, Founder, Ledger};
use crate::{cli, stamp};
use anyhow::{Context as _, bail};
use mainstay_model::MemberId;
use mainstay_raft::Member;
use mainstay_raft::offline::{Seed, seed};
use mainstay_storage::UntilError;
use mainstay_storage::datadir::{DataDir, Identity};
use mainstay_storage::engine::SledEngine;
use mainstay_storage::log::Wal;
use mainstay_storage::snapshot::SnapshotReader;
use serde::Serialize;
use std::path::Path;

/// How far behind the snapshot's index the new cluster's log goes on: the old cluster may have written so
/// much more before it ended (79 days at 10,000 entries a second), and no index may mean two things. Far
/// below 2^53, up to which JSON's numbers are exact.
pub const INDEX_GAP: u64 = 1 << 36;

/// How the command begins that runs this.
pub const VERB: &str = "mainstay snapshot restore";

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct Restored {
    /// The new cluster.
    pub cluster_id: String,
    /// Its first member.
    pub member_id: String,
    /// That member's name.
    pub name: String,
    /// Its log goes on behind this index.
    pub index: u64,
    /// What it was made from.
    pub snapshot: Inspected,
}

/// Make the directory `root` the first member of a new cluster, with what is in `file`.
pub fn restore(
    file: &Path,
    root: &Path,
    member: Member,
    command: &str,
) -> anyhow::Result<Restored> {
    let snapshot = inspect(file)?;
    let dir = DataDir::attach(root)
        .with_context(|| format!("cannot use --data-dir {}", root.display()))?;
    match dir.unfinished()? {
        Some(other) if !other.starts_with(VERB) => bail!(
            "{} was left half way by another command: run that again: `{other}`",
            root.display()
        ),
        // Ours was interrupted: what it left is of no use.
        Some(_) => {}
        None => unused(&dir, root)?,
    }
    dir.begin(command)?;
    dir.empty()?;
    let at = Seed {
        id: stamp::member_id(),
        member: member.clone(),
        index: snapshot.index.saturating_add(INDEX_GAP),
        term: snapshot.term + 1,
    };
    fill(file, &dir, &at)?;
    let cluster_id = uuid::Uuid::new_v4().to_string();
    let charter = Charter {
        cluster_id: cluster_id.clone(),
        founders: vec![Founder {
            id: at.id,
            member: member.clone(),
        }],
    };
    dir.save(&Identity {
        member_id: at.id,
        name: member.name.clone(),
        cluster_id: Some(cluster_id.clone()),
        created_by: cli::VERSION.to_owned(),
        founding: Some(Ledger::sole(charter)?),
    })?;
    dir.done()?;
    Ok(Restored {
        cluster_id,
        member_id: MemberId(at.id).to_string(),
        name: member.name,
        index: at.index,
        snapshot,
    })
}

fn unused(dir: &DataDir, root: &Path) -> anyhow::Result<()> {
    if let Some(identity) = dir.identity()? {
        bail!(
            "{} already belongs to member {}: give the path of an empty or new directory (or empty this one, if that member may be forgotten)",
            root.display(),
            identity.name
        );
    }
    Ok(())
}

fn fill(file: &Path, dir: &DataDir, at: &Seed) -> anyhow::Result<()> {
    // Verified once more: it is another look at the file.
    let mut reader = SnapshotReader::open(file)?;
    let mut entries = UntilError::new(reader.entries());
    let log = Wal::open(&dir.path("log"))?;
    let engine = SledEngine::open(&dir.path("state"))?;
    let seeded = seed(&log, &engine, &mut entries, at.clone());
    entries.outcome()?;
    Ok(seeded?)
}
