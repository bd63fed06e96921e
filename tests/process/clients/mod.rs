//! The calls of the clients that the reference system has, replayed byte for byte: what each sends, reads,
//! waits for and does at the end, as docs/clients.md lists it. One cluster of three members, one node with real
//! VMs; each client against all three members in turn, all clients at once. Pauses between polls are shorter
//! than the clients' own; everything else is as they do it.
//!
//! `MAINSTAY_CLIENTS=jenkins,gitlab` replays only these.

mod actions;
mod cloud_connect;
mod exporter;
mod gitlab;
mod jenkins;
mod legacy;
mod mcp;
mod mgmtcl;
mod packer;
mod read;
mod rules;
mod teamcity;
mod wire;

use crate::cluster::{Cluster, until};
use crate::journey::guest;
use crate::push::{noise_file, push_small_template, template_id};
use crate::turn;
use base64::Engine as _;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use wire::{Load, Wire};

/// Between two polls of a client that waits; theirs are 2 to 10 s.
pub(crate) const POLL: Duration = Duration::from_millis(300);
/// Until a VM is started and ready: it boots beside others, without hardware's help.
const START_MAX: Duration = Duration::from_secs(240);
/// Most VMs at once: the others wait for room, as in a cloud that is full.
const ROOM: &str = "5";
/// Tags of each template that clients revert.
const HISTORY: usize = 4;

/// What the replays share.
pub(crate) struct Site {
    pub(crate) cluster: Cluster,
    /// A real guest; ports 22 and 80 are forwarded.
    pub(crate) template: String,
    /// A template that no node here can run.
    pub(crate) foreign: String,
    /// Node that runs VMs.
    pub(crate) node: String,
    /// A group that it is in.
    pub(crate) group: String,
    /// Templates of [`HISTORY`] tags, by name.
    pub(crate) histories: BTreeMap<&'static str, String>,
}

