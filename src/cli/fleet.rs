//! `mainstay bench schedule`: a fleet of simulated nodes, and instances for them. Each node has the two connections and speaks
//! the whole protocol of a real agent (registers, reads its stream, reports on change and with each heartbeat); it only
//! runs nothing: what it is told to run is `running` at once. So everything that a member does for a node is done.
//!
//! Phases, each a line of figures: the nodes join; instances are started in a closed loop until all are `Started`; single
//! starts at a fixed rate; heartbeats alone. A node has an instance when the member has written it into the node's stream and the
//! node has read it: placed, committed, applied and told.

use super::load::{Link, host_of, quantile_ms};
use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use clap::Args;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use mainstay_agent::wire::{
    ImageRef, Observed, RegisterRequest, RegisterResponse, Report, ReportResponse, VmFacts,
};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

/// Nodes that register at the same time.
const JOIN_AT_ONCE: usize = 64;
/// Changes within this time travel in one report, as with a real agent.
const COALESCE: Duration = Duration::from_millis(20);
/// Before a node turns to the next member.
const MOVE_PAUSE: Duration = Duration::from_millis(200);
/// Between two looks at how far all are.
const LOOK: Duration = Duration::from_millis(10);
/// Between two questions to the cluster.
const ASK: Duration = Duration::from_millis(200);

/// How many nodes and instances.
#[derive(Debug, Args)]
pub struct FleetArgs {
    /// Simulated nodes.
    #[arg(long, default_value_t = 100)]
    pub nodes: usize,
    /// Instances that are started as fast as they are accepted.
    #[arg(long, default_value_t = 1000)]
    pub instances: usize,
    /// Instances in one request.
    #[arg(long, default_value_t = 100)]
    pub per_request: usize,
    /// Clients, each with one request at a time.
    #[arg(long, default_value_t = 4)]
    pub clients: usize,
    /// Then single starts, so many a second.
    #[arg(long, default_value_t = 100)]
    pub rate: u32,
    /// For so many seconds.
    #[arg(long, default_value_t = 10)]
    pub rate_seconds: u32,
    /// Then nothing but heartbeats for so many seconds.
    #[arg(long, default_value_t = 10)]
    pub idle_seconds: u64,
    /// Longest time that a phase may take, in seconds.
    #[arg(long, default_value_t = 900)]
    pub patience: u64,
    /// Template of the instances; its bytes are never fetched.
    #[arg(long, default_value = "bench")]
    pub template: String,
}

/// What all nodes share.
#[derive(Default)]
struct Fleet {
    hosts: Vec<String>,
    capacity: u32,
    /// When a node was first told of an instance.
    told: Mutex<HashMap<String, Instant>>,
    joined: AtomicUsize,
    reports: AtomicU64,
    /// Sessions that ended: none should.
    moved: AtomicU64,
    first_error: Mutex<Option<String>>,
}

/// As much of a desired set as a simulated node needs.
#[derive(Deserialize)]
struct Set<'a> {
    generation: u64,
    #[serde(borrow)]
    instances: Vec<Wish<'a>>,
}

#[derive(Deserialize)]
struct Wish<'a> {
    id: &'a str,
    generation: u64,
    run: bool,
    image: Image<'a>,
}

#[derive(Deserialize)]
struct Image<'a> {
    template_id: &'a str,
    number: u32,
}

