//! One running agent: identity, executor and connection put together. Decides nothing itself.

pub(crate) mod durable;
mod identity;
pub mod stats;

pub use identity::Identity;

use crate::cache::{Fetch, Party, RegistryFetch, Sources};
use crate::converge::executor::{Executor, Settings};
use crate::driver::Driver;
use crate::share::{self, Key, Shares};
use crate::sync::{Sync, SyncConfig};
use crate::tunnel::Tunnels;
use crate::wire::{NodeStats, RegisterRequest};
use anyhow::Context;
use parking_lot::Mutex;
use stats::Meter;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;

/// Walking the data directory costs; its size changes slowly.
const DISK_USE_EVERY: Duration = Duration::from_secs(30);
/// A controller that does not accept a connection within this time is passed over.
const CONNECT_TIME: Duration = Duration::from_secs(3);
/// Where nodes serve chunks to other nodes.
const SHARE_PORT: u16 = 8092;

/// What an agent is told at its start.
#[derive(Clone, Debug, Default)]
pub struct AgentConfig {
    /// Base addresses of controllers; at least one.
    pub controllers: Vec<String>,
    /// Everything durable.
    pub data_dir: PathBuf,
    /// Shown name; the host's if empty.
    pub name: String,
    /// Address that CI can reach; the one towards the controllers if empty.
    pub host: String,
    /// Most VMs at once.
    pub capacity: u32,
    /// Node groups to join.
    pub groups: Vec<String>,
    /// Serve chunks of images to other nodes.
    pub share: Share,
    /// Of instances.
    pub settings: Settings,
    /// Of the connection.
    pub sync: SyncConfig,
}

/// Whether, and at which address, a node serves chunks of its images to other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// At the usual port of all addresses, or any other if that is taken.
    #[default]
    Usual,
    /// Here.
    At(SocketAddr),
    /// Nowhere.
    No,
}

/// A client for controllers and registries: no proxies, short connect, dead peers noticed.
pub fn http_client() -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(CONNECT_TIME)
        .tcp_keepalive(Duration::from_secs(15))
        .tcp_nodelay(true)
        .build()
        .context("set up an HTTP client")
}

/// An agent that is ready to run.
pub struct Agent {
    controllers: Vec<String>,
    executor: Executor,
    sync: Sync,
    root: PathBuf,
    used: Arc<AtomicU64>,
    port: Option<(TcpListener, Arc<Shares>)>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

impl Agent {
    /// Lock the data directory, read what the last run left, pull images from the registries.
    pub async fn open(
        config: &AgentConfig,
        driver: impl AsyncFnOnce(&Path) -> anyhow::Result<Arc<dyn Driver>>,
    ) -> anyhow::Result<Self> {
        let listener = match config.share {
            Share::No => None,
            Share::At(at) => Some(share::bind(Some(at), at).await),
            Share::Usual => {
                let usual = SocketAddr::from((Ipv4Addr::UNSPECIFIED, SHARE_PORT));
                Some(share::bind(None, usual).await)
            }
        };
        let listener = listener.transpose();
        let listener = listener.context("cannot listen for other nodes (see --share-listen)")?;
        let address = match &listener {
            Some(listener) => reached_at(&host(config), listener.local_addr()?),
            None => String::new(),
        };
        let party = Party {
            shares: Shares::new(&config.data_dir.join("images")),
            key: Key::default(),
            address,
        };
        let mut agent = Self::open_with(config, driver, |client, sources| {
            Arc::new(RegistryFetch::new(client, sources, party.clone()))
        })
        .await?;
        agent.sync.key = party.key;
        agent.port = listener.map(|listener| (listener, party.shares));
        Ok(agent)
    }

