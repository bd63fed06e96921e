//! `mainstay node`: join (runs the agent in the foreground), list, show, drain, resume, remove. The
//! agent itself is `mainstay_agent`; here it only gets its driver and its flags.

use super::client::{ApiClient, query};
use super::table::{self, Output, Table};
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use mainstay_agent::agent::{Agent, AgentConfig, Share, http_client};
use mainstay_agent::cache::Reserve;
use mainstay_agent::converge::executor::Settings;
use mainstay_agent::driver::Driver;
use mainstay_agent::driver::fake::{FakeConfig, FakeDriver};
use mainstay_agent::driver::qemu::accel::Accel;
use mainstay_agent::driver::qemu::{QemuConfig, QemuDriver};
use mainstay_agent::join;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Join this machine to a cluster, look at nodes, drain and remove them.
#[derive(Args, Debug)]
pub struct NodeArgs {
    #[command(subcommand)]
    command: NodeCommand,
}

#[derive(Subcommand, Debug)]
enum NodeCommand {
    /// Test each controller, then serve as a node until told to stop; VMs outlive the agent
    Join(Box<JoinArgs>),
    /// List all nodes
    List,
    /// Show one node
    Show {
        /// Node id
        id: String,
    },
    /// Place nothing new on a node; what runs there goes on
    Drain {
        /// Node id
        id: String,
    },
    /// End a drain
    Resume {
        /// Node id
        id: String,
    },
    /// Forget a node that is gone for good; its live instances fail
    Remove {
        /// Node id
        id: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DriverName {
    /// Real VMs
    Qemu,
    /// VMs that exist in name only, for tests
    Fake,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum AccelName {
    /// KVM if it really works, else TCG
    Auto,
    /// Insist on KVM
    Kvm,
    /// Software only
    Tcg,
}

impl From<AccelName> for Accel {
    fn from(name: AccelName) -> Self {
        match name {
            AccelName::Auto => Self::Auto,
            AccelName::Kvm => Self::Kvm,
            AccelName::Tcg => Self::Tcg,
        }
    }
}

#[derive(Args, Debug)]
struct JoinArgs {
    /// API addresses of controllers: URL,URL,URL
    controllers: String,
    /// Shown name [default: the host's name]
    #[arg(long, env = "MAINSTAY_NODE_NAME")]
    name: Option<String>,
    /// Address at which others reach this machine [default: the one towards the controllers]
    #[arg(long, env = "MAINSTAY_NODE_HOST")]
    host: Option<String>,
    /// Most VMs at once
    #[arg(long, default_value_t = 2, env = "MAINSTAY_NODE_CAPACITY")]
    capacity: u32,
    /// Node groups to join
    #[arg(long, value_delimiter = ',', env = "MAINSTAY_NODE_GROUPS")]
    groups: Vec<String>,
    /// What runs VMs
    #[arg(long, value_enum, default_value_t = DriverName::Qemu, env = "MAINSTAY_NODE_DRIVER")]
    driver: DriverName,
    /// How QEMU runs guests
    #[arg(long, value_enum, default_value_t = AccelName::Auto, env = "MAINSTAY_NODE_ACCEL")]
    accel: AccelName,
    /// Identity, images and VMs of this node
    #[arg(
        long,
        default_value = "/var/lib/mainstay-node",
        env = "MAINSTAY_NODE_DATA_DIR"
    )]
    data_dir: PathBuf,
    /// Disk space that images leave free: 20% or 50G
    #[arg(long, default_value = "20%", value_parser = reserve, env = "MAINSTAY_NODE_RESERVE_SPACE")]
    reserve_space: Reserve,
    /// Where other nodes get chunks of images that this one has: IP:PORT, or "no" [default: port 8092 of all addresses, or a free one]
    #[arg(long, value_parser = share, env = "MAINSTAY_NODE_SHARE_LISTEN")]
    share_listen: Option<Share>,
}

fn share(text: &str) -> Result<Share, String> {
    match text {
        "no" => Ok(Share::No),
        at => at
            .parse()
            .map(Share::At)
            .map_err(|_| format!("{at:?} is neither IP:PORT nor \"no\"")),
    }
}

fn reserve(text: &str) -> Result<Reserve, String> {
    let wrong = || format!("{text:?} is neither a percentage (20%) nor a size (50G, 500M, bytes)");
    if let Some(percent) = text.strip_suffix('%') {
        let percent: u8 = percent.trim().parse().map_err(|_| wrong())?;
        return if percent <= 100 {
            Ok(Reserve::Percent(percent))
        } else {
            Err(wrong())
        };
    }
    let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    let unit = units
        .iter()
        .find_map(|(name, bits)| Some((text.strip_suffix(name)?, *bits)));
    let (number, bits) = unit.unwrap_or((text, 0));
    let number: u64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number.checked_mul(1 << bits).ok_or_else(wrong)?;
    Ok(Reserve::Bytes(bytes))
}

/// Carry out a `node` command.
pub async fn run(args: NodeArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    if let NodeCommand::Join(args) = args.command {
        return Box::pin(join(*args)).await;
    }
    let client = ApiClient::new(endpoints)?;
    match args.command {
        NodeCommand::Join(_) => Ok(()),
        NodeCommand::List => {
            let nodes: Vec<Value> = client.get("/api/v1/node").await?;
            Ok(table::emit(output, &nodes, |nodes| overview(nodes))?)
        }
        NodeCommand::Show { id } => {
            let path = format!("/api/v1/node{}", query(&[("id", &id)]));
            let nodes: Vec<Value> = client
                .get(&path)
                .await
                .with_context(|| format!("node {id}"))?;
            let Some(node) = nodes.first() else {
                bail!("node {id}: Not found");
            };
            Ok(table::emit(output, node, details)?)
        }
        NodeCommand::Drain { id } => drain(&client, &id, true).await,
        NodeCommand::Resume { id } => drain(&client, &id, false).await,
        NodeCommand::Remove { id } => {
            let body = json!({ "node_id": id });
            let _: Value = client.delete("/api/v1/node", &body).await?;
            Ok(table::line(&format!("node {id} is removed"))?)
        }
    }
}

async fn drain(client: &ApiClient, id: &str, drain: bool) -> anyhow::Result<()> {
    let body = json!({ "node_id": id, "drain_mode": drain });
    let _: Value = client.post("/api/v1/node/config", &body).await?;
    let what = if drain {
        "drains"
    } else {
        "takes instances again"
    };
    Ok(table::line(&format!("node {id} {what}"))?)
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn overview(nodes: &[Value]) -> Table {
    let mut table = Table::new(&["ID", "NAME", "ADDRESS", "STATE", "VMS", "CAPACITY", "ARCH"]);
    for node in nodes {
        let cells = [
            "node_id",
            "node_name",
            "ip_address",
            "state",
            "vm_count",
            "capacity",
            "host_arch",
        ];
        table.row(cells.map(|cell| text(&node[cell])));
    }
    table
}

fn details(node: &Value) -> Table {
    let mut table = Table::new(&["FIELD", "VALUE"]);
    for (field, value) in node.as_object().into_iter().flatten() {
        table.row([field.clone(), text(value)]);
    }
    table
}

async fn join(args: JoinArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let controllers = join::split_urls(&args.controllers);
    if controllers.is_empty() {
        bail!("no controllers: name them as URL,URL,URL");
    }
    let client = http_client()?;
    if !join::test_controllers(&client, &controllers, &mut std::io::stdout()).await? {
        bail!("no controller can be reached: check the addresses, and that one member serves");
    }
    let config = AgentConfig {
        controllers,
        data_dir: args.data_dir.clone(),
        name: args.name.clone().unwrap_or_default(),
        host: args.host.clone().unwrap_or_default(),
        capacity: args.capacity,
        groups: args.groups.clone(),
        share: args.share_listen.unwrap_or_default(),
        settings: Settings {
            reserve: args.reserve_space,
            ..Settings::default()
        },
        ..AgentConfig::default()
    };
    let mut term = signal(SignalKind::terminate())?;
    let agent = Agent::open(&config, async |root| driver(&args, root).await).await?;
    tracing::info!(node = agent.node_id(), data_dir = %args.data_dir.display(), "serving as a node");
    tokio::select! {
        error = agent.run() => Err(error),
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = term.recv() => Ok(()),
    }
}

async fn driver(args: &JoinArgs, root: &Path) -> anyhow::Result<Arc<dyn Driver>> {
    Ok(match args.driver {
        DriverName::Fake => Arc::new(FakeDriver::open(FakeConfig {
            file: Some(root.join("vms.json")),
            ..FakeConfig::default()
        })?),
        DriverName::Qemu => {
            let mut config = QemuConfig::new(root);
            config.accel = args.accel.into();
            let driver = QemuDriver::open(config).await;
            Arc::new(driver.context(
                "QEMU cannot run VMs here (see `make install-deps`, or join with --driver fake)",
            )?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_for_other_nodes_is_an_address_or_none() {
        assert_eq!(share("no"), Ok(Share::No));
        let at = "10.0.0.1:9".parse().unwrap();
        assert_eq!(share("10.0.0.1:9"), Ok(Share::At(at)));
        for bad in ["", "yes", "9", "host:9"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reserves_are_percentages_or_sizes() {
        assert_eq!(reserve("20%"), Ok(Reserve::Percent(20)));
        assert_eq!(reserve("3G"), Ok(Reserve::Bytes(3 << 30)));
        assert_eq!(reserve("12"), Ok(Reserve::Bytes(12)));
        for bad in ["", "%", "101%", "G", "-1", "99999999999999T", "1.5G"] {
            assert!(reserve(bad).is_err(), "{bad}");
        }
    }
}
