//! The consensus core's network: appends pipelined over the data lane, heartbeats and votes over
//! the control lane, snapshots over connections of their own. Keeps one pair of links per member.

use super::link::{Link, LinkError, Target, connect};
use super::pipeline::pipeline;
use super::wire::{self, Lane, SnapshotBegin, kind};
use super::witness::Witness;
use super::{Dialer, Member, snapshot};
use crate::codec::VoteV1;
use crate::store::snapshot::{Snapshot, SnapshotData};
use crate::types::{RpcError, Types, Vote};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use openraft::errors::{NetworkError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RPCTypes, RaftNetworkFactory};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// An append is answered after the other member's fsync; a bad one takes a second and more.
const APPEND_TIMEOUT: Duration = Duration::from_secs(4);
/// Logs stay this long after a snapshot was sent, so that its receiver finds what follows.
const AFTER_SNAPSHOT: Duration = Duration::from_secs(10);

struct Links {
    member: Member,
    control: Arc<Link>,
    data: Arc<Link>,
}

#[derive(Default)]
struct Known {
    /// As the newest membership has them. The core's tasks keep what a member was when they began.
    members: BTreeMap<u64, Member>,
    links: HashMap<u64, Links>,
}

/// The other members and the connections to them.
pub(crate) struct Peers {
    pub(crate) id: u64,
    cluster_id: String,
    dialer: Arc<dyn Dialer>,
    witness: Arc<Witness>,
    /// Where the connections live, whoever asks for them.
    runtime: Handle,
    known: Mutex<Known>,
    sending: Mutex<SnapshotSends>,
    next_send: AtomicU64,
}

#[derive(Default)]
struct SnapshotSends {
    active: HashMap<u64, Instant>,
    last_end: Option<Instant>,
}

impl Peers {
    pub(crate) fn new(
        id: u64,
        cluster_id: String,
        dialer: Arc<dyn Dialer>,
        witness: Arc<Witness>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            cluster_id,
            dialer,
            witness,
            runtime: Handle::current(),
            known: Mutex::default(),
            sending: Mutex::default(),
            next_send: AtomicU64::new(0),
        })
    }

    fn target(&self, id: u64, member: &Member, lane: Lane) -> Target {
        Target {
            id,
            member: member.clone(),
            lane,
            from: self.id,
            cluster_id: self.cluster_id.clone(),
            dialer: self.dialer.clone(),
            witness: self.witness.clone(),
        }
    }

    /// Where a member is now; `told` counts while the membership does not have it.
    fn current(&self, id: u64, told: &Member) -> Member {
        self.known.lock().members.get(&id).unwrap_or(told).clone()
    }

    /// The link to a member where it is now (see [`Peers::current`]); a new one when it is new or
    /// has moved.
    pub(crate) fn link(&self, id: u64, told: &Member, lane: Lane) -> Arc<Link> {
        let mut known = self.known.lock();
        let Known { members, links } = &mut *known;
        let member = members.get(&id).unwrap_or(told);
        let reaches = links
            .get(&id)
            .is_some_and(|l| l.member.peer_url == member.peer_url);
        if !reaches {
            let open = |lane| Arc::new(Link::new(self.target(id, member, lane), &self.runtime));
            let new = Links {
                member: member.clone(),
                control: open(Lane::Control),
                data: open(Lane::Data),
            };
            links.insert(id, new);
        }
        let pair = &links[&id];
        if lane == Lane::Data {
            pair.data.clone()
        } else {
            pair.control.clone()
        }
    }

    /// Take the membership's addresses; drop links to members that are gone or have moved.
    pub(crate) fn update(&self, members: BTreeMap<u64, Member>) {
        let mut known = self.known.lock();
        known.links.retain(|id, links| {
            members
                .get(id)
                .is_some_and(|m| m.peer_url == links.member.peer_url)
        });
        known.members = members;
    }

    /// Has this member's process ended? See [`Dialer::gone`].
    pub(crate) async fn gone(&self, id: u64, told: &Member) -> bool {
        let member = self.current(id, told);
        self.dialer.gone(id, &member).await
    }

    /// Close everything.
    pub(crate) fn close(&self) {
        self.known.lock().links.clear();
    }

    /// Is a snapshot on its way, or was one just now? Then the log behind it must stay: the
    /// receiver would find the entries after it purged and need another one, for ever.
    pub(crate) fn sending_snapshot(&self) -> bool {
        let sending = self.sending.lock();
        !sending.active.is_empty()
            || sending
                .last_end
                .is_some_and(|at| at.elapsed() < AFTER_SNAPSHOT)
    }
}

/// Marks a snapshot as being sent.
struct Sending<'a>(&'a Peers, u64);

impl<'a> Sending<'a> {
    fn new(peers: &'a Peers) -> Self {
        let id = peers.next_send.fetch_add(1, Ordering::Relaxed);
        peers.sending.lock().active.insert(id, Instant::now());
        Self(peers, id)
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let mut sending = self.0.sending.lock();
        sending.active.remove(&self.1);
        sending.last_end = Some(Instant::now());
    }
}

/// Makes a [`Peer`] per purpose.
pub(crate) struct Factory(pub(crate) Arc<Peers>);

