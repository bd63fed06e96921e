//! The registry over real HTTP and real chunk stores; the replicated state is the real model, the
//! consensus around it is one lock.

mod ahead;
mod bad;
mod bucket;
mod collect;
mod dialect;
mod keep;
mod nodes;
mod oci;
mod oci_bounds;
mod pull;
mod push;
mod replicate;

use super::*;
use crate::app::{AppError, Consistency};
use async_trait::async_trait;
use mainstay_agent::transfer::api::Durability;
use mainstay_agent::transfer::{Published, PushSpec, TransferError, pull_file, push_file};
use mainstay_model::{Command, CommandId, Envelope, Outcome, State};
use mainstay_raft::{Member, MemberStatus, Role, Status};
use mainstay_storage::chunks::ChunkOptions;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// One state that all members see at once.
struct Shared {
    state: Mutex<State>,
    status: watch::Sender<Status>,
    urls: Mutex<BTreeMap<MemberId, String>>,
    /// Members whose disk is full.
    full: Mutex<BTreeSet<u64>>,
    /// Bytes that fit on a member's disk; as many as one likes where nothing is said.
    left: Mutex<BTreeMap<u64, u64>>,
    /// No quorum: nobody can say that it is up to date.
    cut_off: AtomicBool,
}

struct Fake(Arc<Shared>);

#[async_trait]
impl Catalog for Fake {
    async fn look(
        &self,
        consistency: Consistency,
        look: &mut (dyn for<'a> FnMut(&'a State) + Send),
    ) -> Result<(), AppError> {
        let cut_off = self.0.cut_off.load(Ordering::Relaxed);
        if cut_off && consistency == Consistency::Linearizable {
            return Err(mainstay_raft::GroupError::NoLeader.into());
        }
        look(&self.0.state.lock());
        Ok(())
    }
    async fn submit(&self, id: CommandId, command: Command) -> Result<Outcome, AppError> {
        let envelope = Envelope {
            id,
            stamp_ms: crate::stamp::now_ms(),
            command,
        };
        let outcome = self.0.state.lock().apply(&envelope);
        self.0.status.send_modify(|s| s.applied += 1);
        match outcome {
            Outcome::Refused(refusal) => Err(AppError::Refused(refusal)),
            outcome => Ok(outcome),
        }
    }
    async fn members(&self) -> Result<Status, AppError> {
        Ok(self.0.status.borrow().clone())
    }
    fn watch(&self) -> watch::Receiver<Status> {
        self.0.status.subscribe()
    }
}

struct FakePeers {
    shared: Arc<Shared>,
    client: reqwest::Client,
}

impl PeerHttp for FakePeers {
    fn request(
        &self,
        method: reqwest::Method,
        member: MemberId,
        path: &str,
    ) -> Option<reqwest::RequestBuilder> {
        let url = self.shared.urls.lock().get(&member)?.clone();
        Some(self.client.request(method, format!("{url}{path}")))
    }
}

/// A served member.
struct TestMember {
    service: Arc<RegistryService>,
    url: String,
    tasks: Vec<JoinHandle<()>>,
}

impl TestMember {
    /// As if killed: open connections end, the port is closed.
    fn stop(&mut self) {
        self.tasks.drain(..).for_each(|t| t.abort());
    }
}

impl Drop for TestMember {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Cluster {
    shared: Arc<Shared>,
    dir: tempfile::TempDir,
    upkeep: Upkeep,
    /// Where all members have their chunks; `None`: each on its disk.
    bucket: Option<Arc<bucket::MemoryBucket>>,
    /// Seconds by which the chunk stores' clocks are ahead.
    hand: Arc<AtomicU64>,
}

impl Cluster {
    /// `size` voters, none of them served yet.
    fn new(size: u64) -> Self {
        let member = |id: u64| MemberStatus {
            member: Member {
                name: format!("c{id}"),
                ..Member::default()
            },
            role: Role::Voter,
            matched: None,
        };
        let members = (1..=size).map(|id| (id, member(id))).collect();
        let status = watch::Sender::new(Status {
            members,
            ..Status::default()
        });
        let shared = Shared {
            state: Mutex::default(),
            status,
            urls: Mutex::default(),
            full: Mutex::default(),
            left: Mutex::default(),
            cut_off: AtomicBool::new(false),
        };
        Self {
            shared: Arc::new(shared),
            dir: tempfile::tempdir().unwrap(),
            // Tests of copies want to see who copies what: those of sending ahead switch it on.
            upkeep: Upkeep {
                send_ahead: false,
                ..Upkeep::default()
            },
            bucket: None,
            hand: Arc::default(),
        }
    }