/// Join the nodes, start the instances, print a line for each phase.
pub(super) async fn run(
    args: FleetArgs,
    endpoints: &[String],
    as_json: bool,
) -> anyhow::Result<()> {
    if endpoints.is_empty() || args.nodes == 0 || args.clients == 0 || args.per_request == 0 {
        bail!("bench schedule needs at least one endpoint, node, client and instance in a request");
    }
    // It holds two connections for each node.
    crate::descriptors::connections()?;
    let hosts = endpoints.iter().map(|e| host_of(e));
    let hosts = hosts.collect::<anyhow::Result<Vec<_>>>()?;
    let paced = args.rate as usize * args.rate_seconds as usize;
    // A tenth more room than is needed: with none at all the last ones would wait for one certain node.
    let room = (args.instances + paced).div_ceil(args.nodes);
    let fleet = Arc::new(Fleet {
        hosts,
        capacity: u32::try_from(room + room.div_ceil(10))?,
        ..Fleet::default()
    });
    let patience = Duration::from_secs(args.patience);
    let template = Link::open(&fleet.hosts[0]).await?;
    let template = { template }.template(&args.template).await?;

    let mut nodes = JoinSet::new();
    print(
        as_json,
        "join",
        &join(&fleet, &args, &mut nodes, patience).await?,
    );
    if args.instances > 0 {
        print(
            as_json,
            "fill",
            &fill(&fleet, &args, &template, patience).await?,
        );
    }
    if paced > 0 {
        print(
            as_json,
            "paced",
            &pace(&fleet, &args, &template, patience).await?,
        );
    }
    print(as_json, "idle", &idle(&fleet, &args).await?);
    Ok(())
}

#[allow(clippy::print_stdout)] // the command's result
fn print(as_json: bool, phase: &str, figures: &Value) {
    if as_json {
        println!("{}", json!({"phase": phase, "figures": figures}));
    } else {
        println!("{phase}: {figures}");
    }
}

async fn join(
    fleet: &Arc<Fleet>,
    args: &FleetArgs,
    nodes: &mut JoinSet<()>,
    patience: Duration,
) -> anyhow::Result<Value> {
    let begin = Instant::now();
    let gate = Arc::new(Semaphore::new(JOIN_AT_ONCE));
    for n in 0..args.nodes {
        nodes.spawn(node(Arc::clone(fleet), Arc::clone(&gate), n));
    }
    wait(patience, "nodes joined", fleet, || {
        (fleet.joined.load(Relaxed), args.nodes)
    })
    .await?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(json!({"nodes": args.nodes, "seconds": seconds}))
}

async fn fill(
    fleet: &Arc<Fleet>,
    args: &FleetArgs,
    template: &str,
    patience: Duration,
) -> anyhow::Result<Value> {
    let begin = Instant::now();
    let left = Arc::new(AtomicUsize::new(args.instances));
    let mut clients = JoinSet::new();
    for n in 0..args.clients {
        let mut caller = Caller::new(fleet, n, patience);
        let (left, template) = (Arc::clone(&left), template.to_owned());
        let most = args.per_request;
        clients.spawn(async move {
            let mut took = Vec::new();
            loop {
                let taken = left.fetch_update(Relaxed, Relaxed, |l| {
                    (l > 0).then(|| l.saturating_sub(most))
                });
                let Ok(before) = taken else {
                    return anyhow::Ok(took);
                };
                let start = Instant::now();
                caller.start(&template, before.min(most)).await?;
                took.push(micros(start.elapsed()));
            }
        });
    }
    let mut answers = Vec::new();
    while let Some(client) = clients.join_next().await {
        answers.extend(client.context("a client ended early")??);
    }
    let accepted = begin.elapsed().as_secs_f64();
    wait(patience, "instances told to nodes", fleet, || {
        (fleet.told.lock().len(), args.instances)
    })
    .await?;
    let told = begin.elapsed().as_secs_f64();
    // Every node's report has been applied.
    let end = Instant::now() + patience;
    while started(fleet).await.unwrap_or(0) < args.instances as u64 {
        if Instant::now() > end {
            bail!(
                "not all instances are Started after {} s",
                patience.as_secs()
            );
        }
        sleep(ASK).await;
    }
    answers.sort_unstable();
    Ok(json!({
        "instances": args.instances, "accepted_s": accepted, "told_s": told,
        "started_s": begin.elapsed().as_secs_f64(), "placed_per_second": args.instances as f64 / told,
        "answer_p50_ms": quantile_ms(&answers, 0.5), "answer_p99_ms": quantile_ms(&answers, 0.99),
    }))
}

/// A client of all members: where one does not answer, the next is asked, for the same thing.
struct Caller {
    hosts: Vec<String>,
    at: usize,
    link: Option<Link>,
    patience: Duration,
}

