//! The stores of a member whose group has lost its majority: what they hold, and how the member becomes a
//! group of one without losing an entry that is on its disk.
//!
//! Nothing is cut off: entries that were not known to be committed stay, because any of them may have been
//! acknowledged by members that are gone. A membership with this member alone is appended behind them, in a
//! term of its own; the member then elects itself and commits them all.

use super::point::members;
use super::{durable, storage};
use crate::codec::{
    LogIdV1, Mark, decode_entry, decode_log_id, decode_vote, encode_entry, encode_log_id,
    encode_vote,
};
use crate::store::snapshot::open_current;
use crate::types::{Command, Entry, LogId, Membership, Payload, Vote};
use crate::{Member, MemberStatus};
use bytes::Bytes;
use mainstay_storage::engine::Engine;
use mainstay_storage::log::{Log, LogEntry};
use mainstay_storage::snapshot::SnapshotDir;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;

/// Entries are read in portions of about this size.
const READ_BYTES: usize = 1 << 20;
/// Of the entries not known to be committed, so many are shown: the newest.
const SHOWN: usize = 20;

/// What the stores hold.
#[derive(Clone, Debug, Default)]
pub struct Survivor {
    /// Newest term it has heard of.
    pub term: u64,
    /// Index of the last entry.
    pub last: u64,
    /// Entries up to here are known to be committed: applied, or heard so from a leader.
    pub committed: u64,
    /// Entries up to here are in the stored state.
    pub applied: u64,
    /// Newest membership in log or state, committed or not.
    pub members: BTreeMap<u64, MemberStatus>,
    /// The newest entries behind `committed`: the group may have committed them, or dropped them.
    pub open: Vec<OpenEntry>,
    /// The log ends in a membership of one, in a term that nothing else is in.
    sole: Option<u64>,
    floor: Option<LogId>,
    end: Option<LogId>,
}

/// An entry that is not known to be committed.
#[derive(Clone, Debug)]
pub struct OpenEntry {
    /// Position.
    pub index: u64,
    /// Term.
    pub term: u64,
    /// Content.
    pub kind: OpenKind,
}

/// What an entry is.
#[derive(Clone, Debug)]
pub enum OpenKind {
    /// A leader's first sign.
    Blank,
    /// A command, opaque here.
    Command(Bytes),
    /// A change of the members.
    Membership,
}

/// Look at the stores; changes nothing. An error says what is damaged, or that they do not fit together.
pub fn examine(
    log: &dyn Log,
    engine: &dyn Engine,
    snapshots: &Arc<SnapshotDir>,
) -> io::Result<Survivor> {
    let (mark, entries) = engine.read().map_err(storage)?;
    for entry in entries {
        entry.map_err(storage)?;
    }
    let mut mark = mark
        .as_deref()
        .map(Mark::decode)
        .transpose()?
        .unwrap_or_default();
    // A crash may have cut short the installation of a snapshot, which the next start would finish.
    if let Some(newer) = open_current(snapshots)?
        && newer.meta.last_log_id > mark.applied
    {
        mark.applied = newer.meta.last_log_id;
        mark.membership = newer.meta.last_membership;
    }
    let state = log.state();
    let vote = state.vote.as_deref().map(decode_vote).transpose()?;
    let purged = state.purged.as_ref();
    let purged = purged.map(|(_, id)| decode_log_id(id)).transpose()?;
    let known = state.committed.as_deref().map(decode_log_id).transpose()?;
    let mut found = Survivor {
        term: vote.map_or(0, |vote| vote.leader_id.term),
        applied: mark.applied.map_or(0, |id| id.index),
        committed: mark.applied.max(known).map_or(0, |id| id.index),
        members: members(mark.membership.membership()),
        floor: mark.applied,
        end: purged.max(mark.applied),
        ..Survivor::default()
    };
    if let Some(floor) = mark.applied
        && (vote.is_none() || ends_before(&state, floor, snapshots)?)
    {
        return Err(io::Error::other(format!(
            "the log ends before entry {}, which is in the stored state: entries that were durable are missing",
            floor.index
        )));
    }
    found.walk(log)?;
    found.last = found.end.map_or(0, |id| id.index);
    Ok(found)
}

