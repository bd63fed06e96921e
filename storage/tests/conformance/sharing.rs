//! What members that share a bucket must be able to rely on, whatever the bucket is: also run against a
//! real S3 server, by the tests of the whole program.

use mainstay_storage::chunks::{Bucket, ChunkId, ChunkStore, Members, Record, SharedOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Different chunks.
const KINDS: u64 = 40;
pub(crate) const GRACE: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(3);
const PACK_LEN: u64 = 60_000;
const MEMBERS: u64 = 3;

/// xorshift: the same numbers in every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

pub(crate) fn record(kind: u64) -> Record {
    let mut dice = Dice(kind * 7919 + 1);
    let len = 500 + (kind * 977) % 6000;
    let raw: Vec<u8> = (0..len).map(|_| dice.below(256) as u8).collect();
    Record::encode(&raw).unwrap()
}

pub(crate) fn id(kind: u64) -> ChunkId {
    record(kind).id
}

/// A bucket until its member dies: then every call fails, the one that it dies in before or after it
/// was done.
#[derive(Debug)]
pub(crate) struct Mortal {
    pub(crate) inner: Arc<dyn Bucket>,
    /// Calls that are left.
    pub(crate) left: AtomicI64,
    pub(crate) done_at_death: bool,
}

impl Mortal {
    pub(crate) fn new(inner: &Arc<dyn Bucket>) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            left: AtomicI64::new(i64::MAX),
            done_at_death: true,
        })
    }

    fn call<T>(&self, call: impl FnOnce(&dyn Bucket) -> io::Result<T>) -> io::Result<T> {
        let dead = || io::Error::new(io::ErrorKind::ConnectionReset, "the member is dead");
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            ..=0 => Err(dead()),
            1 if self.done_at_death => call(&*self.inner).and_then(|_| Err(dead())),
            1 => Err(dead()),
            _ => call(&*self.inner),
        }
    }
}

impl Bucket for Mortal {
    fn put(&self, key: &str, body: bytes::Bytes) -> io::Result<()> {
        self.call(|b| b.put(key, body))
    }
    fn create(&self, key: &str, body: bytes::Bytes) -> io::Result<bool> {
        self.call(|b| b.create(key, body))
    }
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<bytes::Bytes> {
        self.call(|b| b.get(key, range))
    }
    fn size(&self, key: &str) -> io::Result<u64> {
        self.call(|b| b.size(key))
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> io::Result<Vec<(String, u64)>> {
        self.call(|b| b.list(prefix, after))
    }
    fn delete(&self, key: &str) -> io::Result<()> {
        self.call(|b| b.delete(key))
    }
}

/// Members that share a bucket, with a clock that goes when it is told to.
pub(crate) struct Cloud {
    pub(crate) bucket: Arc<dyn Bucket>,
    pub(crate) dir: PathBuf,
    clock: Arc<AtomicU64>,
    pub(crate) cache_bytes: u64,
}

impl Cloud {
    pub(crate) fn new(bucket: Arc<dyn Bucket>, dir: &std::path::Path) -> Self {
        Self {
            bucket,
            dir: dir.to_owned(),
            clock: Arc::default(),
            cache_bytes: 100_000,
        }
    }

    pub(crate) fn ms(&self) -> u64 {
        self.clock.load(Ordering::SeqCst)
    }

    pub(crate) fn go_on(&self, by: Duration) {
        self.clock
            .fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }

    pub(crate) fn dir_of(&self, member: u64) -> PathBuf {
        self.dir.join(member.to_string())
    }

    pub(crate) fn open_on(&self, member: u64, bucket: Arc<dyn Bucket>) -> ChunkStore {
        let clock = Arc::clone(&self.clock);
        let options = SharedOptions {
            pack_len: PACK_LEN,
            settle: SETTLE,
            clock: Arc::new(move || Duration::from_millis(clock.load(Ordering::SeqCst))),
            ..SharedOptions::new(member, "one cluster", self.cache_bytes)
        };
        ChunkStore::open_shared(&self.dir_of(member), bucket, &options).unwrap()
    }

    pub(crate) fn open(&self, member: u64) -> ChunkStore {
        self.open_on(member, Arc::clone(&self.bucket))
    }

