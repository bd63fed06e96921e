//! What one member is told: flags, environment, file, defaults, in that order. Every mistake is a
//! sentence that says what to write instead. Opens nothing, listens nowhere.

use crate::backup::schedule::Schedule;
use crate::bucket::BlobStore;
use crate::registry::Upkeep;
use crate::space::{self, LowDisk};
use clap::{Args, ValueEnum};
use mainstay_raft::Member;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Default port of the REST API.
pub const API_PORT: u16 = 8090;
/// Default port of the registry.
pub const REGISTRY_PORT: u16 = 8089;
/// Default port for members among themselves.
pub const PEER_PORT: u16 = 8091;
/// Most members in an initial list: more voters only slow every write down.
pub const MEMBERS_MAX: usize = 9;
/// Default silence after which a node is unreachable.
pub const NODE_UNREACHABLE_MS: u64 = 20_000;
/// Default silence after which a node is lost.
pub const NODE_LEASE_MS: u64 = 120_000;
/// Default time for which the way back to the previous release stays open.
pub const FEATURE_GRACE_S: u64 = 3_600;
/// Default pause between two snapshots that a member saves by itself.
const SNAPSHOT_EVERY: Duration = Duration::from_secs(3_600);
/// Default number of them that are kept: a day's.
const SNAPSHOT_KEEP: usize = 24;
/// Heartbeats come four times as often, and an election takes about a second.
const NODE_UNREACHABLE_MS_MIN: u64 = 2_000;

/// Default length of the log after which a snapshot is made.
pub const SNAPSHOT_LOG_BYTES: u64 = 64 << 20;
/// Default size of what is kept here of a bucket.
const BLOB_CACHE_BYTES: u64 = 10 << 30;
/// With less, a member does nothing but snapshots.
const SNAPSHOT_LOG_BYTES_MIN: u64 = 64 << 10;

/// A mistake in the configuration, as a sentence.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ConfigError(pub String);