    /// The same with another source of images.
    pub async fn open_with(
        config: &AgentConfig,
        driver: impl AsyncFnOnce(&Path) -> anyhow::Result<Arc<dyn Driver>>,
        fetch: impl FnOnce(reqwest::Client, Sources) -> Arc<dyn Fetch>,
    ) -> anyhow::Result<Self> {
        let identity = Identity::open(&config.data_dir)?;
        // Only under the lock may a driver look at the VMs.
        let driver = driver(&config.data_dir).await?;
        let client = http_client()?;
        let sources = Sources::new(identity.registries());
        let introduction = introduce(config, &identity, driver.name());
        let settings = Settings {
            host_ip: introduction.ip_address.clone(),
            ..config.settings.clone()
        };
        let fetch = fetch(client.clone(), sources.clone());
        let executor = Executor::open(&config.data_dir, driver, fetch, settings)?;
        let used = Arc::new(AtomicU64::new(0));
        let stats = {
            let (executor, used) = (executor.clone(), Arc::clone(&used));
            let meter = Meter::new(&config.data_dir);
            Arc::new(move || measure(&meter, &executor, &used))
        };
        let tunnels = Tunnels::new(
            Arc::clone(executor.driver()),
            client.clone(),
            &introduction.node_id,
        );
        let sync = Sync {
            tunnels,
            client,
            identity: Arc::new(Mutex::new(identity)),
            introduction,
            executor: executor.clone(),
            sources,
            key: Key::default(),
            stats,
            config: config.sync,
        };
        Ok(Self {
            controllers: config.controllers.clone(),
            executor,
            sync,
            root: config.data_dir.clone(),
            used,
            port: None,
        })
    }

    /// This node's id.
    pub fn node_id(&self) -> &str {
        &self.sync.introduction.node_id
    }

    /// The executor, to look at.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Serve. Ends only with a reason why going on would be wrong; dropping the future stops the
    /// agent and leaves its VMs as they are.
    pub async fn run(self) -> anyhow::Error {
        let Self {
            controllers,
            executor,
            sync,
            root,
            used,
            port,
        } = self;
        let key = sync.key.clone();
        let serve = async {
            match port {
                Some((listener, shares)) => share::serve(listener, shares, key).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = executor.run() => anyhow::anyhow!("the executor ended"),
            error = sync.run(&controllers) => error,
            () = serve => anyhow::anyhow!("the port for other nodes was closed"),
            () = watch_disk_use(&root, &executor, &used) => anyhow::anyhow!("the meter ended"),
        }
    }
}

/// Where others reach this machine.
fn host(config: &AgentConfig) -> String {
    if !config.host.is_empty() {
        return config.host.clone();
    }
    let mut ips = config.controllers.iter().filter_map(|u| stats::local_ip(u));
    ips.next()
        .map_or("127.0.0.1".to_owned(), |ip| ip.to_string())
}

/// The address of a port that is bound to `at`: on a machine with several addresses the one that was asked for, else
/// the machine's.
fn reached_at(host: &str, at: SocketAddr) -> String {
    let port = at.port();
    if !at.ip().is_unspecified() {
        return format!("http://{at}");
    }
    match host.parse::<IpAddr>() {
        Ok(ip) => format!("http://{}", SocketAddr::new(ip, port)),
        Err(_) => format!("http://{host}:{port}"),
    }
}

fn introduce(config: &AgentConfig, identity: &Identity, driver: &str) -> RegisterRequest {
    let facts = stats::facts(&config.data_dir);
    let or = |given: &str, found: String| {
        if given.is_empty() {
            found
        } else {
            given.to_owned()
        }
    };
    RegisterRequest {
        node_id: identity.node_id().to_owned(),
        name: or(&config.name, facts.hostname),
        ip_address: host(config),
        arch: facts.arch,
        cpu_count: facts.cpu_count,
        ram_mb: facts.ram_mb,
        disk_bytes: facts.disk_bytes,
        capacity: config.capacity,
        groups: config.groups.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        driver: driver.to_owned(),
    }
}

fn measure(meter: &Meter, executor: &Executor, used: &AtomicU64) -> NodeStats {
    let now = meter.measure();
    NodeStats {
        cpu_util: now.cpu,
        ram_util: now.ram,
        free_disk: now.free_disk,
        used_by_us: used.load(Ordering::Relaxed),
        vm_count: executor.running(),
    }
}

async fn watch_disk_use(root: &Path, executor: &Executor, used: &AtomicU64) {
    loop {
        let (root, cache) = (root.to_owned(), executor.cache().clone());
        let bytes = tokio::task::spawn_blocking(move || {
            stats::disk_use(&root, &root.join("images")) + cache.used_bytes()
        });
        if let Ok(bytes) = bytes.await {
            used.store(bytes, Ordering::Relaxed);
        }
        tokio::time::sleep(DISK_USE_EVERY).await;
    }
}
