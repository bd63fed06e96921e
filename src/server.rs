//! One member, from an empty process to a serving one and back: opens the ports and the data directory,
//! becomes part of a cluster, brings the parts together, stops cleanly. Composition only.
//!
//! ```text
//! bind ports -> lock data directory -> founding (ports answer: not ready) -> open stores -> group
//!   -> routers behind the ports -> ... SIGTERM: hand over the lead, finish requests, checkpoint, exit 0
//!                                      (in this order: a request in flight needs the group)
//!                                  ... the group stops by itself: exit 1 with the reason
//!                                  ... this identity was taken out of the cluster: group stopped, ports
//!                                      say so until SIGTERM; at the next start from the beginning
//! ```

use crate::app::App;
use crate::backup::{export::Saver, schedule};
use crate::bucket;
use crate::config::Config;
use crate::descriptors::{self, Connections};
use crate::founding::{self, Ledger, Parted};
use crate::http::{About, ApiState};
use crate::listen::{self, Door};
use crate::machine::ModelMachine;
use crate::peer::{self, MemberHttp, Notices, PeerClient, PeerDialer, PeerPort, Standing};
use crate::registry::{self, RegistryService};
use crate::rescue::known;
use crate::space::Space;
use crate::{agents, cli, http as rest, reconcile, stamp};
use anyhow::{Context, anyhow, bail};
use axum::Router;
use axum::http::StatusCode;
use mainstay_model::{MemberId, State};
use mainstay_raft::{Group, GroupConfig};
use mainstay_storage::blobs::BlobNames;
use mainstay_storage::chunks::ChunkStore;
use mainstay_storage::datadir::{DataDir, Identity};
use mainstay_storage::engine::{Engine, SledEngine};
use mainstay_storage::log::{Log, Wal, WalOptions};
use mainstay_storage::reserve::GuardedDisk;
use mainstay_storage::snapshot::SnapshotDir;
use parking_lot::RwLock;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};

/// A clean stop takes no longer than this; what is not done by then is done by the next start.
const STOP_MAX: Duration = Duration::from_secs(15);
/// Part of it for handing over the lead.
const HAND_OVER_MAX: Duration = Duration::from_secs(3);
/// Part of it for the requests in flight: those of clients, and those of other members after them.
const CLIENTS_MAX: Duration = Duration::from_secs(6);
const PEERS_MAX: Duration = Duration::from_secs(1);
/// Part of it for those that wait for the group, whose end answers them.
const WAITING_MAX: Duration = Duration::from_millis(500);

/// A file of the log.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;

/// Run one member until it is told to stop (`Ok`) or cannot go on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    #[cfg(feature = "seeded-bugs")]
    if std::env::var("MAINSTAY_SEEDED_BUG").is_ok_and(|bug| bug == "double-apply") {
        mainstay_model::seeded::forget_commands();
    }
    let mut stop = Stop::new()?;
    let connections = descriptors::connections()?;
    let ports = Ports::bind(&config).await?;
    let port = open(config, &ports)?;
    let (doors, open) = Doors::open(ports, &port, connections);
    if let Some(sentence) = port.ledger.removed() {
        port.notices.set("removed", Some(sentence));
        doors.peer.set(removed(&port));
        stop.wanted().await;
        return Ok(());
    }
    let cluster_id = tokio::select! {
        founded = founding::found(&port) => founded?,
        () = stop.wanted() => return Ok(()),
    };
    let member = Box::pin(Member::start(&port, &cluster_id)).await?;
    let guard = tokio::spawn(guard(
        doors.clone(),
        Arc::clone(&port),
        member.routers(&port, &open),
    ));
    let staying = founding::stay(Arc::clone(&port), member.group.clone(), cluster_id.clone());
    let mut staying = tokio::spawn(staying);
    tracing::info!(cluster = %cluster_id, api = %port.member.api_url, "serving");
    let ended = tokio::select! {
        () = stop.wanted() => Ok(()),
        why = fault(&member.group) => Err(anyhow!(
            "this member stopped: {why}; the others go on without it. Repair what is named, then start it again"
        )),
        stayed = &mut staying => match stayed {
            Ok(Err(e)) => Err(e.into()),
            Err(e) => Err(e.into()),
            Ok(Ok(Parted::Stopped)) => {
                Err(anyhow!("this member stopped: {}", fault(&member.group).await))
            }
            Ok(Ok(Parted::Removed(_))) => {
                guard.abort();
                member.part(&doors, &port).await;
                stop.wanted().await;
                return Ok(());
            }
        },
    };
    staying.abort();
    guard.abort();
    if ended.is_ok() {
        tracing::info!("stopping");
        if tokio::time::timeout(STOP_MAX, member.stop(open))
            .await
            .is_err()
        {
            tracing::warn!("the stop took too long: the next start does the rest");
        }
    }
    ended
}