fn wrong<T>(text: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(text.into()))
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags of `mainstay server`; the same names (with `_`) in the file and as `MAINSTAY_*`.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerArgs {
    /// This member's name in the member list [default: the host name]
    #[arg(long, env = "MAINSTAY_NAME")]
    pub name: Option<String>,
    /// Where this member keeps everything it owns
    #[arg(long, env = "MAINSTAY_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// All members, the same list on each: NAME=http://HOST:PORT,... (their peer ports)
    #[arg(long, env = "MAINSTAY_INITIAL_CLUSTER")]
    pub initial_cluster: Option<String>,
    /// Peer addresses of members of a running cluster that this one shall join:
    /// http://HOST:PORT,... ; used until it has joined. Instead of --initial-cluster
    #[arg(long, env = "MAINSTAY_JOIN", value_name = "URL[,URL...]")]
    pub join: Option<String>,
    /// Join as a learner and stay one: holds a copy of everything, has no vote [default: false]
    #[arg(long, env = "MAINSTAY_LEARNER", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    pub learner: Option<bool>,
    /// Address of the REST API and the web page [default: 0.0.0.0:8090]
    #[arg(long, env = "MAINSTAY_LISTEN")]
    pub listen: Option<String>,
    /// Address of the registry [default: 0.0.0.0:8089]
    #[arg(long, env = "MAINSTAY_REGISTRY_LISTEN")]
    pub registry_listen: Option<String>,
    /// Address for the other members [default: 0.0.0.0 and the port in this member's list entry]
    #[arg(long, env = "MAINSTAY_PEER_LISTEN")]
    pub peer_listen: Option<String>,
    /// Secret that all members of a cluster share
    #[arg(long, env = "MAINSTAY_CLUSTER_TOKEN", hide_env_values = true)]
    pub cluster_token: Option<String>,
    /// File that holds the shared secret
    #[arg(long, env = "MAINSTAY_CLUSTER_TOKEN_FILE")]
    pub cluster_token_file: Option<PathBuf>,
    /// Host that clients, nodes and (without a list) members are told [default: the host of this
    /// member's list entry, or of --peer-listen]
    #[arg(long, env = "MAINSTAY_ADVERTISE_HOST")]
    pub advertise_host: Option<String>,
    /// A node that is silent for so long gets no new instances; the same on each member [default: 20000]
    #[arg(long, env = "MAINSTAY_NODE_UNREACHABLE_MS", value_name = "MS")]
    pub node_unreachable_ms: Option<u64>,
    /// A node that is silent for so long is lost and its instances fail; the same on each member
    /// [default: 120000]
    #[arg(long, env = "MAINSTAY_NODE_LEASE_MS", value_name = "MS")]
    pub node_lease_ms: Option<u64>,
    /// Features of a new release are switched on when every member has supported them for so long;
    /// until then the way back to the previous release is open [default: 3600]
    #[arg(long, env = "MAINSTAY_FEATURE_GRACE_S", value_name = "SECONDS")]
    pub feature_grace_s: Option<u64>,
    /// A snapshot is made after so much log, and the log before it is dropped [default: 64MiB]
    #[arg(long, env = "MAINSTAY_SNAPSHOT_LOG", value_name = "SIZE")]
    pub snapshot_log: Option<String>,
    /// Free room on the disk below which this member takes no pushes, a size or a part of the disk;
    /// below half of it, it hands over the lead [default: 5%, at most 2GiB]
    #[arg(long, env = "MAINSTAY_LOW_DISK", value_name = "SIZE")]
    pub low_disk: Option<String>,
    /// Save snapshots of the whole state into this directory, one of them at once
    #[arg(long, env = "MAINSTAY_SNAPSHOT_DIR", value_name = "DIR")]
    pub snapshot_dir: Option<PathBuf>,
    /// Pause between two of them: a number with s, m, h or d [default: 1h]
    #[arg(long, env = "MAINSTAY_SNAPSHOT_EVERY", value_name = "DURATION")]
    pub snapshot_every: Option<String>,
    /// So many of them are kept, the newest ones [default: 24]
    #[arg(long, env = "MAINSTAY_SNAPSHOT_KEEP", value_name = "N")]
    pub snapshot_keep: Option<usize>,
    /// Chunks stay for so long after no tag needs them: longer than any client pauses in a push or a
    /// pull. A number with s, m, h or d [default: 24h]
    #[arg(long, env = "MAINSTAY_GC_GRACE", value_name = "DURATION")]
    pub gc_grace: Option<String>,
    /// Pause between two collections of chunks that no tag needs, or "never" [default: 1h]
    #[arg(long, env = "MAINSTAY_GC_EVERY", value_name = "DURATION")]
    pub gc_every: Option<String>,
    /// A collection copies at most so many bytes a second, when it moves what is left of a file that it
    /// gives back; 0: as fast as it can [default: 64MiB]
    #[arg(long, env = "MAINSTAY_GC_RATE", value_name = "SIZE")]
    pub gc_rate: Option<String>,
    /// Tags are copied from other members at so many bytes a second at most; 0: as fast as can be
    /// [default: 0]
    #[arg(long, env = "MAINSTAY_REPLICATE_RATE", value_name = "SIZE")]
    pub replicate_rate: Option<String>,
    /// Chunks are verified at so many bytes a second; 0: only when asked to [default: 16MiB]
    #[arg(long, env = "MAINSTAY_SCRUB_RATE", value_name = "SIZE")]
    pub scrub_rate: Option<String>,
    /// All chunks are verified once in this time, if the rate allows it [default: 7d]
    #[arg(long, env = "MAINSTAY_SCRUB_EVERY", value_name = "DURATION")]
    pub scrub_every: Option<String>,
    /// Keep chunks in a bucket that all members share, s3://BUCKET/PREFIX, instead of on this disk. Access
    /// by AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION in the environment
    #[arg(long, env = "MAINSTAY_BLOB_STORE", value_name = "URL")]
    pub blob_store: Option<String>,
    /// Where that bucket is: http://HOST:PORT [default: AWS_ENDPOINT_URL]
    #[arg(long, env = "MAINSTAY_S3_ENDPOINT", value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// Of a bucket, so much of what was read and written lately is kept on this disk [default: 10GiB]
    #[arg(long, env = "MAINSTAY_BLOB_CACHE", value_name = "SIZE")]
    pub blob_cache: Option<String>,
    /// Answer browsers that show pages of other origins [default: false]
    #[arg(long, env = "MAINSTAY_ALLOW_CORS", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    pub allow_cors: Option<bool>,
    /// Form of the log on standard error [default: text]
    #[arg(long, value_enum, env = "MAINSTAY_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// TOML file with any of these settings; flags and environment win
    #[arg(long, env = "MAINSTAY_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// One entry of the member list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// Member name.
    pub name: String,
    /// `http://host:port` of its peer port.
    pub url: String,
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// This member.
    pub name: String,
    /// Its directory.
    pub data_dir: PathBuf,
    /// Those that found the cluster, in name order; with `join`, this member alone.
    pub list: Vec<Entry>,
    /// Peer addresses of a running cluster that this member joins; empty for one of the list.
    pub join: Vec<String>,
    /// It does not want a vote.
    pub learner: bool,
    /// REST API.
    pub listen: SocketAddr,
    /// Registry.
    pub registry_listen: SocketAddr,
    /// Members among themselves.
    pub peer_listen: SocketAddr,
    /// Shared secret; may be empty.
    pub token: String,
    /// Host that others are told.
    pub advertise_host: String,
    /// Silence after which a node is unreachable.
    pub node_unreachable: Duration,
    /// Silence after which it is lost; longer.
    pub node_lease: Duration,
    /// How long every member has supported a feature before it is switched on.
    pub feature_grace: Duration,
    /// Bytes of log after which a snapshot is made.
    pub snapshot_log_bytes: u64,
    /// Free room below which pushes are refused.
    pub low_disk: LowDisk,
    /// Snapshots that this member saves by itself.
    pub snapshots: Option<Schedule>,
    /// How the registry looks after what it holds.
    pub upkeep: Upkeep,
    /// The bucket with the chunks; `None`: they are in the data directory.
    pub blob_store: Option<BlobStore>,
    /// Answer cross-origin requests of browsers.
    pub allow_cors: bool,
    /// Log lines.
    pub log_format: LogFormat,
}

