//! A new member behind a thin line: the snapshot takes long, the log moves on behind it, and it ends, once.

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::snapshots::{offline, save, verified};
use crate::{rounds, turn};
use base64::Engine as _;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

/// What passes the line in a second, all connections and both ways together.
const BYTES_PER_S: usize = 5 << 20;
/// Passed on at once: small, so that connections share the line fairly.
const PIECE: usize = 16 << 10;
/// Script bytes of one instance: what fills the state.
const SCRIPT: usize = 1 << 20;

/// The line: pieces pass one after the other, each after its time.
struct Line {
    free_at: Mutex<Instant>,
    passed: AtomicU64,
}

impl Line {
    async fn pass(&self, bytes: usize) {
        let takes = Duration::from_secs_f64(bytes as f64 / BYTES_PER_S as f64);
        let due = {
            let mut free_at = self.free_at.lock().await;
            *free_at = (*free_at).max(Instant::now()) + takes;
            *free_at
        };
        tokio::time::sleep_until(due.into()).await;
        self.passed.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Accept connections and pass them on to `to` over one thin line.
async fn proxy(listener: TcpListener, to: String, line: Arc<Line>) {
    while let Ok((near, _)) = listener.accept().await {
        let (to, line) = (to.clone(), line.clone());
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(&to).await else {
                return;
            };
            near.set_nodelay(true).ok();
            far.set_nodelay(true).ok();
            let (near_read, near_write) = near.into_split();
            let (far_read, far_write) = far.into_split();
            tokio::select! {
                () = carry(near_read, far_write, &line) => {}
                () = carry(far_read, near_write, &line) => {}
            }
        });
    }
}

async fn carry(
    mut read: impl AsyncReadExt + Unpin,
    mut write: impl AsyncWriteExt + Unpin,
    line: &Line,
) {
    let mut piece = vec![0; PIECE];
    while let Ok(n) = read.read(&mut piece).await {
        line.pass(n).await;
        if n == 0 || write.write_all(&piece[..n]).await.is_err() {
            return;
        }
    }
}

/// Instances whose scripts make up `mb` of state.
async fn fill(cluster: &Cluster, template: &str, mb: usize) {
    let script = |n: usize| {
        let bytes: Vec<u8> = (0..SCRIPT)
            .map(|i| ((i * 31 + n * 7) % 251) as u8)
            .collect();
        base64::engine::general_purpose::STANDARD.encode(bytes)
    };
    for n in 0..mb {
        let body = json!({"vmid": template, "startup_script": script(n)});
        let made = cluster.call(0, "POST", "/api/v1/vm", Some(body)).await;
        made.unwrap();
    }
}

/// A saved snapshot of a cloud with `mb` of state.
async fn large_snapshot(to: &Path, mb: usize) {
    let mut cluster = Cluster::new(1);
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    let template = push_small_template(&cluster, "any").await;
    fill(&cluster, &template, mb).await;
    std::fs::copy(save(&cluster, "large.snap"), to).unwrap();
}

/// Two members; the first has the state and no log behind it, the second is reached over the thin line.
async fn two(mb: usize, line: &Arc<Line>) -> Cluster {
    let mut cluster = Cluster::new(2);
    let file = cluster.dir.path().join("saved.snap");
    large_snapshot(&file, mb).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    cluster.members[1].advertised = Some(listener.local_addr().unwrap().to_string());
    let real = cluster.members[1].peer.clone();
    tokio::spawn(proxy(listener, real, line.clone()));
    let data = cluster.members[0].data.to_str().unwrap();
    let file = file.to_str().unwrap();
    let out = offline(&[
        "snapshot",
        "restore",
        file,
        "--name",
        "c1",
        "--data-dir",
        data,
    ]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    cluster
}

/// Write through the first member until told to stop; how often.
fn keep_writing(cluster: &Cluster, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<u64> {
    let (client, stop) = (cluster.client.clone(), stop.clone());
    let url = format!("http://{}/api/v1/group", cluster.members[0].api);
    tokio::spawn(async move {
        let mut made = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            let body = json!({"name": format!("g{made}")}).to_string();
            let sent = client.post(&url).body(body).send().await;
            made += u64::from(sent.is_ok_and(|a| a.status() == 200));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        made
    })
}

/// `MAINSTAY_THIN_LINE_MB=50` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_over_a_thin_line_ends_once() {
    let _turn = turn().await;
    let mb = rounds("MAINSTAY_THIN_LINE_MB", 12);
    let line = Arc::new(Line {
        free_at: Mutex::new(Instant::now()),
        passed: AtomicU64::new(0),
    });
    let mut cluster = two(mb, &line).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writes = keep_writing(&cluster, &stop);
    let begin = Instant::now();
    cluster.start(1);
    cluster.wait_ready(&[1]).await;
    until("two voters", Duration::from_secs(120), || async {
        let list = cluster.call(0, "GET", "/api/v1/members", None).await.ok()?;
        let voters = list.as_array()?.iter().filter(|m| m["role"] == "voter");
        (voters.count() == 2).then_some(())
    })
    .await;
    let took = begin.elapsed();
    stop.store(true, Ordering::Relaxed);
    let made = writes.await.unwrap();
    let passed = line.passed.load(Ordering::Relaxed);
    eprintln!("{mb} MB of state, {passed} bytes over the line, {made} writes meanwhile, {took:?}");
    assert!(
        passed as usize >= mb * SCRIPT,
        "the state went over the line"
    );
    assert!(made > 0, "the log moved on");
    let sent = cluster.log("c1").matches("snapshot sent").count();
    let installed = cluster.log("c2").matches("snapshot installed").count();
    assert_eq!((sent, installed), (1, 1), "sent, installed");
    let digests = [0, 1].map(|n: usize| {
        let file = cluster.dir.path().join(format!("{n}.snap"));
        let at = format!("http://{}", cluster.members[n].api);
        let out = offline(&[
            "snapshot",
            "save",
            file.to_str().unwrap(),
            "--endpoints",
            &at,
        ]);
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        verified(&file)["state_digest"].clone()
    });
    assert_eq!(digests[0], digests[1]);
}