/// The wish to stop.
struct Stop {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    async fn wanted(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// The listening sockets.
struct Ports {
    api: TcpListener,
    registry: TcpListener,
    peer: TcpListener,
}

impl Ports {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let bind = |flag: &'static str, at: std::net::SocketAddr| async move {
            TcpListener::bind(at).await.with_context(|| {
                format!("cannot listen on {flag} {at}: free the port or choose another")
            })
        };
        Ok(Self {
            api: bind("--listen", config.listen).await?,
            registry: bind("--registry-listen", config.registry_listen).await?,
            peer: bind("--peer-listen", config.peer_listen).await?,
        })
    }
}

/// Lock the data directory and learn who we are.
fn open(config: Config, ports: &Ports) -> anyhow::Result<Arc<PeerPort>> {
    let member = config.member(
        ports.api.local_addr()?.port(),
        ports.registry.local_addr()?.port(),
    );
    let fresh = || Identity {
        member_id: stamp::member_id(),
        name: config.name.clone(),
        cluster_id: None,
        created_by: cli::VERSION.to_owned(),
        founding: None,
    };
    let (dir, identity) = DataDir::open(&config.data_dir, fresh)
        .with_context(|| format!("cannot use --data-dir {}", config.data_dir.display()))?;
    if identity.name != config.name {
        bail!(
            "the data directory {} belongs to member {}, this one is {}: give each member a --data-dir of its own, or start with --name {}",
            config.data_dir.display(),
            identity.name,
            config.name,
            identity.name
        );
    }
    let alone = config.list.len() == 1 && config.join.is_empty();
    if config.token.is_empty() && !alone && !config.peer_listen.ip().is_loopback() {
        tracing::warn!(
            "no --cluster-token: whoever reaches {} can act as a member",
            config.peer_listen
        );
    }
    tracing::info!(member = %config.name, id = %MemberId(identity.member_id), version = cli::VERSION, "starting");
    let http = PeerClient::new(&config.token, identity.member_id)?;
    Ok(Arc::new(PeerPort {
        ledger: Arc::new(Ledger::new(Arc::new(dir), identity)?),
        config,
        member,
        http,
        group: OnceLock::new(),
        learnt: Notify::new(),
        book: Arc::default(),
        app: OnceLock::new(),
        look: Notify::new(),
        standing: watch::channel(None).0,
        notices: Notices::default(),
    }))
}

/// Ports that are served until told otherwise.
struct Serving {
    stop: watch::Sender<bool>,
    ports: JoinSet<()>,
}

impl Serving {
    fn new() -> Self {
        Self {
            stop: watch::Sender::new(false),
            ports: JoinSet::new(),
        }
    }

    /// At most so many connections are open.
    fn serve(
        &mut self,
        listener: TcpListener,
        door: &Door,
        between_members: bool,
        connections: usize,
    ) {
        let stop = self.stop.subscribe();
        let door = door.clone();
        let port = listen::serve(listener, door, between_members, connections, stop);
        self.ports.spawn(port);
    }

    /// Accept nothing more and wait for what is in flight; `false` if that takes longer.
    async fn close(&mut self, within: Duration) -> bool {
        self.stop.send_replace(true);
        let ended = async { while self.ports.join_next().await.is_some() {} };
        tokio::time::timeout(within, ended).await.is_ok()
    }
}

