//! The harness: a small key-value machine that recognises repeated commands, members that can be
//! halted and started again on what they left, and waits with a bound.

use crate::thin::Thin;
use bytes::{BufMut, Bytes, BytesMut};
use mainstay_raft::machine::{Change, Entries};
use mainstay_raft::transport::memory::Switchboard;
use mainstay_raft::{Fault, Group, GroupConfig, GroupError, Machine, Member, Status};
use mainstay_storage::engine::{Engine, MemoryEngine, SledEngine};
use mainstay_storage::log::{Log, MemoryLog, Wal};
use mainstay_storage::snapshot::SnapshotDir;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(crate) const BOUND: Duration = Duration::from_secs(20);

#[derive(Default)]
struct State {
    entries: BTreeMap<Vec<u8>, Vec<u8>>,
    changed: BTreeSet<Vec<u8>>,
    applied_commands: u64,
    /// A bug on this member alone: the next command adds one more than it says.
    spoilt: bool,
    imports: u64,
}

/// Adds numbers to keys, once per command id.
#[derive(Default)]
pub(crate) struct Sums(Mutex<State>);

/// `add` to `key`, as command `id`.
pub(crate) fn command(id: u64, key: &str, add: u64) -> Bytes {
    padded(id, key, add, 0)
}

/// The same with `pad` bytes behind it.
pub(crate) fn padded(id: u64, key: &str, add: u64, pad: usize) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u64(id);
    out.put_u64(add);
    out.put_u8(u8::try_from(key.len()).unwrap());
    out.put_slice(key.as_bytes());
    out.put_bytes(b'.', pad);
    out.freeze()
}

pub(crate) fn number(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().unwrap())
}

impl Sums {
    /// Sum under `key`.
    pub(crate) fn get(&self, key: &str) -> u64 {
        self.0
            .lock()
            .entries
            .get(format!("k/{key}").as_bytes())
            .map_or(0, |v| number(v))
    }

    /// How many times `apply` saw a command, repetitions included, in this process.
    pub(crate) fn applied_commands(&self) -> u64 {
        self.0.lock().applied_commands
    }

    /// From now on this member holds another state than the others.
    pub(crate) fn spoil(&self) {
        self.0.lock().spoilt = true;
    }

    /// How often the whole state was replaced, in this process.
    pub(crate) fn imports(&self) -> u64 {
        self.0.lock().imports
    }

    pub(crate) fn all(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.0.lock().entries.clone()
    }
}

impl State {
    fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.changed.insert(key.clone());
        self.entries.insert(key, value);
    }

    fn apply(&mut self, command: &[u8]) -> Result<Bytes, Fault> {
        self.applied_commands += 1;
        if command == b"poison" {
            // Not recognised by `check`: a bug, or bytes of a later release.
            return Err(Fault("a command that cannot be decoded".into()));
        }
        let len = usize::from(command[16]);
        let key = [b"k/", &command[17..17 + len]].concat();
        let done = [b"d/", &command[..8]].concat();
        if let Some(answer) = self.entries.get(&done) {
            return Ok(Bytes::copy_from_slice(answer));
        }
        let spoilt = u64::from(std::mem::take(&mut self.spoilt));
        let before = self.entries.get(&key).map_or(0, |v| number(v));
        let sum = before + number(&command[8..16]) + spoilt;
        self.put(key, sum.to_be_bytes().to_vec());
        self.put(done, sum.to_be_bytes().to_vec());
        Ok(Bytes::copy_from_slice(&sum.to_be_bytes()))
    }
}

impl Machine for Sums {
    fn check(&self, command: &Bytes) -> Result<(), String> {
        if command == "unreadable" {
            return Err("that is no command".into());
        }
        Ok(())
    }
    fn apply(&self, commands: Vec<Bytes>) -> Result<Vec<Bytes>, Fault> {
        let mut state = self.0.lock();
        commands.iter().map(|c| state.apply(c)).collect()
    }
    fn take_changes(&self) -> Vec<Change> {
        let mut state = self.0.lock();
        let changed = std::mem::take(&mut state.changed);
        changed
            .into_iter()
            .map(|k| (k.clone(), state.entries.get(&k).cloned()))
            .collect()
    }
    fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.0.lock().entries.clone().into_iter().collect()
    }
    fn import(&self, entries: &mut Entries<'_>) -> Result<(), Fault> {
        let entries = entries.collect::<Result<_, _>>()?;
        let mut state = self.0.lock();
        state.entries = entries;
        state.imports += 1;
        state.changed.clear();
        Ok(())
    }
}

