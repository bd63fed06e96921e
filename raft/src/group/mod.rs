//! A handle on this process's member of the Raft group. Knows no command and no wire.

mod admin;
mod claims;
mod config;
mod divergence;
mod fitness;
mod membership;
mod propose;
mod queue;
mod read;
mod rounds;
mod service;
mod slow;
mod status;
mod steady;
mod succession;
mod upkeep;

pub use config::GroupConfig;
pub use divergence::Agreement;
pub use fitness::Unfit;
pub use status::{MemberStatus, Role, Status};

use crate::store::checkpoint::{Checkpointer, Parts};
use crate::store::fault::{FaultCell, chain};
use crate::store::log::LogStore;
use crate::store::lost;
use crate::store::machine::StateMachine;
use crate::store::snapshot::SnapshotFile;
use crate::transport::network::{Factory, Peers};
use crate::transport::wire::Admin;
use crate::transport::witness::Witness;
use crate::transport::{self, link::Link};
use crate::types::Raft;
use crate::{Dialer, Machine, Member, PeerStream};
use bytes::Bytes;
use mainstay_storage::{engine::Engine, log::Log, snapshot::SnapshotDir};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{InitializeError, RaftError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Commands being proposed through this member.
const PROPOSALS_MAX: usize = 16 << 10;
/// Commands being committed here for other members.
const FORWARDED_MAX: usize = 16 << 10;
/// Bytes of each kind.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// A membership change is given this long: less than a command line waits for one member's answer.
const ADMIN_DEADLINE: Duration = Duration::from_secs(12);

/// The fault of a member that was asked to stop.
const SHUT_DOWN: &str = "shut down";

/// Why a request to the group failed. `Unknown`: it may or may not have happened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GroupError {
    /// No leader was found in time; the request had no effect.
    #[error("no leader within the deadline")]
    NoLeader,
    /// The request was sent and its answer never came: the outcome is unknown.
    #[error("no answer in time; the outcome is unknown")]
    Unknown,
    /// Refused, e.g. a membership change that is not allowed; the text says why.
    #[error("{0}")]
    Refused(String),
    /// This member has stopped (storage failure, shutdown).
    #[error("this member has stopped: {0}")]
    Stopped(String),
    /// This member's state is known to be wrong: it answers nothing from it.
    #[error("{0}")]
    Diverged(String),
    /// Too much is waiting; try again later.
    #[error("overloaded: {0}")]
    Overloaded(String),
}

/// The handle; cheap to clone. Dropping the last one stops the member as a crash would.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
    _alive: Arc<Alive>,
}

/// Held by handles only, never by tasks: its end is the member's end.
struct Alive(Arc<Inner>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.cancel.cancel();
    }
}

pub(crate) struct Inner {
    config: GroupConfig,
    raft: Raft,
    machine: Arc<dyn Machine>,
    log: LogStore,
    checkpointer: Arc<Checkpointer>,
    snapshots: Arc<SnapshotDir>,
    peers: Arc<Peers>,
    witness: Arc<Witness>,
    fault: FaultCell,
    fitness: fitness::Fitness,
    started: Instant,
    applied: watch::Receiver<u64>,
    leader: watch::Receiver<Option<u64>>,
    status: watch::Receiver<Status>,
    agreement: watch::Sender<Agreement>,
    reads: read::Reads,
    streams: Arc<succession::Streams>,
    proposals: queue::Queue,
    forwarded: queue::Queue,
    receiving: Arc<tokio::sync::Mutex<()>>,
    /// Held from the look at the membership to its change: nothing comes in between.
    changing: tokio::sync::Mutex<()>,
    steady: steady::Steady,
    cancel: CancellationToken,
    /// `stop` was called: it, and not the guard, ends everything.
    stopping: AtomicBool,
    runtime: Handle,
}

