//! How members tell each other what their agents said. Every follower hands the leader what it heard
//! since the last time and takes back what the leader heard from all others. Nothing here is durable
//! and nothing is lost by losing it: the next heartbeat says it again.
//!
//! It also says whether this member may speak for the cluster. A leader without a quorum still calls
//! itself the leader, so nobody is believed for what it is: the leader asks a quorum, a follower a
//! leader that did.

use super::AgentsConfig;
use super::liveness::{Gossip, Liveness};
use crate::app::{App, AppError, Consistency};
use crate::peer::PeerClient;
use mainstay_model::NodeId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// On the peer port: members of the cluster only.
pub(super) const PATH: &str = "/peer/v1/nodes";

/// What a follower sends.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Ask {
    /// What it heard.
    pub told: Gossip,
    /// Our sequence, as far as it has it.
    pub epoch: u64,
    /// Place in it.
    pub cursor: u64,
}

/// What it gets back.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Answer {
    /// `false`: not the leader, or one without a quorum; nothing was taken.
    pub leader: bool,
    /// What the leader heard.
    pub told: Gossip,
}

/// When a quorum was known to be behind this member; cheap to clone.
#[derive(Clone)]
pub(super) struct Exchange {
    reached: Arc<Mutex<Option<Instant>>>,
    grace: Duration,
}

impl Exchange {
    /// Not yet. What was reached counts for `grace`.
    pub(super) fn new(grace: Duration) -> Self {
        Self {
            reached: Arc::default(),
            grace,
        }
    }

    /// May this member answer for the cluster?
    pub(super) fn fresh(&self) -> bool {
        let reached = *self.reached.lock();
        reached.is_some_and(|at| at.elapsed() <= self.grace)
    }
}

/// Answer another member.
pub(super) async fn answer(
    app: &App,
    liveness: &Liveness,
    exchange: &Exchange,
    ask: &Ask,
) -> Result<Answer, AppError> {
    if !app.group().status().is_leader() || !exchange.fresh() {
        return Ok(Answer::default());
    }
    learn(app, liveness, &ask.told).await?;
    Ok(Answer {
        leader: true,
        told: liveness.since(ask.epoch, ask.cursor),
    })
}

/// Takes what is told of nodes in the state; of others nothing is kept, whoever names them.
async fn learn(app: &App, liveness: &Liveness, told: &Gossip) -> Result<(), AppError> {
    let state = app.read(Consistency::Stale).await?;
    for heard in &told.heard {
        if state.nodes.contains_key(&NodeId::from(heard.node.clone())) {
            liveness.learn(heard);
        }
    }
    Ok(())
}

/// How far two sequences have been told.
#[derive(Default)]
struct Places {
    leader: Option<u64>,
    ours: (u64, u64),
    theirs: (u64, u64),
}

/// For ever: as leader ask a quorum, as follower exchange with the leader.
pub(super) async fn run(
    app: App,
    liveness: Liveness,
    exchange: Exchange,
    peers: PeerClient,
    config: AgentsConfig,
) {
    let mut places = Places::default();
    loop {
        // What is confirmed was so at some time after this one.
        let began = Instant::now();
        match once(&app, &liveness, &peers, &mut places, config.exchange_grace).await {
            Ok(true) => *exchange.reached.lock() = Some(began),
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "neither a quorum nor the leader was reached"),
        }
        // Until one was reached for the first time, no report is accepted here: ask soon again.
        let known = exchange.reached.lock().is_some();
        let pause = if known {
            config.exchange_every
        } else {
            config.exchange_every / 10
        };
        tokio::time::sleep(pause).await;
    }
}

/// Was a quorum reached, or a leader that lately reached one?
async fn once(
    app: &App,
    liveness: &Liveness,
    peers: &PeerClient,
    places: &mut Places,
    limit: Duration,
) -> anyhow::Result<bool> {
    let status = app.group().status();
    let Some(leader) = status.leader else {
        return Ok(false);
    };
    if leader == status.id {
        app.group().read_barrier(limit).await?;
        return Ok(true);
    }
    let Some(base) = status.members.get(&leader).map(|m| &m.member.peer_url) else {
        return Ok(false);
    };
    if places.leader != Some(leader) {
        // A new leader has heard nothing of ours yet.
        *places = Places {
            leader: Some(leader),
            ..Places::default()
        };
    }
    let told = liveness.own_since(places.ours.0, places.ours.1);
    let ours = (told.epoch, told.cursor);
    let ask = Ask {
        told,
        epoch: places.theirs.0,
        cursor: places.theirs.1,
    };
    let answer: Answer = peers.ask(base, PATH, &ask, limit).await?;
    if !answer.leader {
        return Ok(false);
    }
    places.ours = ours;
    places.theirs = (answer.told.epoch, answer.told.cursor);
    learn(app, liveness, &answer.told).await?;
    Ok(true)
}
