//! Who is in the group and who votes: what each change demands, looked at on the leader, in the
//! core's own membership (the newest in the log, committed or not), under one lock.
//!
//! | change | refused when |
//! | --- | --- |
//! | add a learner | its name or its address is another member's |
//! | new addresses | it is not in; its name would be another's |
//! | promote | it is not in. Not yet: it lags, came a moment ago, does not answer, or no living majority would be left |
//! | remove | the voters left would have no living majority |

use super::Inner;
use super::status::answers;
use crate::Member;
use crate::transport::wire::Reply;
use crate::types::{Membership, Types};
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, RaftMetrics};
use std::collections::{BTreeMap, BTreeSet};

/// How a person calls this member.
pub(super) fn called(membership: &Membership, id: u64) -> String {
    match membership.get_node(&id) {
        Some(member) if !member.name.is_empty() => format!("member {}", member.name),
        _ => format!("member {id:016x}"),
    }
}

pub(super) fn is_voter(membership: &Membership, id: u64) -> bool {
    membership.voter_ids().any(|v| v == id)
}

fn listed(membership: &Membership, ids: &[u64]) -> String {
    let names = ids.iter().map(|id| called(membership, *id));
    names.collect::<Vec<_>>().join(", ")
}

fn do_not(ids: &[u64]) -> &'static str {
    if ids.len() == 1 {
        "does not answer"
    } else {
        "do not answer"
    }
}

impl Inner {
    /// The newest membership in the log, uncommitted ones included; the published one may lag.
    async fn membership(&self) -> Result<Membership, Reply<()>> {
        let newest = self
            .raft
            .with_raft_state(|state| state.membership_state.effective().membership().clone())
            .await;
        newest.map_err(|e| Reply::Busy(e.to_string()))
    }

    pub(super) async fn add_learner_here(&self, id: u64, member: &Member) -> Reply<()> {
        let membership = match self.membership().await {
            Ok(membership) => membership,
            Err(reply) => return reply,
        };
        if membership.get_node(&id).is_some() {
            return self.readdress(&membership, id, member).await;
        }
        if let Some(why) = taken(&membership, id, member, true) {
            return Reply::Refused(why);
        }
        tracing::info!(member = %member.name, id = %format_args!("{id:016x}"), "adding a learner");
        self.set_member(id, member).await
    }

    pub(super) async fn update_here(&self, id: u64, member: &Member) -> Reply<()> {
        let membership = match self.membership().await {
            Ok(membership) => membership,
            Err(reply) => return reply,
        };
        if membership.get_node(&id).is_none() {
            let name = &member.name;
            return Reply::Refused(format!("member {name} is not, or no longer, in the group"));
        }
        self.readdress(&membership, id, member).await
    }

    async fn readdress(&self, membership: &Membership, id: u64, member: &Member) -> Reply<()> {
        if membership.get_node(&id) == Some(member) {
            return Reply::Done(());
        }
        // Two members that exchange their addresses pass through a moment in which both have one.
        if let Some(why) = taken(membership, id, member, false) {
            return Reply::Refused(why);
        }
        tracing::info!(member = %member.name, peer_url = %member.peer_url, "new addresses");
        self.set_member(id, member).await
    }

    async fn set_member(&self, id: u64, member: &Member) -> Reply<()> {
        let change = ChangeMembers::SetNodes(BTreeMap::from([(id, member.clone())]));
        self.change(change, true).await
    }

