//! Streams of desired sets. One task per member looks, after each applied change, at the nodes that
//! have a stream here, and wakes those whose set changed; ten thousand idle streams cost a look each.
//! Every line also says where the members are, and one is sent when that changes: an agent that was given
//! a single address knows the others as soon as there are any, whatever becomes of that one.

use super::addresses;
use super::desired::desired_set;
use super::exchange::Exchange;
use crate::app::{App, Consistency};
use axum::body::Bytes;
use futures::Stream;
use futures::StreamExt as _;
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

/// API and registry addresses of all members.
pub(super) type Addresses = (Vec<String>, Vec<String>);

/// Who waits for which node's set, and what all wait for.
#[derive(Clone)]
pub(super) struct Streams {
    desks: Desks,
    members: watch::Sender<Arc<Addresses>>,
}

/// For ever: wake the streams of nodes whose set changed, and all when the members did.
pub(super) async fn watch(app: App, streams: Streams) {
    let mut status = app.group().watch();
    while status.changed().await.is_ok() {
        let began = Instant::now();
        let members = addresses(&status.borrow_and_update());
        streams.members.send_if_modified(|told| {
            let new = **told != members;
            if new {
                *told = Arc::new(members);
            }
            new
        });
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
    members: watch::Receiver<Arc<Addresses>>,
    beat: Duration,
    fresh: Instant,
    last: Option<(u64, Arc<Addresses>, Bytes)>,
}

impl Streams {
    pub(super) fn new(members: Addresses) -> Self {
        Self {
            desks: Desks::default(),
            members: watch::Sender::new(Arc::new(members)),
        }
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
            members: self.members.subscribe(),
            beat,
            fresh: Instant::now(),
            last: None,
        };
        futures::stream::unfold(line, |mut line| async move {
            let bytes = line.next().await?;
            Some((Ok(bytes), line))
        })
        .fuse()
    }
}

impl Line {
    async fn next(&mut self) -> Option<Bytes> {
        if self.last.is_some() {
            let news = async {
                tokio::select! {
                    set = self.generation.changed() => set,
                    members = self.members.changed() => members,
                }
            };
            // Ended with the member, or time for a sign of life, or news.
            if let Ok(Err(_)) = timeout(self.beat, news).await {
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
        let members = self.members.borrow_and_update().clone();
        if let Some((generation, told, bytes)) = &self.last
            && *generation == now
            && *told == members
        {
            return Some(bytes.clone());
        }
        let mut set = desired_set(&state, &self.id)?;
        drop(state);
        set.controllers.clone_from(&members.0);
        set.registries.clone_from(&members.1);
        let mut line = serde_json::to_vec(&set).ok()?;
        line.push(b'\n');
        let line = Bytes::from(line);
        self.last = Some((now, members, line.clone()));
        Some(line)
    }
}
