//! A bucket in memory shared by members: what holds whatever they do at once, and whenever they die.
//!
//! `MAINSTAY_CHUNK_LIVES=100` is the long form.

use crate::sharing::{self, Cloud, Dice, GRACE, Mortal, everybody, id, record};
use bytes::Bytes;
use mainstay_storage::StorageError;
use mainstay_storage::chunks::{Bucket, ChunkId, ChunkStore, SharedOptions};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Objects in memory; each call is one step, and others' calls come between any two.
#[derive(Debug, Default)]
pub(crate) struct MemoryBucket(Mutex<BTreeMap<String, Bytes>>);

impl MemoryBucket {
    fn objects(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Bytes>> {
        std::thread::yield_now();
        self.0.lock().unwrap()
    }
}

impl Bucket for MemoryBucket {
    fn put(&self, key: &str, body: Bytes) -> io::Result<()> {
        self.objects().insert(key.to_owned(), body);
        Ok(())
    }
    fn create(&self, key: &str, body: Bytes) -> io::Result<bool> {
        let mut objects = self.objects();
        let free = !objects.contains_key(key);
        if free {
            objects.insert(key.to_owned(), body);
        }
        Ok(free)
    }
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Bytes> {
        let body = self.objects().get(key).cloned();
        let body = body.ok_or(io::ErrorKind::NotFound)?;
        let at = |to: u64| (to as usize).min(body.len());
        Ok(body.slice(at(range.start)..at(range.end)))
    }
    fn size(&self, key: &str) -> io::Result<u64> {
        let objects = self.objects();
        let body = objects.get(key).ok_or(io::ErrorKind::NotFound)?;
        Ok(body.len() as u64)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> io::Result<Vec<(String, u64)>> {
        let objects = self.objects();
        let found = objects
            .iter()
            .filter(|(key, _)| key.starts_with(prefix) && after.is_none_or(|a| key.as_str() > a));
        Ok(found
            .map(|(key, body)| (key.clone(), body.len() as u64))
            .collect())
    }
    fn delete(&self, key: &str) -> io::Result<()> {
        self.objects().remove(key);
        Ok(())
    }
}

fn lives() -> u64 {
    let asked = std::env::var("MAINSTAY_CHUNK_LIVES").ok();
    asked.and_then(|v| v.parse().ok()).unwrap_or(8)
}

#[test]
fn members_that_die_in_any_call_lose_nothing_and_leave_nothing() {
    for seed in 1..=lives() {
        let dir = crate::support::tempdir();
        let cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
        eprintln!("{}", sharing::random_lives(&cloud, 400, seed));
    }
}

#[test]
fn what_one_puts_all_have() {
    let dir = crate::support::tempdir();
    let cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    eprintln!("{}", sharing::sharing(&cloud));
}

/// Whoever was told by a member that a chunk is there gets it from that member, whatever the collectors of
/// all members do meanwhile.
#[test]
fn claims_and_collections_of_all_members_at_once() {
    const KINDS: u64 = 30;
    let dir = crate::support::tempdir();
    let cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    let stores: Vec<ChunkStore> = (1..=3).map(|member| cloud.open(member)).collect();
    let (stop, claims) = (AtomicBool::new(false), AtomicU64::new(0));
    let grace = GRACE.as_millis() as u64;
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (n, store) in (0_u64..).zip(stores.iter().chain(&stores)) {
            let (cloud, stop, claims) = (&cloud, &stop, &claims);
            workers.push(scope.spawn(move || {
                let mut dice = Dice(n * 31 + 5);
                while !stop.load(Ordering::Relaxed) {
                    let kind = dice.below(KINDS);
                    let told = cloud.ms();
                    if !store.adopt(&[id(kind)]).unwrap().is_empty() {
                        store.put(vec![record(kind)]).unwrap();
                    }
                    claims.fetch_add(1, Ordering::Relaxed);
                    for _ in 0..dice.below(200) {
                        std::thread::yield_now();
                    }
                    let got = store.get(&id(kind)).unwrap();
                    let late = cloud.ms() - told >= grace;
                    assert!(
                        got.is_some() || late,
                        "chunk {kind} is gone within the grace"
                    );
                }
            }));
        }
        let failed = || {
            workers
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        };
        while claims.load(Ordering::Relaxed) < 1500 && !failed() {
            cloud.go_on(GRACE / 3);
            std::thread::scope(|scope| {
                for store in &stores {
                    scope.spawn(|| sharing::collect(store, &[], &everybody()).unwrap());
                }
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
    for _ in 0..6 {
        cloud.go_on(GRACE * 2);
        for store in &stores {
            sharing::collect(store, &[], &everybody()).unwrap();
        }
    }
    assert!(
        cloud.objects("packs/").is_empty(),
        "{:?}",
        cloud.objects("")
    );
}

/// While the bucket does not answer, what was read or written lately is served, the rest refused; nothing
/// is taken for damaged.
#[test]
fn a_bucket_that_does_not_answer() {
    let dir = crate::support::tempdir();
    let mut cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    let writer = cloud.open(1);
    writer.put((0..20).map(record).collect()).unwrap();
    cloud.cache_bytes = 1 << 20;
    let line = Mortal::new(&cloud.bucket);
    let reader = cloud.open_on(2, Arc::clone(&line) as Arc<dyn Bucket>);
    let ids: Vec<ChunkId> = (0..20).map(id).collect();
    assert!(reader.adopt(&ids).unwrap().is_empty());
    line.left.store(0, Ordering::SeqCst);
    let refused = reader.get(&ids[0]).unwrap_err();
    assert!(
        matches!(refused, StorageError::Unavailable { .. }),
        "{refused}"
    );
    let refused = reader.put(vec![record(30)]).unwrap_err();
    assert!(
        matches!(refused, StorageError::Unavailable { .. }),
        "{refused}"
    );
    assert!(reader.adopt(&[id(31)]).is_err());
    assert_eq!((reader.stats().chunks, reader.stats().damaged), (20, 0));
    assert!(!reader.contains(&id(30)));
    line.left.store(i64::MAX, Ordering::SeqCst);
    assert_eq!(reader.records(&ids).unwrap().records.len(), 20);
    line.left.store(0, Ordering::SeqCst);
    assert_eq!(reader.records(&ids).unwrap().records.len(), 20, "kept here");
    drop(reader);
    let reader = cloud.open_on(2, Arc::clone(&line) as Arc<dyn Bucket>);
    assert_eq!(
        reader.records(&ids).unwrap().records.len(),
        20,
        "also after a start"
    );
    line.left.store(i64::MAX, Ordering::SeqCst);
    assert_eq!(reader.put(vec![record(30)]).unwrap().stored, 1);
}

/// A look at everything is past what is kept here: neither does it push that out, nor believe it.
#[test]
fn verification_reads_past_the_cache() {
    let dir = crate::support::tempdir();
    let mut cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    cloud.cache_bytes = 1 << 20;
    let line = Mortal::new(&cloud.bucket);
    let store = cloud.open_on(1, Arc::clone(&line) as Arc<dyn Bucket>);
    store.put((0..20).map(record).collect()).unwrap();
    let ids: Vec<ChunkId> = (0..20).map(id).collect();
    let kept = || {
        let files = std::fs::read_dir(cloud.dir_of(1).join("cache")).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
        files.sort();
        files
    };
    let before = kept();
    assert!(!before.is_empty());
    let mut verifier = store.verify_from(mainstay_storage::chunks::Place::default());
    let mut checked = 0;
    while let Some(step) = verifier.step(10_000).unwrap() {
        checked += step.chunks;
        assert!(step.damaged.is_empty());
    }
    assert_eq!((checked, kept()), (20, before));
    line.left.store(0, Ordering::SeqCst);
    assert_eq!(store.records(&ids).unwrap().records.len(), 20, "kept here");
    let mut verifier = store.verify_from(mainstay_storage::chunks::Place::default());
    let blind = verifier.step(10_000).unwrap_err();
    assert!(matches!(blind, StorageError::Unavailable { .. }), "{blind}");
}

/// Damage in the bucket is never served, and made good by whoever has the bytes; damage of what is kept
/// here is no damage.
#[test]
fn damage_in_the_bucket_and_here() {
    let dir = crate::support::tempdir();
    let bucket = Arc::<MemoryBucket>::default();
    let mut cloud = Cloud::new(Arc::clone(&bucket) as Arc<dyn Bucket>, dir.path());
    cloud.cache_bytes = 1 << 20;
    let stores = [cloud.open(1), cloud.open(2)];
    stores[0].put((0..10).map(record).collect()).unwrap();
    let ids: Vec<ChunkId> = (0..10).map(id).collect();
    assert!(stores[1].adopt(&ids).unwrap().is_empty());
    // A copy here.
    assert_eq!(stores[1].records(&ids).unwrap().records.len(), 10);
    for file in std::fs::read_dir(cloud.dir_of(2).join("cache")).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[5000] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    assert_eq!(stores[1].records(&ids).unwrap().records.len(), 10);
    // The object.
    let (key, _) = cloud.objects("packs/")[0].clone();
    let whole = bucket.get(&key, 0..u64::MAX).unwrap();
    let mut bytes = whole.to_vec();
    bytes[16 + 56 + 5] ^= 1;
    bucket.put(&key, bytes.into()).unwrap();
    let mut damaged = Vec::new();
    let mut verifier = stores[0].verify_from(mainstay_storage::chunks::Place::default());
    while let Some(checked) = verifier.step(10_000).unwrap() {
        damaged.extend(checked.damaged);
    }
    assert_eq!(damaged, [ids[0]]);
    assert!(!stores[0].contains(&ids[0]));
    assert_eq!(
        stores[0].adopt(&ids).unwrap(),
        [ids[0]],
        "no good copy anywhere"
    );
    assert_eq!(stores[0].put(vec![record(0)]).unwrap().stored, 1);
    assert_eq!(stores[0].stats().damaged, 0);
    let mut verifier = stores[1].verify_from(mainstay_storage::chunks::Place::default());
    assert!(
        verifier.step(10_000).unwrap().is_none(),
        "each looks after its own"
    );
    assert!(stores[1].adopt(&ids).unwrap().is_empty());
    assert_eq!(
        stores[1].get(&ids[0]).unwrap().unwrap(),
        record(0).verify().unwrap()
    );
    drop(stores);
    let store = cloud.open(1);
    assert_eq!(
        store.get(&ids[0]).unwrap().unwrap(),
        record(0).verify().unwrap()
    );
}

/// A repaired member has a new identity on its old directory: nothing that the old one claimed counts.
#[test]
fn a_new_identity_inherits_no_claims() {
    let dir = crate::support::tempdir();
    let cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    let old = cloud.open(1);
    old.put((0..5).map(record).collect()).unwrap();
    drop(old);
    std::fs::rename(cloud.dir_of(1), cloud.dir_of(4)).unwrap();
    let new = cloud.open(4);
    assert!(!new.contains(&id(0)));
    let ids: Vec<ChunkId> = (0..5).map(id).collect();
    assert!(new.adopt(&ids).unwrap().is_empty());
    assert_eq!(cloud.objects("claims/0000000000000004/").len(), 1);
    assert_eq!(new.records(&ids).unwrap().records.len(), 5);
}

#[test]
fn another_clusters_bucket_is_refused() {
    let dir = crate::support::tempdir();
    let cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    cloud.open(1).greet().unwrap();
    let options = SharedOptions::new(7, "another", 0);
    let store = ChunkStore::open_shared(&dir.path().join("7"), Arc::clone(&cloud.bucket), &options)
        .unwrap();
    let refused = store.put(vec![record(1)]).unwrap_err();
    assert!(
        matches!(&refused, StorageError::Foreign(why) if why.contains("one cluster")),
        "{refused}"
    );
    assert!(refused.to_string().contains("delete the object `store`"));
    assert!(cloud.objects("packs/").is_empty());
}

/// Who has taken a bucket over is noticed before anything is deleted in it.
#[test]
fn a_bucket_that_changed_hands_is_not_tidied() {
    let dir = crate::support::tempdir();
    let cloud = Cloud::new(Arc::<MemoryBucket>::default(), dir.path());
    let store = cloud.open(1);
    store.put(vec![record(1)]).unwrap();
    cloud.bucket.delete("store").unwrap();
    store.tidy(&everybody()).unwrap();
    assert_eq!(cloud.objects("store").len(), 1, "marked as ours again");
    let theirs = Bytes::from_static(b"MAINSTAY-BUCKET 1 another\n");
    cloud.bucket.put("store", theirs).unwrap();
    let unknown = "packs/0000000000000063/0000000000000001";
    cloud.bucket.put(unknown, Bytes::from_static(b"x")).unwrap();
    for _ in 0..3 {
        cloud.go_on(GRACE);
        let refused = store.tidy(&everybody()).unwrap_err();
        assert!(matches!(&refused, StorageError::Foreign(_)), "{refused}");
    }
    assert!(cloud.objects("dooms/").is_empty());
    assert_eq!(cloud.objects("packs/").len(), 2);
}
