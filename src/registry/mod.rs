//! The template registry: push, replication, pull, and the registry's own REST dialect.
//! Refuses to know how members are authenticated: requests to peers come ready made.
//!
//! * `catalog`: what is needed of the replicated state, so that tests can do without consensus.
//! * `transfer`: chunks in and out.
//! * `publish`: from chunks to a tag.
//! * `walk`: what a manifest reaches, and what of it is lacking here.
//! * `fetch`: chunks from other members.
//! * `replicate`: makes this member hold every tag; `replicas` shows how far that is.
//! * `dialect`: the registry's REST dialect for third parties.
//! * `answer`: envelope, parameters, refusals.
//! * `oci`: the OCI distribution API over the same store and commits.
//!
//! ```text
//! push -> chunks durable here -> PublishTag -> peers see it, fetch, verify, fsync -> ReportHeld -> visible
//! ```

mod answer;
mod catalog;
mod dialect;
mod fetch;
mod oci;
mod publish;
mod replicas;
mod replicate;
#[cfg(test)]
mod tests;
mod transfer;
mod walk;

pub use catalog::Catalog;

use axum::Router;
use axum::routing::{delete, get, post, put};
use mainstay_agent::transfer::api;
use mainstay_model::MemberId;
use mainstay_storage::blobs::BlobNames;
use mainstay_storage::chunks::ChunkStore;
use std::sync::Arc;
use tokio::sync::{Notify, Semaphore};
use tower::util::MapRequest;

/// Bodies of chunks that are read at once: each holds up to 16 MiB, a usual one half of it.
const READERS_MAX: usize = 32;
/// Batches that are verified and written at once; a slow body takes none of these places.
const WRITERS_MAX: usize = 12;
/// Manifests that are walked at once.
const WALKS_MAX: usize = 2;
/// Fetches from other members on behalf of pulling clients at once.
const READ_THROUGH_MAX: usize = 8;

/// Requests to other members' peer ports, with whatever proves who we are.
pub trait PeerHttp: Send + Sync + 'static {
    /// A request to `path` (with a leading slash, query included) at a member's peer address;
    /// `None` if no such member is known.
    fn request(
        &self,
        method: reqwest::Method,
        member: MemberId,
        path: &str,
    ) -> Option<reqwest::RequestBuilder>;
}

/// May more chunks be stored? Asked before each batch; if not: why, and what to do.
pub type Room = dyn Fn() -> Result<(), String> + Send + Sync;

/// One member's registry.
pub struct RegistryService {
    catalog: Arc<dyn Catalog>,
    chunks: ChunkStore,
    /// Uploaded blobs that no artifact may name yet.
    names: BlobNames,
    uploads: oci::Uploads,
    member: MemberId,
    peers: Arc<dyn PeerHttp>,
    version: String,
    readers: Semaphore,
    writers: Semaphore,
    walks: Semaphore,
    sums: Semaphore,
    read_through: Semaphore,
    room: Box<Room>,
    progress: replicas::ProgressMap,
    /// A stored chunk turned out damaged: what we say we hold must be checked again.
    damage: Notify,
}

impl RegistryService {
    /// The registry of `member`. `version` is shown by `/registry/status`; `room` is asked before
    /// anything is stored: the log on the same disk must never find it full.
    pub fn new(
        catalog: Arc<dyn Catalog>,
        stores: (ChunkStore, BlobNames),
        member: MemberId,
        peers: Arc<dyn PeerHttp>,
        version: String,
        room: Box<Room>,
    ) -> Arc<Self> {
        let (chunks, names) = stores;
        Arc::new(Self {
            catalog,
            chunks,
            names,
            uploads: oci::Uploads::default(),
            member,
            peers,
            version,
            readers: Semaphore::new(READERS_MAX),
            writers: Semaphore::new(WRITERS_MAX),
            walks: Semaphore::new(WALKS_MAX),
            sums: Semaphore::new(1),
            room,
            read_through: Semaphore::new(READ_THROUGH_MAX),
            progress: replicas::ProgressMap::default(),
            damage: Notify::new(),
        })
    }

    /// Make this member hold every tag. Runs until it is dropped; spawn it once.
    pub async fn replicate(self: Arc<Self>) {
        replicate::run(self).await;
    }

    /// The chunk store.
    pub fn chunks(&self) -> &ChunkStore {
        &self.chunks
    }
}

/// Everything that members ask each other; the peer port authenticates first.
pub fn peer_router(service: Arc<RegistryService>) -> Router {
    transfer_router(Arc::clone(&service)).merge(oci::peer_router(service))
}

/// The transfer protocol, for clients and members alike.
fn transfer_router(service: Arc<RegistryService>) -> Router {
    Router::new()
        .route(api::MISSING, post(transfer::missing))
        .route(api::CHUNKS, put(transfer::receive).post(transfer::receive))
        .route(api::CHUNKS_GET, post(transfer::send))
        .route(api::PUBLISH, post(publish::publish))
        .route(api::TAG, get(publish::look_up))
        .route(api::REPLICAS, get(replicas::list))
        .with_state(service)
}

/// Everything that the registry port answers.
pub fn registry_router(service: Arc<RegistryService>) -> Router {
    let dialect = Router::new()
        .route("/livez", get(dialect::livez))
        .route("/readyz", get(dialect::readyz))
        .route("/registry/status", get(dialect::status))
        .route(
            "/registry/vm",
            get(dialect::list_v1).delete(dialect::delete),
        )
        .route(
            "/registry/v2/vm",
            get(dialect::list_v2).delete(dialect::delete),
        )
        .route("/registry/revert", delete(dialect::revert))
        .route("/registry/disk", get(dialect::disk))
        .with_state(Arc::clone(&service));
    let inner = dialect
        .merge(transfer_router(Arc::clone(&service)))
        .merge(oci::router(service))
        .fallback(answer::not_found);
    Router::new().fallback_service(MapRequest::new(inner, answer::collapse_slashes))
}
