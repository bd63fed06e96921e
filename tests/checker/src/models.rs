//! The objects that our tests record. Values are small numbers that callers hand out, each to one
//! write only: so an answer says which write it saw.

use crate::{Interval, Model};
use std::collections::HashSet;

/// The value of a key that was never written.
pub const ABSENT: u32 = 0;

/// Keys with values, some of them written or read at once.
#[derive(Clone, Copy, Debug)]
pub struct Registers;

/// What is done to [`Registers`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistersOp {
    /// Set these keys (by number), each to a value of its own.
    Write(Vec<(usize, u32)>),
    /// The values of these keys.
    Read(Vec<(usize, u32)>),
}

impl Model for Registers {
    type State = Vec<u32>;
    type Op = RegistersOp;

    fn apply(&self, state: &Vec<u32>, op: &RegistersOp) -> Option<Vec<u32>> {
        match op {
            RegistersOp::Read(seen) => seen
                .iter()
                .all(|(key, value)| state.get(*key) == Some(value))
                .then(|| state.clone()),
            RegistersOp::Write(pairs) => {
                let mut after = state.clone();
                for (key, value) in pairs {
                    *after.get_mut(*key)? = *value;
                }
                Some(after)
            }
        }
    }

    fn observes(&self, op: &RegistersOp) -> bool {
        matches!(op, RegistersOp::Read(_))
    }
}

impl Registers {
    /// The same question with less to search: without writes that have no answer and whose values
    /// nobody saw. If any order works, one without them works as well.
    pub fn without_unseen(history: Vec<Interval<RegistersOp>>) -> Vec<Interval<RegistersOp>> {
        let seen: HashSet<u32> = history
            .iter()
            .filter_map(|interval| match &interval.op {
                RegistersOp::Read(pairs) => Some(pairs.iter().map(|(_, value)| *value)),
                RegistersOp::Write(_) => None,
            })
            .flatten()
            .collect();
        let keep = |interval: &Interval<RegistersOp>| match &interval.op {
            RegistersOp::Write(pairs) => {
                interval.returned.is_some() || pairs.iter().any(|(_, value)| seen.contains(value))
            }
            RegistersOp::Read(_) => true,
        };
        history.into_iter().filter(keep).collect()
    }
}

/// A pile of so many things that nobody adds to. To take one twice shows: nothing else in it does.
#[derive(Clone, Copy, Debug)]
pub struct Pile;

/// What is done to a [`Pile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PileOp {
    /// Take one away.
    Take,
    /// How many are left.
    Count(u32),
}

impl Model for Pile {
    type State = u32;
    type Op = PileOp;

    fn apply(&self, state: &u32, op: &PileOp) -> Option<u32> {
        match op {
            PileOp::Take => state.checked_sub(1),
            PileOp::Count(seen) => (seen == state).then_some(*state),
        }
    }

    fn observes(&self, op: &PileOp) -> bool {
        matches!(op, PileOp::Count(_))
    }

    fn alike(&self, one: &PileOp, other: &PileOp) -> bool {
        matches!((one, other), (PileOp::Take, PileOp::Take))
    }
}

/// One possible member of a set that is only added to. The state: is it in?
#[derive(Clone, Copy, Debug)]
pub struct Membership;

/// What is done to [`Membership`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembershipOp {
    /// Add it; a repetition does nothing.
    Add,
    /// Was it in?
    Look(bool),
}

impl Model for Membership {
    type State = bool;
    type Op = MembershipOp;

    fn apply(&self, state: &bool, op: &MembershipOp) -> Option<bool> {
        match op {
            MembershipOp::Add => Some(true),
            MembershipOp::Look(seen) => (seen == state).then_some(*state),
        }
    }

    fn observes(&self, op: &MembershipOp) -> bool {
        matches!(op, MembershipOp::Look(_))
    }

    fn alike(&self, one: &MembershipOp, other: &MembershipOp) -> bool {
        one == other
    }
}