    /// As if so much time had passed in the chunk stores.
    fn pass(&self, time: Duration) {
        self.hand.fetch_add(time.as_secs(), Ordering::Relaxed);
    }

    fn chunk_dir(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("chunks-{id}"))
    }

    /// Serve member `id` from its directory; with or without its replicator.
    async fn serve(&self, id: u64, replicates: bool) -> TestMember {
        let (opened, hand) = (Instant::now(), Arc::clone(&self.hand));
        let options = ChunkOptions {
            clock: Arc::new(move || {
                opened.elapsed() + Duration::from_secs(hand.load(Ordering::Relaxed))
            }),
            ..ChunkOptions::default()
        };
        let dir = self.chunk_dir(id);
        let chunks = match &self.bucket {
            Some(bucket) => bucket.open(&dir, id),
            None => ChunkStore::open_with(&dir, options).unwrap(),
        };
        let names = BlobNames::open(&self.dir.path().join(format!("blobs-{id}"))).unwrap();
        let catalog = Arc::new(Fake(Arc::clone(&self.shared)));
        let peers = Arc::new(FakePeers {
            shared: Arc::clone(&self.shared),
            client: client(),
        });
        let shared = Arc::clone(&self.shared);
        let room = move || {
            let full = shared.full.lock().contains(&id);
            (!full).then_some(()).ok_or_else(|| "no room".to_owned())
        };
        let shared = Arc::clone(&self.shared);
        let left = move || shared.left.lock().get(&id).copied();
        let disk = Disk {
            may_store: Box::new(room),
            left: Box::new(left),
            central_log: CentralLog::new(self.dir.path().join(format!("central-logs-{id}"))),
        };
        let version = "1.0-test".to_owned();
        let service = RegistryService::new(
            catalog,
            (chunks, names),
            MemberId(id),
            peers,
            version,
            disk,
            self.upkeep,
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = registry_router(Arc::clone(&service));
        let mut tasks = vec![tokio::spawn(async move {
            axum::serve(listener, router).await.unwrap()
        })];
        if replicates {
            tasks.push(tokio::spawn(Arc::clone(&service).replicate()));
        }
        tasks.push(tokio::spawn(Arc::clone(&service).look_after()));
        let (peer, task) = serve_router(peer_router(Arc::clone(&service))).await;
        tasks.push(task);
        self.shared.urls.lock().insert(MemberId(id), peer);
        TestMember {
            service,
            url,
            tasks,
        }
    }

    async fn serve_all(&self) -> Vec<TestMember> {
        let count = self.shared.status.borrow().members.len() as u64;
        let mut members = Vec::new();
        for id in 1..=count {
            members.push(self.serve(id, true).await);
        }
        members
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Members that the state says hold the newest tag of `template`.
    fn holders(&self, template: &str) -> usize {
        let state = self.shared.state.lock();
        let found = state.templates.values().find(|t| t.name == template);
        found
            .and_then(|t| t.tags.values().next_back())
            .map_or(0, |t| t.holders.len())
    }
}

/// On a port of its own; its address.
async fn serve_router(router: Router) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let serve = async move { axum::serve(listener, router).await.unwrap() };
    (url, tokio::spawn(serve))
}

fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(2))
        .build()
        .unwrap()
}

fn spec(template: &str, tag: &str, durability: Durability) -> PushSpec {
    PushSpec {
        template: template.to_owned(),
        tag: tag.to_owned(),
        description: "a test".to_owned(),
        arch: "amd64".to_owned(),
        format: None,
        beside: Vec::new(),
        forwards: Vec::new(),
        durability,
        wait: Duration::from_secs(30),
        save: String::new(),
    }
}