impl Caller {
    fn new(fleet: &Fleet, n: usize, patience: Duration) -> Self {
        Self {
            hosts: fleet.hosts.clone(),
            at: n,
            link: None,
            patience,
        }
    }

    async fn start(&mut self, template: &str, count: usize) -> anyhow::Result<()> {
        let body = json!({"vmid": template, "count": count, "external_id": "fleet"});
        let (body, key) = (body.to_string(), uuid::Uuid::new_v4().to_string());
        let end = Instant::now() + self.patience;
        loop {
            let Err(error) = self.try_start(&body, &key).await else {
                return Ok(());
            };
            if Instant::now() > end {
                return Err(error);
            }
            self.link = None;
            self.at += 1;
            sleep(MOVE_PAUSE).await;
        }
    }

    async fn try_start(&mut self, body: &str, key: &str) -> anyhow::Result<()> {
        let host = &self.hosts[self.at % self.hosts.len()];
        let link = match &mut self.link {
            Some(link) => link,
            none @ None => none.insert(Link::open(host).await?),
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri("/api/v1/vm")
            .header("host", host)
            .header("idempotency-key", key)
            .body(Full::new(Bytes::from(body.to_owned())))?;
        let answer = link.request(request).await?.collect().await?.to_bytes();
        let answer: Value = serde_json::from_slice(&answer)?;
        if answer["status"] != "OK" {
            bail!("{}", answer["message"]);
        }
        Ok(())
    }
}

/// Instances that the cluster calls `Started`, by the first member that answers.
async fn started(fleet: &Fleet) -> anyhow::Result<u64> {
    let mut link = fleet.link().await?;
    let stats = link.call(Method::GET, "/api/v1/stats", None).await?;
    Ok(stats["instances"]["Started"].as_u64().unwrap_or(0))
}

impl Fleet {
    /// To the first member that can be reached.
    async fn link(&self) -> anyhow::Result<Link> {
        let mut last = anyhow::anyhow!("no member is known");
        for host in &self.hosts {
            match Link::open(host).await {
                Ok(link) => return Ok(link),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

async fn pace(
    fleet: &Arc<Fleet>,
    args: &FleetArgs,
    template: &str,
    patience: Duration,
) -> anyhow::Result<Value> {
    let known = fleet.told.lock().len();
    let mut ticks = interval(Duration::from_secs(1) / args.rate.max(1));
    // A late tick is a late start of the generator, not of the cluster: it is counted from its own time.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let links = Arc::new(Mutex::new(Vec::<Link>::new()));
    let mut starts = JoinSet::new();
    let total = args.rate * args.rate_seconds;
    for n in 0..total as usize {
        let due = ticks.tick().await;
        let (links, template) = (Arc::clone(&links), template.to_owned());
        let host = fleet.hosts[n % fleet.hosts.len()].clone();
        starts.spawn(async move {
            let kept = links.lock().pop();
            let mut link = match kept {
                Some(link) => link,
                None => Link::open(&host).await?,
            };
            let body = json!({"vmid": template, "external_id": "fleet"});
            let made = link.call(Method::POST, "/api/v1/vm", Some(body)).await?;
            let answered = due.elapsed();
            links.lock().push(link);
            let id = made[0].as_str().unwrap_or_default().to_owned();
            anyhow::Ok((due, answered, id))
        });
    }
    let mut all = Vec::new();
    while let Some(start) = starts.join_next().await {
        all.push(start.context("a start ended early")??);
    }
    wait(patience, "instances told to nodes", fleet, || {
        (fleet.told.lock().len() - known, total as usize)
    })
    .await?;
    let told = fleet.told.lock();
    let mut answers = Vec::new();
    let mut tolds = Vec::new();
    for (due, answered, id) in &all {
        let at = told
            .get(id)
            .context("an instance that nobody was told of")?;
        answers.push(micros(*answered));
        tolds.push(micros(at.saturating_duration_since(*due)));
    }
    answers.sort_unstable();
    tolds.sort_unstable();
    let ms = |of: &[u32], q| quantile_ms(of, q);
    Ok(json!({
        "starts": total, "per_second": args.rate,
        "answer_p50_ms": ms(&answers, 0.5), "answer_p99_ms": ms(&answers, 0.99), "answer_max_ms": ms(&answers, 1.0),
        "told_p50_ms": ms(&tolds, 0.5), "told_p99_ms": ms(&tolds, 0.99), "told_max_ms": ms(&tolds, 1.0),
    }))
}

async fn idle(fleet: &Arc<Fleet>, args: &FleetArgs) -> anyhow::Result<Value> {
    let mut link = fleet.link().await?;
    let (log, reports, begin) = (
        last_log(&mut link).await?,
        fleet.reports.load(Relaxed),
        Instant::now(),
    );
    sleep(Duration::from_secs(args.idle_seconds)).await;
    let seconds = begin.elapsed().as_secs_f64();
    let reports = fleet.reports.load(Relaxed) - reports;
    let entries = last_log(&mut link).await?.saturating_sub(log);
    Ok(json!({
        "seconds": seconds, "reports_per_second": reports as f64 / seconds, "log_entries": entries,
        "sessions_ended": fleet.moved.load(Relaxed), "first_error": *fleet.first_error.lock(),
    }))
}

/// Last index of the member's log.
async fn last_log(link: &mut Link) -> anyhow::Result<u64> {
    let page = link.send(Method::GET, "/metrics", None).await?;
    let page = String::from_utf8_lossy(&page);
    let mut lines = page.lines();
    let line = lines.find_map(|l| l.strip_prefix("mainstay_raft_last_log_index "));
    Ok(line.context("/metrics has no last log index")?.parse()?)
}

async fn wait(
    patience: Duration,
    what: &str,
    fleet: &Fleet,
    look: impl Fn() -> (usize, usize),
) -> anyhow::Result<()> {
    let end = Instant::now() + patience;
    loop {
        let (now, all) = look();
        if now >= all {
            return Ok(());
        }
        if Instant::now() > end {
            let why = fleet.first_error.lock().clone().unwrap_or_default();
            bail!(
                "only {now} of {all} {what} after {} s {why}",
                patience.as_secs()
            );
        }
        sleep(LOOK).await;
    }
}

/// One simulated node, for ever.
async fn node(fleet: Arc<Fleet>, gate: Arc<Semaphore>, n: usize) {
    let id = uuid::Uuid::new_v4().to_string();
    for turn in n.. {
        let host = &fleet.hosts[turn % fleet.hosts.len()];
        let joined = Session::join(&fleet, &gate, host, n, &id).await;
        let ended = match joined {
            Ok(mut session) => {
                if turn == n {
                    fleet.joined.fetch_add(1, Relaxed);
                }
                session.run().await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            fleet.moved.fetch_add(1, Relaxed);
            let mut first = fleet.first_error.lock();
            first.get_or_insert_with(|| format!("{error:#}"));
        }
        sleep(MOVE_PAUSE).await;
    }
}

/// A node's life with one home.
struct Session<'a> {
    fleet: &'a Fleet,
    calls: Link,
    body: hyper::body::Incoming,
    /// The connection lives as long as this.
    _stream: Link,
    buffer: BytesMut,
    line: BytesMut,
    beat: Duration,
    next: Instant,
    report: Report,
}

impl<'a> Session<'a> {
    async fn join(
        fleet: &'a Fleet,
        gate: &Semaphore,
        host: &str,
        n: usize,
        id: &str,
    ) -> anyhow::Result<Session<'a>> {
        let _turn = gate.acquire().await?;
        let mut calls = Link::open(host).await?;
        let who = RegisterRequest {
            node_id: id.to_owned(),
            name: format!("simulated-{n}"),
            ip_address: "127.0.0.1".to_owned(),
            arch: "amd64".to_owned(),
            cpu_count: 64,
            ram_mb: 262_144,
            disk_bytes: 1 << 40,
            capacity: fleet.capacity,
            agent_version: super::VERSION.to_owned(),
            driver: "simulated".to_owned(),
            ..RegisterRequest::default()
        };
        let answer = calls
            .send(
                Method::POST,
                "/agent/v1/register",
                Some(serde_json::to_vec(&who)?),
            )
            .await?;
        let answer: RegisterResponse = serde_json::from_slice(&answer)?;
        let path = format!("/agent/v1/desired?node_id={id}");
        let mut stream = Link::open(host).await?;
        let body = stream.ask(Method::GET, &path, Vec::new()).await?;
        let beat = Duration::from_millis(answer.heartbeat_ms.max(10));
        // No two nodes are in step.
        let phase = (n as f64 * 0.618_034).fract();
        Ok(Session {
            fleet,
            calls,
            body,
            _stream: stream,
            buffer: BytesMut::new(),
            line: BytesMut::new(),
            beat,
            next: Instant::now() + beat.mul_f64(phase),
            report: Report {
                node_id: id.to_owned(),
                pulls: Some(Vec::new()),
                ..Report::default()
            },
        })
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                frame = timeout(self.beat * 3, self.body.frame()) => {
                    let frame = frame.context("the stream fell silent")?;
                    let frame = frame.context("the stream ended")??;
                    if let Ok(bytes) = frame.into_data() {
                        self.buffer.extend_from_slice(&bytes);
                    }
                    if self.read_lines()? {
                        self.next = self.next.min(Instant::now() + COALESCE);
                    }
                }
                () = sleep_until(self.next) => self.say().await?,
            }
        }
    }

    /// Is there anything to report?
    fn read_lines(&mut self) -> anyhow::Result<bool> {
        let mut news = false;
        while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
            let line = self.buffer.split_to(end + 1);
            // A sign of life.
            if line != self.line {
                self.take(&line)?;
                self.line = line;
                news = true;
            }
        }
        Ok(news)
    }