    pub(super) async fn promote_here(&self, id: u64) -> Reply<()> {
        let membership = match self.membership().await {
            Ok(membership) => membership,
            Err(reply) => return reply,
        };
        let name = called(&membership, id);
        if membership.get_node(&id).is_none() {
            return Reply::Refused(format!("{name} is not known: add it as a learner first"));
        }
        if is_voter(&membership, id) && membership.get_joint_config().len() == 1 {
            return Reply::Done(());
        }
        let metrics = self.metrics();
        if let Err(why) = self.caught_up(&metrics, id) {
            return Reply::Busy(format!("{name} {why}"));
        }
        let voters: BTreeSet<u64> = membership.voter_ids().chain([id]).collect();
        if let Err(silent) = self.majority_answers(&metrics, &voters) {
            return Reply::Busy(format!(
                "with {name} there would be {} voters, and {} {}: that leaves no majority",
                voters.len(),
                listed(&membership, &silent),
                do_not(&silent)
            ));
        }
        tracing::info!(member = %name, voters = voters.len(), "making a voter");
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true)
            .await
    }

    /// What is wrong with a candidate, if anything is.
    fn caught_up(&self, metrics: &RaftMetrics<Types>, id: u64) -> Result<(), String> {
        let (lag, near) = super::steady::lag(metrics, id);
        if !near {
            return Err(format!("has not caught up: {lag} entries behind"));
        }
        // A matched position says what it held once; a voter that is gone makes majorities harder.
        if !self.answers(metrics, id) {
            return Err("does not answer".to_owned());
        }
        if !self.steady.since(id, self.config.promote_after) {
            let ms = self.config.promote_after.as_millis();
            return Err(format!("has not been caught up for {ms} ms yet"));
        }
        Ok(())
    }

    pub(super) async fn may_remove_here(&self, id: u64) -> Reply<()> {
        match self.membership().await {
            Ok(membership) => match self.removal_refused(&membership, id) {
                Some(reply) => reply,
                None => Reply::Done(()),
            },
            Err(reply) => reply,
        }
    }

    fn removal_refused(&self, membership: &Membership, id: u64) -> Option<Reply<()>> {
        if !is_voter(membership, id) {
            return None;
        }
        let name = called(membership, id);
        let rest: BTreeSet<u64> = membership.voter_ids().filter(|v| *v != id).collect();
        if rest.is_empty() {
            let text = format!("{name} is the only voter: without it nothing is left");
            return Some(Reply::Refused(text));
        }
        let silent = self.majority_answers(&self.metrics(), &rest).err()?;
        let silent = listed(membership, &silent);
        Some(self.for_now(format!(
            "without {name} there would be {} voters, too few of which answer for a majority; silent: {silent}. \
             Bring these back, or remove them first: not even --force can do without a majority",
            rest.len()
        )))
    }

    /// No, because somebody does not answer: final, unless we lead since a moment ago only.
    pub(super) fn for_now(&self, why: String) -> Reply<()> {
        if self.steady.leads(self.config.election.1) {
            Reply::Refused(why)
        } else {
            Reply::Busy(why)
        }
    }

    pub(super) async fn remove_here(&self, id: u64) -> Reply<()> {
        let membership = match self.membership().await {
            Ok(membership) => membership,
            Err(reply) => return reply,
        };
        if membership.get_node(&id).is_none() {
            return Reply::Done(());
        }
        let name = called(&membership, id);
        if !is_voter(&membership, id) {
            tracing::info!(member = %name, "removing a learner");
            return self
                .change(ChangeMembers::RemoveNodes(BTreeSet::from([id])), true)
                .await;
        }
        if let Some(reply) = self.removal_refused(&membership, id) {
            return reply;
        }
        if id == self.config.id {
            tracing::info!("handing over the lead before this member is removed");
            return match self.transfer_here(None).await {
                // The next leader does the rest.
                Reply::Done(()) => Reply::NotLeader,
                other => other,
            };
        }
        tracing::info!(member = %name, "removing a voter");
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id])), false)
            .await
    }

    /// `Err`: those that do not answer, when the others are no majority.
    fn majority_answers(
        &self,
        metrics: &RaftMetrics<Types>,
        voters: &BTreeSet<u64>,
    ) -> Result<(), Vec<u64>> {
        let silent = voters.iter().filter(|v| !self.answers(metrics, **v));
        let silent: Vec<u64> = silent.copied().collect();
        if voters.len() - silent.len() > voters.len() / 2 {
            Ok(())
        } else {
            Err(silent)
        }
    }

    pub(super) fn answers(&self, metrics: &RaftMetrics<Types>, id: u64) -> bool {
        answers(metrics, id, self.config.election.1)
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

/// Two members cannot have one name, nor a new one an address that the others dial for another.
fn taken(membership: &Membership, id: u64, member: &Member, new: bool) -> Option<String> {
    let others = || membership.nodes().filter(|(other, _)| **other != id);
    let name = &member.name;
    if !name.is_empty() && others().any(|(_, m)| &m.name == name) {
        return Some(format!(
            "the name {name} is another member's: give each member a --name of its own, \
             or run `mainstay member replace {name}` if that one has lost its data directory"
        ));
    }
    let url = &member.peer_url;
    let there = others().find(|(_, m)| new && !url.is_empty() && &m.peer_url == url);
    there.map(|(_, m)| {
        format!(
            "{url} is the address of member {}: run `mainstay member remove {}` first if that one is gone for good",
            m.name, m.name
        )
    })
}