/// Bytes a second.
fn rate(flag: &str, text: &str, none: &str) -> Result<u64, ConfigError> {
    let Some(rate) = space::bytes(text) else {
        return wrong(format!(
            "{flag} {text}: give bytes a second such as 16MiB, or 0 for {none}"
        ));
    };
    Ok(rate)
}

impl ServerArgs {
    /// Fill in what only the `--config` file says, and check everything.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let args = match self.config.clone() {
            None => self,
            Some(path) => self.over(read_file(&path)?),
        };
        let name = match args.name.clone() {
            Some(name) => name,
            None => host_name()?,
        };
        check_name(&name)?;
        let join = args.join.as_deref().map_or(Ok(Vec::new()), parse_join)?;
        let list = match &args.initial_cluster {
            Some(_) if args.join.is_some() => {
                return wrong(
                    "give --initial-cluster or --join, not both: --initial-cluster is for the members that found a cluster, --join for one that comes to a cluster which runs",
                );
            }
            Some(text) => parse_list(text)?,
            None => args.alone(&name)?,
        };
        let learner = args.learner.unwrap_or(false);
        if learner && join.is_empty() {
            return wrong("--learner goes with --join: those that found a cluster have to vote");
        }
        let Some(own) = list.iter().find(|entry| entry.name == name) else {
            let names: Vec<_> = list.iter().map(|entry| entry.name.as_str()).collect();
            return wrong(format!(
                "--initial-cluster names {} but not this member, \"{name}\": add {name}=http://HOST:{PEER_PORT} to the list on every member, or give the right --name",
                names.join(", ")
            ));
        };
        let (host, port) = split_url(&own.url)?;
        let Some(data_dir) = args.data_dir.clone() else {
            return wrong(
                "--data-dir is missing: name a directory that this member owns, e.g. --data-dir /var/lib/mainstay",
            );
        };
        let (node_unreachable, node_lease) = args.node_times()?;
        Ok(Config {
            node_unreachable,
            node_lease,
            snapshot_log_bytes: args.snapshot_log_bytes()?,
            low_disk: match &args.low_disk {
                Some(text) => text.parse().map_err(ConfigError)?,
                None => LowDisk::Default,
            },
            listen: address("--listen", args.listen.as_deref(), API_PORT)?,
            registry_listen: address(
                "--registry-listen",
                args.registry_listen.as_deref(),
                REGISTRY_PORT,
            )?,
            peer_listen: address("--peer-listen", args.peer_listen.as_deref(), port)?,
            token: args.token()?,
            advertise_host: args.advertise_host.clone().unwrap_or(host),
            feature_grace: Duration::from_secs(args.feature_grace_s.unwrap_or(FEATURE_GRACE_S)),
            snapshots: args.snapshots()?,
            upkeep: args.upkeep()?,
            blob_store: args.blob_store()?,
            allow_cors: args.allow_cors.unwrap_or(false),
            log_format: args.log_format.unwrap_or_default(),
            name,
            data_dir,
            list,
            join,
            learner,
        })
    }

    /// The entry of a member that is given no list: where others reach it.
    fn alone(&self, name: &str) -> Result<Vec<Entry>, ConfigError> {
        let at = address("--peer-listen", self.peer_listen.as_deref(), PEER_PORT)?;
        let host = match &self.advertise_host {
            Some(host) => host.clone(),
            None if !at.ip().is_unspecified() => at.ip().to_string(),
            None if self.join.is_some() => {
                return wrong(format!(
                    "--join: the members must know where to reach this one: give --advertise-host HOST, or an address of this machine in --peer-listen, e.g. --peer-listen 10.0.1.7:{PEER_PORT}"
                ));
            }
            None => "127.0.0.1".to_owned(),
        };
        let host = if host.contains(':') && !host.starts_with('[') {
            format!("[{host}]")
        } else {
            host
        };
        let (host, port) = split_url(&format!("http://{host}:{}", at.port()))
            .map_err(|_| ConfigError(format!("--advertise-host \"{host}\" is not a host name")))?;
        Ok(vec![Entry {
            name: name.to_owned(),
            url: format!("http://{host}:{port}"),
        }])
    }

    fn over(self, file: Self) -> Self {
        // A token on the command line must not meet a token file from the file.
        let own_token = self.cluster_token.is_some() || self.cluster_token_file.is_some();
        let (token, token_file) = if own_token {
            (self.cluster_token, self.cluster_token_file)
        } else {
            (file.cluster_token, file.cluster_token_file)
        };
        // The same for the two ways into a cluster.
        let own_way = self.initial_cluster.is_some() || self.join.is_some();
        let (initial_cluster, join) = if own_way {
            (self.initial_cluster, self.join)
        } else {
            (file.initial_cluster, file.join)
        };
        Self {
            name: self.name.or(file.name),
            data_dir: self.data_dir.or(file.data_dir),
            initial_cluster,
            join,
            learner: self.learner.or(file.learner),
            listen: self.listen.or(file.listen),
            registry_listen: self.registry_listen.or(file.registry_listen),
            peer_listen: self.peer_listen.or(file.peer_listen),
            cluster_token: token,
            cluster_token_file: token_file,
            advertise_host: self.advertise_host.or(file.advertise_host),
            node_unreachable_ms: self.node_unreachable_ms.or(file.node_unreachable_ms),
            node_lease_ms: self.node_lease_ms.or(file.node_lease_ms),
            feature_grace_s: self.feature_grace_s.or(file.feature_grace_s),
            snapshot_log: self.snapshot_log.or(file.snapshot_log),
            low_disk: self.low_disk.or(file.low_disk),
            snapshot_dir: self.snapshot_dir.or(file.snapshot_dir),
            snapshot_every: self.snapshot_every.or(file.snapshot_every),
            snapshot_keep: self.snapshot_keep.or(file.snapshot_keep),
            gc_grace: self.gc_grace.or(file.gc_grace),
            gc_every: self.gc_every.or(file.gc_every),
            gc_rate: self.gc_rate.or(file.gc_rate),
            replicate_rate: self.replicate_rate.or(file.replicate_rate),
            scrub_rate: self.scrub_rate.or(file.scrub_rate),
            scrub_every: self.scrub_every.or(file.scrub_every),
            blob_store: self.blob_store.or(file.blob_store),
            s3_endpoint: self.s3_endpoint.or(file.s3_endpoint),
            blob_cache: self.blob_cache.or(file.blob_cache),
            allow_cors: self.allow_cors.or(file.allow_cors),
            log_format: self.log_format.or(file.log_format),
            config: None,
        }
    }

    fn snapshot_log_bytes(&self) -> Result<u64, ConfigError> {
        let Some(text) = &self.snapshot_log else {
            return Ok(SNAPSHOT_LOG_BYTES);
        };
        match space::bytes(text) {
            Some(bytes) if bytes >= SNAPSHOT_LOG_BYTES_MIN => Ok(bytes),
            _ => wrong(format!(
                "--snapshot-log {text}: give a size of at least 64KiB, such as 64MiB"
            )),
        }
    }

    fn snapshots(&self) -> Result<Option<Schedule>, ConfigError> {
        let Some(dir) = self.snapshot_dir.clone() else {
            if self.snapshot_every.is_some() || self.snapshot_keep.is_some() {
                return wrong("--snapshot-every and --snapshot-keep need --snapshot-dir");
            }
            return Ok(None);
        };
        let every = self
            .snapshot_every
            .as_deref()
            .map_or(Ok(SNAPSHOT_EVERY), |text| {
                duration("--snapshot-every", text)
            })?;
        let keep = self.snapshot_keep.unwrap_or(SNAPSHOT_KEEP);
        if keep == 0 {
            return wrong("--snapshot-keep 0 would keep none: give at least 1");
        }
        Ok(Some(Schedule { dir, every, keep }))
    }

    fn upkeep(&self) -> Result<Upkeep, ConfigError> {
        let mut upkeep = Upkeep::default();
        if let Some(text) = &self.gc_grace {
            upkeep.collect.grace = duration("--gc-grace", text)?;
        }
        match self.gc_every.as_deref() {
            None => {}
            Some("never") => upkeep.collect.every = None,
            Some(text) => upkeep.collect.every = Some(duration("--gc-every", text)?),
        }
        if let Some(text) = &self.scrub_rate {
            upkeep.scrub.rate = rate("--scrub-rate", text, "never")?;
        }
        if let Some(text) = &self.gc_rate {
            upkeep.collect.rate = rate("--gc-rate", text, "no limit")?;
        }
        if let Some(text) = &self.replicate_rate {
            upkeep.replicate_rate = rate("--replicate-rate", text, "no limit")?;
        }
        if let Some(text) = &self.scrub_every {
            upkeep.scrub.every = duration("--scrub-every", text)?;
        }
        Ok(upkeep)
    }

    fn blob_store(&self) -> Result<Option<BlobStore>, ConfigError> {
        let Some(url) = &self.blob_store else {
            if self.s3_endpoint.is_some() || self.blob_cache.is_some() {
                return wrong("--s3-endpoint and --blob-cache need --blob-store");
            }
            return Ok(None);
        };
        let cache_bytes = match &self.blob_cache {
            None => BLOB_CACHE_BYTES,
            Some(text) => match space::bytes(text) {
                Some(bytes) => bytes,
                None => {
                    return wrong(format!("--blob-cache {text}: give a size such as 10GiB"));
                }
            },
        };
        let parsed = BlobStore::parse(url, self.s3_endpoint.clone(), cache_bytes);
        parsed.map(Some).map_err(ConfigError)
    }

    fn node_times(&self) -> Result<(Duration, Duration), ConfigError> {
        let unreachable_ms = self.node_unreachable_ms.unwrap_or(NODE_UNREACHABLE_MS);
        let lease_ms = self.node_lease_ms.unwrap_or(NODE_LEASE_MS);
        if unreachable_ms < NODE_UNREACHABLE_MS_MIN {
            return wrong(format!(
                "--node-unreachable-ms {unreachable_ms} is too short: a slow moment would look like a dead node; give at least {NODE_UNREACHABLE_MS_MIN}"
            ));
        }
        if lease_ms <= unreachable_ms {
            return wrong(format!(
                "--node-lease-ms {lease_ms} must be more than --node-unreachable-ms {unreachable_ms}: a node is unreachable before it is lost"
            ));
        }
        Ok((
            Duration::from_millis(unreachable_ms),
            Duration::from_millis(lease_ms),
        ))
    }

    fn token(&self) -> Result<String, ConfigError> {
        match (&self.cluster_token, &self.cluster_token_file) {
            (Some(_), Some(_)) => wrong("give --cluster-token or --cluster-token-file, not both"),
            (Some(token), None) => Ok(token.clone()),
            (None, Some(path)) => match std::fs::read_to_string(path) {
                Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
                Ok(_) => wrong(format!("--cluster-token-file {} is empty", path.display())),
                Err(e) => wrong(format!(
                    "cannot read --cluster-token-file {}: {e}",
                    path.display()
                )),
            },
            (None, None) => Ok(String::new()),
        }
    }
}