/// Where a member keeps its log and state.
pub(crate) enum Disk {
    Memory {
        log: Arc<MemoryLog>,
        engine: Arc<MemoryEngine>,
    },
    Files,
}

pub(crate) struct Node {
    pub(crate) id: u64,
    pub(crate) disk: Disk,
    pub(crate) dir: TempDir,
    pub(crate) machine: Arc<Sums>,
    pub(crate) group: Option<Group>,
}

impl Node {
    pub(crate) fn group(&self) -> &Group {
        self.group.as_ref().expect("started")
    }

    pub(crate) fn files(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    pub(crate) fn memory_log(&self) -> &MemoryLog {
        match &self.disk {
            Disk::Memory { log, .. } => log,
            Disk::Files => panic!("a member on files"),
        }
    }
}

pub(crate) struct Cluster {
    pub(crate) net: Switchboard,
    pub(crate) nodes: BTreeMap<u64, Node>,
    pub(crate) tune: fn(&mut GroupConfig),
    /// Members started from now on send no faster than this over any one connection.
    pub(crate) bytes_per_s: Option<u64>,
    next_command: AtomicU64,
}

pub(crate) fn member(id: u64) -> Member {
    Member {
        name: format!("m{id}"),
        peer_url: format!("memory:{id}"),
        ..Member::default()
    }
}

impl Cluster {
    /// Members 1 to `n`, in memory, not founded.
    pub(crate) async fn new(n: u64, tune: fn(&mut GroupConfig)) -> Self {
        let mut cluster = Self {
            net: Switchboard::new(),
            nodes: BTreeMap::new(),
            tune,
            bytes_per_s: None,
            next_command: AtomicU64::new(1),
        };
        for id in 1..=n {
            cluster.add(id, false).await;
        }
        cluster
    }

    /// Members 1 to `n`, founded, with a leader.
    pub(crate) async fn founded(n: u64, tune: fn(&mut GroupConfig)) -> Self {
        let cluster = Self::new(n, tune).await;
        cluster.found().await;
        cluster
    }

    pub(crate) async fn found(&self) {
        let members: BTreeMap<u64, Member> =
            self.nodes.keys().map(|&id| (id, member(id))).collect();
        for node in self.nodes.values() {
            node.group().initialize(members.clone()).await.unwrap();
        }
        self.leader().await;
    }