/// The open ports, by whom they serve: members are still needed while clients are answered.
struct Open {
    clients: Serving,
    peers: Serving,
}

/// What stands behind the ports.
#[derive(Clone)]
struct Doors {
    api: Door,
    registry: Door,
    peer: Door,
}

impl Doors {
    /// Open all three: the peer port serves founding at once, the others say why they are not ready.
    fn open(ports: Ports, port: &Arc<PeerPort>, most: Connections) -> (Self, Open) {
        let doors = Self {
            api: Door::new(not_ready(port)),
            registry: Door::new(not_ready(port)),
            peer: Door::new(peer::router(port, Router::new())),
        };
        let mut open = Open {
            clients: Serving::new(),
            peers: Serving::new(),
        };
        let (clients, peers) = (&mut open.clients, &mut open.peers);
        clients.serve(ports.api, &doors.api, false, most.api);
        clients.serve(ports.registry, &doors.registry, false, most.registry);
        peers.serve(ports.peer, &doors.peer, true, most.peers);
        (doors, open)
    }

    fn close_to_clients(&self, port: &Arc<PeerPort>) {
        self.api.set(not_ready(port));
        self.registry.set(not_ready(port));
    }
}

/// What each port answers once this member is in a cluster.
struct Routers {
    api: Router,
    registry: Router,
    peer: Router,
}

/// Put the routers behind the ports, and take them away from clients while this member is not let in,
/// or the members around it are another cluster's.
async fn guard(doors: Doors, port: Arc<PeerPort>, routers: Routers) {
    doors.peer.set(routers.peer);
    let mut standing = port.standing.subscribe();
    loop {
        let now = *standing.borrow_and_update();
        match now {
            None => {}
            Some(Standing::Member) => {
                doors.api.set(routers.api.clone());
                doors.registry.set(routers.registry.clone());
            }
            Some(Standing::Waiting) => doors.close_to_clients(&port),
            Some(Standing::Outnumbered) => {
                tracing::error!(
                    "most members of the list are in another cluster: clients are not served"
                );
                doors.close_to_clients(&port);
            }
        }
        if standing.changed().await.is_err() {
            return;
        }
    }
}

/// Answers other members once this identity was taken out.
fn removed(port: &PeerPort) -> Router {
    let message = port.ledger.removed().unwrap_or_default();
    let body = serde_json::json!({ "message": message });
    Router::new().fallback(async move || (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)))
}

/// Answers while this member is not part of a cluster.
fn not_ready(port: &Arc<PeerPort>) -> Router {
    let port = Arc::clone(port);
    let answer = async move || {
        let mut why = port.notices.all().join("; ");
        if why.is_empty() {
            why.push_str("starting");
        }
        let message = format!("this member is not ready: {why}");
        let body = serde_json::json!({"status": "FAIL", "message": message});
        (
            StatusCode::SERVICE_UNAVAILABLE,
            [("retry-after", "1")],
            axum::Json(body),
        )
    };
    Router::new()
        .route(
            "/livez",
            axum::routing::get(async || (StatusCode::OK, "ok")),
        )
        .fallback(answer)
}

/// The thread that consensus works on, apart from those that serve requests: a heartbeat does not wait
/// behind a long list, and a write's way through consensus is a walk on one thread.
struct Consensus(Option<Runtime>);

impl Consensus {
    fn new() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("consensus")
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let runtime = self.0.as_ref().context("consensus has ended")?;
        Ok(runtime.spawn(work).await?)
    }
}

