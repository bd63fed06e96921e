//! The controller's side of the node agents' protocol (`mainstay_agent::wire`): registration, the
//! stream of desired sets, reports. Turns what agents say into commands where something changed;
//! refuses to decide anything about instances or nodes (see `reconcile`).
//!
//! * [`liveness`]: heartbeats and soft figures, in memory, obtainable on every member.
//! * [`exchange`]: how members tell each other what they heard.
//! * [`tunnels`]: ways to what is in VMs, through the streams.
//! * `desired`: what a node shall run, from the state; `streams`: who is told when it changes.
//! * `intake`: reports become commands; `translate`: words of the wire and of the model.
//!
//! Whoever receives a report handles it: any member compares it with its own applied state and
//! proposes what differs. A report is acknowledged only by a member that lately had a quorum behind it
//! (a follower: through the leader): an agent on the wrong side of a partition moves on.

mod desired;
pub mod exchange;
mod intake;
pub mod liveness;
mod streams;
#[cfg(test)]
mod tests;
mod translate;
pub mod tunnels;

pub use liveness::Liveness;
pub use tunnels::Tunnels;

use crate::app::{App, AppError, Consistency};
use crate::peer::PeerClient;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use exchange::Exchange;
use intake::Intake;
use liveness::Heard;
use mainstay_agent::wire::{RegisterRequest, RegisterResponse, Report, ReportResponse};
use mainstay_model::{Command, NodeId};
use mainstay_raft::Status;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use streams::{Addresses, Streams};
use tokio::task::{AbortHandle, JoinSet};

/// Largest body from an agent: outputs of many scripts in one report.
const BODY_MAX: usize = 64 << 20;
/// Largest body from a member: figures of as many nodes as a cluster may have, several times over.
const EXCHANGE_BODY_MAX: usize = 64 << 20;

/// What agents are told, and how members exchange what they heard.
#[derive(Clone, Debug)]
pub struct AgentsConfig {
    /// Told to agents; an agent serves one cluster only.
    pub cluster_id: String,
    /// Heartbeat interval of agents, and how often a stream says something.
    pub heartbeat: Duration,
    /// Told to agents: how long instances may run unheard.
    pub lease: Duration,
    /// Told to agents: what nodes show each other.
    pub share_key: String,
    /// Between two exchanges with the leader.
    pub exchange_every: Duration,
    /// A member without a quorum behind it for so long no longer accepts reports.
    pub exchange_grace: Duration,
}

impl AgentsConfig {
    /// For a cluster that calls a node unreachable after `unreachable` and lost after `lease`. An agent
    /// whose member is cut off shall be heard elsewhere before the first of the two.
    pub fn new(cluster_id: &str, unreachable: Duration, lease: Duration) -> Self {
        Self {
            cluster_id: cluster_id.to_owned(),
            heartbeat: (unreachable / 4).min(Duration::from_secs(5)),
            lease,
            share_key: String::new(),
            exchange_every: (unreachable / 8).min(Duration::from_millis(500)),
            exchange_grace: (unreachable / 2).min(Duration::from_secs(5)),
        }
    }

    /// The same on every member, and nothing that leads back to the token: who knows it gets chunks of images
    /// from nodes, as anybody does who reaches a registry port.
    #[must_use]
    pub fn sharing(self, token: &str) -> Self {
        let mut key = blake3::Hasher::new_derive_key("mainstay nodes serve nodes v1");
        for part in [token, self.cluster_id.as_str()] {
            key.update(&(part.len() as u64).to_le_bytes());
            key.update(part.as_bytes());
        }
        let share_key = key.finalize().to_hex().to_string();
        Self { share_key, ..self }
    }
}

struct Inner {
    app: App,
    liveness: Liveness,
    config: AgentsConfig,
    streams: Streams,
    intake: Intake,
    exchange: Exchange,
    tunnels: Tunnels,
    tasks: Vec<AbortHandle>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Shared by the agents' routes; cheap to clone. Its background tasks end with the last clone.
#[derive(Clone)]
pub struct AgentsState {
    inner: Arc<Inner>,
}

impl AgentsState {
    /// Starts the exchange with the leader, through `peers`, and the watch over desired sets.
    pub fn new(app: App, liveness: Liveness, peers: PeerClient, config: AgentsConfig) -> Self {
        let mut tasks = JoinSet::new();
        let streams = Streams::new(addresses(&app.group().status()));
        let exchange = Exchange::new(config.exchange_grace);
        let tunnels = Tunnels::new(app.clone(), peers.clone(), streams.clone());
        let abort = vec![
            tasks.spawn(streams::watch(app.clone(), streams.clone())),
            tasks.spawn(exchange::run(
                app.clone(),
                liveness.clone(),
                exchange.clone(),
                peers,
                config.clone(),
            )),
        ];
        tasks.detach_all();
        let intake = Intake::new(app.clone());
        Self {
            inner: Arc::new(Inner {
                app,
                liveness,
                config,
                streams,
                intake,
                exchange,
                tunnels,
                tasks: abort,
            }),
        }
    }