    pub(crate) async fn add(&mut self, id: u64, files: bool) {
        let disk = if files {
            Disk::Files
        } else {
            let engine = Arc::new(MemoryEngine::new());
            Disk::Memory {
                log: Arc::new(MemoryLog::new()),
                engine,
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let machine = Arc::default();
        self.nodes.insert(
            id,
            Node {
                id,
                disk,
                dir,
                machine,
                group: None,
            },
        );
        self.start(id).await;
    }

    /// Start a member on what it has.
    pub(crate) async fn start(&mut self, id: u64) {
        self.try_start(id).await.unwrap();
    }

    pub(crate) async fn try_start(&mut self, id: u64) -> Result<(), GroupError> {
        let mut dialer = self.net.dialer(id);
        if let Some(bytes_per_s) = self.bytes_per_s {
            dialer = Arc::new(Thin {
                through: dialer,
                bytes_per_s,
            });
        }
        let node = self.nodes.get_mut(&id).unwrap();
        let (log, engine): (Arc<dyn Log>, Arc<dyn Engine>) = match &node.disk {
            Disk::Memory { log, engine } => (log.clone(), engine.clone()),
            Disk::Files => {
                let log = Arc::new(Wal::open(&node.dir.path().join("log")).unwrap());
                (
                    log,
                    Arc::new(SledEngine::open(&node.dir.path().join("state")).unwrap()),
                )
            }
        };
        let snapshots = SnapshotDir::open(&node.snapshots()).unwrap();
        node.machine = Arc::default();
        let mut config = GroupConfig::new(id, "test");
        config.election = (Duration::from_millis(200), Duration::from_millis(400));
        config.checkpoint_interval = Duration::from_millis(20);
        config.promote_after = Duration::from_millis(300);
        (self.tune)(&mut config);
        let group =
            Group::start(config, log, engine, snapshots, node.machine.clone(), dialer).await?;
        self.net.attach(id, group.clone());
        node.group = Some(group);
        Ok(())
    }

    /// End a member as a crash would, and wait until it has let go of its files.
    pub(crate) async fn halt(&mut self, id: u64) {
        self.net.detach(id);
        let group = self.nodes.get_mut(&id).unwrap().group.take().unwrap();
        group.halt().await;
    }

    pub(crate) fn ids(&self) -> Vec<u64> {
        self.nodes.keys().copied().collect()
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|n| n.group.is_some())
    }

    /// The leader that a majority of the running members agree on.
    pub(crate) async fn leader(&self) -> u64 {
        self.leader_among(&self.running().map(|n| n.id).collect::<Vec<_>>())
            .await
    }

    /// The leader, one of `ids`, that all of `ids` agree on.
    pub(crate) async fn leader_among(&self, ids: &[u64]) -> u64 {
        let end = Instant::now() + BOUND;
        loop {
            let seen: BTreeSet<Option<u64>> = ids
                .iter()
                .map(|id| self.nodes[id].group().status().leader)
                .collect();
            if let (1, Some(Some(leader))) = (seen.len(), seen.first())
                && ids.contains(leader)
            {
                return *leader;
            }
            assert!(Instant::now() < end, "no leader among {ids:?}: {seen:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn command_id(&self) -> u64 {
        self.next_command.fetch_add(1, Ordering::Relaxed)
    }

    /// Add through a member; the new sum.
    pub(crate) async fn put(&self, via: u64, key: &str, add: u64) -> u64 {
        let command = command(self.command_id(), key, add);
        let answer = self.nodes[&via]
            .group()
            .propose(command, BOUND)
            .await
            .unwrap();
        number(&answer)
    }

    /// Read through a member, linearizably.
    pub(crate) async fn get(&self, via: u64, key: &str) -> u64 {
        let node = &self.nodes[&via];
        node.group().read_barrier(BOUND).await.unwrap();
        node.machine.get(key)
    }

    /// Every running member has applied all that was acknowledged, and holds the same. A proposal whose
    /// outcome nobody knows may still be applied between two looks, so members that differ are looked
    /// at again, but those that differ at an equal applied index differ for good.
    pub(crate) async fn converge(&self) {
        let begun = std::time::Instant::now();
        loop {
            let mut digests = BTreeMap::new();
            let mut states = Vec::new();
            for node in self.running() {
                node.group().read_barrier(BOUND).await.unwrap();
                let (applied, digest) = node.group().digest();
                let (other, seen) = *digests.entry(applied).or_insert((node.id, digest));
                let text = format!("members {other} and {} differ at {applied}", node.id);
                assert_eq!(seen, digest, "{text}");
                states.push((node.id, node.machine.all()));
            }
            let differing = states.windows(2).find(|pair| pair[0].1 != pair[1].1);
            let Some(pair) = differing else { return };
            let (one, other) = (pair[0].0, pair[1].0);
            assert!(begun.elapsed() < BOUND, "members {one} and {other} differ");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    pub(crate) async fn wait(
        &self,
        id: u64,
        what: &str,
        cond: impl FnMut(&Status) -> bool,
    ) -> Status {
        let mut watch = self.nodes[&id].group().watch();
        let waited = tokio::time::timeout(BOUND, watch.wait_for(cond)).await;
        match waited {
            Ok(Ok(status)) => status.clone(),
            other => {
                let why = format!("{:?}", other.map(|r| r.is_ok()));
                panic!(
                    "member {id}: {what}: {why}: {:#?}",
                    self.nodes[&id].group().status()
                );
            }
        }
    }
}

/// Wait until `cond` holds.
pub(crate) async fn eventually(what: &str, mut cond: impl FnMut() -> bool) {
    let end = Instant::now() + BOUND;
    while !cond() {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
