//! Single-decree Paxos over the member list: agree once, for all time, on who founded which cluster.
//! Pure: no clock, no network, no disk. Knows neither HTTP nor how its state is stored.
//!
//! Voters are the *names* of the initial list; a majority of them decides. Safety rests on the
//! acceptors' memory, so an [`Acceptor`] must be durable before its [`Reply`] leaves the member.
//!
//! ```text
//! proposer: Prepare(b) -> majority of Promise -> Accept(b, charter) -> majority of Accepted -> Decide
//!             any Outbid: give up, later a higher ballot.  any Decided: learn it.
//! ```

use mainstay_raft::Member;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Orders proposals; unique because the proposer's member id is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ballot {
    /// Attempt number.
    pub round: u64,
    /// Member id of the proposer.
    pub proposer: u64,
}

/// One founding member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Founder {
    /// Member id.
    pub id: u64,
    /// Name and addresses.
    pub member: Member,
}

/// What is decided: the cluster's name and its first voters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charter {
    /// Random.
    pub cluster_id: String,
    /// First voters.
    pub founders: Vec<Founder>,
}

impl Charter {
    /// Is this member id among the founders?
    pub fn names(&self, id: u64) -> bool {
        self.founders.iter().any(|founder| founder.id == id)
    }
}

/// From a proposer to an acceptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    /// Phase 1.
    Prepare {
        /// Promise nothing lower than this.
        ballot: Ballot,
    },
    /// Phase 2.
    Accept {
        /// Under this ballot.
        ballot: Ballot,
        /// Accept this.
        charter: Charter,
    },
    /// A majority has accepted.
    Decide {
        /// This.
        charter: Charter,
    },
}

/// An acceptor's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    /// Nothing lower will be accepted.
    Promise {
        /// The ballot promised to.
        ballot: Ballot,
        /// What was accepted before, if anything.
        accepted: Option<(Ballot, Charter)>,
    },
    /// Accepted.
    Accepted {
        /// Under this ballot.
        ballot: Ballot,
    },
    /// A higher ballot was promised.
    Outbid {
        /// It.
        promised: Ballot,
    },
    /// It is decided already.
    Decided {
        /// The decision.
        charter: Charter,
    },
}

/// A voter's memory. Save it before a reply leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptor {
    /// Highest ballot promised.
    pub promised: Ballot,
    /// Last acceptance.
    pub accepted: Option<(Ballot, Charter)>,
    /// The decision, once known.
    pub decided: Option<Charter>,
}

impl Acceptor {
    /// Handle a request; compare with the state before to see whether it must be saved.
    pub fn handle(&mut self, request: Request) -> Reply {
        if let Some(charter) = &self.decided {
            return Reply::Decided {
                charter: charter.clone(),
            };
        }
        match request {
            Request::Prepare { ballot } if ballot >= self.promised => {
                self.promised = ballot;
                Reply::Promise {
                    ballot,
                    accepted: self.accepted.clone(),
                }
            }
            Request::Accept { ballot, charter } if ballot >= self.promised => {
                self.promised = ballot;
                self.accepted = Some((ballot, charter));
                Reply::Accepted { ballot }
            }
            Request::Prepare { .. } | Request::Accept { .. } => Reply::Outbid {
                promised: self.promised,
            },
            Request::Decide { charter } => {
                self.decided = Some(charter.clone());
                Reply::Decided { charter }
            }
        }
    }
}

/// One attempt to get a charter decided. Volatile: forgotten by a restart.
#[derive(Clone, Debug)]
pub struct Proposer {
    ballot: Ballot,
    voters: BTreeSet<String>,
    promises: BTreeMap<String, (Founder, Option<(Ballot, Charter)>)>,
    charter: Option<Charter>,
    accepts: BTreeSet<String>,
}

impl Proposer {
    /// An attempt under `ballot` among the `voters`, the names of the initial list.
    pub fn new(ballot: Ballot, voters: impl IntoIterator<Item = String>) -> Self {
        Self {
            ballot,
            voters: voters.into_iter().collect(),
            promises: BTreeMap::new(),
            charter: None,
            accepts: BTreeSet::new(),
        }
    }

    /// Its ballot.
    pub fn ballot(&self) -> Ballot {
        self.ballot
    }

    fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// A voter promised to `ballot`. Another ballot's answer, or a stranger's, is ignored.
    pub fn promised(
        &mut self,
        ballot: Ballot,
        voter: Founder,
        accepted: Option<(Ballot, Charter)>,
    ) {
        if ballot == self.ballot && self.voters.contains(&voter.member.name) {
            self.promises
                .entry(voter.member.name.clone())
                .or_insert((voter, accepted));
        }
    }

    /// The charter to ask acceptance for, once a majority has promised: the one accepted under the
    /// highest ballot or, if there is none, a fresh one founded by everyone who promised. Fixed by
    /// the first call that answers.
    pub fn charter(&mut self, fresh_cluster_id: &str) -> Option<Charter> {
        if self.charter.is_none() && self.promises.len() >= self.majority() {
            let bound = self
                .promises
                .values()
                .filter_map(|(_, accepted)| accepted.as_ref())
                .max_by_key(|(ballot, _)| *ballot);
            self.charter = Some(match bound {
                Some((_, charter)) => charter.clone(),
                None => Charter {
                    cluster_id: fresh_cluster_id.to_owned(),
                    founders: self
                        .promises
                        .values()
                        .map(|(voter, _)| voter.clone())
                        .collect(),
                },
            });
        }
        self.charter.clone()
    }

    /// A voter accepted under `ballot`. The decision, if this makes a majority. A voter that has
    /// another identity than when it promised was wiped in between: its acceptance does not count.
    pub fn accepted(&mut self, ballot: Ballot, voter: &Founder) -> Option<Charter> {
        let name = &voter.member.name;
        let changed = self
            .promises
            .get(name)
            .is_some_and(|(promised, _)| promised.id != voter.id);
        if ballot == self.ballot && self.voters.contains(name) && !changed {
            self.accepts.insert(name.clone());
        }
        if self.accepts.len() >= self.majority() {
            self.charter.clone()
        } else {
            None
        }
    }
}

#[cfg(test)]
#[path = "paxos_tests.rs"]
mod tests;
