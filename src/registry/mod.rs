//! The template registry: push, replication, pull, and the registry's own REST dialect.
//! Refuses to know how members are authenticated: requests to peers come ready made.
//!
//! * `catalog`: what is needed of the replicated state, so that tests can do without consensus.
//! * `transfer`: chunks in and out.
//! * `publish`: from chunks to a tag.
//! * `ahead`: what a client sends goes on to other members at once.
//! * `walk`: what a manifest reaches, and what of it is lacking here.
//! * `fetch`: chunks from other members; `speeds`: which of them are slow.
//! * `swarm`: nodes that pull the same at once get it from each other.
//! * `admit`: would a push fit? asked before its bytes are sent; `reserve`: what was promised then.
//! * `usage`: what tags weigh; `quota`: how much they may.
//! * `pulls`: when tags were last pulled.
//! * `pace`: limits of bytes a second.
//! * `replicate`: makes this member hold every tag; `replicas` shows how far that is.
//! * `roots`: what must stay; `collect`: gives back the room of everything else.
//! * `scrub`: finds what the disk has spoilt.
//! * `dialect`: the registry's REST dialect for third parties; `central_log`: lines that they send.
//! * `answer`: envelope, parameters, refusals.
//! * `oci`: the OCI distribution API over the same store and commits.
//!
//! ```text
//! push -> chunks durable here -> PublishTag -> peers see it, fetch what they lack, verify, fsync -> ReportHeld -> visible
//! ```

mod admit;
mod ahead;
mod answer;
mod catalog;
mod central_log;
mod collect;
mod dialect;
mod fetch;
mod oci;
mod pace;
mod publish;
mod pulls;
mod quota;
mod replicas;
mod replicate;
mod reserve;
mod roots;
mod scrub;
mod speeds;
mod swarm;
#[cfg(test)]
mod tests;
mod transfer;
mod usage;
mod walk;

pub use ahead::AheadFigures;
pub use catalog::Catalog;
pub use central_log::CentralLog;
pub use collect::CollectConfig;
pub use scrub::ScrubConfig;
pub use swarm::SentFigures;

pub(crate) use publish::check_name;

use axum::Router;
use axum::routing::{delete, get, post, put};
use mainstay_agent::transfer::api::{self, CollectionStatus, ScrubStatus, Usage};
use mainstay_model::MemberId;
use mainstay_storage::blobs::BlobNames;
use mainstay_storage::chunks::{ChunkStats, ChunkStore};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tower::util::MapRequest;

/// Bodies of chunks that are read at once: each holds up to 16 MiB, a usual one half of it.
const READERS_MAX: usize = 32;
/// Batches that are verified and written at once; a slow body takes none of these places.
const WRITERS_MAX: usize = 12;
/// Manifests that are walked at once.
const WALKS_MAX: usize = 2;
/// Answers with chunks that are sent to nodes at once; more wait for their turn.
const NODES_SERVED_MAX: usize = 32;
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

/// Bytes that may still be stored before [`Room`] says no, if that can be told.
pub type Left = dyn Fn() -> Option<u64> + Send + Sync;

/// The disk, as far as the registry asks it.
pub struct Disk {
    /// Asked before anything is stored: the log on the same disk must never find it full.
    pub may_store: Box<Room>,
    /// Asked before a push begins.
    pub left: Box<Left>,
    /// Where lines that other programs send are kept.
    pub central_log: CentralLog,
}

/// What a handler is given.
type Service = axum::extract::State<Arc<RegistryService>>;

/// How a registry looks after what it holds.
#[derive(Clone, Copy, Debug)]
pub struct Upkeep {
    /// Its collector.
    pub collect: CollectConfig,
    /// Its scrubber.
    pub scrub: ScrubConfig,
    /// Bytes a second at which it copies tags from other members; 0: no limit.
    pub replicate_rate: u64,
    /// Is what clients send sent on at once? Not if copies have a limit: they shall keep off the line.
    pub send_ahead: bool,
}

impl Default for Upkeep {
    fn default() -> Self {
        Self {
            collect: CollectConfig {
                grace: Duration::from_secs(24 * 3600),
                every: Some(Duration::from_secs(3600)),
                rate: 64 << 20,
            },
            scrub: ScrubConfig {
                rate: 16 << 20,
                every: Duration::from_secs(7 * 24 * 3600),
            },
            replicate_rate: 0,
            send_ahead: true,
        }
    }
}

/// Figures of one member's registry.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// What is stored.
    pub chunks: ChunkStats,
    /// What the collector did.
    pub collections: CollectionStatus,
    /// What the scrubber found.
    pub scrubs: ScrubStatus,
    /// Tags that this member held and that are not whole any more.
    pub broken_tags: u64,
    /// What replication did and has to do.
    pub replication: ReplicationFigures,
    /// What was sent to other members before it was committed.
    pub ahead: AheadFigures,
    /// What clients and nodes got.
    pub sent: SentFigures,
}