impl Config {
    /// This member's own entry.
    pub fn own(&self) -> &Entry {
        self.list
            .iter()
            .find(|entry| entry.name == self.name)
            .expect("checked when the configuration was made")
    }

    /// What others are told of this member, given the ports it really listens on.
    pub fn member(&self, api: u16, registry: u16) -> Member {
        let host = &self.advertise_host;
        Member {
            name: self.name.clone(),
            peer_url: self.own().url.clone(),
            api_url: format!("http://{host}:{api}"),
            registry_url: format!("http://{host}:{registry}"),
        }
    }
}

fn read_file(path: &Path) -> Result<ServerArgs, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| ConfigError(format!("cannot read --config {}: {e}", path.display())))?;
    toml::from_str(&text)
        .map_err(|e| ConfigError(format!("--config {}: {}", path.display(), e.message())))
}

fn host_name() -> Result<String, ConfigError> {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    match name.split('.').next() {
        Some(short) if !short.is_empty() => Ok(short.to_owned()),
        _ => wrong("this machine has no host name: give --name"),
    }
}

/// A member's name becomes part of file names and addresses.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(good) {
        return wrong(format!(
            "\"{name}\" cannot be a member's name: use 1 to 63 letters, digits, '-', '_' and '.'"
        ));
    }
    Ok(())
}

