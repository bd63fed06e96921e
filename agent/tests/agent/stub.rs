//! Controllers that say what they are told to say and remember what they hear, a source of images
//! that can be held back, and an agent between them.

use async_trait::async_trait;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use mainstay_agent::agent::{Agent, AgentConfig};
use mainstay_agent::cache::Reserve;
use mainstay_agent::cache::fetch::{Fetch, Told};
use mainstay_agent::converge::executor::{Executor, Settings};
use mainstay_agent::driver::Driver;
use mainstay_agent::driver::fake::{FakeConfig, FakeDriver};
use mainstay_agent::sync::SyncConfig;
use mainstay_agent::transfer::api::TagInfo;
use mainstay_agent::transfer::{FileEntry, Manifest, PushSpec, TransferError};
use mainstay_agent::wire::*;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the stubs of one cluster share.
pub(crate) struct Cluster {
    pub(crate) id: Mutex<String>,
    pub(crate) desired: watch::Sender<DesiredSet>,
    pub(crate) reports: watch::Sender<Report>,
    pub(crate) registered: watch::Sender<u32>,
    /// Told to agents.
    pub(crate) controllers: Mutex<Vec<String>>,
    pub(crate) known: Mutex<bool>,
}

impl Cluster {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            id: Mutex::new("cluster-1".to_owned()),
            desired: watch::Sender::new(DesiredSet::default()),
            reports: watch::Sender::new(Report::default()),
            registered: watch::Sender::new(0),
            controllers: Mutex::new(Vec::new()),
            known: Mutex::new(true),
        })
    }

    pub(crate) fn want(&self, instances: Vec<DesiredInstance>) {
        self.desired.send_modify(|set| {
            set.generation += 1;
            set.instances = instances;
        });
    }

    /// Waits until the newest report meets `met`.
    pub(crate) async fn reported(&self, what: &str, met: impl Fn(&Report) -> bool) -> Report {
        let mut reports = self.reports.subscribe();
        let found = tokio::time::timeout(Duration::from_secs(20), reports.wait_for(|r| met(r)));
        match found.await {
            Ok(report) => report.unwrap().clone(),
            Err(_) => panic!("never reported: {what}; last: {:#?}", self.reports.borrow()),
        }
    }

    /// Waits until what is said of the save of `id` meets `met`; what is said of the instance then.
    pub(crate) async fn saving(
        &self,
        id: &str,
        what: &str,
        met: impl Fn(&SaveSeen) -> bool,
    ) -> Observed {
        let of = |r: &Report| {
            let seen = r.observed.iter().find(|o| o.id == id)?.clone();
            seen.save.as_ref().is_some_and(&met).then_some(seen)
        };
        let what = format!("save of {id}: {what}");
        let report = self.reported(&what, |r| of(r).is_some()).await;
        of(&report).unwrap()
    }

    /// Waits until `id` is reported in `phase`.
    pub(crate) async fn phase(&self, id: &str, phase: &str) -> Observed {
        let is = |r: &Report| r.observed.iter().any(|o| o.id == id && o.phase == phase);
        let report = self.reported(&format!("{id} {phase}"), is).await;
        report.observed.into_iter().find(|o| o.id == id).unwrap()
    }
}

/// One controller.
pub(crate) struct Stub {
    pub(crate) url: String,
    pub(crate) streams: watch::Sender<u32>,
    stop: watch::Sender<bool>,
    silent: watch::Sender<bool>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Port {
    cluster: Arc<Cluster>,
    streams: watch::Sender<u32>,
    stop: watch::Receiver<bool>,
    silent: watch::Receiver<bool>,
}

impl Stub {
    pub(crate) async fn new(cluster: &Arc<Cluster>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = watch::channel(false);
        let (silent, falls_silent) = watch::channel(false);
        let streams = watch::Sender::new(0);
        let port = Port {
            cluster: Arc::clone(cluster),
            streams: streams.clone(),
            stop: stopped.clone(),
            silent: falls_silent,
        };
        let router = Router::new()
            .route("/api/v1/status", get(status))
            .route("/agent/v1/register", post(register))
            .route("/agent/v1/desired", get(desired))
            .route("/agent/v1/report", post(report))
            .with_state(port);
        let task = tokio::spawn(async move {
            let mut stopped = stopped;
            let until = async move {
                let _ = stopped.wait_for(|s| *s).await;
            };
            let served = axum::serve(listener, router).with_graceful_shutdown(until);
            served.await.unwrap();
        });
        Self {
            url,
            streams,
            stop,
            silent,
            task,
        }
    }