    pub(crate) fn objects(&self, prefix: &str) -> Vec<(String, u64)> {
        self.bucket.list(prefix, None).unwrap()
    }
}

pub(crate) fn everybody() -> Members {
    Members {
        present: (1..=MEMBERS).collect(),
        gone: BTreeSet::new(),
    }
}

/// What a member's collector does; what is needed must be there.
pub(crate) fn collect(
    store: &ChunkStore,
    roots: &[ChunkId],
    members: &Members,
) -> mainstay_storage::Result<()> {
    let lacking = store.adopt(roots)?;
    assert!(lacking.is_empty(), "{} chunks are lost", lacking.len());
    let mark = store.begin_mark();
    assert_eq!(store.keep(roots), roots.len() as u64);
    store.condemn(&mark);
    store.sweep(&mark, GRACE)?;
    store.tidy(members)
}

struct Member {
    id: u64,
    store: Option<ChunkStore>,
    bucket: Arc<Mortal>,
    /// What it was told to hold, and when.
    told: BTreeMap<u64, u64>,
}

/// Random work on all members, of which any may die within any call of the bucket, beside a model:
/// what is needed is to be had from everyone, and what a member said it holds it holds for the grace.
/// At the end nothing is needed, and the bucket is empty.
pub(crate) fn random_lives(cloud: &Cloud, steps: usize, seed: u64) -> String {
    let mut dice = Dice(seed);
    let mut roots: BTreeSet<u64> = BTreeSet::new();
    let mut members: Vec<Member> = (1..=MEMBERS)
        .map(|id| {
            let bucket = Mortal::new(&cloud.bucket);
            Member {
                id,
                store: Some(cloud.open_on(id, Arc::clone(&bucket) as Arc<dyn Bucket>)),
                bucket,
                told: BTreeMap::new(),
            }
        })
        .collect();
    let (mut deaths, mut failures) = (0, 0);
    for _ in 0..steps {
        let at = dice.below(MEMBERS) as usize;
        if dice.below(8) == 0 && deaths * 6 < steps {
            members[at]
                .bucket
                .left
                .store(1 + dice.below(12) as i64, Ordering::SeqCst);
            deaths += 1;
        }
        let choice = dice.below(12);
        if choice == 0 {
            cloud.go_on(Duration::from_secs(1 + dice.below(6)));
            continue;
        }
        let done = step(cloud, &mut members[at], &mut roots, &mut dice, choice);
        if done.is_err() {
            failures += 1;
            let member = &mut members[at];
            member.store = None;
            member.bucket = Arc::new(Mortal {
                inner: Arc::clone(&cloud.bucket),
                left: AtomicI64::new(i64::MAX),
                done_at_death: dice.below(2) == 0,
            });
            member.store =
                Some(cloud.open_on(member.id, Arc::clone(&member.bucket) as Arc<dyn Bucket>));
        }
    }
    // Everything that is needed is to be had from everyone.
    for member in &members {
        member.bucket.left.store(i64::MAX, Ordering::SeqCst);
        let store = member.store.as_ref().unwrap();
        let ids: Vec<ChunkId> = roots.iter().map(|k| id(*k)).collect();
        assert!(
            store.adopt(&ids).unwrap().is_empty(),
            "a needed chunk is lost"
        );
        for kind in &roots {
            assert_eq!(
                store.get(&id(*kind)).unwrap().unwrap(),
                record(*kind).verify().unwrap()
            );
        }
    }
    let packs = cloud.objects("packs/").len();
    // What was copied together and then seen by another begins its grace there anew: a few rounds.
    let mut rounds = 0;
    while rounds < 15 && !(cloud.objects("packs/").is_empty() && cloud.objects("dooms/").is_empty())
    {
        rounds += 1;
        for member in &members {
            collect(member.store.as_ref().unwrap(), &[], &everybody()).unwrap();
        }
        cloud.go_on(GRACE + SETTLE);
    }
    for folder in ["packs/", "claims/", "dooms/"] {
        let left = cloud.objects(folder);
        assert!(left.is_empty(), "left behind: {left:?}");
    }
    for member in &members {
        assert_eq!(member.store.as_ref().unwrap().stats().chunks, 0);
    }
    format!(
        "{steps} steps, {failures} members died within a call, {packs} packs at the end, \
         {} chunks needed: nothing lost, all room given back in {rounds} rounds",
        roots.len()
    )
}

fn step(
    cloud: &Cloud,
    member: &mut Member,
    roots: &mut BTreeSet<u64>,
    dice: &mut Dice,
    choice: u64,
) -> mainstay_storage::Result<()> {
    let store = member.store.as_ref().unwrap();
    let now = cloud.ms();
    let kind = dice.below(KINDS);
    match choice {
        1..=3 => {
            let kinds: BTreeSet<u64> = (0..1 + dice.below(6)).map(|_| dice.below(KINDS)).collect();
            store.put(kinds.iter().map(|k| record(*k)).collect())?;
            member.told.extend(kinds.iter().map(|k| (*k, now)));
        }
        4 | 5 => {
            // "Do you have it?"
            let grace = GRACE.as_millis() as u64;
            let owed = member.told.get(&kind).is_some_and(|at| at + grace > now);
            let held = store.contains(&id(kind));
            assert!(held || !owed, "member {} lost chunk {kind}", member.id);
            if held {
                member.told.insert(kind, now);
                if let Some(raw) = store.get(&id(kind))? {
                    assert_eq!(raw, record(kind).verify().unwrap());
                } else {
                    panic!("chunk {kind} is not there");
                }
            } else {
                member.told.remove(&kind);
            }
        }
        6 => {
            if store.adopt(&[id(kind)])?.is_empty() {
                member.told.insert(kind, now);
            } else {
                assert!(!roots.contains(&kind), "needed chunk {kind} is lost");
            }
        }
        7 | 8 => {
            // Made visible: everybody needs it from now on.
            if store.contains(&id(kind)) {
                member.told.insert(kind, now);
                roots.insert(kind);
            }
        }
        9 => {
            let gone = roots.iter().next().copied();
            gone.map(|kind| roots.remove(&kind));
        }
        _ => {
            let needed: Vec<ChunkId> = roots.iter().map(|k| id(*k)).collect();
            collect(store, &needed, &everybody())?;
            member.told.extend(roots.iter().map(|k| (*k, now)));
        }
    }
    Ok(())
}

/// What one puts the others have without its being sent to them, also after the one is gone; small packs
/// are copied together by their writer, and nothing is there twice.
pub(crate) fn sharing(cloud: &Cloud) -> String {
    let stores: Vec<ChunkStore> = (1..=MEMBERS).map(|member| cloud.open(member)).collect();
    for kind in 0..KINDS {
        stores[0].put(vec![record(kind)]).unwrap();
    }
    let ids: Vec<ChunkId> = (0..KINDS).map(id).collect();
    let before = cloud.objects("packs/").len();
    assert_eq!(before as u64, KINDS, "each put made a pack");
    for store in &stores[1..] {
        assert!(store.adopt(&ids).unwrap().is_empty());
        assert_eq!(store.records(&ids).unwrap().records.len(), KINDS as usize);
        let again = store.put(vec![record(3)]).unwrap();
        assert_eq!(
            (again.stored, again.known),
            (0, 1),
            "it is in the bucket already"
        );
    }
    for _ in 0..4 {
        cloud.go_on(GRACE + SETTLE);
        for store in &stores {
            collect(store, &ids, &everybody()).unwrap();
        }
    }
    let packs = cloud.objects("packs/");
    assert!(packs.len() < 10, "{} packs", packs.len());
    let bytes: u64 = packs.iter().map(|(_, size)| size).sum();
    let held = stores[1].stats();
    assert_eq!(held.pack_bytes, bytes);
    let overhead = KINDS * 100 + packs.len() as u64 * 100;
    assert!(
        bytes < held.stored_bytes + overhead,
        "something is there twice: {held:?}, {bytes} bytes"
    );
    drop(stores);
    // The first is taken out, and its disk lost; the others have all of it, and need half.
    std::fs::remove_dir_all(cloud.dir_of(1)).unwrap();
    let members = Members {
        present: [2, 3].into(),
        gone: [1].into(),
    };
    let half: Vec<ChunkId> = (0..KINDS).step_by(2).map(id).collect();
    let stores = [cloud.open(2), cloud.open(3)];
    let mut after = bytes;
    for _ in 0..20 {
        for store in &stores {
            collect(store, &half, &members).unwrap();
            assert_eq!(store.records(&half).unwrap().records.len(), half.len());
        }
        cloud.go_on(GRACE + SETTLE);
        after = cloud.objects("packs/").iter().map(|(_, size)| size).sum();
        if after < bytes * 2 / 3 {
            break;
        }
    }
    assert!(after < bytes * 2 / 3, "{after} of {bytes} bytes are left");
    assert!(cloud.objects("claims/0000000000000001/").is_empty());
    for store in &stores {
        collect(store, &[], &members).unwrap();
    }
    format!(
        "{before} packs of one chunk became {}; {bytes} bytes, {after} once half was not needed",
        packs.len()
    )
}
