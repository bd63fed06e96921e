//! Changes of the membership and of the leader: checked and made by the leader, asked for from
//! any member. Every request may be repeated: what holds already is done.

use super::status::answers;
use super::{GroupError, Inner};
use crate::Member;
use crate::codec;
use crate::transport::wire::{Admin, Fit, Lane, Reply, kind};
use crate::types::{Membership, Types};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, RaftMetrics};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// A learner this close to the end of the log may become a voter.
const PROMOTE_LAG_MAX: u64 = 1000;
/// Before a change that the group is not ready for is tried again.
const RETRY: Duration = Duration::from_millis(100);

impl Inner {
    pub(super) async fn admin(&self, request: Admin, deadline: Instant) -> Result<(), GroupError> {
        let mut unclear = false;
        loop {
            self.check_running()?;
            let seen = *self.leader.borrow();
            let reply = match seen {
                Some(leader) if leader == self.config.id => {
                    tokio::time::timeout_at(deadline, self.admin_here(&request))
                        .await
                        .unwrap_or(Reply::Unknown)
                }
                Some(leader) => self.admin_there(leader, &request, deadline).await,
                None => Reply::NotLeader,
            };
            let mut why_busy = None;
            match reply {
                Reply::Done(()) => return Ok(()),
                Reply::Refused(why) => return Err(GroupError::Refused(why)),
                Reply::Overloaded(why) => return Err(GroupError::Overloaded(why)),
                Reply::Unknown => unclear = true,
                Reply::NotLeader => {}
                Reply::Busy(why) => why_busy = Some(why),
            }
            self.leader_moved(seen, deadline).await;
            tokio::time::sleep_until((Instant::now() + RETRY).min(deadline)).await;
            if Instant::now() >= deadline {
                return Err(match why_busy {
                    Some(why) => GroupError::Refused(why),
                    None if unclear => GroupError::Unknown,
                    None => GroupError::NoLeader,
                });
            }
        }
    }

    async fn admin_there(&self, leader: u64, request: &Admin, deadline: Instant) -> Reply<()> {
        let Some(link) = self.leader_link(leader, Lane::Control) else {
            return Reply::NotLeader;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let payload = codec::encode(request).into();
        match link.call(kind::ADMIN, payload, left).await {
            Ok(bytes) => codec::decode(&bytes).unwrap_or(Reply::Unknown),
            Err(crate::transport::link::LinkError::NotSent(_)) => Reply::NotLeader,
            Err(_) => Reply::Unknown,
        }
    }

    /// The leader's side.
    pub(super) async fn admin_here(&self, request: &Admin) -> Reply<()> {
        if !self.leads() {
            return Reply::NotLeader;
        }
        tracing::info!(?request, "membership request");
        match request {
            Admin::AddLearner { id, member } => self.add_learner_here(*id, member).await,
            Admin::Promote { id } => self.promote_here(*id).await,
            Admin::Remove { id } => self.remove_here(*id).await,
            Admin::Transfer { to } => self.transfer_here(*to).await,
        }
    }

    pub(super) fn metrics(&self) -> RaftMetrics<Types> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.clone()
    }

    async fn add_learner_here(&self, id: u64, member: &Member) -> Reply<()> {
        let metrics = self.metrics();
        if metrics.membership_config.membership().get_node(&id) == Some(member) {
            return Reply::Done(());
        }
        // For a member that is known, voter or learner, this replaces its addresses only.
        let change = ChangeMembers::SetNodes(BTreeMap::from([(id, member.clone())]));
        self.change(change, true).await
    }

    async fn promote_here(&self, id: u64) -> Reply<()> {
        let metrics = self.metrics();
        let membership = metrics.membership_config.membership();
        if membership.get_node(&id).is_none() {
            return Reply::Refused(format!(
                "member {id} is not known: add it as a learner first"
            ));
        }
        if is_voter(membership, id) && membership.get_joint_config().len() == 1 {
            return Reply::Done(());
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let matched = metrics
            .replication
            .as_ref()
            .and_then(|r| r.get(&id).copied().flatten());
        let lag = last.saturating_sub(matched.map_or(0, |m| m.index));
        if matched.is_none() || lag > PROMOTE_LAG_MAX {
            return Reply::Busy(format!(
                "member {id} has not caught up: {lag} entries behind"
            ));
        }
        // A matched position says what it held once; a voter that is gone makes majorities harder.
        if !self.answers(&metrics, id) {
            return Reply::Busy(format!("member {id} does not answer"));
        }
        let voters: BTreeSet<u64> = membership.voter_ids().chain([id]).collect();
        if let Err(live) = self.majority_answers(&metrics, &voters) {
            return Reply::Busy(format!(
                "with member {id} there are {} voters, of which {live} answer: that is no majority",
                voters.len()
            ));
        }
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true)
            .await
    }