    /// Dies: no more connections, streams cut.
    pub(crate) async fn kill(self) {
        self.stop.send_replace(true);
        self.task.abort();
        let _ = self.task.await;
    }

    /// Open streams say no more, but stay open.
    pub(crate) fn fall_silent(&self) {
        self.silent.send_replace(true);
    }

    pub(crate) async fn streamed(&self, times: u32) {
        let mut streams = self.streams.subscribe();
        let opened =
            tokio::time::timeout(Duration::from_secs(20), streams.wait_for(|n| *n >= times));
        opened.await.expect("the stream is opened").unwrap();
    }
}

async fn status() -> Response {
    Json(serde_json::json!({"status": "OK", "body": {"status": "Running", "registry_address": ""}}))
        .into_response()
}

async fn register(State(port): State<Port>, Json(call): Json<RegisterRequest>) -> Response {
    port.cluster.registered.send_modify(|n| *n += 1);
    *port.cluster.known.lock().unwrap() = true;
    Json(RegisterResponse {
        node_id: call.node_id,
        cluster_id: port.cluster.id.lock().unwrap().clone(),
        heartbeat_ms: 200,
        lease_ms: 10_000,
        controllers: port.cluster.controllers.lock().unwrap().clone(),
        ..RegisterResponse::default()
    })
    .into_response()
}

async fn desired(State(port): State<Port>) -> Response {
    port.streams.send_modify(|n| *n += 1);
    let set = port.cluster.desired.subscribe();
    let (stop, silent) = (port.stop.clone(), port.silent.clone());
    let lines = futures::stream::unfold((set, stop, silent, true), |mut at| async move {
        if !at.3 {
            let beat = tokio::time::sleep(Duration::from_millis(100));
            tokio::select! {
                _ = at.0.changed() => {}
                _ = at.1.wait_for(|s| *s) => return None,
                () = beat => {}
            }
        }
        if *at.2.borrow() {
            let _ = at.1.wait_for(|s| *s).await;
            return None;
        }
        at.3 = false;
        let line = serde_json::to_string(&*at.0.borrow_and_update()).unwrap() + "\n";
        Some((Ok::<_, std::io::Error>(line), at))
    });
    Body::from_stream(lines).into_response()
}

async fn report(State(port): State<Port>, Json(report): Json<Report>) -> Response {
    if *port.stop.borrow() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let known = *port.cluster.known.lock().unwrap();
    if known {
        port.cluster.reports.send_replace(report);
    }
    Json(ReportResponse {
        known,
        controllers: port.cluster.controllers.lock().unwrap().clone(),
        registries: Vec::new(),
    })
    .into_response()
}

/// Images whose tag is in `held` do not arrive, nor do those that are delivered under it; those whose tag begins with
/// `endless` fit on no disk.
#[derive(Default)]
pub(crate) struct Images {
    pub(crate) held: watch::Sender<BTreeSet<String>>,
    /// Why the next deliveries come to nothing.
    pub(crate) refusals: Mutex<Vec<TransferError>>,
    /// The save and the bytes of each delivery.
    pub(crate) delivered: watch::Sender<Vec<(String, String)>>,
}

#[async_trait]
impl Fetch for Images {
    async fn deliver(
        &self,
        disk: &Path,
        spec: &PushSpec,
        told: &Told<'_>,
    ) -> Result<TagInfo, TransferError> {
        told(250, 1000);
        let mut held = self.held.subscribe();
        held.wait_for(|h| !h.contains(&spec.tag)).await.unwrap();
        if let Some(error) = self.refusals.lock().unwrap().pop() {
            return Err(error);
        }
        let bytes = std::fs::read_to_string(disk)?;
        self.delivered
            .send_modify(|all| all.push((spec.save.clone(), bytes)));
        Ok(TagInfo {
            visible: true,
            ..TagInfo::default()
        })
    }