/// All members know suspended templates.
fn know_suspended(cluster: &Cluster) {
    let level = mainstay_model::feature::SUSPENDED;
    let known = Envelope {
        id: CommandId(1),
        stamp_ms: 1,
        command: Command::SetFeatures { level },
    };
    cluster.shared.state.lock().apply(&known);
}

async fn push(urls: &[&str], path: &Path, spec: &PushSpec) -> Result<Published, TransferError> {
    let urls: Vec<String> = urls.iter().map(|&u| u.to_owned()).collect();
    push_file(&client(), &urls, path, spec, &|_, _| ()).await
}

async fn pull(urls: &[&str], manifest: &str, dest: &Path) -> Result<(), TransferError> {
    let urls: Vec<String> = urls.iter().map(|&u| u.to_owned()).collect();
    pull_file(&client(), &urls, manifest, 0, dest, &|_, _| ())
        .await
        .map(|_| ())
}

/// Bytes that look random; every third chunk compresses.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let squeeze = |n: usize| (n >> 16).is_multiple_of(3) && !n.is_multiple_of(8);
    (0..len)
        .map(|n| if squeeze(n) { (n >> 16) as u8 } else { next() })
        .collect()
}

/// 24 MiB of data in a file of 200 MiB and a bit: holes, written zeros, the same chunk twice.
fn write_image(path: &Path, seed: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len((200 << 20) + 1234).unwrap();
    let data = noise(seed, 12 << 20);
    file.write_all_at(&data, 0).unwrap();
    file.write_all_at(&noise(seed + 1, (12 << 20) - 777), 150 << 20)
        .unwrap();
    file.write_all_at(&data[..1 << 20], 40 << 20).unwrap();
    file.write_all_at(&vec![0; 1 << 20], 60 << 20).unwrap();
    file.write_all_at(b"the end", (200 << 20) + 1227).unwrap();
}

fn assert_same(a: &Path, b: &Path) {
    assert_eq!(
        std::fs::metadata(a).unwrap().len(),
        std::fs::metadata(b).unwrap().len()
    );
    assert!(
        std::fs::read(a).unwrap() == std::fs::read(b).unwrap(),
        "the bytes differ"
    );
}

/// Wait for a state, bounded.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A proxy that counts, and cuts connections after some bytes from the client.
struct Proxy {
    url: String,
    cuts: Arc<AtomicU64>,
    sent_back: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// The first `limits.len()` connections are cut after so many bytes from the client.
    async fn new(target: &str, limits: Vec<u64>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let target = target.trim_start_matches("http://").to_owned();
        let (cuts, sent_back) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let counters = (Arc::clone(&cuts), Arc::clone(&sent_back));
        let task = tokio::spawn(async move {
            let mut limits = limits.into_iter();
            while let Ok((inbound, _)) = listener.accept().await {
                let outbound = TcpStream::connect(&target).await.unwrap();
                let limit = limits.next();
                let (cuts, back) = (Arc::clone(&counters.0), Arc::clone(&counters.1));
                tokio::spawn(async move {
                    relay(inbound, outbound, limit.unwrap_or(u64::MAX), &cuts, &back).await;
                });
            }
        });
        Self {
            url,
            cuts,
            sent_back,
            task,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(
    inbound: TcpStream,
    outbound: TcpStream,
    limit: u64,
    cuts: &AtomicU64,
    back: &AtomicU64,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut from_client, mut to_client) = inbound.into_split();
    let (mut from_server, mut to_server) = outbound.into_split();
    let up = async {
        let mut limited = (&mut from_client).take(limit);
        let sent = tokio::io::copy(&mut limited, &mut to_server)
            .await
            .unwrap_or(0);
        if sent == limit {
            cuts.fetch_add(1, Ordering::Relaxed);
        }
    };
    let down = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
            back.fetch_add(n as u64, Ordering::Relaxed);
            if to_client.write_all(&buffer[..n]).await.is_err() {
                break;
            }
        }
    };
    // Either end closes both.
    tokio::select! { () = up => (), () = down => () }
}