/// A log may end before the state only where a snapshot was just installed.
fn ends_before(
    state: &mainstay_storage::log::LogState,
    floor: LogId,
    snapshots: &Arc<SnapshotDir>,
) -> io::Result<bool> {
    let end = state
        .last
        .max(state.purged.as_ref().map(|(index, _)| *index));
    if end >= Some(floor.index) {
        return Ok(false);
    }
    let snapshot = open_current(snapshots)?.and_then(|s| s.meta.last_log_id);
    Ok(snapshot != Some(floor))
}

impl Survivor {
    /// Read what is behind the stored state.
    fn walk(&mut self, log: &dyn Log) -> io::Result<()> {
        let Some(last) = log.state().last else {
            return Ok(());
        };
        let mut open = VecDeque::new();
        let mut at = self.floor.map_or(0, |id| id.index + 1);
        while at <= last {
            let portion = log.read(at..last + 1, READ_BYTES).map_err(storage)?;
            for raw in portion {
                if raw.index != at {
                    break;
                }
                let entry = decode_entry(raw.bytes)?;
                self.see(&entry, &mut open);
                at += 1;
            }
            let next = log.read(at..at + 1, 1).map_err(storage)?;
            if at <= last && next.is_empty() {
                return Err(io::Error::other(format!(
                    "entry {at} is missing before the log's end"
                )));
            }
        }
        self.open = open.into();
        Ok(())
    }

    fn see(&mut self, entry: &Entry, open: &mut VecDeque<OpenEntry>) {
        let id = entry.log_id;
        let kind = match &entry.payload {
            Payload::Blank => OpenKind::Blank,
            Payload::Normal(Command(bytes)) => OpenKind::Command(bytes.clone()),
            Payload::Membership(membership) => {
                self.members = members(membership);
                OpenKind::Membership
            }
        };
        let alone = matches!(kind, OpenKind::Membership) && self.members.len() == 1;
        let new_term = self.end.is_none_or(|end| end.leader_id < id.leader_id);
        self.sole = (alone && new_term).then_some(id.leader_id.node_id);
        self.end = Some(id);
        if id.index > self.committed {
            open.push_back(OpenEntry {
                index: id.index,
                term: id.leader_id.term,
                kind,
            });
            if open.len() > SHOWN {
                open.pop_front();
            }
        }
    }

    /// How many entries are not known to be committed.
    pub fn open_count(&self) -> u64 {
        self.last.saturating_sub(self.committed)
    }
}

/// Append a membership with `id` alone, in a term of its own. Durable on return; the log keeps every entry
/// it has. Done already (by a command that was interrupted), it does nothing.
pub fn become_sole(log: &dyn Log, survivor: &Survivor, id: u64, member: Member) -> io::Result<()> {
    let Some(end) = survivor.end else {
        return Err(io::Error::other(
            "there is nothing to recover: this member never was part of a group",
        ));
    };
    if survivor.sole == Some(id) {
        return Ok(());
    }
    // Finish the installation of a snapshot that a crash cut short: the log goes on behind it.
    if let Some(floor) = survivor.floor
        && log.state().last < Some(floor.index)
    {
        durable(|done| log.purge(floor.index, encode_log_id(floor), done))?;
    }
    let term = survivor.term.max(end.leader_id.term) + 1;
    durable(|done| log.save_vote(encode_vote(&Vote::new(term, id)), done))?;
    let entry = Entry {
        log_id: LogIdV1 {
            term,
            leader: id,
            index: end.index + 1,
        }
        .into(),
        payload: Payload::Membership(sole(id, member)?),
    };
    let entry = LogEntry {
        index: end.index + 1,
        bytes: encode_entry(&entry),
    };
    durable(|done| log.append(vec![entry], done))
}

fn sole(id: u64, member: Member) -> io::Result<Membership> {
    let voters = vec![BTreeSet::from([id])];
    Membership::new(voters, BTreeMap::from([(id, member)])).map_err(io::Error::other)
}
