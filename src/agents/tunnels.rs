//! Tunnels from any member to something in a VM. The member that holds the stream of the VM's node (its home)
//! tells the agent to dial out to it; a member that is not the home goes through the one that is, on the peer port.
//! Soft state only: a tunnel is an order under way, then two connections, then nothing. Knows the agents' frames
//! ([`mainstay_agent::tunnel`]) up to the first answer; refuses to know what travels behind it.
//!
//! ```text
//! client -- WebSocket --> member -- peer port, Upgrade --> home <-- Upgrade -- agent --> VM
//!                           |                               |
//!                           +-- frames, to the agent -------+-- bytes, as they come
//! ```
//! Nothing is begun at the VM before the member at the client's side has said what over the open tunnel: looking for
//! the home, and asking again when an agent does not come, is safe.

use super::Refused;
use super::streams::{Streams, Undelivered};
use crate::app::App;
use crate::peer::PeerClient;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hyper_util::rt::TokioIo;
use mainstay_agent::tunnel::frame::{self, Kind};
use mainstay_agent::tunnel::held::{AnyStream, Held};
use mainstay_agent::tunnel::{ID_HEADER, PATH, UPGRADE};
use mainstay_agent::wire::{Access, TunnelOrder, TunnelRefusal};
use mainstay_model::NodeId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt as _, copy, split};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

/// Tunnels of one member at once, those it passes on for others counted.
pub const MEMBER_TUNNELS_MAX: usize = 256;
/// Tunnels of one node at once.
pub const NODE_TUNNELS_MAX: usize = 32;
/// For the whole of finding a node's home and having its agent dial in.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// For the agent, once it was told. A home that lost its agent does not know it yet.
const DIAL_MAX: Duration = Duration::from_secs(3);
/// For an answer to the first frame: a VM's control socket may be slow.
const READY_MAX: Duration = Duration::from_secs(20);
/// For a member to say whether it is a node's home.
const ASK_MAX: Duration = Duration::from_secs(1);
/// Before everybody is asked again: the agent is on its way from one home to the next.
const ROUND_PAUSE: Duration = Duration::from_millis(200);
/// For what is under way the other way, when one side of a tunnel has ended.
const LINGER_MAX: Duration = Duration::from_secs(5);
/// Peer routes.
const PEER_PATH: &str = "/peer/v1/tunnel";
const WHERE_PATH: &str = "/peer/v1/tunnel/where";

/// Why there is no tunnel, as a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// Asking again does not help.
    #[error("{0}")]
    Refused(String),
    /// It may.
    #[error("{0}")]
    Unavailable(String),
}

/// The frames' end of a tunnel whose other end is ready.
pub struct Tunnel {
    /// Frames both ways; holds the places that the tunnel takes.
    pub stream: AnyStream,
    /// True when the member stops.
    pub stop: watch::Receiver<bool>,
}

struct Pending {
    node: NodeId,
    dialled: oneshot::Sender<AnyStream>,
}

struct Inner {
    app: App,
    peers: PeerClient,
    streams: Streams,
    pending: Mutex<HashMap<String, Pending>>,
    places: Arc<Semaphore>,
    nodes: Mutex<BTreeMap<NodeId, usize>>,
    stop: watch::Sender<bool>,
}

/// All tunnels of a member; cheap to clone.
#[derive(Clone)]
pub struct Tunnels {
    inner: Arc<Inner>,
}

/// One of a node's places.
struct NodePlace {
    inner: Arc<Inner>,
    node: NodeId,
}

impl Drop for NodePlace {
    fn drop(&mut self) {
        let mut nodes = self.inner.nodes.lock();
        if let Some(taken) = nodes.get_mut(&self.node) {
            *taken -= 1;
            if *taken == 0 {
                nodes.remove(&self.node);
            }
        }
    }
}

/// An order that nobody has answered yet is forgotten with this.
struct Waits {
    inner: Arc<Inner>,
    id: String,
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.inner.pending.lock().remove(&self.id);
    }
}