    async fn remove_here(&self, id: u64) -> Reply<()> {
        let metrics = self.metrics();
        let membership = metrics.membership_config.membership();
        if membership.get_node(&id).is_none() {
            return Reply::Done(());
        }
        if !is_voter(membership, id) {
            return self
                .change(ChangeMembers::RemoveNodes(BTreeSet::from([id])), true)
                .await;
        }
        let rest: BTreeSet<u64> = membership.voter_ids().filter(|v| *v != id).collect();
        if let Err(live) = self.majority_answers(&metrics, &rest) {
            let text = format!(
                "without member {id} there are {} voters, of which {live} answer: \
                 that is no majority; bring members back or add new ones first",
                rest.len()
            );
            return Reply::Refused(text);
        }
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id])), false)
            .await
    }

    /// `Err`: how many of them answer, when that is no majority.
    fn majority_answers(
        &self,
        metrics: &RaftMetrics<Types>,
        voters: &BTreeSet<u64>,
    ) -> Result<(), usize> {
        let live = voters.iter().filter(|v| self.answers(metrics, **v)).count();
        if live > voters.len() / 2 {
            Ok(())
        } else {
            Err(live)
        }
    }

    fn answers(&self, metrics: &RaftMetrics<Types>, id: u64) -> bool {
        answers(metrics, id, self.config.election.1)
    }

    async fn transfer_here(&self, to: Option<u64>) -> Reply<()> {
        let metrics = self.metrics();
        let target = match to {
            Some(id) if id == self.config.id => return Reply::Done(()),
            Some(id) if !is_voter(metrics.membership_config.membership(), id) => {
                return Reply::Refused(format!("member {id} is not a voter"));
            }
            Some(id) if !self.answers(&metrics, id) => {
                return Reply::Refused(format!("member {id} does not answer"));
            }
            Some(id) => match self.ask_fitness(id).await {
                Fit::Yes => id,
                Fit::Reluctant(why) | Fit::Barred(why) => {
                    return Reply::Refused(format!("member {id} is not fit to lead: {why}"));
                }
            },
            // This one leaves, most likely: better a reluctant leader than an election.
            None => match self.successor(true).await {
                Ok(id) => id,
                Err(why) => return Reply::Refused(why),
            },
        };
        self.transfer_to(target).await
    }

    /// From here on this member's heartbeats have ended: the target, or another, is elected.
    pub(super) async fn transfer_to(&self, target: u64) -> Reply<()> {
        if self.raft.trigger().transfer_leader(target).await.is_err() {
            return Reply::Busy("this member has stopped".into());
        }
        // Until the target is elected; should it fail, the usual election follows.
        let mut leader = self.leader.clone();
        let moved = leader.wait_for(|now| now.is_some_and(|l| l != self.config.id));
        match tokio::time::timeout(self.config.election.1 * 4, moved).await {
            Ok(Ok(_)) => Reply::Done(()),
            _ => Reply::Busy(format!("member {target} did not take over")),
        }
    }

    async fn change(&self, change: ChangeMembers<u64, Member>, retain: bool) -> Reply<()> {
        match self.raft.change_membership(change, retain).await {
            Ok(_) => Reply::Done(()),
            Err(RaftError::Fatal(e)) => Reply::Busy(e.to_string()),
            Err(RaftError::APIError(e)) => match e {
                ClientWriteError::ForwardToLeader(_) => Reply::NotLeader,
                ClientWriteError::LogEntryDiscarded(_) => Reply::Unknown,
                ClientWriteError::PreconditionFailed(e) => Reply::Busy(e.to_string()),
                ClientWriteError::ChangeMembershipError(e) => match e {
                    ChangeMembershipError::InProgress(_)
                    | ChangeMembershipError::UncommittedLeaderLog(_) => Reply::Busy(e.to_string()),
                    other => Reply::Refused(other.to_string()),
                },
            },
        }
    }

    /// Finish a change of voters that a former leader left half way. A voter that it removes leaves
    /// the membership, as the former leader wanted: kept as a learner, it would come back.
    pub(super) async fn finish_change(&self) {
        let change = ChangeMembers::AddVoterIds(BTreeSet::new());
        match self.change(change, false).await {
            Reply::Done(()) => tracing::info!("finished the membership change of a former leader"),
            reply => tracing::debug!(?reply, "membership change not finished yet"),
        }
    }
}

fn is_voter(membership: &Membership, id: u64) -> bool {
    membership.voter_ids().any(|v| v == id)
}
