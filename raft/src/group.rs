//! A handle on this process's member of the Raft group.

use crate::{Dialer, Machine, Member, PeerStream};
use bytes::Bytes;
use mainstay_storage::{engine::Engine, log::Log, snapshot::SnapshotDir};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Timing and bounds.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// This member.
    pub id: u64,
    /// Shown in logs and checked by peers.
    pub cluster_id: String,
    /// Leader's heartbeat.
    pub heartbeat: Duration,
    /// Election timeout range.
    pub election: (Duration, Duration),
    /// A snapshot is taken after this many log bytes.
    pub snapshot_log_bytes: u64,
    /// Entries kept behind a snapshot for slow members.
    pub keep_entries: u64,
    /// Longest time between two checkpoints of changed state.
    pub checkpoint_interval: Duration,
}

/// Why a request to the group failed. `Unknown`: it may or may not have happened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GroupError {
    /// No leader was found in time; the request had no effect.
    #[error("no leader within the deadline")]
    NoLeader,
    /// The deadline passed after the request was sent: the outcome is unknown.
    #[error("no answer within the deadline; the outcome is unknown")]
    Unknown,
    /// Refused, e.g. a membership change that is not allowed; the text says why.
    #[error("{0}")]
    Refused(String),
    /// This member has stopped (storage failure, shutdown).
    #[error("this member has stopped: {0}")]
    Stopped(String),
    /// Too much is waiting; try again later.
    #[error("overloaded: {0}")]
    Overloaded(String),
}

/// A member's part in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Votes.
    Voter,
    /// Receives the log, does not vote.
    Learner,
}

/// A member as the membership has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Where it is.
    pub member: Member,
    /// Its part.
    pub role: Role,
    /// Last log index known to be on its disk (leader only).
    pub matched: Option<u64>,
}

/// A look at the group from this member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// This member.
    pub id: u64,
    /// Current leader as far as known.
    pub leader: Option<u64>,
    /// Term.
    pub term: u64,
    /// Last log index on disk or queued.
    pub last_log: u64,
    /// Applied index.
    pub applied: u64,
    /// Members by id.
    pub members: BTreeMap<u64, MemberStatus>,
    /// Set when the member has stopped.
    pub fault: Option<String>,
}

impl Status {
    /// Is this member the leader?
    pub fn is_leader(&self) -> bool {
        self.leader == Some(self.id)
    }
}

/// The handle; cheap to clone.
#[derive(Clone)]
pub struct Group {
    _inner: Arc<()>,
}

impl Group {
    /// Recover from log, engine and snapshot, and take part in the group (an uninitialised member
    /// waits to be initialised or contacted).
    pub async fn start(
        config: GroupConfig,
        log: Arc<dyn Log>,
        engine: Arc<dyn Engine>,
        snapshots: SnapshotDir,
        machine: Arc<dyn Machine>,
        dialer: Arc<dyn Dialer>,
    ) -> Result<Self, GroupError> {
        let _ = (config, log, engine, snapshots, machine, dialer);
        todo!()
    }
    /// Found the group with these voters. Idempotent; every founder calls it with the same map.
    pub async fn initialize(&self, members: BTreeMap<u64, Member>) -> Result<(), GroupError> {
        let _ = members;
        todo!()
    }
    /// Commit and apply `command`; answers what the machine answered. From any member: it is
    /// forwarded to the leader and retried (the same bytes) through leader changes until `deadline`.
    pub async fn propose(&self, command: Bytes, deadline: Duration) -> Result<Bytes, GroupError> {
        let _ = (command, deadline);
        todo!()
    }
    /// Returns once this member's machine has applied everything that was acknowledged anywhere
    /// before the call (ReadIndex; concurrent calls share a round). The applied index.
    pub async fn read_barrier(&self, deadline: Duration) -> Result<u64, GroupError> {
        let _ = deadline;
        todo!()
    }
    /// A look at the group.
    pub fn status(&self) -> Status {
        todo!()
    }
    /// Told of every change of [`Status`] (applied index included).
    pub fn watch(&self) -> watch::Receiver<Status> {
        todo!()
    }
    /// Serve one accepted stream from another member until it ends.
    pub async fn serve(&self, stream: Box<dyn PeerStream>) {
        let _ = stream;
        todo!()
    }
    /// Add a learner (or change a member's addresses). From any member.
    pub async fn add_learner(&self, id: u64, member: Member) -> Result<(), GroupError> {
        let _ = (id, member);
        todo!()
    }
    /// Make a caught-up learner a voter. From any member.
    pub async fn promote(&self, id: u64) -> Result<(), GroupError> {
        let _ = id;
        todo!()
    }
    /// Remove a member. From any member.
    pub async fn remove(&self, id: u64) -> Result<(), GroupError> {
        let _ = id;
        todo!()
    }
    /// Hand leadership to a caught-up voter (before a clean stop).
    pub async fn transfer_leader(&self, to: Option<u64>) -> Result<(), GroupError> {
        let _ = to;
        todo!()
    }
    /// Checkpoint, stop all tasks.
    pub async fn shutdown(&self) {
        todo!()
    }
}
