//! The REST dialect on the API port: thin handlers (read the call, ask [`App`], convert). Knows
//! the wire contract; refuses to know consensus, storage or how a decision is made.
//!
//! * [`router`]: all routes of this module; merge others onto it.
//! * [`envelope`]: how requests are read and answers wrapped; [`error`]: the only status table.
//! * [`instances`], [`images`], [`nodes`], [`templates`]: JSON from the state; [`start`]: the start request.
//! * `access`: what WebSockets and tunnels to VMs say to each other.
//! * [`listing`]: the list of all instances, kept as it is sent.
//! * [`routes`]: the handlers; [`openapi`] and `requests`: what they say of themselves; [`front`]: what
//!   happens before routing.
//!
//! The server that carries the router keeps idle connections for at least 120 s.

mod access;
pub mod distributions;
pub mod envelope;
pub mod error;
pub mod front;
pub mod images;
pub mod instances;
mod intake;
pub mod listing;
pub mod members;
pub mod nodes;
pub mod openapi;
pub mod requests;
pub mod routes;
pub mod start;
pub mod templates;
pub mod time;

use crate::agents::Tunnels;
use crate::agents::liveness::Liveness;
use crate::app::{App, Consistency};
use crate::peer::PeerClient;
use crate::registry::Figures;
use crate::space::Room;
pub use access::{ExecAnswer, ExecRequest};
use axum::Router;
use envelope::Call;
use error::ApiError;
use http::HeaderValue;
use listing::Listing;
use mainstay_model::State;
use parking_lot::{Mutex, RwLockReadGuard};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Snapshots being sent at once.
const SAVES_MAX: usize = 2;

/// A figure that is looked up when it is asked for.
pub type Getter<T> = Arc<dyn Fn() -> T + Send + Sync>;

/// What the handlers tell about this member beyond the replicated state.
#[derive(Clone)]
pub struct About {
    /// Member name, for as long as the membership does not say.
    pub name: String,
    /// The cluster this member is part of.
    pub cluster_id: String,
    /// `x.y.z-hash`.
    pub version: String,
    /// Registry address that others are told.
    pub registry_address: String,
    /// Answer cross-origin requests of browsers.
    pub allow_cors: bool,
    /// Bytes of the durable state on disk.
    pub db_size: Getter<u64>,
    /// Room on disk; `None` when the registry's disk cannot be asked.
    pub disk: Getter<Option<Room>>,
    /// What is wrong with that room, if anything.
    pub complaint: Getter<Option<String>>,
    /// Figures of the registry.
    pub registry: Getter<Figures>,
}

/// Shared by all handlers; cheap to clone.
#[derive(Clone)]
pub struct ApiState {
    /// The way into the replicated state.
    pub app: App,
    /// Soft facts about nodes.
    pub liveness: Liveness,
    /// This member.
    pub about: Arc<About>,
    /// Bounds snapshots that are being sent: each holds a file and a thread.
    saves: Arc<Semaphore>,
    /// The way to the members' ports, where there is one.
    peers: Option<PeerClient>,
    /// The way to what is in VMs, likewise.
    tunnels: Option<Tunnels>,
    /// Start of the newest read barrier that succeeded: the local state is at least that new.
    fresh: Arc<Mutex<Option<Instant>>>,
    /// The list of all instances.
    listing: Arc<Listing>,
}

/// What JSON is built from.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Replicated.
    pub state: &'a State,
    /// Soft.
    pub soft: &'a Liveness,
    /// Registry address that others are told.
    pub registry_address: &'a str,
}

impl ApiState {
    /// Bring the parts together.
    pub fn new(app: App, liveness: Liveness, about: About) -> Self {
        Self {
            app,
            liveness,
            about: Arc::new(about),
            saves: Arc::new(Semaphore::new(SAVES_MAX)),
            peers: None,
            tunnels: None,
            fresh: Arc::default(),
            listing: Arc::default(),
        }
    }

    /// The same, able to tell other members something.
    #[must_use]
    pub fn with_peers(self, peers: PeerClient) -> Self {
        Self {
            peers: Some(peers),
            ..self
        }
    }

    /// The same, able to reach what is in VMs.
    #[must_use]
    pub fn with_tunnels(self, tunnels: Tunnels) -> Self {
        Self {
            tunnels: Some(tunnels),
            ..self
        }
    }

    /// Read the state as fresh as the call wants it. Drop the guard before the next await.
    async fn read(&self, call: &Call) -> Result<Reading<'_>, ApiError> {
        let consistency = call.consistency()?;
        let asked = Instant::now();
        let state = self.app.read(consistency).await?;
        if consistency == Consistency::Linearizable {
            self.refreshed(asked);
        }
        let stale = (consistency == Consistency::Stale).then(|| Stale {
            // Under the guard nothing is applied, so this index never claims more than `state` has.
            applied: self.app.group().status().applied,
            age: self.fresh.lock().map(|at| at.elapsed()),
        });
        Ok(Reading {
            api: self,
            state,
            stale,
        })
    }

    /// Wait until the local state has everything acknowledged before this call.
    async fn barrier(&self, deadline: Duration) -> Result<(), ApiError> {
        let asked = Instant::now();
        self.app.group().read_barrier(deadline).await?;
        self.refreshed(asked);
        Ok(())
    }

    fn refreshed(&self, at: Instant) {
        let mut fresh = self.fresh.lock();
        *fresh = (*fresh).max(Some(at));
    }
}

/// How fresh a stale read is at least.
struct Stale {
    applied: u64,
    age: Option<Duration>,
}

/// The state under its guard, and what to say about its freshness.
struct Reading<'a> {
    api: &'a ApiState,
    state: RwLockReadGuard<'a, State>,
    stale: Option<Stale>,
}

impl Reading<'_> {
    fn view(&self) -> View<'_> {
        View {
            state: &self.state,
            soft: &self.api.liveness,
            registry_address: &self.api.about.registry_address,
        }
    }

    /// Add the headers of a stale read.
    fn finish(self, response: axum::response::Response) -> axum::response::Response {
        Stale::tell(self.stale, response)
    }
}

impl Stale {
    fn tell(
        told: Option<Self>,
        mut response: axum::response::Response,
    ) -> axum::response::Response {
        if let Some(stale) = told {
            let headers = response.headers_mut();
            headers.insert("x-mainstay-applied-index", HeaderValue::from(stale.applied));
            if let Some(age) = stale.age {
                let ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
                headers.insert("x-mainstay-age-ms-max", HeaderValue::from(ms));
            }
        }
        response
    }
}

/// Every route of the REST dialect. Slashes are collapsed before routing; answers are compressed
/// when the client takes gzip.
pub fn router(state: ApiState) -> Router {
    let allow_cors = state.about.allow_cors;
    front::wrap(routes::all().with_state(state), allow_cors)
}

#[cfg(test)]
mod listing_tests;
#[cfg(test)]
mod view_tests;