impl Group {
    /// Recover from log, engine and snapshot, and take part in the group (an uninitialised member
    /// waits to be initialised or contacted). Refused when the log lacks what was applied from it.
    /// Everything that it does by itself happens on the runtime of this call.
    pub async fn start(
        config: GroupConfig,
        log: Arc<dyn Log>,
        engine: Arc<dyn Engine>,
        snapshots: SnapshotDir,
        machine: Arc<dyn Machine>,
        dialer: Arc<dyn Dialer>,
    ) -> Result<Self, GroupError> {
        let fault = FaultCell::new();
        let fail = |e: &dyn std::error::Error| GroupError::Stopped(chain(e));
        let core = Arc::new(
            config
                .core()
                .map_err(|e| GroupError::Refused(e.to_string()))?,
        );
        let log = LogStore::open(log, fault.clone()).map_err(|e| fail(&e))?;
        let snapshots = Arc::new(snapshots);
        let parts = Parts {
            machine: machine.clone(),
            engine,
            snapshots: snapshots.clone(),
            log: log.progress(),
            fault: fault.clone(),
            interval: config.checkpoint_interval,
        };
        let checkpointer = load(parts, log.clone()).await?;
        let state = StateMachine::new(
            machine.clone(),
            checkpointer.clone(),
            snapshots.clone(),
            fault.clone(),
        );
        let witness = Witness::new(
            config.id,
            log.clone(),
            checkpointer.clone(),
            fault.clone(),
            snapshots.path(),
        );
        let cluster_id = config.cluster_id.clone();
        let peers = Peers::new(config.id, cluster_id, dialer, witness.clone());
        let raft = Raft::new(config.id, core, Factory(peers.clone()), log.clone(), state)
            .await
            .map_err(|e| fail(&e))?;
        let applied = checkpointer.applied();
        let fitness = fitness::Fitness::new();
        let first = status::status_of(
            &raft.metrics().borrow_watched(),
            *applied.borrow(),
            &fault,
            &fitness,
        );
        let (leader_tx, leader) = watch::channel(first.leader);
        let (status_tx, status) = watch::channel(first);
        let (streams, ended) = succession::Streams::new();
        let inner = Arc::new(Inner {
            config,
            raft,
            machine,
            log,
            checkpointer,
            snapshots,
            peers,
            witness,
            fault,
            fitness,
            started: Instant::now(),
            applied,
            leader,
            status,
            agreement: watch::Sender::new(Agreement::default()),
            reads: read::Reads::default(),
            streams,
            proposals: queue::Queue::new("proposals", PROPOSALS_MAX, QUEUE_BYTES_MAX),
            forwarded: queue::Queue::new(
                "proposals of other members",
                FORWARDED_MAX,
                QUEUE_BYTES_MAX,
            ),
            receiving: Arc::default(),
            changing: tokio::sync::Mutex::default(),
            steady: steady::Steady::default(),
            cancel: CancellationToken::new(),
            stopping: AtomicBool::new(false),
            runtime: Handle::current(),
        });
        upkeep::spawn(&inner, leader_tx, status_tx);
        read::spawn(&inner);
        divergence::spawn(&inner);
        fitness::spawn(&inner);
        slow::spawn(&inner);
        succession::spawn(&inner, ended);
        steady::spawn(&inner);
        claims::spawn(&inner);
        Ok(Self {
            _alive: Arc::new(Alive(inner.clone())),
            inner,
        })
    }

    /// Found the group with these voters. Idempotent; every founder calls it with the same map.
    pub async fn initialize(&self, members: BTreeMap<u64, Member>) -> Result<(), GroupError> {
        match self.inner.raft.initialize(members).await {
            // Initialised before, or already reached by a founder that was faster.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(e)) => Err(GroupError::Refused(e.to_string())),
            Err(RaftError::Fatal(e)) => Err(self.inner.stopped(&e.to_string())),
        }
    }

    /// Commit and apply `command`; answers what the machine answered. From any member: it is
    /// forwarded to the leader and retried (the same bytes) through leader changes until `deadline`
    /// or until the log has moved on by [`GroupConfig::retry_entries`].
    pub async fn propose(&self, command: Bytes, deadline: Duration) -> Result<Bytes, GroupError> {
        self.inner.propose(command, Instant::now() + deadline).await
    }

    /// Returns once this member's machine has applied everything that was acknowledged anywhere
    /// before the call (ReadIndex; concurrent calls share a round). The applied index.
    pub async fn read_barrier(&self, deadline: Duration) -> Result<u64, GroupError> {
        self.inner.read_barrier(Instant::now() + deadline).await
    }