/// Parse `URL,URL,...`, each a member's peer port.
fn parse_join(text: &str) -> Result<Vec<String>, ConfigError> {
    let mut urls = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (host, port) = split_url(part).map_err(|e| ConfigError(format!("--join: {e}")))?;
        let url = format!("http://{host}:{port}");
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    if urls.is_empty() {
        return wrong(format!(
            "--join is empty: name the peer ports of members that run, e.g. --join http://10.0.1.4:{PEER_PORT}"
        ));
    }
    Ok(urls)
}

/// Parse `NAME=URL,NAME=URL,...`.
pub fn parse_list(text: &str) -> Result<Vec<Entry>, ConfigError> {
    let mut list = Vec::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let Some((name, url)) = part.split_once('=') else {
            return wrong(format!(
                "--initial-cluster: \"{part}\" is not NAME=http://HOST:PORT, e.g. c1=http://10.0.1.4:{PEER_PORT}"
            ));
        };
        check_name(name.trim())?;
        let (host, port) = split_url(url.trim())?;
        list.push(Entry {
            name: name.trim().to_owned(),
            url: format!("http://{host}:{port}"),
        });
    }
    list.sort();
    let names: BTreeSet<_> = list.iter().map(|entry| &entry.name).collect();
    let urls: BTreeSet<_> = list.iter().map(|entry| &entry.url).collect();
    if list.is_empty() {
        return wrong("--initial-cluster is empty: list every member as NAME=http://HOST:PORT,...");
    }
    if names.len() != list.len() || urls.len() != list.len() {
        return wrong(
            "--initial-cluster names a member or an address twice: each member has a name and an address of its own",
        );
    }
    if list.len() > MEMBERS_MAX {
        return wrong(format!(
            "--initial-cluster has {} members; at most {MEMBERS_MAX} are allowed, three or five are usual",
            list.len()
        ));
    }
    Ok(list)
}