/// What one member's replication did since its start, and has to do now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicationFigures {
    /// Tags and artifacts that it does not hold yet.
    pub lacking: u64,
    /// Chunks fetched from other members, and their bytes as sent.
    pub fetched_chunks: u64,
    /// See above.
    pub fetched_bytes: u64,
    /// Looks at what changed, or at all tags.
    pub looks: u64,
    /// Looks at all tags; else only those that changed are looked at.
    pub whole_looks: u64,
    /// Tags and artifacts looked at.
    pub looked_at: u64,
}

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
    /// `None`: this member's chunks are not sent ahead.
    ahead: Option<ahead::Ahead>,
    /// MiB of chunks on their way into copies.
    copied: Semaphore,
    nodes_served: Arc<Semaphore>,
    swarm: swarm::Swarm,
    room: Box<Room>,
    left: Box<Left>,
    central_log: Arc<CentralLog>,
    /// Room that pushes under way were told of.
    reserved: reserve::Reserved,
    under_way: reserve::UnderWay,
    /// How fast tags are copied.
    pace: pace::Pace,
    counts: replicate::Counts,
    pulls: pulls::Pulls,
    adding: tokio::sync::Mutex<quota::Turn>,
    /// What everything weighed, and when.
    weights: Mutex<Option<(u64, Arc<Usage>)>>,
    speeds: speeds::Speeds,
    /// Members that did not say in time what they hold, and until when they are not asked.
    shy: Mutex<BTreeMap<MemberId, tokio::time::Instant>>,
    progress: replicas::ProgressMap,
    /// A stored chunk turned out damaged: what we say we hold must be checked again.
    damage: Notify,
    /// Tags that this member held and that are not whole any more, and why.
    broken: Mutex<BTreeMap<replicas::Key, String>>,
    collect: CollectConfig,
    collector: collect::Collector,
    scrub: ScrubConfig,
    scrubber: scrub::Scrubber,
    leases: roots::Leases,
}

impl RegistryService {
    /// The registry of `member`. `version` is shown by `/registry/status`.
    pub fn new(
        catalog: Arc<dyn Catalog>,
        stores: (ChunkStore, BlobNames),
        member: MemberId,
        peers: Arc<dyn PeerHttp>,
        version: String,
        disk: Disk,
        upkeep: Upkeep,
    ) -> Arc<Self> {
        let (chunks, names) = stores;
        let ahead = upkeep.send_ahead && upkeep.replicate_rate == 0 && !chunks.shared();
        let ahead = ahead.then(|| ahead::Ahead::new(Arc::clone(&peers), member));
        Arc::new(Self {
            ahead,
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
            room: disk.may_store,
            left: disk.left,
            central_log: Arc::new(disk.central_log),
            reserved: reserve::Reserved::default(),
            under_way: reserve::UnderWay::default(),
            pace: pace::Pace::new(upkeep.replicate_rate),
            counts: replicate::Counts::default(),
            pulls: pulls::Pulls::default(),
            adding: tokio::sync::Mutex::default(),
            weights: Mutex::new(None),
            speeds: speeds::Speeds::default(),
            shy: Mutex::default(),
            read_through: Semaphore::new(READ_THROUGH_MAX),
            copied: Semaphore::new(replicate::COPIED_MIB_MAX),
            nodes_served: Arc::new(Semaphore::new(NODES_SERVED_MAX)),
            swarm: swarm::Swarm::default(),
            progress: replicas::ProgressMap::default(),
            damage: Notify::new(),
            broken: Mutex::default(),
            collect: upkeep.collect,
            collector: collect::Collector::default(),
            scrub: upkeep.scrub,
            scrubber: scrub::Scrubber::default(),
            leases: roots::Leases::default(),
        })
    }

    /// Make this member hold every tag. Runs until it is dropped; spawn it once.
    pub async fn replicate(self: Arc<Self>) {
        replicate::run(self).await;
    }

    /// Give room back and verify what is stored. Runs until it is dropped; spawn it once.
    pub async fn look_after(self: Arc<Self>) {
        tokio::join!(
            collect::run(Arc::clone(&self)),
            pulls::run(Arc::clone(&self)),
            scrub::run(self)
        );
    }

    /// What it holds, and how that is looked after.
    pub fn figures(&self) -> Figures {
        Figures {
            chunks: self.chunks.stats(),
            collections: self.collector.status(),
            scrubs: self.scrubber.status(),
            broken_tags: self.broken.lock().len() as u64,
            replication: self.counts.figures(),
            ahead: self
                .ahead
                .as_ref()
                .map(ahead::Ahead::figures)
                .unwrap_or_default(),
            sent: self.swarm.figures(),
        }
    }

    fn scrubs(&self) -> ScrubStatus {
        let broken = self.broken.lock();
        let broken = broken.iter().map(|(key, why)| format!("{key}: {why}"));
        let names = self.names.aside().into_iter();
        let names = names.map(|(file, why)| format!("name of an upload blobs/{file}: {why}"));
        ScrubStatus {
            damaged_now: self.chunks.stats().damaged,
            broken: broken.chain(names).collect(),
            ..self.scrubber.status()
        }
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
        .route(api::TAG, get(publish::look_up).delete(publish::delete_tag))
        .route(api::ADMIT, post(admit::admit))
        .route(api::USAGE, get(usage::show))
        .route(api::QUOTA, put(usage::set_quota))
        .route(api::REPLICAS, get(replicas::list))
        .route(api::GC, get(collect::status).post(collect::start))
        .route(api::SCRUB, get(scrub::status).post(scrub::start))
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
        .route("/registry/vm/info", get(dialect::info))
        .route("/registry/vm/arch", put(dialect::set_arch))
        .route("/registry/revert", delete(dialect::revert))
        .route("/registry/disk", get(dialect::disk))
        // Whoever asks for this only wants to know whether someone listens.
        .route("/", get(dialect::status))
        .route("/log", get(central_log::show).post(central_log::append))
        .with_state(Arc::clone(&service));
    let inner = dialect
        .merge(transfer_router(Arc::clone(&service)))
        .merge(oci::router(service))
        .fallback(answer::not_found);
    Router::new().fallback_service(MapRequest::new(inner, answer::collapse_slashes))
}