    /// A snapshot that has everything acknowledged anywhere before the call. It is made by the checkpoint
    /// thread, from what is on disk: applying and answering go on meanwhile.
    pub async fn snapshot(&self, deadline: Duration) -> Result<SnapshotFile, GroupError> {
        self.read_barrier(deadline).await?;
        let failed = |e: std::io::Error| self.inner.stopped(&e.to_string());
        self.inner.checkpointer.snapshot().await.map_err(failed)?;
        let snapshots = self.inner.snapshots.clone();
        tokio::task::spawn_blocking(move || SnapshotFile::current(&snapshots))
            .await
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(failed)
    }

    /// A look at the group.
    pub fn status(&self) -> Status {
        let metrics = self.inner.raft.metrics();
        let applied = *self.inner.applied.borrow();
        let metrics = metrics.borrow_watched();
        let inner = &self.inner;
        status::status_of(&metrics, applied, &inner.fault, &inner.fitness)
    }

    /// Told of every change of [`Status`] (applied index included); of quick successions, the last.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.inner.status.clone()
    }

    /// Whether all members hold the same state, as far as this one can see.
    pub fn agreement(&self) -> watch::Receiver<Agreement> {
        self.inner.agreement.subscribe()
    }

    /// Refused when this member's state is known not to be the group's: nothing may be answered from it.
    pub fn check_agreement(&self) -> Result<(), GroupError> {
        self.inner
            .diverged()
            .map_or(Ok(()), |why| Err(GroupError::Diverged(why)))
    }

    /// Applied index and the digest of the state there: equal on all members at an equal index.
    pub fn digest(&self) -> (u64, u64) {
        self.inner.checkpointer.newest_digest()
    }

    /// The members that answered this one within a lease; empty unless this member leads.
    pub fn answering(&self) -> BTreeSet<u64> {
        let metrics = self.inner.metrics();
        if metrics.current_leader != Some(metrics.id) {
            return BTreeSet::new();
        }
        let lease = self.inner.config.election.1;
        let members = metrics.membership_config.membership().nodes();
        members
            .map(|(id, _)| *id)
            .filter(|id| status::answers(&metrics, *id, lease))
            .collect()
    }

    /// The log index that the disk of member `id` is known to hold for good, if that has been heard: put
    /// back to an older state, it is not listened to.
    pub fn witnessed(&self, id: u64) -> Option<u64> {
        self.inner.witness.kept(id)
    }

    /// The runtime that this member was started on and works on. Streams are served there as well,
    /// and best registered there.
    pub fn runtime(&self) -> &Handle {
        &self.inner.runtime
    }

    /// Serve one accepted stream from another member until it ends.
    pub async fn serve(&self, stream: Box<dyn PeerStream>) {
        let service = Arc::new(service::Requests(self.inner.clone()));
        let cancel = self.inner.cancel.clone();
        let serving = async move {
            let serving = transport::server::serve(service, stream);
            cancel.run_until_cancelled(serving).await;
        };
        // A set, so that it ends with its caller.
        let mut set = JoinSet::new();
        set.spawn_on(serving, &self.inner.runtime);
        set.join_next().await;
    }

    /// Add a learner (or change a member's addresses). From any member. Refused when another member
    /// has its name or its address.
    pub async fn add_learner(&self, id: u64, member: Member) -> Result<(), GroupError> {
        self.admin(Admin::AddLearner { id, member }).await
    }

    /// Change a member's addresses. From any member. Refused when it is not, or no longer, in.
    pub async fn update(&self, id: u64, member: Member) -> Result<(), GroupError> {
        self.admin(Admin::Update { id, member }).await
    }

    /// Make a learner a voter, once it has been caught up for [`GroupConfig::promote_after`]. From
    /// any member. Refused, with what is missing, when that takes too long.
    pub async fn promote(&self, id: u64) -> Result<(), GroupError> {
        self.admin(Admin::Promote { id }).await
    }

    /// Would [`Group::remove`] be refused now? Changes nothing.
    pub async fn may_remove(&self, id: u64) -> Result<(), GroupError> {
        self.admin(Admin::MayRemove { id }).await
    }

    /// Remove a member; a leader hands over first. From any member. Refused when the voters that
    /// answer now would no longer be a majority; the text names those that do not.
    pub async fn remove(&self, id: u64) -> Result<(), GroupError> {
        self.admin(Admin::Remove { id }).await
    }

    /// Hand leadership to a caught-up voter (before a clean stop).
    pub async fn transfer_leader(&self, to: Option<u64>) -> Result<(), GroupError> {
        self.admin(Admin::Transfer { to }).await
    }

    async fn admin(&self, request: Admin) -> Result<(), GroupError> {
        self.inner
            .admin(request, Instant::now() + ADMIN_DEADLINE)
            .await
    }

    /// Checkpoint, stop all tasks.
    pub async fn shutdown(&self) {
        self.inner.stop(true).await;
    }

    /// Stop at once, without a last checkpoint: what is on disk is what a crash would leave.
    pub async fn halt(&self) {
        self.inner.stop(false).await;
    }
}

