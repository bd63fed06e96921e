//! The read barrier: a round asks the leader for a commit index that a quorum confirms to be
//! current (ReadIndex); everyone who came before the round began shares it. Never a clock lease.

use super::rounds::repeat;
use super::{GroupError, Inner};
use crate::codec;
use crate::transport::wire::{Lane, Reply, kind};
use bytes::Bytes;
use futures::FutureExt;
use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

/// A round that takes longer has lost its leader; the next one asks again.
const ROUND_TIMEOUT: Duration = Duration::from_secs(1);
/// Callers waiting for a round.
const WAITING_MAX: usize = 64 << 10;

/// The index to wait for, or `None` when the round failed and may be repeated.
type Outcome = Option<u64>;

/// Callers waiting for the next round.
#[derive(Default)]
pub(super) struct Reads {
    waiting: Mutex<Vec<oneshot::Sender<Outcome>>>,
    wake: Notify,
}

/// Run rounds while someone waits.
pub(super) fn spawn(inner: &Arc<Inner>) {
    repeat(inner, |inner| inner.read_round().boxed());
}

impl Inner {
    /// One round for all who wait, or the wait for the first of them.
    async fn read_round(&self) {
        let waiting = std::mem::take(&mut *self.reads.waiting.lock());
        if waiting.is_empty() {
            return self.reads.wake.notified().await;
        }
        let outcome = tokio::time::timeout(ROUND_TIMEOUT, self.round()).await;
        let outcome = outcome.ok().flatten();
        for caller in waiting {
            // The caller may have given up.
            let _ = caller.send(outcome);
        }
    }

    pub(super) async fn read_barrier(&self, deadline: Instant) -> Result<u64, GroupError> {
        #[cfg(feature = "seeded-bugs")]
        if crate::seeded::bug("stale-read") && !self.leads() {
            return Ok(*self.applied.borrow());
        }
        loop {
            self.check_running()?;
            if let Some(why) = self.diverged() {
                return Err(GroupError::Diverged(why));
            }
            let seen = *self.leader.borrow();
            let index = match seen {
                Some(_) => self.read_index(deadline).await?,
                None => None,
            };
            if let Some(index) = index {
                return self.wait_applied(index, deadline).await;
            }
            self.leader_moved(seen, deadline).await;
            if Instant::now() >= deadline {
                return Err(GroupError::NoLeader);
            }
        }
    }

    /// Join the next round.
    async fn read_index(&self, deadline: Instant) -> Result<Outcome, GroupError> {
        let (tx, rx) = oneshot::channel();
        {
            let mut waiting = self.reads.waiting.lock();
            if waiting.len() >= WAITING_MAX {
                return Err(GroupError::Overloaded("too many reads are waiting".into()));
            }
            waiting.push(tx);
        }
        self.reads.wake.notify_one();
        match tokio::time::timeout_at(deadline, rx).await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(_)) => Err(self.stopped("shutting down")),
            Err(_) => Ok(None),
        }
    }

    async fn wait_applied(&self, index: u64, deadline: Instant) -> Result<u64, GroupError> {
        let mut applied = self.applied.clone();
        let mut fault = self.fault.watch();
        tokio::select! {
            biased;
            Ok(now) = applied.wait_for(|now| *now >= index) => Ok(*now),
            Ok(why) = fault.wait_for(Option::is_some) => {
                Err(GroupError::Stopped(why.clone().unwrap_or_default()))
            }
            () = tokio::time::sleep_until(deadline) => Err(GroupError::NoLeader),
        }
    }

    async fn round(&self) -> Outcome {
        let leader = (*self.leader.borrow())?;
        if leader == self.config.id {
            return self.confirm_leadership().await;
        }
        let link = self.leader_link(leader, Lane::Control)?;
        let bytes = link
            .call(kind::READ_INDEX, Bytes::new(), ROUND_TIMEOUT)
            .await
            .ok()?;
        match codec::decode(&bytes) {
            Ok(Reply::Done(index)) => Some(index),
            _ => None,
        }
    }

    /// The leader's side of a round.
    async fn confirm_leadership(&self) -> Outcome {
        #[cfg(feature = "seeded-bugs")]
        if crate::seeded::bug("lease-read") {
            return Some(*self.applied.borrow());
        }
        match self.raft.get_read_log_id(ReadPolicy::ReadIndex).await {
            Ok((read, _)) => Some(read.index()),
            Err(RaftError::APIError(
                LinearizableReadError::ForwardToLeader(_)
                | LinearizableReadError::QuorumNotEnough(_),
            )) => None,
            Err(RaftError::Fatal(_)) => None,
        }
    }

    /// Another member asks for a read index: it joins our next round, if we lead.
    pub(super) async fn read_index_forwarded(&self) -> Reply<u64> {
        if !self.leads() {
            return Reply::NotLeader;
        }
        match self.read_index(Instant::now() + ROUND_TIMEOUT).await {
            Ok(Some(index)) => Reply::Done(index),
            Ok(None) => Reply::NotLeader,
            Err(e) => Reply::Busy(e.to_string()),
        }
    }
}