/// Why this member did not get the agent to dial in.
enum Missed {
    Elsewhere,
    Old,
    Busy,
    Silent,
}

/// "Is this node's agent with you?"
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Where {
    node: String,
}

/// The answer.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Here {
    here: bool,
}

#[derive(Deserialize)]
struct OfNode {
    node_id: String,
}

/// Where a node's agent may be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Home {
    Ours,
    Member(u64),
}

impl Tunnels {
    pub(super) fn new(app: App, peers: PeerClient, streams: Streams) -> Self {
        let inner = Inner {
            app,
            peers,
            streams,
            pending: Mutex::default(),
            places: Arc::new(Semaphore::new(MEMBER_TUNNELS_MAX)),
            nodes: Mutex::default(),
            stop: watch::Sender::new(false),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// How many there are through this member.
    pub fn open_now(&self) -> u64 {
        let taken = MEMBER_TUNNELS_MAX - self.inner.places.available_permits();
        u64::try_from(taken).unwrap_or(u64::MAX)
    }

    /// The member stops: all tunnels end, with a word to their clients.
    pub fn close(&self) {
        self.inner.stop.send_replace(true);
    }

    /// Open a tunnel to something on `node`; dropping this future gives it up.
    pub async fn open(&self, node: &NodeId, access: &Access) -> Result<Tunnel, TunnelError> {
        let inner = &self.inner;
        let place = inner.place()?;
        let stream = inner.reach(node).await?;
        let mut stream: AnyStream = Box::new(Held::new(stream, place));
        let first = async {
            frame::write_json(&mut stream, Kind::Open, access).await?;
            frame::next(&mut stream).await
        };
        let broke = |why: String| {
            TunnelError::Unavailable(format!(
                "the connection to node {node} broke before anything was done: {why}; try again"
            ))
        };
        let first = timeout(READY_MAX, first).await;
        let first = first.map_err(|_| broke("no answer in time".to_owned()))?;
        let first = first.map_err(|e| broke(e.to_string()))?;
        match first.kind {
            Kind::Ready => Ok(Tunnel {
                stream,
                stop: inner.stop.subscribe(),
            }),
            Kind::Refused => {
                let said: TunnelRefusal = serde_json::from_slice(&first.body).unwrap_or_default();
                Err(TunnelError::Refused(said.message))
            }
            other => Err(broke(format!("{other:?} instead of Ready"))),
        }
    }
}

impl Inner {
    fn place(&self) -> Result<OwnedSemaphorePermit, TunnelError> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        place.map_err(|_| {
            TunnelError::Unavailable(format!(
                "overloaded: this member has {MEMBER_TUNNELS_MAX} tunnels, as many as it may; ask another member, or try again later"
            ))
        })
    }

    fn node_place(self: &Arc<Self>, node: &NodeId) -> Option<NodePlace> {
        let mut nodes = self.nodes.lock();
        let taken = nodes.entry(node.clone()).or_default();
        if *taken >= NODE_TUNNELS_MAX {
            return None;
        }
        *taken += 1;
        Some(NodePlace {
            inner: Arc::clone(self),
            node: node.clone(),
        })
    }

    /// A connection from the node's agent, wherever its home is.
    async fn reach(self: &Arc<Self>, node: &NodeId) -> Result<AnyStream, TunnelError> {
        let until = Instant::now() + OPEN_MAX;
        let mut why = format!("node {node} is connected to no member that answers");
        loop {
            let mut tried = Vec::new();
            while let Some(home) = self.home(node, &tried).await {
                let reached = match &home {
                    Home::Ours => self.summon(node).await,
                    Home::Member(id) => self.through(*id, node).await,
                };
                match reached {
                    Ok(stream) => return Ok(stream),
                    Err(Missed::Old) => {
                        return Err(TunnelError::Refused(format!(
                            "the agent of node {node} is of an older release, which knows no tunnels: update it"
                        )));
                    }
                    Err(Missed::Busy) => {
                        return Err(TunnelError::Unavailable(format!(
                            "overloaded: node {node} has {NODE_TUNNELS_MAX} tunnels, or its home {MEMBER_TUNNELS_MAX}, as many as may be; try again later"
                        )));
                    }
                    Err(Missed::Silent) => {
                        why = format!("the agent of node {node} does not answer");
                    }
                    Err(Missed::Elsewhere) => {}
                }
                tried.push(home);
            }
            if Instant::now() + ROUND_PAUSE > until {
                return Err(TunnelError::Unavailable(format!(
                    "{why}: nothing was done; try again"
                )));
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    /// The first that says it is the node's home, of those that were not tried.
    async fn home(&self, node: &NodeId, tried: &[Home]) -> Option<Home> {
        if !tried.contains(&Home::Ours) && self.streams.seat(node).is_some() {
            return Some(Home::Ours);
        }
        let status = self.app.group().status();
        let others = status.members.iter().filter(|(id, _)| **id != status.id);
        let others = others.filter(|(id, _)| !tried.contains(&Home::Member(**id)));
        let ask = Where {
            node: node.to_string(),
        };
        let mut asked: FuturesUnordered<_> = others
            .map(|(id, member)| {
                let (ask, base) = (&ask, member.member.peer_url.clone());
                async move {
                    // One of an older release does not know the question.
                    let answer = self
                        .peers
                        .ask::<Here>(&base, WHERE_PATH, ask, ASK_MAX)
                        .await;
                    answer.is_ok_and(|a| a.here).then_some(Home::Member(*id))
                }
            })
            .collect();
        while let Some(answer) = asked.next().await {
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    /// Tell the agent, whose home this member is, to dial in, and wait until it does.
    async fn summon(self: &Arc<Self>, node: &NodeId) -> Result<AnyStream, Missed> {
        let place = self.node_place(node).ok_or(Missed::Busy)?;
        let id = uuid::Uuid::new_v4().simple().to_string();
        let (dialled, arrives) = oneshot::channel();
        let pending = Pending {
            node: node.clone(),
            dialled,
        };
        self.pending.lock().insert(id.clone(), pending);
        let _waits = Waits {
            inner: Arc::clone(self),
            id: id.clone(),
        };
        self.streams
            .order(node, TunnelOrder { id })
            .map_err(|undelivered| match undelivered {
                Undelivered::Elsewhere => Missed::Elsewhere,
                Undelivered::Old => Missed::Old,
                Undelivered::Busy => Missed::Silent,
            })?;
        match timeout(DIAL_MAX, arrives).await {
            Ok(Ok(stream)) => Ok(Box::new(Held::new(stream, place))),
            _ => Err(Missed::Silent),
        }
    }

    /// The same through another member.
    async fn through(&self, id: u64, node: &NodeId) -> Result<AnyStream, Missed> {
        let status = self.app.group().status();
        let member = status.members.get(&id).ok_or(Missed::Elsewhere)?;
        let base = &member.member.peer_url;
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("node_id", node.as_str())
            .finish();
        let call = self.peers.get(&format!("{base}{PEER_PATH}?{query}"));
        let call = call
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, UPGRADE);
        let answer = timeout(ASK_MAX + DIAL_MAX, call.send()).await;
        let Ok(Ok(answer)) = answer else {
            return Err(Missed::Silent);
        };
        match answer.status() {
            StatusCode::SWITCHING_PROTOCOLS => {}
            StatusCode::CONFLICT => return Err(Missed::Old),
            StatusCode::TOO_MANY_REQUESTS => return Err(Missed::Busy),
            StatusCode::GATEWAY_TIMEOUT => return Err(Missed::Silent),
            _ => return Err(Missed::Elsewhere),
        }
        let upgraded = answer.upgrade().await.map_err(|_| Missed::Silent)?;
        Ok(Box::new(upgraded))
    }
}

/// The agents' call, for the API port.
pub(super) fn agents_router(tunnels: Tunnels) -> Router {
    Router::new().route(PATH, get(dialled)).with_state(tunnels)
}

/// The members' calls, for the peer port.
pub fn peer_router(tunnels: Tunnels) -> Router {
    Router::new()
        .route(PEER_PATH, get(passed_on))
        .route(WHERE_PATH, post(located))
        .with_state(tunnels)
}

fn wants_upgrade(headers: &HeaderMap) -> Result<(), Refused> {
    if headers.get(header::UPGRADE).is_some_and(|v| v == UPGRADE) {
        return Ok(());
    }
    let why = "this path takes tunnels only".to_owned();
    Err(Refused(StatusCode::UPGRADE_REQUIRED, why))
}

fn switch() -> Response {
    let upgrade = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(UPGRADE)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, upgrade).into_response()
}

/// An agent brings a tunnel that it was told to. Each is taken once, by the node that was told.
async fn dialled(
    State(tunnels): State<Tunnels>,
    Query(call): Query<OfNode>,
    mut request: Request,
) -> Result<Response, Refused> {
    wants_upgrade(request.headers())?;
    let id = request.headers().get(ID_HEADER);
    let id = id.and_then(|id| id.to_str().ok()).unwrap_or_default();
    let taken = {
        let mut pending = tunnels.inner.pending.lock();
        let meant = pending
            .get(id)
            .is_some_and(|p| p.node.as_str() == call.node_id);
        if meant { pending.remove(id) } else { None }
    };
    let Some(taken) = taken else {
        let why = "there is no such tunnel (any more)".to_owned();
        return Err(Refused(StatusCode::NOT_FOUND, why));
    };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            // Nobody waits any more: it is closed.
            taken.dialled.send(Box::new(TokioIo::new(upgraded))).ok();
        }
    });
    Ok(switch())
}

async fn located(State(tunnels): State<Tunnels>, Json(ask): Json<Where>) -> Json<Here> {
    let here = tunnels
        .inner
        .streams
        .seat(&NodeId::from(ask.node))
        .is_some();
    Json(Here { here })
}

/// Another member wants a tunnel to a node whose home this one is.
async fn passed_on(
    State(tunnels): State<Tunnels>,
    Query(call): Query<OfNode>,
    mut request: Request,
) -> Result<Response, Refused> {
    wants_upgrade(request.headers())?;
    let inner = &tunnels.inner;
    let busy = || Refused(StatusCode::TOO_MANY_REQUESTS, "too many tunnels".to_owned());
    let place = inner.place().map_err(|_| busy())?;
    let agent = inner.summon(&NodeId::from(call.node_id)).await;
    let agent = agent.map_err(|missed| {
        let (status, why) = match missed {
            Missed::Elsewhere => (StatusCode::NOT_FOUND, "the node's agent is not here"),
            Missed::Old => (StatusCode::CONFLICT, "the node's agent knows no tunnels"),
            Missed::Busy => return busy(),
            Missed::Silent => (StatusCode::GATEWAY_TIMEOUT, "the agent did not dial in"),
        };
        Refused(status, why.to_owned())
    })?;
    let mut stop = inner.stop.subscribe();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            let peer: AnyStream = Box::new(TokioIo::new(upgraded));
            tokio::select! {
                () = relay(peer, agent) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        }
        drop(place);
    });
    Ok(switch())
}

/// Bytes both ways until one side ends, and what is under way after that.
async fn relay(a: AnyStream, b: AnyStream) {
    let ((mut from_a, mut to_a), (mut from_b, mut to_b)) = (split(a), split(b));
    let mut there = pin!(async {
        copy(&mut from_a, &mut to_b).await.ok();
        to_b.shutdown().await.ok();
    });
    let mut back = pin!(async {
        copy(&mut from_b, &mut to_a).await.ok();
        to_a.shutdown().await.ok();
    });
    tokio::select! {
        () = &mut there => timeout(LINGER_MAX, back).await.ok(),
        () = &mut back => timeout(LINGER_MAX, there).await.ok(),
    };
}