impl Drop for Consensus {
    fn drop(&mut self) {
        // Elsewhere than in a drop one would wait for it.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// The parts of a member that is in a cluster.
struct Member {
    group: Group,
    /// Behind the group: it lives on it.
    _consensus: Consensus,
    api: ApiState,
    nodes: agents::AgentsState,
    reconcilers: JoinHandle<()>,
    registry: Arc<RegistryService>,
    /// Ends with the member.
    tasks: JoinSet<()>,
}

/// What is opened on disk.
struct Stores {
    space: Arc<Space>,
    log: Arc<dyn Log>,
    engine: Arc<dyn Engine>,
    snapshots: SnapshotDir,
    chunks: ChunkStore,
    names: BlobNames,
}

impl Stores {
    fn open(config: &Config, id: u64, cluster: &str, runtime: Handle) -> anyhow::Result<Self> {
        let root = &config.data_dir;
        // First: on a full disk the others open on what it gives up.
        let space = Space::new(root, config.low_disk)?;
        let disk = Arc::new(GuardedDisk::new(space.reserve()));
        let log = WalOptions {
            disk: disk.clone(),
            // Dropped as a whole: with a small limit, in small pieces.
            segment_bytes: config.snapshot_log_bytes.min(SEGMENT_BYTES_MAX),
            ..WalOptions::default()
        };
        Ok(Self {
            log: Arc::new(Wal::open_with(&root.join("log"), log)?),
            engine: Arc::new(SledEngine::open_on(&root.join("state"), disk.clone())?.for_good()),
            snapshots: SnapshotDir::open_on(&root.join("snapshots"), disk)?,
            chunks: bucket::open_chunks(
                config.blob_store.as_ref(),
                &root.join("chunks"),
                (id, cluster),
                (space.pack_len(), config.upkeep.collect.grace),
                runtime,
            )?,
            names: BlobNames::open(&root.join("blobs"))?,
            space,
        })
    }
}

impl Member {
    async fn start(port: &Arc<PeerPort>, cluster_id: &str) -> anyhow::Result<Self> {
        let config = port.config.clone();
        let (id, cluster) = (port.ledger.member_id(), cluster_id.to_owned());
        let runtime = Handle::current();
        let opening = move || Stores::open(&config, id, &cluster, runtime);
        let stores = tokio::task::spawn_blocking(opening)
            .await?
            .context("cannot open the data directory")?;
        let state = Arc::new(RwLock::new(State::default()));
        let db_size = {
            let (log, engine) = (Arc::clone(&stores.log), Arc::clone(&stores.engine));
            Arc::new(move || log.state().disk_bytes + engine.disk_bytes())
        };
        let consensus = Consensus::new().context("cannot start the thread of consensus")?;
        let started = Box::pin(Group::start(
            GroupConfig::new(id, cluster_id).snapshot_every(port.config.snapshot_log_bytes),
            stores.log,
            stores.engine,
            stores.snapshots,
            Arc::new(ModelMachine::new(Arc::clone(&state))),
            Arc::new(PeerDialer::new(
                &port.config.token,
                cluster_id,
                id,
                Arc::clone(&port.book),
            )),
        ));
        let group = consensus.run(started).await??;
        // Only one start per process: nobody has set it before.
        port.group.set(group.clone()).ok();
        let app = App::new(group.clone(), state);
        port.app.set(app.clone()).ok();
        let space = stores.space;
        let liveness = agents::Liveness::new();
        let peer_client = port.http.for_cluster(cluster_id);
        let peers = MemberHttp::new(peer_client.clone(), group.clone());
        let registry = RegistryService::new(
            Arc::new(app.clone()),
            (stores.chunks, stores.names),
            MemberId(id),
            Arc::new(peers.clone()),
            cli::VERSION.to_owned(),
            registry::Disk {
                may_store: {
                    let space = Arc::clone(&space);
                    Box::new(move || space.may_store())
                },
                left: {
                    let space = Arc::clone(&space);
                    Box::new(move || space.left())
                },
                central_log: registry::CentralLog::new(port.config.data_dir.join("central-logs")),
            },
            port.config.upkeep,
        );
        let about = About {
            name: port.config.name.clone(),
            cluster_id: cluster_id.to_owned(),
            version: cli::VERSION.to_owned(),
            registry_address: port.member.registry_url.clone(),
            allow_cors: port.config.allow_cors,
            db_size,
            disk: {
                let space = Arc::clone(&space);
                Arc::new(move || space.room())
            },
            complaint: {
                let space = Arc::clone(&space);
                Arc::new(move || space.complaint())
            },
            registry: {
                let registry = Arc::clone(&registry);
                Arc::new(move || registry.figures())
            },
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&registry).replicate());
        tasks.spawn(Arc::clone(&registry).tidy());
        tasks.spawn(Arc::clone(&registry).look_after());
        tasks.spawn(space.watch(group.clone()));
        tasks.spawn(known::keep(port.config.data_dir.clone(), group.clone()));
        if let Some(schedule) = port.config.snapshots.clone() {
            let saver = Saver {
                cluster_id: cluster_id.to_owned(),
                name: port.config.name.clone(),
                release: cli::VERSION.to_owned(),
            };
            tasks.spawn(schedule::run(schedule, group.clone(), saver));
        }
        let (unreachable, lease) = (port.config.node_unreachable, port.config.node_lease);
        let nodes = agents::AgentsState::new(
            app.clone(),
            liveness.clone(),
            peer_client,
            agents::AgentsConfig::new(cluster_id, unreachable, lease).sharing(&port.config.token),
        );
        let reconcilers = reconcile::spawn(
            app.clone(),
            liveness.clone(),
            peers,
            reconcile::ReconcileConfig {
                feature_grace: port.config.feature_grace,
                ..reconcile::ReconcileConfig::new(unreachable, lease)
            },
        );
        let api = ApiState::new(app, liveness, about)
            .with_peers(port.http.for_cluster(cluster_id))
            .with_tunnels(nodes.tunnels().clone());
        Ok(Self {
            group,
            _consensus: consensus,
            api,
            nodes,
            reconcilers,
            registry,
            tasks,
        })
    }

    fn routers(&self, port: &Arc<PeerPort>, open: &Open) -> Routers {
        let between_members = registry::peer_router(Arc::clone(&self.registry))
            .merge(agents::exchange_router(self.nodes.clone()));
        // Agents turn to another member when their streams end.
        let nodes = agents::agents_router(self.nodes.clone());
        let nodes = listen::endless(nodes, open.clients.stop.subscribe());
        Routers {
            api: rest::router(self.api.clone()).merge(nodes),
            registry: registry::registry_router(Arc::clone(&self.registry)),
            peer: peer::router(port, between_members),
        }
    }

    /// This identity was taken out: serve nobody, and let the others alone. Its streams to agents end, so
    /// that they turn to the members that are left; its data stay where they are.
    async fn part(self, doors: &Doors, port: &Arc<PeerPort>) {
        doors.close_to_clients(port);
        doors.peer.set(removed(port));
        self.nodes.tunnels().close();
        self.reconcilers.abort();
        self.group.shutdown().await;
        drop(self);
        tracing::error!("this member is not part of its cluster any more; it serves nobody");
    }

    /// Hand over the lead while everything still works, finish requests, checkpoint.
    async fn stop(self, mut open: Open) {
        if self.group.status().is_leader() && self.group.status().members.len() > 1 {
            let handed = self.group.transfer_leader(None);
            match tokio::time::timeout(HAND_OVER_MAX, handed).await {
                Ok(Ok(())) => tracing::info!("handed over the lead"),
                Ok(Err(e)) => tracing::warn!("nobody took the lead: {e}"),
                Err(_) => tracing::warn!("nobody took the lead in time"),
            }
        }
        self.reconcilers.abort();
        drop(self.tasks);
        // They would outlive the ports, and end without a word.
        self.nodes.tunnels().close();
        let answered = open.clients.close(CLIENTS_MAX).await;
        if !open.peers.close(PEERS_MAX).await {
            tracing::debug!("a member's request was cut off");
        }
        self.group.shutdown().await;
        if !answered && !open.clients.close(WAITING_MAX).await {
            tracing::warn!("requests in flight were cut off");
        }
    }
}

/// Why the group stopped by itself; waits until it does.
async fn fault(group: &Group) -> String {
    let mut watch = group.watch();
    match watch.wait_for(|status| status.fault.is_some()).await {
        Ok(status) => status.fault.clone().unwrap_or_default(),
        Err(_) => "the group ended".to_owned(),
    }
}