    fn take(&mut self, line: &[u8]) -> anyhow::Result<()> {
        let set: Set<'_> = serde_json::from_slice(line)?;
        let now = Instant::now();
        let mut told = self.fleet.told.lock();
        for wish in set.instances.iter().filter(|w| w.run) {
            if !told.contains_key(wish.id) {
                told.insert(wish.id.to_owned(), now);
            }
        }
        drop(told);
        self.report.generation = set.generation;
        self.report.observed = set.instances.iter().map(observed).collect();
        for wish in set.instances.iter().filter(|w| w.run) {
            let has = |i: &ImageRef| {
                i.template_id == wish.image.template_id && i.number == wish.image.number
            };
            if !wish.image.template_id.is_empty() && !self.report.images.iter().any(has) {
                self.report.images.push(ImageRef {
                    template_id: wish.image.template_id.to_owned(),
                    number: wish.image.number,
                    ..ImageRef::default()
                });
            }
        }
        let running = set.instances.iter().filter(|w| w.run).count();
        self.report.stats.vm_count = u32::try_from(running)?;
        Ok(())
    }

    async fn say(&mut self) -> anyhow::Result<()> {
        let body = serde_json::to_vec(&self.report)?;
        let answer = self
            .calls
            .send(Method::POST, "/agent/v1/report", Some(body))
            .await?;
        let answer: ReportResponse = serde_json::from_slice(&answer)?;
        if !answer.known {
            bail!("the node is not known");
        }
        self.fleet.reports.fetch_add(1, Relaxed);
        self.next = Instant::now() + self.beat * 7 / 8;
        Ok(())
    }
}

fn observed(wish: &Wish<'_>) -> Observed {
    let vm = wish.run.then(|| VmFacts {
        uuid: wish.id.to_owned(),
        name: format!("simulated-{}", wish.id),
        status: "running".to_owned(),
        ip: "10.0.2.15".to_owned(),
        host_ip: "127.0.0.1".to_owned(),
        cpu_cores: 2,
        ram_mb: 4096,
        accelerator: "none (simulated)".to_owned(),
        ..VmFacts::default()
    });
    Observed {
        id: wish.id.to_owned(),
        generation: wish.generation,
        phase: if wish.run { "running" } else { "gone" }.to_owned(),
        vm,
        ..Observed::default()
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
