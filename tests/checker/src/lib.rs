//! Is a recorded history linearizable? Pure: intervals and a model in, a verdict out. Refuses to
//! know processes, clocks, HTTP, or what is stored.
//!
//! * [`check`]: the search; [`Model`]: what an operation does to one object.
//! * [`models`]: the objects that our tests record: metadata of an instance, a pile of tags, one
//!   member of a set.
//!
//! A history of several objects is linearizable if each object's is (Herlihy and Wing 1990), so
//! callers split it and check each part. The search is that of Wing and Gong (1993), with Lowe's
//! memory of configurations (2017), and with two cuts that lose no answer: see `search`.

pub mod models;
mod search;

pub use search::check;

use std::fmt;
use std::hash::Hash;

/// One operation as its client saw it. Times are of one clock, in any unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval<O> {
    /// Just before the request was sent.
    pub invoked: u64,
    /// Just after its answer was there. `None`: there was no answer that said what happened, so it
    /// took effect at any time after `invoked`, or will later, or never.
    pub returned: Option<u64>,
    /// The operation and, when it was answered, what the answer said.
    pub op: O,
}

/// What operations do to one object.
pub trait Model {
    /// The object. Equal states must behave alike for ever.
    type State: Clone + Eq + Hash + fmt::Debug;
    /// An operation with its answer.
    type Op: fmt::Debug;

    /// The state after `op`, or `None` if `op` cannot have been answered so in `state`.
    fn apply(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;

    /// `op` changes no state, whatever the state is.
    fn observes(&self, op: &Self::Op) -> bool;

    /// The two do the same in every state, and their answers say the same: only their times differ.
    fn alike(&self, _one: &Self::Op, _other: &Self::Op) -> bool {
        false
    }
}

/// What a search found. Positions are those in the history that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order that explains every answer.
    Linearizable {
        /// One such order. Operations without an answer are in it only if they took effect.
        order: Vec<usize>,
    },
    /// There is none.
    Violation {
        /// The longest order that was found.
        order: Vec<usize>,
        /// What could have come next, and contradicts.
        stuck: Vec<usize>,
    },
    /// Given up at the limit: nothing is known. A run must count this as a failure.
    Undecided {
        /// Configurations that were looked at.
        looked_at: usize,
    },
}

impl Verdict {
    /// The only verdict that a run may have.
    pub fn is_linearizable(&self) -> bool {
        matches!(self, Self::Linearizable { .. })
    }
}

/// Bounds time and memory of a search: at most so many configurations are looked at and remembered.
/// One takes a bit per operation and a state, so a million of 1,000 operations are some 200 MB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Configurations.
    pub configurations: usize,
}

impl Default for Limit {
    fn default() -> Self {
        Self {
            configurations: 1_000_000,
        }
    }
}

#[cfg(test)]
mod brute;
#[cfg(test)]
mod tests;