type Replay = fn(Arc<Site>, usize) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// All of them, those that take longest first.
const REPLAYS: [(&str, Replay); 11] = [
    ("jenkins", |site, n| Box::pin(jenkins::replay(site, n))),
    ("teamcity", |site, n| Box::pin(teamcity::replay(site, n))),
    ("gitlab", |site, n| Box::pin(gitlab::replay(site, n))),
    ("actions", |site, n| Box::pin(actions::replay(site, n))),
    ("mgmtcl", |site, n| Box::pin(mgmtcl::replay(site, n))),
    ("mcp", |site, n| Box::pin(mcp::replay(site, n))),
    ("legacy", |site, n| Box::pin(legacy::replay(site, n))),
    ("rules", |site, n| Box::pin(rules::replay(site, n))),
    ("cloud_connect", |site, n| {
        Box::pin(cloud_connect::replay(site, n))
    }),
    ("exporter", |site, n| Box::pin(exporter::replay(site, n))),
    ("packer", |site, n| Box::pin(packer::replay(site, n))),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_calls_of_every_client_are_answered_as_it_reads_them() {
    let page = include_str!("../../../docs/clients.md");
    for (name, _) in REPLAYS {
        let file = format!("{name}.rs");
        assert!(page.contains(&file), "docs/clients.md lacks {file}");
    }
    let _turn = turn().await;
    let begin = Instant::now();
    let cluster = Cluster::ready().await;
    rules::an_empty_cloud(&cluster).await;
    let idle = rules::Idle::open(&cluster).await;
    let idle = tokio::spawn(idle.used_again());
    let site = Arc::new(Site::open(cluster).await);
    let opened = begin.elapsed();
    let only = std::env::var("MAINSTAY_CLIENTS").unwrap_or_default();
    let wanted = |name: &&str| only.is_empty() || only.split(',').any(|one| one == *name);
    let mut running = JoinSet::new();
    let mut names = BTreeMap::new();
    for (name, replay) in REPLAYS.into_iter().filter(|(name, _)| wanted(name)) {
        let site = Arc::clone(&site);
        let task = running.spawn(async move {
            let mut took = Vec::new();
            for n in 0..site.cluster.members.len() {
                let begin = Instant::now();
                replay(Arc::clone(&site), n).await;
                took.push(format!("{:.1} s", begin.elapsed().as_secs_f64()));
            }
            format!("| {name} | {} |", took.join(" | "))
        });
        names.insert(task.id(), name);
    }
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    while let Some(ended) = running.join_next_with_id().await {
        match ended {
            Ok((_, row)) => rows.push(row),
            Err(e) => failed.push(names[&e.id()]),
        }
    }
    let replayed = begin.elapsed() - opened;
    eprintln!("| client | against c1 | c2 | c3 |\n| --- | --- | --- | --- |");
    eprintln!("{}", rows.join("\n"));
    assert!(failed.is_empty(), "replays that failed: {failed:?}");
    let Ok(mut site) = Arc::try_unwrap(site) else {
        panic!("a replay still holds the site");
    };
    idle.await.unwrap();
    rules::a_leader_dies_during_starts(&mut site).await;
    eprintln!(
        "set up {:.1} s, replays {:.1} s, all {:.1} s, {} requests by hand",
        opened.as_secs_f64(),
        replayed.as_secs_f64(),
        begin.elapsed().as_secs_f64(),
        wire::SENT.load(Ordering::Relaxed),
    );
}

impl Site {
    /// With a node, a group and the templates.
    async fn open(mut cluster: Cluster) -> Self {
        cluster.start_agent("node1", &["--driver", "qemu", "--capacity", ROOM]);
        let disk = guest();
        let disk = disk.to_str().unwrap();
        let of = ["--forward", "ssh:22", "--forward", "http:80"];
        let push = ["template", "push", "tiny", "--tag", "v1", "--disk", disk];
        cluster.cli_ok(&[&push[..], &of[..]].concat());
        let template = template_id(&cluster, "tiny").await.unwrap();
        let foreign = push_small_template(&cluster, "foreign").await;
        let mut histories = BTreeMap::new();
        for name in ["of-jenkins", "of-packer"] {
            for n in 0..HISTORY {
                let disk = cluster.dir.path().join(format!("{name}-{n}.raw"));
                noise_file(&disk, 70_000, n as u64);
                let (tag, disk) = (format!("v{n}"), disk.to_str().unwrap().to_owned());
                cluster.cli_ok(&["template", "push", name, "--tag", &tag, "--disk", &disk]);
            }
            histories.insert(name, template_id(&cluster, name).await.unwrap());
        }
        let joined = until("the node is there", START_MAX, || async {
            let nodes = cluster.call(0, "GET", "/api/v1/node", None).await.ok()?;
            Some(nodes.as_array()?.first()?.clone())
        })
        .await;
        rules::a_node_that_just_joined(&joined);
        let node = joined["node_id"].as_str().unwrap().to_owned();
        let call = |path, body| cluster.call(0, "POST", path, Some(body));
        let group = call("/api/v1/group", json!({"name": "macs"}))
            .await
            .unwrap();
        let group = group["id"].as_str().unwrap().to_owned();
        let join = json!({"group_ids": [group], "node_ids": [node]});
        call("/api/v1/node/group", join).await.unwrap();
        Self {
            cluster,
            template,
            foreign,
            node,
            group,
            histories,
        }
    }

    /// API address of member `n`, counted around.
    pub(crate) fn api(&self, n: usize) -> &str {
        &self.cluster.members[n % self.cluster.members.len()].api
    }

    /// Registry address of member `n`.
    pub(crate) fn registry(&self, n: usize) -> &str {
        &self.cluster.members[n % self.cluster.members.len()].registry
    }

    /// Until nothing of this instance is left on its node; seen through member `n`.
    pub(crate) async fn ended(&self, n: usize, id: &str) {
        let n = n % self.cluster.members.len();
        until(&format!("{id} has ended"), START_MAX, || async {
            let path = format!("/api/v1/vm?id={id}");
            match self.cluster.call(n, "GET", &path, None).await {
                Ok(vm) => over(&vm).then_some(()),
                Err(why) => why.ends_with("Not found").then_some(()),
            }
        })
        .await;
    }
}

/// Is nothing of it left? One that never had a VM has no last state, but no node either.
pub(crate) fn over(vm: &Value) -> bool {
    match vm["instance_state"].as_str() {
        Some("Terminated") => true,
        Some("Terminating") => vm.get("node_id").is_none(),
        _ => false,
    }
}

/// Standard base64 with padding, one line.
pub(crate) fn base64(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// Polls until something is `Some`, with a client's patience.
pub(crate) struct Patience {
    what: String,
    begin: Instant,
}

impl Patience {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            begin: Instant::now(),
        }
    }

    /// Pause before the next poll; the test ends when it took too long.
    pub(crate) async fn pause(&self, seen: &Value) {
        let over = self.begin.elapsed() > START_MAX;
        assert!(!over, "not within {START_MAX:?}: {}: {seen}", self.what);
        tokio::time::sleep(POLL).await;
    }
}

/// What a client does before it logs in: can the port be reached?
pub(crate) async fn probe(host: &str, port: u64) {
    let port = u16::try_from(port).unwrap();
    let patience = Patience::new(format!("{host}:{port} can be reached"));
    loop {
        let within = Duration::from_secs(1);
        match tokio::time::timeout(within, TcpStream::connect((host, port))).await {
            Ok(Ok(_)) => return,
            _ => patience.pause(&Value::Null).await,
        }
    }
}

/// What the guest's web server says on a forwarded port, once it does.
pub(crate) async fn page(host: &str, port: u64, path: &str) -> String {
    let patience = Patience::new(format!("{path} of {host}:{port}"));
    let last = [("Connection", "close")];
    let at = format!("{host}:{port}");
    let mut wire = Wire::new(&at, Duration::from_secs(5), &last).without_memory();
    loop {
        match wire.send("GET", path, &[], &Load::Nothing).await {
            Ok(answer) if answer.status == 200 => return answer.text,
            _ => patience.pause(&Value::Null).await,
        }
    }
}

/// Host port of the rule for a guest port.
pub(crate) fn forwarded(vm: &Value, guest: u64) -> u64 {
    let rules = read::go_list(&vm["vminfo"], "port_forwarding");
    let fits = |rule: &&Value| read::java_int(rule, "guest_port") == guest;
    let rule = rules.iter().find(fits);
    read::java_int(
        rule.unwrap_or_else(|| panic!("no rule for {guest}: {vm}")),
        "host_port",
    )
}
