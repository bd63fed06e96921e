//! How members tell each other what their agents said. Every follower hands the leader what it heard
//! since the last time and takes back what the leader heard from all others. Nothing here is durable
//! and nothing is lost by losing it: the next heartbeat says it again.

use super::AgentsConfig;
use super::liveness::{Gossip, Liveness};
use crate::app::App;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

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
    /// `false`: not the leader, nothing was taken.
    pub leader: bool,
    /// What the leader heard.
    pub told: Gossip,
}

/// When the leader was reached last.
#[derive(Clone, Default)]
pub struct Exchange {
    reached: Arc<Mutex<Option<Instant>>>,
}

impl Exchange {
    /// May this member answer for the cluster? As leader, or having reached it within `grace`.
    pub(super) fn fresh(&self, app: &App, grace: Duration) -> bool {
        let reached = *self.reached.lock();
        app.group().status().is_leader() || reached.is_some_and(|at| at.elapsed() <= grace)
    }
}

/// Answer another member.
pub(super) fn answer(app: &App, liveness: &Liveness, ask: &Ask) -> Answer {
    if !app.group().status().is_leader() {
        return Answer::default();
    }
    for heard in &ask.told.heard {
        liveness.learn(heard);
    }
    Answer {
        leader: true,
        told: liveness.since(ask.epoch, ask.cursor),
    }
}

/// How far two sequences have been told.
#[derive(Default)]
struct Places {
    leader: Option<u64>,
    ours: (u64, u64),
    theirs: (u64, u64),
}

/// For ever: while this member is a follower, exchange with the leader.
pub(super) async fn run(app: App, liveness: Liveness, exchange: Exchange, config: AgentsConfig) {
    let client = reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(config.exchange_grace)
        .timeout(config.exchange_grace)
        .build();
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(%error, "no HTTP client: nodes' figures stay on the member that heard them");
            return;
        }
    };
    let mut places = Places::default();
    loop {
        let status = app.group().status();
        let leader = status
            .leader
            .filter(|leader| *leader != status.id)
            .and_then(|leader| Some((leader, status.members.get(&leader)?.member.api_url.clone())));
        if let Some((leader, url)) = leader {
            if places.leader != Some(leader) {
                // A new leader has heard nothing of ours yet.
                places = Places {
                    leader: Some(leader),
                    ..Places::default()
                };
            }
            match once(&client, &url, &liveness, &mut places).await {
                Ok(true) => *exchange.reached.lock() = Some(Instant::now()),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, leader, "exchange of heartbeats failed"),
            }
        }
        // Until the leader was reached for the first time, no report is accepted here: ask soon again.
        let known = exchange.reached.lock().is_some();
        let pause = if known {
            config.exchange_every
        } else {
            config.exchange_every / 10
        };
        tokio::time::sleep(pause).await;
    }
}

async fn once(
    client: &reqwest::Client,
    url: &str,
    liveness: &Liveness,
    places: &mut Places,
) -> Result<bool, reqwest::Error> {
    let told = liveness.own_since(places.ours.0, places.ours.1);
    let ours = (told.epoch, told.cursor);
    let ask = Ask {
        told,
        epoch: places.theirs.0,
        cursor: places.theirs.1,
    };
    let call = client.post(format!("{url}/agent/v1/exchange")).json(&ask);
    let answer: Answer = call.send().await?.error_for_status()?.json().await?;
    if !answer.leader {
        return Ok(false);
    }
    places.ours = ours;
    places.theirs = (answer.told.epoch, answer.told.cursor);
    for heard in &answer.told.heard {
        liveness.learn(heard);
    }
    Ok(true)
}