/// Load the engine into the machine; refused when the log does not go with it.
async fn load(parts: Parts, log: LogStore) -> Result<Arc<Checkpointer>, GroupError> {
    let work = move || {
        let fail = |e: std::io::Error| GroupError::Stopped(chain(&e));
        let snapshots = parts.snapshots.clone();
        let checkpointer = Checkpointer::start(parts).map_err(fail)?;
        let mark = checkpointer.mark();
        #[cfg(feature = "seeded-bugs")]
        crate::seeded::lose_tail(&log, &mark);
        if lost::lost(&log, &mark, &snapshots).map_err(fail)? {
            // So that it has let go of the engine when the caller hears of it.
            checkpointer.stop(false);
            return Err(GroupError::Stopped(lost::advice(&snapshots)));
        }
        if let Err(e) = lost::heal(&snapshots) {
            checkpointer.stop(false);
            return Err(GroupError::Stopped(chain(&e)));
        }
        Ok(checkpointer)
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| GroupError::Stopped(chain(&e)))?
}

impl Inner {
    async fn stop(&self, checkpoint: bool) {
        let checkpoint = checkpoint && self.fault.get().is_none();
        self.stopping.store(true, Ordering::SeqCst);
        self.cancel.cancel();
        self.peers.close();
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "consensus core ended badly");
        }
        let checkpointer = self.checkpointer.clone();
        // Joins a thread: off the runtime.
        let _ = tokio::task::spawn_blocking(move || checkpointer.stop(checkpoint)).await;
        self.fault.close(SHUT_DOWN);
    }

    fn stopped(&self, otherwise: &str) -> GroupError {
        GroupError::Stopped(self.fault.get().unwrap_or_else(|| otherwise.to_string()))
    }

    fn check_running(&self) -> Result<(), GroupError> {
        match self.fault.get() {
            Some(why) => Err(GroupError::Stopped(why)),
            None => Ok(()),
        }
    }

    fn leads(&self) -> bool {
        *self.leader.borrow() == Some(self.config.id)
    }

    /// The link to the current leader for a kind of work; `None` without a leader or when it is us.
    fn leader_link(&self, leader: u64, lane: transport::wire::Lane) -> Option<Arc<Link>> {
        Some(self.peers.link(leader, &self.member(leader)?, lane))
    }

    /// All members as the membership has them.
    fn members(&self) -> Vec<(u64, Member)> {
        let metrics = self.metrics();
        let nodes = metrics.membership_config.membership().nodes();
        nodes.map(|(id, member)| (*id, member.clone())).collect()
    }

    /// A member as the membership has it.
    fn member(&self, id: u64) -> Option<Member> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        membership.get_node(&id).cloned()
    }

    /// Wait until the known leader is another than `seen`, or a moment has passed, or the deadline.
    async fn leader_moved(&self, seen: Option<u64>, deadline: Instant) {
        let mut leader = self.leader.clone();
        let mut fault = self.fault.watch();
        let moment = (Instant::now() + Duration::from_millis(20)).min(deadline);
        let limit = if seen.is_none() { deadline } else { moment };
        let moved = async {
            tokio::select! {
                // A closed channel means that the member stops: look again at once.
                _ = leader.wait_for(|now| *now != seen) => {}
                _ = fault.wait_for(Option::is_some) => {}
            }
        };
        // Elapsed or not, the caller looks again.
        let _ = tokio::time::timeout_at(limit, moved).await;
    }
}
