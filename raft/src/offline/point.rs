//! A position in the log and who the members were there: what a snapshot says of itself.

use crate::codec::Mark;
use crate::types::Membership;
use crate::{MemberStatus, Role};
use std::collections::BTreeMap;
use std::io;

/// What a snapshot stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Index of the last entry that is in it.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// Members by id, as of that entry.
    pub members: BTreeMap<u64, MemberStatus>,
}

impl Point {
    /// From a snapshot file's meta.
    pub fn decode(meta: &[u8]) -> io::Result<Self> {
        Mark::decode(meta).map(|mark| Self::of(&mark))
    }

    pub(crate) fn of(mark: &Mark) -> Self {
        Self {
            index: mark.applied.map_or(0, |id| id.index),
            term: mark.applied.map_or(0, |id| id.leader_id.term),
            members: members(mark.membership.membership()),
        }
    }
}

/// A membership as it is shown.
pub(super) fn members(membership: &Membership) -> BTreeMap<u64, MemberStatus> {
    let voters: Vec<u64> = membership.voter_ids().collect();
    let status = |id, member: &crate::Member| MemberStatus {
        member: member.clone(),
        role: if voters.contains(&id) {
            Role::Voter
        } else {
            Role::Learner
        },
        matched: None,
    };
    let nodes = membership.nodes();
    nodes
        .map(|(id, member)| (*id, status(*id, member)))
        .collect()
}
