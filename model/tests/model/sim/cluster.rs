//! The members: one log, a state at its head, a state that lags behind it, and a leader that changes.
//! How the log is agreed upon is no part of this (`tests/process/linear` has that): here whatever was
//! proposed comes late, twice, in another order, or never.

use super::Shape;
use crate::sample::Random;
use mainstay_model::pace::Pace;
use mainstay_model::plan::{Judge, Leases};
use mainstay_model::{Command, CommandId, Envelope, NodeId, Outcome, State};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

pub const MEMBERS: usize = 3;
pub const JUDGE_EVERY_MS: u64 = 1_000;

pub struct Cluster {
    /// Everything committed is applied.
    pub head: State,
    /// A member that lags.
    pub behind: State,
    backlog: VecDeque<Envelope>,
    pub lags: bool,
    /// Counts leaders.
    pub term: u64,
    pub leader: usize,
    /// Nobody leads before this time.
    pub silent_until: u64,
    judge: Judge,
    leases: Leases,
    /// Heartbeats of each node.
    heard: BTreeMap<NodeId, u64>,
    /// What each member's clock is ahead.
    pub skew: [i64; MEMBERS],
    paces: [Pace; MEMBERS],
    /// Since when the leader leads.
    pub leads_since: u64,
    /// When each node was last heard.
    last_heard: BTreeMap<NodeId, u64>,
    commands: u128,
}

impl Cluster {
    pub fn new(shape: &Shape) -> Self {
        let leases = Leases {
            unreachable_after: Duration::from_millis(shape.unreachable_ms),
            lease: Duration::from_millis(shape.lease_ms),
            judge_every: Duration::from_millis(JUDGE_EVERY_MS),
        };
        Self {
            head: State::default(),
            behind: State::default(),
            backlog: VecDeque::new(),
            lags: false,
            term: 1,
            leader: 0,
            silent_until: 0,
            judge: Judge::new(leases),
            leases,
            heard: BTreeMap::new(),
            skew: [0; MEMBERS],
            paces: [Pace::default(); MEMBERS],
            leads_since: 0,
            last_heard: BTreeMap::new(),
            commands: 0,
        }
    }

    /// What time a member says it is.
    pub fn clock(&mut self, member: usize, now: u64) -> u64 {
        let wall = now.saturating_add_signed(self.skew[member]);
        self.paces[member].now(wall, now, self.head.clock_ms)
    }

    /// What a member proposes, with its own time.
    pub fn envelope(&mut self, member: usize, now: u64, command: Command) -> Envelope {
        self.commands += 1;
        Envelope {
            id: CommandId(self.commands),
            stamp_ms: self.clock(member, now),
            command,
        }
    }

    /// The next entry of the log.
    pub fn commit(&mut self, envelope: Envelope) -> Outcome {
        let outcome = self.head.apply(&envelope);
        self.backlog.push_back(envelope);
        if self.commands.is_multiple_of(64) {
            self.head.take_changes();
            self.behind.take_changes();
        }
        if !self.lags {
            self.catch_up(usize::MAX);
        }
        outcome
    }

    /// The member that lags applies some more.
    pub fn catch_up(&mut self, entries: usize) {
        for _ in 0..entries {
            let Some(envelope) = self.backlog.pop_front() else {
                return;
            };
            self.behind.apply(&envelope);
        }
    }

    pub fn state(&self, behind: bool) -> &State {
        if behind { &self.behind } else { &self.head }
    }

    pub fn heard(&mut self, node: &NodeId, now: u64) {
        self.last_heard.insert(node.clone(), now);
        *self.heard.entry(node.clone()).or_default() += 1;
    }

    /// Another member leads: it knows nothing of what the former one had in memory.
    pub fn change_leader(&mut self, leader: usize, silent_until: u64) {
        self.term += 1;
        self.leader = leader;
        self.silent_until = silent_until;
        self.leads_since = silent_until;
        self.judge = Judge::new(self.leases);
    }

    /// One look of the leader at all nodes. Nobody is given up before a whole lease of silence under
    /// this leader.
    pub fn judge(&mut self, elapsed_ms: u64, now: u64) -> Result<Vec<Command>, String> {
        let elapsed = Duration::from_millis(elapsed_ms);
        let heard = &self.heard;
        let looked = self
            .judge
            .look(&self.head, elapsed, &|node| heard.get(node).copied());
        let lease = u64::try_from(self.leases.lease.as_millis()).unwrap_or(u64::MAX);
        for verdict in &looked {
            let Command::SetNodeReachability { id, lost: true, .. } = verdict else {
                continue;
            };
            let heard = self.last_heard.get(id).copied().unwrap_or_default();
            // Looks are a little apart.
            let silent = now - heard.max(self.leads_since) + 2 * JUDGE_EVERY_MS;
            if silent < lease {
                return Err(format!(
                    "node {id} is given up after {silent} ms of silence"
                ));
            }
        }
        Ok(looked)
    }

    /// Both states are the same once both have applied everything.
    pub fn agree(&mut self) -> Result<(), String> {
        self.catch_up(usize::MAX);
        if self.head == self.behind && self.head.digest() == self.behind.digest() {
            Ok(())
        } else {
            Err("two members that applied the same log differ".to_owned())
        }
    }

    pub fn random_member(random: &mut Random) -> usize {
        random.below(MEMBERS as u64) as usize
    }
}
