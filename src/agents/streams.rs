//! Streams of desired sets. One task per member looks, after each applied change, at the nodes that
//! have a stream here, and wakes those whose set changed; ten thousand idle streams cost a look each.

use super::desired::desired_set;
use super::exchange::Exchange;
use crate::app::{App, Consistency};
use axum::body::Bytes;
use futures::Stream;
use mainstay_model::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// The look at all streams takes at most this part of a core.
const LOOK_SHARE: u32 = 5;
/// A stream on a member that is cut off from the quorum says nothing new: after so many heartbeats it
/// ends, so that its agent looks elsewhere.
const STALE_BEATS: u32 = 3;

type Desks = Arc<Mutex<BTreeMap<NodeId, watch::Sender<u64>>>>;

/// Who waits for which node's set.
#[derive(Clone, Default)]
pub(super) struct Streams {
    desks: Desks,
}

/// For ever: wake the streams of nodes whose set changed.
pub(super) async fn watch(app: App, streams: Streams) {
    let mut applied = app.group().watch();
    while applied.changed().await.is_ok() {
        let began = Instant::now();
        if let Ok(state) = app.read(Consistency::Stale).await {
            streams.desks.lock().retain(|id, desk| {
                let now = state.nodes.get(id).map_or(0, |n| n.desired_generation);
                desk.send_if_modified(|told| std::mem::replace(told, now) != now);
                desk.receiver_count() > 0
            });
        }
        sleep(began.elapsed() * LOOK_SHARE).await;
    }
}

struct Line {
    app: App,
    exchange: Exchange,
    id: NodeId,
    generation: watch::Receiver<u64>,
    beat: Duration,
    fresh: Instant,
    last: Option<(u64, Bytes)>,
}

impl Streams {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// A line at once, one on each change, and the last again every `beat`.
    pub(super) fn lines(
        &self,
        app: App,
        exchange: Exchange,
        id: NodeId,
        beat: Duration,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static + use<> {
        let generation = {
            let mut desks = self.desks.lock();
            let desk = desks.entry(id.clone()).or_default();
            desk.subscribe()
        };
        let line = Line {
            app,
            exchange,
            id,
            generation,
            beat,
            fresh: Instant::now(),
            last: None,
        };
        futures::stream::unfold(line, |mut line| async move {
            let bytes = line.next().await?;
            Some((Ok(bytes), line))
        })
    }
}

impl Line {
    async fn next(&mut self) -> Option<Bytes> {
        if self.last.is_some() {
            // Ended with the member, or time for a sign of life, or news.
            if let Ok(Err(_)) = timeout(self.beat, self.generation.changed()).await {
                return None;
            }
        }
        if self.exchange.fresh() {
            self.fresh = Instant::now();
        } else if self.fresh.elapsed() > self.beat * STALE_BEATS {
            return None;
        }
        let state = self.app.read(Consistency::Stale).await.ok()?;
        // A node that was removed has no set: its stream ends, and it registers again.
        let now = state.nodes.get(&self.id)?.desired_generation;
        if let Some((generation, bytes)) = &self.last
            && *generation == now
        {
            return Some(bytes.clone());
        }
        let set = desired_set(&state, &self.id)?;
        drop(state);
        let mut line = serde_json::to_vec(&set).ok()?;
        line.push(b'\n');
        let line = Bytes::from(line);
        self.last = Some((now, line.clone()));
        Some(line)
    }
}