impl RaftNetworkFactory<Types> for Factory {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &Member) -> Peer {
        Peer {
            peers: self.0.clone(),
            id: target,
            member: node.clone(),
            lane: Lane::Data,
        }
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Peer {
        Peer {
            peers: self.0.clone(),
            id: target,
            member: node.clone(),
            lane: Lane::Control,
        }
    }
}

/// One member, as the core's replication, heartbeat, vote and snapshot tasks see it.
pub(crate) struct Peer {
    peers: Arc<Peers>,
    id: u64,
    /// As it was when the core made this one.
    member: Member,
    /// Where appends go: heartbeats must not queue behind bulk.
    lane: Lane,
}

impl Peer {
    fn error(&self, error: LinkError, action: RPCTypes) -> RpcError {
        match error {
            LinkError::NotSent(why) => Unreachable::from_string(why).into(),
            LinkError::Lost(why) => NetworkError::from_string(why).into(),
            LinkError::Failed(why) => Unreachable::from_string(why).into(),
            LinkError::Timeout(timeout) => Timeout {
                action,
                id: self.peers.id,
                target: self.id,
                timeout,
            }
            .into(),
        }
    }

    fn undecodable(error: &io::Error) -> RpcError {
        NetworkError::from_string(format!("undecodable answer: {error}")).into()
    }

    async fn call(
        &self,
        kind: u8,
        payload: Bytes,
        option: &RPCOption,
        action: RPCTypes,
    ) -> Result<Bytes, RpcError> {
        let link = self.peers.link(self.id, &self.member, Lane::Control);
        link.call(kind, payload, option.hard_ttl())
            .await
            .map_err(|e| self.error(e, action))
    }
}

impl NetBackoff<Types> for Peer {
    fn backoff(&self) -> Option<Backoff> {
        let steps = [50, 100, 200, 500].map(Duration::from_millis);
        Some(Backoff::new(
            steps.into_iter().chain(std::iter::repeat(steps[3])),
        ))
    }
}

impl NetStreamAppend<Types> for Peer {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Types>, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let this = &*self;
        let link = this.peers.link(this.id, &this.member, this.lane);
        let send = move |request: AppendEntriesRequest<Types>| {
            let prev = request.prev_log_id;
            let last = request.entries.last().map(|e| e.log_id).or(prev);
            // Started here and not when first polled: the wire keeps the order of the log.
            let ticket = link.start(kind::APPEND, wire::encode_append(&request));
            let answer = async move {
                let bytes = ticket
                    .map_err(|e| this.error(e, RPCTypes::AppendEntries))?
                    .wait(APPEND_TIMEOUT)
                    .await
                    .map_err(|e| this.error(e, RPCTypes::AppendEntries))?;
                wire::decode_append_answer(&bytes, prev, last).map_err(|e| Self::undecodable(&e))
            };
            (request.entries.is_empty(), answer)
        };
        let answers = pipeline(input, send, |answer| matches!(answer, Ok(Ok(_))));
        Box::pin(async move { Ok(answers.boxed()) })
    }
}

impl NetVote<Types> for Peer {
    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RpcError> {
        let ask = wire::encode_vote_request(&rpc);
        let bytes = self.call(kind::VOTE, ask, &option, RPCTypes::Vote).await?;
        wire::decode_vote_answer(&bytes).map_err(|e| Self::undecodable(&e))
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RpcError> {
        let ask = wire::encode_vote_request(&rpc);
        let bytes = self
            .call(kind::PRE_VOTE, ask, &option, RPCTypes::Vote)
            .await?;
        wire::decode_vote_answer(&bytes).map_err(|e| Self::undecodable(&e))
    }
}

impl NetTransferLeader<Types> for Peer {
    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RpcError> {
        let ask = wire::encode_transfer(&req);
        self.call(kind::TRANSFER, ask, &option, RPCTypes::TransferLeader)
            .await?;
        Ok(Ok(()))
    }
}

impl NetSnapshot<Types> for Peer {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let _mark = Sending::new(&self.peers);
        let begin = |bytes| SnapshotBegin {
            vote: VoteV1::from(&vote),
            name: crate::store::snapshot::name(snapshot.meta.last_log_id),
            bytes,
        };
        let data = snapshot.snapshot;
        let send = async {
            let file = data.sound().await?;
            let begin = begin(file.metadata()?.len());
            let member = self.peers.current(self.id, &self.member);
            let target = self.peers.target(self.id, &member, Lane::Snapshot);
            let stream = connect(&target).await?;
            let started = Instant::now();
            let answer = snapshot::send(stream, &begin, file).await?;
            let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::info!(
                peer = self.id,
                bytes = begin.bytes,
                took_ms,
                "snapshot sent"
            );
            crate::codec::decode::<VoteV1>(&answer)
        };
        let outcome = tokio::select! {
            outcome = send => outcome,
            closed = cancel => return Err(closed.into()),
        };
        match outcome {
            Ok(vote) => Ok(SnapshotResponse::new(vote.into())),
            // Unreachable makes the sender back off; a snapshot is too much to repeat at once.
            Err(e) => Err(Unreachable::from_string(format!("sending a snapshot: {e}")).into()),
        }
    }
}
