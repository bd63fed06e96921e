//! The one way into the replicated state: commands in, outcomes out; reads with their consistency named.

use crate::stamp::{self, Stamps};
use bytes::Bytes;
use mainstay_model::{Command, CommandId, Envelope, MemberId, Outcome, Refusal, State, codec};
use mainstay_raft::{Group, GroupError};
use parking_lot::{RwLock, RwLockReadGuard};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Longest a request waits for a leader and a commit (wire contract, trap 17: under 10 s).
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(9);
/// The same for `/api/v1/status` (under 5 s).
pub const STATUS_DEADLINE: Duration = Duration::from_secs(4);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The state machine refused; nothing changed.
    #[error("{0:?}")]
    Refused(Refusal),
    /// Consensus could not, or could not say.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Bytes of another release, or a bug.
    #[error("undecodable outcome: {0}")]
    Codec(#[from] codec::CodecError),
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// Sees everything acknowledged before the call, on any member.
    Linearizable,
    /// Whatever this member has.
    Stale,
}

/// Shared by every handler and reconciler; cheap to clone.
#[derive(Clone)]
pub struct App {
    group: Group,
    state: Arc<RwLock<State>>,
    stamps: Arc<Stamps>,
}

impl App {
    /// `state` is the one that the group's machine applies to.
    pub fn new(group: Group, state: Arc<RwLock<State>>) -> Self {
        let stamps = Arc::default();
        Self {
            group,
            state,
            stamps,
        }
    }

    /// Commit a new command and wait until it is applied. A refusal is an error.
    pub async fn submit(&self, command: Command) -> Result<Outcome, AppError> {
        self.submit_as(stamp::command_id(), command).await
    }

    /// The same with a caller's command id: submitted twice, applied once.
    pub async fn submit_as(&self, id: CommandId, command: Command) -> Result<Outcome, AppError> {
        let stamp_ms = self.now_ms(&self.state.read());
        let envelope = Envelope {
            id,
            stamp_ms,
            command,
        };
        let bytes = Bytes::from(codec::encode_envelope(&envelope));
        let answer = self.group.propose(bytes, REQUEST_DEADLINE).await?;
        match codec::decode_outcome(&answer)? {
            Outcome::Refused(refusal) => Err(AppError::Refused(refusal)),
            outcome => Ok(outcome),
        }
    }

    /// The time that commands are stamped with, for who decides by a state what is due.
    pub fn now_ms(&self, state: &State) -> u64 {
        self.stamps.now_ms(state.clock_ms)
    }

    /// Look at the state. Never hold the guard across an await: clone what you need.
    pub async fn read(
        &self,
        consistency: Consistency,
    ) -> Result<RwLockReadGuard<'_, State>, AppError> {
        if consistency == Consistency::Linearizable {
            self.group.read_barrier(REQUEST_DEADLINE).await?;
        }
        // Also the oldest state must be one that the members agreed on.
        self.group.check_agreement()?;
        Ok(self.state.read())
    }

    /// Identities of members that were taken out for good, as far as this member has applied; none
    /// from a state that the other members do not share.
    pub fn retired(&self) -> BTreeSet<MemberId> {
        if self.group.check_agreement().is_err() {
            return BTreeSet::new();
        }
        self.state.read().retired.keys().copied().collect()
    }

    /// May commands of this feature level be submitted?
    pub fn supports(&self, level: u32) -> bool {
        self.state.read().features >= level
    }

    /// This member's group handle.
    pub fn group(&self) -> &Group {
        &self.group
    }
}
