//! Changes of the membership and of the leader: checked and made by the leader, asked for from
//! any member. Every request may be repeated: what holds already is done.

use super::membership::{called, is_voter};
use super::{ADMIN_DEADLINE, GroupError, Inner};
use crate::codec;
use crate::transport::wire::{Admin, Fit, Lane, Reply, kind};
use crate::types::Types;
use openraft::RaftMetrics;
use openraft::async_runtime::watch::WatchReceiver as _;
use std::time::Duration;
use tokio::time::Instant;

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

    /// The leader's side. One at a time, each looking at what the one before left behind.
    pub(super) async fn admin_here(&self, request: &Admin) -> Reply<()> {
        if !self.leads() {
            return Reply::NotLeader;
        }
        tracing::debug!(?request, "membership request");
        let work = async {
            let _one = self.changing.lock().await;
            match request {
                Admin::AddLearner { id, member } => self.add_learner_here(*id, member).await,
                Admin::Update { id, member } => self.update_here(*id, member).await,
                Admin::Promote { id } => self.promote_here(*id).await,
                Admin::Remove { id } => self.remove_here(*id).await,
                Admin::MayRemove { id } => self.may_remove_here(*id).await,
                Admin::Transfer { to } => self.transfer_here(*to).await,
            }
        };
        // A leader without a majority would wait for ever, and whoever asks next behind it.
        let done = tokio::time::timeout(ADMIN_DEADLINE, work).await;
        done.unwrap_or(Reply::Unknown)
    }

    pub(super) fn metrics(&self) -> RaftMetrics<Types> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.clone()
    }

    pub(super) async fn transfer_here(&self, to: Option<u64>) -> Reply<()> {
        let metrics = self.metrics();
        let membership = metrics.membership_config.membership();
        let called = |id| called(membership, id);
        let target = match to {
            Some(id) if id == self.config.id => return Reply::Done(()),
            Some(id) if !is_voter(membership, id) => {
                return Reply::Refused(format!(
                    "{} is no voter: only a voter can lead",
                    called(id)
                ));
            }
            Some(id) if !self.answers(&metrics, id) => {
                return self.for_now(format!("{} does not answer", called(id)));
            }
            Some(id) => match self.ask_fitness(id).await {
                Fit::Yes => id,
                Fit::Reluctant(why) | Fit::Barred(why) => {
                    return Reply::Refused(format!("{} is not fit to lead: {why}", called(id)));
                }
            },
            // This one leaves, most likely: better a reluctant leader than an election.
            None => match self.successor(true).await {
                Ok(id) => id,
                Err(why) => return self.for_now(why),
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
            _ => {
                let metrics = self.metrics();
                let name = called(metrics.membership_config.membership(), target);
                Reply::Busy(format!("{name} did not take over"))
            }
        }
    }
}