    /// Ways to what is in VMs.
    pub fn tunnels(&self) -> &Tunnels {
        &self.inner.tunnels
    }
}

/// The agents' calls, for the API port.
pub fn agents_router(state: AgentsState) -> Router {
    Router::new()
        .route("/agent/v1/register", post(register))
        .route("/agent/v1/desired", get(desired_stream))
        .route("/agent/v1/report", post(report))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(state.clone())
        .merge(tunnels::agents_router(state.inner.tunnels.clone()))
}

/// The members' calls, for the peer port.
pub fn exchange_router(state: AgentsState) -> Router {
    Router::new()
        .route(exchange::PATH, post(exchanged))
        .layer(DefaultBodyLimit::max(EXCHANGE_BODY_MAX))
        .with_state(state.clone())
        .merge(tunnels::peer_router(state.inner.tunnels.clone()))
}

/// A call that was not answered as asked: a status and a sentence.
struct Refused(StatusCode, String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

impl From<AppError> for Refused {
    fn from(error: AppError) -> Self {
        let status = match error {
            AppError::Refused(_) => StatusCode::CONFLICT,
            AppError::Group(_) => StatusCode::SERVICE_UNAVAILABLE,
            AppError::Codec(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|e| Refused(StatusCode::BAD_REQUEST, e.to_string()))
}

async fn register(
    State(state): State<AgentsState>,
    body: Bytes,
) -> Result<Json<RegisterResponse>, Refused> {
    let call: RegisterRequest = parse(&body)?;
    let inner = &state.inner;
    let id = NodeId::from(call.node_id.clone());
    let spec = translate::spec(&call);
    let same = {
        let now = inner.app.read(Consistency::Linearizable).await?;
        now.nodes
            .get(&id)
            .is_some_and(|n| n.spec == spec && n.reachable && !n.lost)
    };
    if !same {
        let command = Command::RegisterNode {
            id: id.clone(),
            spec: Box::new(spec),
        };
        inner.app.submit(command).await?;
    }
    inner.liveness.hear(&Heard {
        node: call.node_id.clone(),
        stats: inner.liveness.node_stats(&id).unwrap_or_default(),
        // Its first report will say whether it can do that at all.
        pulls: Some(inner.liveness.pulls(&id).unwrap_or_default()),
        ..Heard::default()
    });
    let (controllers, registries) = addresses(&inner.app.group().status());
    Ok(Json(RegisterResponse {
        node_id: call.node_id,
        cluster_id: inner.config.cluster_id.clone(),
        heartbeat_ms: millis(inner.config.heartbeat),
        lease_ms: millis(inner.config.lease),
        controllers,
        registries,
        share_key: inner.config.share_key.clone(),
    }))
}

#[derive(Deserialize)]
struct OfNode {
    node_id: String,
    /// 1: the agent takes orders for tunnels.
    #[serde(default)]
    tunnels: u32,
}

/// Opened only with a state that is as new as any acknowledged write, and moving only forward from
/// there: no agent is ever told an older set than before, whatever member it turns to.
async fn desired_stream(
    State(state): State<AgentsState>,
    Query(call): Query<OfNode>,
) -> Result<Response, Refused> {
    let (id, takes) = (NodeId::from(call.node_id), call.tunnels > 0);
    let inner = &state.inner;
    if !inner
        .app
        .read(Consistency::Linearizable)
        .await?
        .nodes
        .contains_key(&id)
    {
        let why = "this node is not known; register first".to_owned();
        return Err(Refused(StatusCode::NOT_FOUND, why));
    }
    let lines = inner.streams.lines(
        inner.app.clone(),
        inner.exchange.clone(),
        (id, takes),
        inner.config.heartbeat,
    );
    let body = Body::from_stream(lines);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

async fn report(
    State(state): State<AgentsState>,
    body: Bytes,
) -> Result<Json<ReportResponse>, Refused> {
    let call: Report = parse(&body)?;
    let inner = &state.inner;
    if !inner.exchange.fresh() {
        let why = "this member does not reach a majority of the members".to_owned();
        return Err(Refused(StatusCode::SERVICE_UNAVAILABLE, why));
    }
    let id = NodeId::from(call.node_id.clone());
    let known = inner
        .app
        .read(Consistency::Stale)
        .await?
        .nodes
        .contains_key(&id);
    if known {
        inner.liveness.hear(&translate::heard(&call));
        inner.intake.take(call);
    }
    let (controllers, registries) = addresses(&inner.app.group().status());
    Ok(Json(ReportResponse {
        known,
        controllers,
        registries,
    }))
}

/// Another member tells what it heard and asks what we heard.
async fn exchanged(
    State(state): State<AgentsState>,
    body: Bytes,
) -> Result<Json<exchange::Answer>, Refused> {
    let call: exchange::Ask = parse(&body)?;
    let inner = &state.inner;
    let answer = exchange::answer(&inner.app, &inner.liveness, &inner.exchange, &call);
    Ok(Json(answer.await?))
}

/// API and registry addresses of all members.
fn addresses(status: &Status) -> Addresses {
    let all = |url: fn(&mainstay_raft::Member) -> &String| {
        let urls = status.members.values().map(|m| url(&m.member).clone());
        urls.filter(|u| !u.is_empty()).collect()
    };
    (all(|m| &m.api_url), all(|m| &m.registry_url))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
