//! Proposals: to our own core when we lead, else over the wire to who does; again, with the same
//! bytes, when leadership moves. Knows no command: the machine recognises a repetition.

use super::{GroupError, Inner};
use crate::transport::link::LinkError;
use crate::transport::wire::{self, COMMAND_MAX, Lane, Reply, kind};
use crate::types::{Answer, Command};
use bytes::Bytes;
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
        let _permit = self
            .proposals
            .try_acquire()
            .map_err(|_| GroupError::Overloaded("too many proposals are waiting".into()))?;
        let mut unclear = false;
        loop {
            self.check_running()?;
            let seen = *self.leader.borrow();
            let attempt = match seen {
                Some(leader) => self.attempt(leader, &command, deadline).await,
                None => Attempt::NoEffect,
            };
            match attempt {
                Attempt::Done(answer) => return Ok(answer),
                Attempt::Failed(error) => return Err(error),
                Attempt::NoEffect => {}
                Attempt::Unclear => unclear = true,
            }
            if Instant::now() < deadline {
                self.leader_moved(seen, deadline).await;
            }
            if Instant::now() >= deadline {
                return Err(if unclear {
                    GroupError::Unknown
                } else {
                    GroupError::NoLeader
                });
            }
        }
    }

    /// One attempt with one leader; given up when another leader appears.
    async fn attempt(&self, leader: u64, command: &Bytes, deadline: Instant) -> Attempt {
        let mut watch = self.leader.clone();
        let here = leader == self.config.id;
        let work = async {
            if here {
                self.propose_here(command.clone()).await
            } else {
                self.propose_there(leader, command, deadline).await
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

    pub(super) async fn propose_here(&self, command: Bytes) -> Attempt {
        match self.raft.client_write(Command(command)).await {
            Ok(response) => {
                let Answer(answer) = response.data;
                Attempt::Done(answer)
            }
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Attempt::NoEffect,
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Attempt::Unclear,
            Err(RaftError::APIError(e)) => Attempt::Failed(GroupError::Refused(e.to_string())),
            Err(RaftError::Fatal(e)) => Attempt::Failed(self.stopped(&e.to_string())),
        }
    }

    async fn propose_there(&self, leader: u64, command: &Bytes, deadline: Instant) -> Attempt {
        let Some(link) = self.leader_link(leader, Lane::Data) else {
            return Attempt::NoEffect;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let wait_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        let payload = wire::encode_propose(wait_ms, command);
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
        let (wait_ms, command) = wire::decode_propose(payload).map_err(|e| e.to_string())?;
        let Ok(_permit) = self.forwarded.try_acquire() else {
            return Ok(Reply::Overloaded(
                "the leader has too many proposals waiting".into(),
            ));
        };
        let limit = std::time::Duration::from_millis(wait_ms.into());
        match tokio::time::timeout(limit, self.propose_here(command)).await {
            Ok(Attempt::Done(answer)) => Ok(Reply::Done(answer)),
            Ok(Attempt::NoEffect) => Ok(Reply::NotLeader),
            Ok(Attempt::Unclear) | Err(_) => Ok(Reply::Unknown),
            Ok(Attempt::Failed(GroupError::Refused(why))) => Ok(Reply::Refused(why)),
            Ok(Attempt::Failed(error)) => Err(error.to_string()),
        }
    }
}
