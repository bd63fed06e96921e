//! Life with one home: register, then read its stream and report to it until one of the two fails.

use super::Sync;
use super::homes::{Homes, jitter};
use super::lines::Lines;
use crate::wire::{DesiredSet, RegisterResponse, Report, ReportResponse};
use futures::StreamExt;
use reqwest::StatusCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// A home that sends nothing for this many heartbeats is dead.
const SILENT_BEATS: u32 = 3;
/// Whatever a controller says, the heart beats at least and at most this fast.
const BEAT_BOUNDS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(300));

/// Why a session ended.
pub(super) enum End {
    /// In a sentence.
    Moved(String),
    /// It belongs to another cluster.
    Stranger(anyhow::Error),
}

impl<T: Into<String>> From<T> for End {
    fn from(why: T) -> Self {
        Self::Moved(why.into())
    }
}

/// Where the members are, as a home tells it; what is empty was not told.
#[derive(Clone, Default, PartialEq)]
struct Members {
    controllers: Vec<String>,
    registries: Vec<String>,
}

pub(super) struct Session<'a> {
    sync: &'a Sync,
    url: String,
}

impl<'a> Session<'a> {
    pub(super) fn new(sync: &'a Sync, url: &str) -> Self {
        let url = url.to_owned();
        Self { sync, url }
    }

    pub(super) async fn run(&self, homes: &mut Homes) -> End {
        let beat = match self.register(homes).await {
            Ok(beat) => beat,
            Err(end) => return end,
        };
        let (streamed, mut by_stream) = watch::channel(Members::default());
        let (answered, mut by_answers) = watch::channel(Members::default());
        let stream = self.stream(beat, &streamed);
        let reports = self.reports(beat, &answered);
        tokio::pin!(stream, reports);
        loop {
            let now = tokio::select! {
                end = &mut stream => return end,
                end = &mut reports => return end,
                // At once, and it may be the last that this home says; only a report that it takes
                // proves that it can serve.
                _ = by_stream.changed() => by_stream.borrow_and_update().clone(),
                _ = by_answers.changed() => {
                    homes.good();
                    by_answers.borrow_and_update().clone()
                }
            };
            self.learn(homes, &now);
        }
    }

    async fn register(&self, homes: &mut Homes) -> Result<Duration, End> {
        let answer: RegisterResponse = self
            .post("/agent/v1/register", &self.sync.introduction)
            .await?;
        let claimed = self.sync.identity.lock().claim_cluster(&answer.cluster_id);
        claimed.map_err(End::Stranger)?;
        if !answer.share_key.is_empty() {
            self.sync.key.set(&answer.share_key);
        }
        let members = Members {
            controllers: answer.controllers,
            registries: answer.registries,
        };
        self.learn(homes, &members);
        tracing::info!(controller = %self.url, node = %answer.node_id, "registered");
        let beat = Duration::from_millis(answer.heartbeat_ms);
        Ok(beat.clamp(BEAT_BOUNDS.0, BEAT_BOUNDS.1))
    }

    fn learn(&self, homes: &mut Homes, members: &Members) {
        let Members {
            controllers,
            registries,
        } = members;
        if !controllers.is_empty() {
            homes.update(controllers);
        }
        self.sync.sources.set(registries);
        let kept = self.sync.identity.lock().remember(controllers, registries);
        if let Err(error) = kept {
            tracing::warn!(%error, "cannot remember the controllers' addresses");
        }
    }

    /// Desired sets, one a line, until the stream ends or falls silent.
    async fn stream(&self, beat: Duration, news: &watch::Sender<Members>) -> End {
        match self.read_stream(beat, news).await {
            Ok(never) => never,
            Err(end) => end,
        }
    }

    async fn read_stream(&self, beat: Duration, news: &watch::Sender<Members>) -> Result<End, End> {
        let silence = beat * SILENT_BEATS;
        // The id is a UUID of our own making: nothing in it needs escaping.
        let node = &self.sync.introduction.node_id;
        let url = format!("{}/agent/v1/desired?node_id={node}&tunnels=1", self.url);
        let call = self.sync.client.get(url);
        let answer = timeout(self.sync.config.answer, call.send())
            .await
            .map_err(|_| "the stream was not opened in time")?
            .map_err(|e| format!("cannot open the stream: {e}"))?;
        if answer.status() != StatusCode::OK {
            return Err(refusal("the stream", answer).await.into());
        }
        let mut body = answer.bytes_stream();
        let mut lines = Lines::default();
        loop {
            let piece = timeout(silence, body.next())
                .await
                .map_err(|_| format!("nothing was heard for {} ms", silence.as_millis()))?
                .ok_or("the stream ended")?
                .map_err(|e| format!("the stream broke: {e}"))?;
            lines.push(&piece)?;
            while let Some(line) = lines.next() {
                let mut set: DesiredSet = serde_json::from_slice(&line)
                    .map_err(|e| format!("the stream makes no sense: {e}"))?;
                if let Some(order) = set.tunnel {
                    self.sync.tunnels.answer(&self.url, order);
                    continue;
                }
                let members = Members {
                    controllers: std::mem::take(&mut set.controllers),
                    registries: std::mem::take(&mut set.registries),
                };
                news.send_if_modified(|told| {
                    let new = *told != members;
                    *told = members;
                    new
                });
                if !self.sync.executor.accept(set) {
                    return Err("it sent an older desired set than we have".into());
                }
            }
        }
    }

    /// A report every heartbeat, and soon after each change.
    async fn reports(&self, beat: Duration, news: &watch::Sender<Members>) -> End {
        let mut changed = self.sync.executor.changed();
        let mut images = self.sync.executor.cache().changed();
        loop {
            changed.mark_unchanged();
            images.mark_unchanged();
            let answer: ReportResponse = match self.post("/agent/v1/report", &self.report()).await {
                Ok(answer) => answer,
                Err(why) => return why.into(),
            };
            if !answer.known {
                return "it does not know this node: registering again".into();
            }
            news.send_replace(Members {
                controllers: answer.controllers,
                registries: answer.registries,
            });
            // Spread: no two nodes stay in step.
            let next = Instant::now() + beat * 3 / 4 + jitter(beat / 4);
            tokio::select! {
                () = sleep_until(next) => continue,
                _ = changed.changed() => {}
                _ = images.changed() => {}
            }
            sleep(self.sync.config.coalesce).await;
        }
    }

    fn report(&self) -> Report {
        let executor = &self.sync.executor;
        Report {
            node_id: self.sync.introduction.node_id.clone(),
            generation: executor.generation(),
            observed: executor.observe(),
            images: executor.cache().images(),
            pulls: Some(executor.pulls()),
            stats: (self.sync.stats)(),
        }
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, String> {
        let call = async {
            let url = format!("{}{path}", self.url);
            let answer = self.sync.client.post(url).json(body).send().await;
            let answer = answer.map_err(|e| format!("{path}: {}", chain(&e)))?;
            if answer.status() != StatusCode::OK {
                return Err(refusal(path, answer).await);
            }
            let answer = answer.json().await;
            answer.map_err(|e| format!("{path}: the answer makes no sense: {}", chain(&e)))
        };
        timeout(self.sync.config.answer, call)
            .await
            .map_err(|_| format!("{path}: no answer in time"))?
    }
}

async fn refusal(what: &str, answer: reqwest::Response) -> String {
    let status = answer.status();
    let mut text = answer.text().await.unwrap_or_default();
    text.truncate(text.floor_char_boundary(200));
    format!("{what}: answered {status} {text}")
}

/// An error with its causes: a refused connection stands in the last one.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
