//! Committed durable writes per second of three members on one machine: `throughput [seconds] [dir]`.
//!
//! Three processes (this one starts the others), loopback TCP, write-ahead logs and sled on disk,
//! commands of 256 bytes, proposers spread over the members or all on the leader. Prints writes/s
//! and the p50/p99 latency at 1, 16, 64 and 256 proposers, and read barriers likewise.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use async_trait::async_trait;
use bytes::Bytes;
use mainstay_raft::machine::{Change, Entries};
use mainstay_raft::{Dialer, Fault, Group, GroupConfig, Machine, Member, PeerStream};
use mainstay_storage::engine::SledEngine;
use mainstay_storage::log::Wal;
use mainstay_storage::snapshot::SnapshotDir;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};

const DEADLINE: Duration = Duration::from_secs(30);

type Values = BTreeMap<Vec<u8>, Vec<u8>>;

/// The last value of each of ten thousand keys; and those changed.
#[derive(Default)]
struct Last(Mutex<(Values, Values)>);

impl Machine for Last {
    fn apply(&self, commands: Vec<Bytes>) -> Result<Vec<Bytes>, Fault> {
        let mut state = self.0.lock();
        for command in &commands {
            let (key, value) = command.split_at(8);
            state.0.insert(key.to_vec(), value.to_vec());
            state.1.insert(key.to_vec(), value.to_vec());
        }
        Ok(vec![Bytes::from_static(b"ok"); commands.len()])
    }
    fn take_changes(&self) -> Vec<Change> {
        let changed = std::mem::take(&mut self.0.lock().1);
        changed.into_iter().map(|(k, v)| (k, Some(v))).collect()
    }
    fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.0.lock().0.clone().into_iter().collect()
    }
    fn import(&self, entries: &mut Entries<'_>) -> Result<(), Fault> {
        self.0.lock().0 = entries.collect::<Result<_, _>>()?;
        Ok(())
    }
}

struct Tcp;

#[async_trait]
impl Dialer for Tcp {
    async fn dial(&self, _id: u64, member: &Member) -> std::io::Result<Box<dyn PeerStream>> {
        let stream = TcpStream::connect(&member.peer_url).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    match args.get(1).map(String::as_str) {
        Some("member") => runtime.block_on(member(args[2].parse().unwrap(), Path::new(&args[3]))),
        other => {
            let seconds = other.and_then(|s| s.parse().ok()).unwrap_or(3);
            let base = args.get(2).map_or_else(std::env::temp_dir, Into::into);
            conduct(seconds, &base);
        }
    }
}

/// The parent: starts members, has them measure, ends them.
fn conduct(seconds: u64, base: &Path) {
    let dir = tempfile::tempdir_in(base).unwrap();
    let mut children: Vec<(Child, BufReader<std::process::ChildStdout>)> = (1..=3)
        .map(|id| {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["member", &id.to_string()])
                .arg(dir.path().join(id.to_string()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let out = BufReader::new(child.stdout.take().unwrap());
            (child, out)
        })
        .collect();
    let line = |out: &mut BufReader<_>| {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    let addresses: Vec<String> = children.iter_mut().map(|(_, out)| line(out)).collect();
    let tell =
        |child: &mut Child, text: &str| writeln!(child.stdin.as_mut().unwrap(), "{text}").unwrap();
    for (child, _) in &mut children {
        tell(child, &addresses.join(" "));
    }
    let leaders: Vec<String> = children.iter_mut().map(|(_, out)| line(out)).collect();
    let leader: usize = leaders[0].parse().unwrap();
    for what in [
        "write-leader",
        "write-follower",
        "read-leader",
        "read-follower",
    ] {
        for clients in [1, 16, 64, 256] {
            let via = if what.ends_with("leader") {
                leader
            } else {
                1 + leader % 3
            };
            let (child, out) = &mut children[via - 1];
            let kind = what.split('-').next().unwrap();
            tell(child, &format!("{kind} {clients} {seconds}"));
            println!("{what:14} {clients:4} clients: {}", line(out));
        }
    }
    for (child, _) in &mut children {
        tell(child, "quit");
        child.wait().unwrap();
    }
}

/// A child: one member; does what it reads on stdin.
async fn member(id: u64, dir: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let (tx, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin()
            .lines()
            .try_for_each(|l| tx.send(l.unwrap()).ok())
    });
    let addresses = lines.recv().await.unwrap();
    let members: BTreeMap<u64, Member> = (1..)
        .zip(addresses.split(' '))
        .map(|(id, url)| {
            (
                id,
                Member {
                    peer_url: url.into(),
                    ..Member::default()
                },
            )
        })
        .collect();
    let log = Arc::new(Wal::open(&dir.join("log")).unwrap());
    let engine = Arc::new(SledEngine::open(&dir.join("state")).unwrap());
    let snapshots = SnapshotDir::open(&dir.join("snapshots")).unwrap();
    let config = GroupConfig::new(id, "throughput");
    let machine = Arc::new(Last::default());
    let group = Group::start(config, log, engine, snapshots, machine, Arc::new(Tcp))
        .await
        .unwrap();
    let serving = group.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let group = serving.clone();
            tokio::spawn(async move { group.serve(Box::new(stream)).await });
        }
    });
    group.initialize(members).await.unwrap();
    let leader = group
        .watch()
        .wait_for(|s| s.leader.is_some())
        .await
        .unwrap()
        .leader;
    println!("{}", leader.unwrap());
    while let Some(line) = lines.recv().await {
        let words: Vec<&str> = line.split(' ').collect();
        let [kind, clients, seconds] = words[..] else {
            break;
        };
        let write = kind == "write";
        println!(
            "{}",
            load(
                &group,
                write,
                clients.parse().unwrap(),
                seconds.parse().unwrap()
            )
            .await
        );
    }
    group.shutdown().await;
}

async fn load(group: &Group, write: bool, clients: u64, seconds: u64) -> String {
    let started = Instant::now();
    let end = started + Duration::from_secs(seconds);
    let tasks = (0..clients).map(|client| {
        let group = group.clone();
        tokio::spawn(async move {
            let mut latencies = Vec::new();
            let mut n = client * 1_000_003;
            while Instant::now() < end {
                n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let start = Instant::now();
                if write {
                    let mut command = vec![7; 256];
                    command[..8].copy_from_slice(&((n >> 33) % 10_000).to_be_bytes());
                    group.propose(command.into(), DEADLINE).await.unwrap();
                } else {
                    group.read_barrier(DEADLINE).await.unwrap();
                }
                latencies.push(start.elapsed());
            }
            latencies
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    let took = started.elapsed();
    all.sort_unstable();
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
    format!(
        "{:8.0}/s  p50 {:?}  p99 {:?}  max {:?}",
        all.len() as f64 / took.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(1.0)
    )
}