/// Host and port of `http://host[:port][/]`. IPv6 hosts keep their brackets.
pub fn split_url(url: &str) -> Result<(String, u16), ConfigError> {
    let bad = || {
        ConfigError(format!(
            "\"{url}\" is not a peer address: write http://HOST:PORT, e.g. http://10.0.1.4:{PEER_PORT}"
        ))
    };
    let uri: http::Uri = url.parse().map_err(|_| bad())?;
    let plain = uri.scheme_str() == Some("http") && matches!(uri.path(), "" | "/");
    match uri.host() {
        Some(host) if plain && uri.query().is_none() && !host.is_empty() => {
            Ok((host.to_owned(), uri.port_u16().unwrap_or(PEER_PORT)))
        }
        _ => Err(bad()),
    }
}

/// A number of seconds, minutes, hours or days.
fn duration(flag: &str, text: &str) -> Result<Duration, ConfigError> {
    let unit_s = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3_600,
        Some('d') => 86_400,
        _ => 0,
    };
    let number = text.get(..text.len().saturating_sub(1));
    let number = number.and_then(|number| number.parse::<u64>().ok());
    match number.and_then(|number| number.checked_mul(unit_s)) {
        Some(s) if s > 0 => Ok(Duration::from_secs(s)),
        _ => wrong(format!(
            "{flag} \"{text}\" is not a duration: write a number with s, m, h or d, e.g. 1h"
        )),
    }
}

/// `http://host:port` of a URL, or of `host:port`, with this port when it names none.
pub fn plain_url(text: &str, port: u16) -> Result<String, ConfigError> {
    let text = text.trim();
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    let named = full.parse::<http::Uri>().ok().and_then(|u| u.port_u16());
    let (host, _) = split_url(&full)
        .map_err(|_| ConfigError(format!("\"{text}\" is no address: write http://HOST:PORT")))?;
    Ok(format!("http://{host}:{}", named.unwrap_or(port)))
}

fn address(flag: &str, text: Option<&str>, port: u16) -> Result<SocketAddr, ConfigError> {
    let Some(text) = text else {
        return Ok(SocketAddr::from(([0, 0, 0, 0], port)));
    };
    let full = match text.strip_prefix(':') {
        Some(port) => format!("0.0.0.0:{port}"),
        None if text.contains(':') => text.replace("localhost:", "127.0.0.1:"),
        None => format!("{text}:{port}"),
    };
    full.parse().map_err(|_| {
        ConfigError(format!(
            "{flag} \"{text}\" is not an address to listen on: write IP:PORT, e.g. 0.0.0.0:{port}"
        ))
    })
}

#[cfg(test)]
mod tests;