    async fn fetch(
        &self,
        image: &ImageRef,
        dest: &Path,
        told: &Told<'_>,
    ) -> Result<Manifest, TransferError> {
        if image.tag.starts_with("endless") {
            told(0, u64::MAX);
            return std::future::pending().await;
        }
        told(0, 1000);
        told(250, 1000);
        let mut held = self.held.subscribe();
        held.wait_for(|h| !h.contains(&image.tag)).await.unwrap();
        std::fs::write(dest, b"bytes")?;
        let file = FileEntry {
            name: "disk.qcow2".to_owned(),
            format: "qcow2".to_owned(),
            size: 5,
            segments: Vec::new(),
        };
        Ok(Manifest {
            version: 1,
            files: vec![file],
        })
    }
}

/// An agent that runs in the background until it is dropped.
pub(crate) struct Running {
    pub(crate) executor: Executor,
    pub(crate) driver: Arc<FakeDriver>,
    pub(crate) images: Arc<Images>,
    pub(crate) task: JoinHandle<anyhow::Error>,
}

impl Running {
    /// As `kill -9` would: VMs stay (in the fake driver's file).
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    pub(crate) async fn vms(&self) -> Vec<String> {
        let list = self.driver.list().await.unwrap();
        list.into_iter().map(|vm| vm.id).collect()
    }
}

pub(crate) async fn agent(dir: &Path, controllers: &[&Stub]) -> Running {
    let urls = controllers.iter().map(|s| s.url.clone()).collect();
    agent_with(dir, urls, usize::MAX).await
}

pub(crate) async fn agent_with(dir: &Path, controllers: Vec<String>, capacity: usize) -> Running {
    let fake = FakeConfig {
        capacity,
        ..FakeConfig::default()
    };
    agent_on(dir, controllers, fake, Duration::from_millis(50)).await
}

/// With a driver like this, which is asked for what is there only so often.
pub(crate) async fn agent_on(
    dir: &Path,
    controllers: Vec<String>,
    fake: FakeConfig,
    survey_every: Duration,
) -> Running {
    let ms = Duration::from_millis;
    let config = AgentConfig {
        controllers,
        data_dir: dir.to_owned(),
        name: "n1".to_owned(),
        capacity: 9,
        settings: Settings {
            retry_pause: ms(20),
            reject_pause: ms(10),
            survey_every,
            reserve: Reserve::Bytes(0),
            ..Settings::default()
        },
        sync: SyncConfig {
            backoff: (ms(20), ms(200)),
            ..SyncConfig::default()
        },
        ..AgentConfig::default()
    };
    let fake = FakeConfig {
        boot_delay: ms(10),
        file: Some(dir.join("vms.json")),
        ..fake
    };
    std::fs::create_dir_all(dir).unwrap();
    let driver = Arc::new(FakeDriver::open(fake).unwrap());
    let images = Arc::new(Images::default());
    let agent = Agent::open_with(
        &config,
        async |_| Ok(Arc::clone(&driver) as Arc<dyn Driver>),
        |_, _| Arc::clone(&images) as Arc<dyn Fetch>,
    )
    .await
    .unwrap();
    Running {
        executor: agent.executor().clone(),
        driver,
        images,
        task: tokio::spawn(agent.run()),
    }
}

pub(crate) fn run(id: &str, generation: u64) -> DesiredInstance {
    DesiredInstance {
        id: id.to_owned(),
        generation,
        run: true,
        image: ImageRef {
            template_id: "t1".to_owned(),
            tag: "v1".to_owned(),
            manifest: "ab".repeat(32),
            ..ImageRef::default()
        },
        ..DesiredInstance::default()
    }
}

pub(crate) fn again(wish: DesiredInstance) -> DesiredInstance {
    DesiredInstance {
        keep: true,
        restart: true,
        ..wish
    }
}

/// To be saved as tag `v2`.
pub(crate) fn save(wish: DesiredInstance, id: &str, go: bool) -> DesiredInstance {
    DesiredInstance {
        keep: true,
        save: Some(SaveOrder {
            id: id.to_owned(),
            go,
            template: "debian".to_owned(),
            tag: "v2".to_owned(),
            ..SaveOrder::default()
        }),
        ..wish
    }
}

pub(crate) fn stop(id: &str, generation: u64) -> DesiredInstance {
    DesiredInstance {
        run: false,
        ..run(id, generation)
    }
}

/// `body` is in the fake driver's language. Of an instance that is to be saved it is the script before that.
pub(crate) fn script(mut instance: DesiredInstance, body: &str, on_failure: u8) -> DesiredInstance {
    use base64::Engine as _;
    let script = Script {
        body: base64::engine::general_purpose::STANDARD.encode(body),
        monitored: true,
        timeout_s: 60,
        at_boot: false,
        on_failure,
    };
    match &mut instance.save {
        Some(order) => order.script = Some(script),
        None => instance.script = Some(script),
    }
    instance
}

/// Waits for something that nobody tells.
pub(crate) async fn until(what: &str, mut met: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !met().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(20), wait).await;
    done.unwrap_or_else(|_| panic!("never: {what}"));
}
