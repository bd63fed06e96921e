//! Proposals: to our own core when we lead, else over the wire to who does; again, with the same
//! bytes, when leadership moves. Knows no command: the machine recognises a repetition.
//!
//! # What an error promises
//!
//! Every error but `Unknown` says that nothing happened. Once an attempt may have been appended
//! anywhere, `Unknown` is the only error left, whatever stops the later ones.
//!
//! # How long a retry is safe
//!
//! The machine recognises a repetition while it remembers the command, and it remembers a number
//! of commands, not a time. So a retry is bounded by the log: what an earlier attempt appended, and
//! the group then committed, comes behind everything applied here before that attempt (`since`).
//! A retry is appended only while the log has not grown by more than
//! [`GroupConfig::retry_entries`](super::GroupConfig) since then; else the answer is `Unknown`. A
//! forwarded retry carries `since`, for the leader to look at its own log: ours may lag. Between
//! that look and the append at most `PROPOSALS_MAX + FORWARDED_MAX` others come first, so a machine
//! that remembers the newest `retry_entries` plus that many commands applies nothing twice.

use super::{GroupError, Inner};
use crate::transport::link::LinkError;
use crate::transport::wire::{self, COMMAND_MAX, Lane, Reply, kind};
use crate::types::{Answer, Command};
use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ClientWriteError, RaftError};
use tokio::time::Instant;

/// How one attempt ended.
pub(super) enum Attempt {
    Done(Bytes),
    /// It had no effect.
    NoEffect,
    /// It may have had one.
    Unclear,
    Failed(GroupError),
}

impl Inner {
    pub(super) async fn propose(
        &self,
        command: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, GroupError> {
        if command.len() > COMMAND_MAX {
            let text = format!(
                "a command of {} bytes; the limit is {COMMAND_MAX}",
                command.len()
            );
            return Err(GroupError::Refused(text));
        }
        let _place = self.proposals.enter(command.len())?;
        // Set by the first attempt that may have been appended: the position before it.
        let mut retry: Option<u64> = None;
        loop {
            let fail = |error| retry.map_or(error, |_| GroupError::Unknown);
            self.check_running().map_err(fail)?;
            if retry.is_some_and(|since| self.too_far(since)) {
                return Err(GroupError::Unknown);
            }
            let seen = *self.leader.borrow();
            let applied = *self.applied.borrow();
            let attempt = match seen {
                Some(leader) => self.attempt(leader, &command, retry, deadline).await,
                None => Attempt::NoEffect,
            };
            match attempt {
                Attempt::Done(answer) => return Ok(answer),
                Attempt::Failed(error) => return Err(fail(error)),
                Attempt::NoEffect => {}
                Attempt::Unclear => retry = retry.or(Some(applied)),
            }
            if Instant::now() < deadline {
                self.leader_moved(seen, deadline).await;
            }
            if Instant::now() >= deadline {
                return Err(retry.map_or(GroupError::NoLeader, |_| GroupError::Unknown));
            }
        }
    }

    /// Has the log moved so far past `since` that the machine may have forgotten what came behind it?
    fn too_far(&self, since: u64) -> bool {
        let metrics = self.raft.metrics();
        let last = metrics.borrow_watched().last_log_index.unwrap_or(0);
        last.saturating_sub(since) > self.config.retry_entries
    }

    /// One attempt with one leader; given up when another leader appears.
    async fn attempt(
        &self,
        leader: u64,
        command: &Bytes,
        retry: Option<u64>,
        deadline: Instant,
    ) -> Attempt {
        let mut watch = self.leader.clone();
        let here = leader == self.config.id;
        let work = async {
            if here {
                self.propose_here(command.clone(), retry).await
            } else {
                self.propose_there(leader, command, retry, deadline).await
            }
        };
        tokio::select! {
            biased;
            attempt = work => attempt,
            // It may still be committed by the next leader; the machine will know it again.
            Ok(_) = watch.wait_for(|now| now.is_some_and(|l| l != leader)) => Attempt::Unclear,
            () = tokio::time::sleep_until(deadline) => Attempt::Unclear,
        }
    }

    /// The leader's side; `retry` is where the log was before an attempt that may have been appended.
    async fn propose_here(&self, command: Bytes, retry: Option<u64>) -> Attempt {
        if retry.is_some_and(|since| self.too_far(since)) {
            return Attempt::Unclear;
        }
        // Committed, it would stop every member, at every start again.
        if let Err(why) = self.machine.check(&command) {
            return Attempt::Failed(GroupError::Refused(why));
        }
        match self.raft.client_write(Command(command)).await {
            Ok(response) => {
                let Answer(answer) = response.data;
                Attempt::Done(answer)
            }
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Attempt::NoEffect,
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Attempt::Unclear,
            Err(RaftError::APIError(e)) => Attempt::Failed(GroupError::Refused(e.to_string())),
            // It may have been appended, and sent, before the core ended.
            Err(RaftError::Fatal(_)) => Attempt::Unclear,
        }
    }

    async fn propose_there(
        &self,
        leader: u64,
        command: &Bytes,
        retry: Option<u64>,
        deadline: Instant,
    ) -> Attempt {
        let Some(link) = self.leader_link(leader, Lane::Data) else {
            return Attempt::NoEffect;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let wait_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        let payload = wire::encode_propose(wait_ms, retry, command);
        match link.call(kind::PROPOSE, payload, left).await {
            Ok(bytes) => match wire::decode_proposed(bytes) {
                Ok(Reply::Done(answer)) => Attempt::Done(answer),
                Ok(Reply::NotLeader | Reply::Busy(_)) => Attempt::NoEffect,
                Ok(Reply::Unknown) => Attempt::Unclear,
                Ok(Reply::Refused(why)) => Attempt::Failed(GroupError::Refused(why)),
                Ok(Reply::Overloaded(why)) => Attempt::Failed(GroupError::Overloaded(why)),
                Err(error) => {
                    tracing::warn!(peer = leader, %error, "undecodable answer to a proposal");
                    Attempt::Unclear
                }
            },
            Err(LinkError::NotSent(_)) => Attempt::NoEffect,
            Err(LinkError::Lost(_) | LinkError::Failed(_) | LinkError::Timeout(_)) => {
                Attempt::Unclear
            }
        }
    }

    /// A command that another member forwarded to us: the leader's side.
    pub(super) async fn propose_forwarded(&self, payload: Bytes) -> Result<Reply<Bytes>, String> {
        let (wait_ms, retry, command) = wire::decode_propose(payload).map_err(|e| e.to_string())?;
        let _place = match self.forwarded.enter(command.len()) {
            Ok(place) => place,
            Err(GroupError::Overloaded(why)) => {
                return Ok(Reply::Overloaded(format!("at the leader, {why}")));
            }
            Err(other) => return Err(other.to_string()),
        };
        let limit = std::time::Duration::from_millis(wait_ms.into());
        match tokio::time::timeout(limit, self.propose_here(command, retry)).await {
            Ok(Attempt::Done(answer)) => Ok(Reply::Done(answer)),
            Ok(Attempt::NoEffect) => Ok(Reply::NotLeader),
            Ok(Attempt::Unclear) | Err(_) => Ok(Reply::Unknown),
            Ok(Attempt::Failed(GroupError::Refused(why))) => Ok(Reply::Refused(why)),
            Ok(Attempt::Failed(error)) => Err(error.to_string()),
        }
    }
}
