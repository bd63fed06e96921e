//! The last data directory of a cluster becomes a cluster of one, under a new cluster id: the members that
//! were lost, should they come back, do not talk to it, nor it to them.
//!
//! The member keeps its id. Nothing that id stands for was forgotten: the log, the vote and the chunks that
//! the state says it holds are all here. What must be new is the pair of cluster and member, and that is.
//!
//! ```text
//! mark -> identity with the new cluster id -> membership of one at the log's end -> mark removed
//! ```
//! In this order: with the new id and the old members it cannot do anything; with the old id and a membership
//! of one it would lead the old cluster alone.

use super::{Stores, attach};
use crate::founding::{Charter, Founder, Ledger};
use anyhow::{Context as _, bail};
use mainstay_model::{MemberId, codec};
use mainstay_raft::offline::{OpenKind, Survivor, become_sole, examine};
use mainstay_raft::{Member, Role};
use mainstay_storage::datadir::{DataDir, Identity};
use serde::Serialize;
use std::path::Path;

/// How the command begins that runs this.
pub const VERB: &str = "mainstay member recover";

/// What a directory holds, and what may be missing.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The member's name.
    pub name: String,
    /// Its id, which it keeps.
    pub id: String,
    /// The cluster that it was part of.
    pub cluster_id: String,
    /// The cluster that it is now; `None` after a dry run.
    pub new_cluster_id: Option<String>,
    /// Newest term that it has heard of.
    pub term: u64,
    /// Index of the last entry in its log: all entries up to here are kept.
    pub last_index: u64,
    /// Up to here they are known to have been committed.
    pub committed_index: u64,
    /// Up to here they are in the stored state.
    pub applied_index: u64,
    /// The members as they were known here.
    pub members: Vec<ReportedMember>,
    /// Entries behind the committed index.
    pub open_count: u64,
    /// The newest of them.
    pub open: Vec<ReportedEntry>,
    /// What may be lost, in words.
    pub notes: Vec<String>,
}

/// A member as it was known.
#[derive(Clone, Debug, Serialize)]
pub struct ReportedMember {
    /// Name.
    pub name: String,
    /// Id.
    pub id: String,
    /// `voter` or `learner`.
    pub role: &'static str,
}

/// An entry that may or may not have been committed.
#[derive(Clone, Debug, Serialize)]
pub struct ReportedEntry {
    /// Index.
    pub index: u64,
    /// Term.
    pub term: u64,
    /// What it is.
    pub what: String,
}

/// Look at the directory and, unless `dry_run`, make it a cluster of one. `command` is what runs this.
pub fn recover(root: &Path, dry_run: bool, command: &str) -> anyhow::Result<Report> {
    let dir = attach(root, VERB)?;
    let Some(identity) = dir.identity()? else {
        bail!("{} has no identity", root.display());
    };
    let Some(cluster_id) = identity.cluster_id.clone() else {
        bail!(
            "member {} never was part of a cluster: there is nothing to recover",
            identity.name
        );
    };
    let stores = Stores::open(&dir).context(HOPELESS)?;
    let survivor = examine(&stores.log, &stores.engine, &stores.snapshots).context(HOPELESS)?;
    let mut report = report(&identity, cluster_id, &survivor);
    if !dry_run {
        report.new_cluster_id = Some(alone(&dir, identity, &stores, &survivor, command)?);
    }
    Ok(report)
}

const HOPELESS: &str = "this directory is damaged: recover another member's, if there is one left; else \
    `mainstay snapshot restore` takes a saved snapshot, or the file in this directory's snapshots/";

fn alone(
    dir: &DataDir,
    mut identity: Identity,
    stores: &Stores,
    survivor: &Survivor,
    command: &str,
) -> anyhow::Result<String> {
    let id = identity.member_id;
    let fresh = || Member {
        name: identity.name.clone(),
        ..Member::default()
    };
    let member = survivor
        .members
        .get(&id)
        .map_or_else(fresh, |at| at.member.clone());
    let cluster_id = uuid::Uuid::new_v4().to_string();
    let charter = Charter {
        cluster_id: cluster_id.clone(),
        founders: vec![Founder {
            id,
            member: member.clone(),
        }],
    };
    identity.founding = Some(Ledger::sole(charter)?);
    identity.cluster_id = Some(cluster_id.clone());
    dir.begin(command)?;
    dir.save(&identity)?;
    become_sole(&stores.log, survivor, id, member)?;
    dir.done()?;
    Ok(cluster_id)
}

fn report(identity: &Identity, cluster_id: String, survivor: &Survivor) -> Report {
    let members = survivor.members.iter().map(|(id, at)| ReportedMember {
        name: at.member.name.clone(),
        id: MemberId(*id).to_string(),
        role: role(at.role),
    });
    let open = survivor.open.iter().map(|entry| ReportedEntry {
        index: entry.index,
        term: entry.term,
        what: what(&entry.kind),
    });
    Report {
        name: identity.name.clone(),
        id: MemberId(identity.member_id).to_string(),
        cluster_id,
        new_cluster_id: None,
        term: survivor.term,
        last_index: survivor.last,
        committed_index: survivor.committed,
        applied_index: survivor.applied,
        members: members.collect(),
        open_count: survivor.open_count(),
        open: open.collect(),
        notes: notes(identity, survivor),
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Voter => "voter",
        Role::Learner => "learner",
    }
}

/// The kind of a command, without what it carries: that may be long, and secret.
fn what(kind: &OpenKind) -> String {
    match kind {
        OpenKind::Blank => "a new leader's first entry".to_owned(),
        OpenKind::Membership => "a change of the members".to_owned(),
        OpenKind::Command(bytes) => match codec::decode_envelope(bytes) {
            Ok(envelope) => {
                let text = format!("{:?}", envelope.command);
                let end = text.find(|c: char| !c.is_alphanumeric());
                text[..end.unwrap_or(text.len())].to_owned()
            }
            Err(_) => "a command that this release cannot read".to_owned(),
        },
    }
}

fn notes(identity: &Identity, survivor: &Survivor) -> Vec<String> {
    let mut notes = vec![format!(
        "what the other members acknowledged after entry {} is not here and would be lost; another member's directory may hold more: compare the terms and last indexes, and recover the one with the highest term, then index",
        survivor.last
    )];
    if survivor.open_count() > 0 {
        notes.push(format!(
            "{} entries after {} are not known to be committed: they are kept, also those that nobody was told had happened",
            survivor.open_count(),
            survivor.committed
        ));
    }
    match survivor.members.get(&identity.member_id).map(|at| at.role) {
        Some(Role::Voter) => {}
        Some(Role::Learner) => notes.push(
            "this member was a learner: it may be far behind what was acknowledged".to_owned(),
        ),
        None => notes.push(
            "by its own log this member had been removed: it may lack everything since then"
                .to_owned(),
        ),
    }
    notes
}
