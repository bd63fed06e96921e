//! Streams of desired sets. One task per member looks, after each applied change, at the nodes that
//! have a stream here, and wakes those whose set changed; ten thousand idle streams cost a look each.
//! Every line also says where the members are, and one is sent when that changes: an agent that was given
//! a single address knows the others as soon as there are any, whatever becomes of that one.
//! Orders travel in between, to agents that take them.

use super::addresses;
use super::desired::desired_set;
use super::exchange::Exchange;
use crate::app::{App, Consistency};
use axum::body::Bytes;
use futures::Stream;
use futures::StreamExt as _;
use mainstay_agent::wire::{DesiredSet, TunnelOrder};
use mainstay_model::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

/// The look at all streams takes at most this part of a core.
const LOOK_SHARE: u32 = 5;
/// A stream on a member that is cut off from the quorum says nothing new: after so many heartbeats it
/// ends, so that its agent looks elsewhere.
const STALE_BEATS: u32 = 3;

/// Orders on their way into one stream; more means that nobody reads it.
const ORDERS_MAX: usize = 16;

type Desks = Arc<Mutex<BTreeMap<NodeId, Desk>>>;

/// The streams of one node: one, but for a while after its agent came back.
#[derive(Default)]
struct Desk {
    generation: watch::Sender<u64>,
    /// Of those that take orders, the oldest first.
    takers: Vec<mpsc::Sender<TunnelOrder>>,
}

/// An agent's stream, as one looks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// It takes orders.
    pub(super) takes: bool,
}

/// Why an order did not go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undelivered {
    /// The node's agent has no stream here.
    Elsewhere,
    /// It has, and knows no orders.
    Old,
    /// It reads none.
    Busy,
}

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
                let told = &desk.generation;
                told.send_if_modified(|told| std::mem::replace(told, now) != now);
                told.receiver_count() > 0
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
    orders: mpsc::Receiver<TunnelOrder>,
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

    /// The node's stream here, if its agent has one.
    pub(super) fn seat(&self, id: &NodeId) -> Option<Seat> {
        let desks = self.desks.lock();
        let desk = desks.get(id)?;
        let open = desk.generation.receiver_count() > 0;
        let takes = desk.takers.iter().any(|taker| !taker.is_closed());
        open.then_some(Seat { takes })
    }

    /// Send an order into the node's newest stream. That it is carried out is not said.
    pub(super) fn order(&self, id: &NodeId, order: TunnelOrder) -> Result<(), Undelivered> {
        let mut desks = self.desks.lock();
        let desk = desks.get_mut(id).ok_or(Undelivered::Elsewhere)?;
        desk.takers.retain(|taker| !taker.is_closed());
        match desk.takers.last() {
            Some(taker) => taker.try_send(order).map_err(|_| Undelivered::Busy),
            None if desk.generation.receiver_count() > 0 => Err(Undelivered::Old),
            None => Err(Undelivered::Elsewhere),
        }
    }

    /// A line at once, one on each change, and the last again every `beat`; orders, if the agent `takes` them.
    pub(super) fn lines(
        &self,
        app: App,
        exchange: Exchange,
        (id, takes): (NodeId, bool),
        beat: Duration,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static + use<> {
        let (give, orders) = mpsc::channel(ORDERS_MAX);
        let generation = {
            let mut desks = self.desks.lock();
            let desk = desks.entry(id.clone()).or_default();
            desk.takers.retain(|taker| !taker.is_closed());
            if takes {
                desk.takers.push(give);
            }
            desk.generation.subscribe()
        };
        let line = Line {
            app,
            exchange,
            id,
            generation,
            orders,
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
                    set = self.generation.changed() => set.map(|()| None),
                    members = self.members.changed() => members.map(|()| None),
                    // Closed where the agent takes none.
                    Some(order) = self.orders.recv() => Ok(Some(order)),
                }
            };
            match timeout(self.beat, news).await {
                // Ended with the member.
                Ok(Err(_)) => return None,
                Ok(Ok(Some(order))) => return line(&order_of(order)),
                // News, or time for a sign of life.
                Ok(Ok(None)) | Err(_) => {}
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
        let line = line(&set)?;
        self.last = Some((now, members, line.clone()));
        Some(line)
    }
}

fn line(set: &DesiredSet) -> Option<Bytes> {
    let mut line = serde_json::to_vec(set).ok()?;
    line.push(b'\n');
    Some(line.into())
}

fn order_of(order: TunnelOrder) -> DesiredSet {
    DesiredSet {
        tunnel: Some(order),
        ..DesiredSet::default()
    }
}
