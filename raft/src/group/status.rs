//! What a member shows of itself and of the group.

use super::fitness::Fitness;
use crate::Member;
use crate::store::fault::FaultCell;
use crate::types::Types;
use openraft::{Instant as _, RaftMetrics};
use std::collections::BTreeMap;
use std::time::Duration;

/// A member's part in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Votes.
    Voter,
    /// Receives the log, does not vote.
    Learner,
}

/// A member as the membership has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Where it is.
    pub member: Member,
    /// Its part.
    pub role: Role,
    /// Last log index known to be on its disk (leader only).
    pub matched: Option<u64>,
}

/// A look at the group from this member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// This member.
    pub id: u64,
    /// Current leader as far as known.
    pub leader: Option<u64>,
    /// Term.
    pub term: u64,
    /// Last log index on disk or queued.
    pub last_log: u64,
    /// Applied index.
    pub applied: u64,
    /// Members by id.
    pub members: BTreeMap<u64, MemberStatus>,
    /// Why this member should not lead, each reason in words (see [`Unfit`](super::Unfit)).
    pub unfit: Vec<String>,
    /// Set when the member has stopped.
    pub fault: Option<String>,
}

impl Status {
    /// Is this member the leader?
    pub fn is_leader(&self) -> bool {
        self.leader == Some(self.id)
    }
}

/// Has this member answered the leader, whose metrics these are, within `lease`?
pub(crate) fn answers(m: &RaftMetrics<Types>, id: u64, lease: Duration) -> bool {
    let acked = || {
        m.heartbeat
            .as_ref()
            .and_then(|h| h.get(&id).copied().flatten())
    };
    id == m.id || acked().is_some_and(|at| at.elapsed() < lease)
}

pub(super) fn status_of(
    m: &RaftMetrics<Types>,
    applied: u64,
    fault: &FaultCell,
    fitness: &Fitness,
) -> Status {
    let membership = m.membership_config.membership();
    let voters: Vec<u64> = membership.voter_ids().collect();
    let leads = m.current_leader == Some(m.id);
    let members = membership
        .nodes()
        .map(|(&id, member)| {
            let role = if voters.contains(&id) {
                Role::Voter
            } else {
                Role::Learner
            };
            let matched = match &m.replication {
                Some(_) if leads && id == m.id => m.last_log_index,
                Some(all) if leads => all.get(&id).copied().flatten().map(|log_id| log_id.index),
                _ => None,
            };
            (
                id,
                MemberStatus {
                    member: member.clone(),
                    role,
                    matched,
                },
            )
        })
        .collect();
    let core_fault = || m.running_state.as_ref().err().map(ToString::to_string);
    let fault = fault.get().or_else(core_fault);
    Status {
        id: m.id,
        leader: m.current_leader.filter(|_| fault.is_none()),
        term: m.current_term,
        last_log: m.last_log_index.unwrap_or(0),
        applied,
        members,
        unfit: fitness.reasons(),
        fault,
    }
}
