//! The chunk store under collection and power cuts, beside a model: what is needed, or was used within
//! the grace, is there at every moment and after every cut; what is neither gives its room back.
//!
//! `MAINSTAY_CHUNK_LIVES=100` is the long form.

use crate::disk::{Event, Luck, PowerDisk};
use crate::support::Random;
use mainstay_storage::chunks::{ChunkId, ChunkOptions, ChunkStore, Record};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Different chunks that are put.
const KINDS: u64 = 60;
const GRACE: Duration = Duration::from_secs(10);
/// Small enough that packs are sealed all the time.
const PACK_LEN: u64 = 50_000;
const STEPS: usize = 60;
const CUTS: usize = 25;

/// A clock that goes when it is told to.
#[derive(Clone, Default)]
struct Hand(Arc<AtomicU64>);

impl Hand {
    fn go_on(&self, by: Duration) {
        self.0.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }

    fn ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn options(&self, disk: Arc<dyn mainstay_storage::disk::Disk>) -> ChunkOptions {
        let hand = self.clone();
        ChunkOptions {
            pack_len: PACK_LEN,
            disk,
            clock: Arc::new(move || Duration::from_millis(hand.ms())),
        }
    }
}

fn record(kind: u64) -> Record {
    let len = 500 + (kind as usize * 977) % 6000;
    Record::encode(&Random(kind * 7 + 1).bytes(len)).unwrap()
}

fn id(kind: u64) -> ChunkId {
    record(kind).id
}

/// What the store must have, by the words it was told.
#[derive(Clone, Default)]
struct Model {
    /// Needed.
    roots: BTreeSet<u64>,
    /// Put and acknowledged, and when they were last spoken of, in milliseconds.
    used: BTreeMap<u64, u64>,
}

impl Model {
    /// Those that no collection may touch now.
    fn must(&self, now: u64) -> BTreeSet<u64> {
        let grace = GRACE.as_millis() as u64;
        let fresh = self.used.iter().filter(|(_, at)| **at + grace > now);
        let needed = self.roots.iter().filter(|k| self.used.contains_key(k));
        fresh.map(|(k, _)| *k).chain(needed.copied()).collect()
    }
}

/// One life of a store: random work, each step between two marks in the disk's journal. What had to be
/// there after each.
struct Life<'a> {
    random: &'a mut Random,
    store: ChunkStore,
    disk: PowerDisk,
    hand: Hand,
    model: Model,
    must: Vec<BTreeSet<u64>>,
    removed: u64,
    moved: u64,
}

impl Life<'_> {
    fn step(&mut self, n: usize) {
        self.disk.note(Event::Asked(n));
        match self.random.below(10) {
            0..=3 => self.put(),
            4 => self.ask(),
            5 => {
                let kind = self.random.below(KINDS);
                if self.need(kind) {
                    self.model.roots.insert(kind);
                }
            }
            6 => {
                let gone = self.model.roots.iter().next().copied();
                gone.map(|kind| self.model.roots.remove(&kind));
            }
            7 => self.hand.go_on(Duration::from_secs(self.random.below(8))),
            _ => self.collect(),
        }
        self.must.push(self.model.must(self.hand.ms()));
        self.disk.note(Event::Acked(n));
    }

    fn put(&mut self) {
        let kinds: BTreeSet<u64> = (0..1 + self.random.below(5))
            .map(|_| self.random.below(KINDS))
            .collect();
        let records = kinds.iter().map(|k| record(*k)).collect();
        self.store.put(records).unwrap();
        let now = self.hand.ms();
        self.model.used.extend(kinds.iter().map(|k| (*k, now)));
    }

    /// "Do you have it?" Whoever is told so may rely on it.
    fn ask(&mut self) {
        let kind = self.random.below(KINDS);
        self.need(kind);
    }

    fn need(&mut self, kind: u64) -> bool {
        let must = self.model.must(self.hand.ms()).contains(&kind);
        let held = self.store.contains(&id(kind));
        assert!(held || !must, "chunk {kind} is lost");
        if held {
            self.model.used.insert(kind, self.hand.ms());
        } else {
            self.model.used.remove(&kind);
        }
        held
    }

    fn collect(&mut self) {
        let mark = self.store.begin_mark();
        let roots: Vec<ChunkId> = self.model.roots.iter().map(|k| id(*k)).collect();
        assert_eq!(self.store.keep(&roots), roots.len() as u64);
        let now = self.hand.ms();
        self.model
            .used
            .extend(self.model.roots.iter().map(|k| (*k, now)));
        self.store.condemn(&mark);
        let before = self.store.survey(&mark, GRACE);
        let swept = self.store.sweep(&mark, GRACE).unwrap();
        assert!(swept.removed.chunks <= before.dead.chunks);
        self.removed += swept.removed.chunks;
        self.moved += swept.moved.chunks;
    }
}

/// Everything in `must` is there and right.
fn check(store: &ChunkStore, must: &BTreeSet<u64>, what: &str) {
    for kind in must {
        let record = record(*kind);
        let got = store.get(&record.id).unwrap();
        assert_eq!(got, Some(record.verify().unwrap()), "{what}: chunk {kind}");
    }
}

fn lives() -> usize {
    let asked = std::env::var("MAINSTAY_CHUNK_LIVES").ok();
    asked.and_then(|v| v.parse().ok()).unwrap_or(8)
}

#[test]
fn power_cuts_during_collection_lose_nothing_that_is_needed() {
    let dir = crate::support::tempdir();
    let (from, image, next) = (
        dir.path().join("chunks"),
        dir.path().join("image"),
        dir.path().join("next"),
    );
    let mut random = Random(0x5EED);
    let hand = Hand::default();
    let mut model = Model::default();
    let (mut steps, mut cuts, mut removed, mut moved) = (0, 0, 0, 0);
    std::fs::create_dir(&from).unwrap();
    for life in 0..lives() {
        let disk = PowerDisk::over(&from);
        let store = ChunkStore::open_with(&from, hand.options(Arc::new(disk.clone()))).unwrap();
        let begun = hand.ms();
        check(&store, &model.must(begun), &format!("life {life}"));
        // What a start finds counts as used then; the check above has looked at the others.
        let mut life_of = Life {
            random: &mut random,
            store,
            disk: disk.clone(),
            hand: hand.clone(),
            must: vec![model.must(begun)],
            model,
            removed: 0,
            moved: 0,
        };
        for n in 1..=STEPS {
            life_of.step(n);
        }
        let Life {
            store,
            model: after,
            must,
            ..
        } = life_of;
        (removed, moved) = (removed + life_of.removed, moved + life_of.moved);
        steps += STEPS;
        model = after;
        check(&store, &model.must(hand.ms()), "before the end");
        drop(store);
        let events = disk.events();
        for round in 0..CUTS {
            let cut = random.below(events.len() as u64 + 1) as usize;
            let luck = match round % 3 {
                0 => Luck::None,
                _ => Luck::Random(&mut random),
            };
            disk.cut_power(cut, luck, &from, &image);
            let store = reopen(&image);
            check(
                &store,
                &owed(&must, &events[..cut]),
                &format!("life {life} cut {cut}"),
            );
            drop(store);
            cuts += 1;
        }
        // Go on from a cut: what was acknowledged by then is what is left to rely on.
        let cut = random.below(events.len() as u64 + 1) as usize;
        disk.cut_power(cut, Luck::Random(&mut random), &from, &next);
        let owed = owed(&must, &events[..cut]);
        model.used.retain(|k, _| owed.contains(k));
        model.roots.retain(|k| owed.contains(k));
        std::fs::remove_dir_all(&from).unwrap();
        std::fs::rename(&next, &from).unwrap();
    }
    eprintln!(
        "{steps} steps, {cuts} power cuts, {removed} chunks removed, {moved} moved: nothing needed was lost"
    );
    assert!(removed > 0 && moved > 0, "nothing was collected");
}

fn reopen(dir: &Path) -> ChunkStore {
    let hand = Hand::default();
    ChunkStore::open_with(
        dir,
        hand.options(Arc::new(mainstay_storage::disk::RealDisk)),
    )
    .unwrap()
}

/// What must be there after these events: owed both by the last step that ended and by the one that had
/// begun.
fn owed(must: &[BTreeSet<u64>], events: &[Event]) -> BTreeSet<u64> {
    let (acked, asked) = events
        .iter()
        .fold((0, 0), |(acked, asked), event| match event {
            Event::Acked(n) => (*n, asked),
            Event::Asked(n) => (acked, *n),
            _ => (acked, asked),
        });
    must[acked].intersection(&must[asked]).copied().collect()
}

/// With nothing needed any more all the room comes back, but what is not worth a pack.
#[test]
fn room_comes_back() {
    let dir = crate::support::tempdir();
    let hand = Hand::default();
    let disk = Arc::new(mainstay_storage::disk::RealDisk);
    let store = ChunkStore::open_with(dir.path(), hand.options(disk)).unwrap();
    for kind in 0..KINDS {
        store.put(vec![record(kind)]).unwrap();
    }
    let kept: Vec<ChunkId> = (0..KINDS).step_by(6).map(id).collect();
    let collect = |kept: &[ChunkId]| {
        let mark = store.begin_mark();
        store.keep(kept);
        store.condemn(&mark);
        let survey = store.survey(&mark, GRACE);
        (survey, store.sweep(&mark, GRACE).unwrap())
    };
    hand.go_on(Duration::from_secs(1));
    let full = store.stats();
    let (survey, swept) = collect(&kept);
    assert_eq!(survey.live.chunks, kept.len() as u64);
    assert_eq!(survey.waiting.chunks, KINDS - kept.len() as u64);
    assert_eq!(swept.removed.chunks, 0, "the grace has only begun");
    hand.go_on(GRACE);
    let (survey, swept) = collect(&kept);
    assert_eq!(survey.dead.chunks, KINDS - kept.len() as u64);
    assert!(swept.packs > 2 && swept.moved.chunks > 0, "{swept:?}");
    let stats = store.stats();
    let live: u64 = stats.stored_bytes + stats.chunks * 56;
    assert!(stats.pack_bytes < full.pack_bytes / 3, "{stats:?}");
    // At most a quarter of each pack is waste, or too little to be worth it.
    let on_disk: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap())
        .filter(|f| f.path().extension().is_some_and(|e| e == "mspk"))
        .map(|f| f.metadata().unwrap().len())
        .sum();
    assert_eq!(on_disk, stats.pack_bytes);
    let bound = live * 4 / 3 + stats.packs * (PACK_LEN / 8 + 8192);
    assert!(on_disk <= bound, "{on_disk} bytes for {live}");
    check(&store, &(0..KINDS).step_by(6).collect(), "kept");
    drop(store);
    check(
        &reopen(dir.path()),
        &(0..KINDS).step_by(6).collect(),
        "reopened",
    );
}

/// Three openings, each shorter than the grace, are together as long as it; a crash begins it anew.
#[test]
fn the_grace_goes_on_over_clean_restarts() {
    let dir = crate::support::tempdir();
    let kept: Vec<ChunkId> = (0..KINDS).step_by(6).map(id).collect();
    let third = GRACE / 3 + Duration::from_secs(1);
    let live = |ends_well: bool| {
        let hand = Hand::default();
        let disk = Arc::new(mainstay_storage::disk::RealDisk);
        let store = ChunkStore::open_with(dir.path(), hand.options(disk)).unwrap();
        for kind in 0..KINDS {
            // What is there already is not spoken of: that would be use.
            if store.stats().chunks < KINDS {
                store.put(vec![record(kind)]).unwrap();
            }
        }
        let collect = || {
            hand.go_on(Duration::from_millis(100));
            let mark = store.begin_mark();
            store.keep(&kept);
            store.condemn(&mark);
            store.sweep(&mark, GRACE).unwrap().removed.chunks
        };
        let first = collect();
        hand.go_on(third);
        let last = collect();
        if ends_well {
            store.keep_ages();
        }
        first + last
    };
    assert_eq!(live(true), 0);
    assert_eq!(live(false), 0, "a crash: nobody knows");
    assert_eq!((live(true), live(true)), (0, 0), "the grace began anew");
    assert!(live(true) > 0, "dead for longer than the grace");
    check(
        &reopen(dir.path()),
        &(0..KINDS).step_by(6).collect(),
        "kept",
    );
}

/// A sweep is told how much it copied, and stops when it is told to, with nothing lost.
#[test]
fn a_sweep_keeps_a_pace_and_can_be_broken_off() {
    let dir = crate::support::tempdir();
    let hand = Hand::default();
    let disk = Arc::new(mainstay_storage::disk::RealDisk);
    let store = ChunkStore::open_with(dir.path(), hand.options(disk)).unwrap();
    for kind in 0..KINDS {
        store.put(vec![record(kind)]).unwrap();
    }
    let kept: Vec<ChunkId> = (0..KINDS).step_by(6).map(id).collect();
    let sweep = |pace: &dyn Fn(u64) -> bool| {
        hand.go_on(GRACE + Duration::from_secs(1));
        let mark = store.begin_mark();
        store.keep(&kept);
        store.condemn(&mark);
        store.sweep_paced(&mark, GRACE, pace).unwrap()
    };
    sweep(&|_| true);
    let told = AtomicU64::new(0);
    let broken = sweep(&|bytes| {
        told.fetch_add(bytes, Ordering::SeqCst);
        false
    });
    assert!(broken.moved.bytes > 0, "{broken:?}");
    assert_eq!(told.load(Ordering::SeqCst), broken.moved.bytes);
    let wanted = (0..KINDS).step_by(6).collect();
    check(&store, &wanted, "broken off");
    let rest = sweep(&|bytes| {
        told.fetch_add(bytes, Ordering::SeqCst);
        true
    });
    assert!(rest.packs > broken.packs, "{rest:?} after {broken:?}");
    let moved = broken.moved.bytes + rest.moved.bytes;
    assert_eq!(told.load(Ordering::SeqCst), moved);
    check(&store, &wanted, "swept");
    drop(store);
    check(&reopen(dir.path()), &wanted, "reopened");
}

/// Whoever was told that a chunk is there finds it there, whatever the collector does meanwhile.
#[test]
fn a_claim_and_a_collection_at_once() {
    let dir = crate::support::tempdir();
    let hand = Hand::default();
    let disk = Arc::new(mainstay_storage::disk::RealDisk);
    let store = ChunkStore::open_with(dir.path(), hand.options(disk)).unwrap();
    let stop = AtomicBool::new(false);
    let (claims, runs) = (AtomicU64::new(0), AtomicU64::new(0));
    let grace = GRACE.as_millis() as u64;
    let (mut removed, mut moved) = (0, 0);
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for t in 0..4_u64 {
            let (store, hand, stop) = (&store, &hand, &stop);
            let (claims, runs) = (&claims, &runs);
            workers.push(scope.spawn(move || {
                let mut random = Random(t * 31 + 5);
                while !stop.load(Ordering::Relaxed) {
                    let kind = random.below(KINDS);
                    let record = record(kind);
                    let told = hand.ms();
                    if !store.contains(&record.id) {
                        store.put(vec![record.clone()]).unwrap();
                    }
                    let claim = claims.fetch_add(1, Ordering::Relaxed);
                    // Half of them let a collection pass before they rely on it.
                    let begun = runs.load(Ordering::Relaxed);
                    while claim.is_multiple_of(2)
                        && runs.load(Ordering::Relaxed) == begun
                        && !stop.load(Ordering::Relaxed)
                    {
                        std::thread::yield_now();
                    }
                    let got = store.get(&record.id).unwrap();
                    let late = hand.ms() - told >= grace;
                    assert!(
                        got.is_some() || late,
                        "chunk {kind} is gone within the grace"
                    );
                    // Some are left alone for a while, so that they die.
                    while random.below(4) > 0 && !stop.load(Ordering::Relaxed) {
                        std::thread::yield_now();
                    }
                }
            }));
        }
        let failed = || {
            workers
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        };
        while claims.load(Ordering::Relaxed) < 4000 && !failed() {
            hand.go_on(GRACE / 3);
            let mark = store.begin_mark();
            store.condemn(&mark);
            let swept = store.sweep(&mark, GRACE).unwrap();
            removed += swept.removed.chunks;
            moved += swept.moved.chunks;
            runs.fetch_add(1, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let claims = claims.into_inner();
    eprintln!("{claims} claims, {removed} chunks removed and {moved} moved meanwhile");
    assert!(removed > 0, "nothing was collected");
}

/// Bits flip under a store that runs: found by one look at everything, never served, whole again once put.
#[test]
fn flipped_bits_are_found_and_healed() {
    use std::os::unix::fs::FileExt;
    let dir = crate::support::tempdir();
    let hand = Hand::default();
    let disk = Arc::new(mainstay_storage::disk::RealDisk);
    let store = ChunkStore::open_with(dir.path(), hand.options(disk)).unwrap();
    for kind in 0..KINDS {
        store.put(vec![record(kind)]).unwrap();
    }
    let mut flips = 0;
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|e| e != "mspk") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for at in (4096 + 700..bytes.len()).step_by(9001) {
            file.write_all_at(&[bytes[at] ^ 1 << (at % 8)], at as u64)
                .unwrap();
            flips += 1;
        }
    }
    let mut verifier = store.verify_from(mainstay_storage::chunks::Place::default());
    let (mut seen, mut damaged) = (0, BTreeSet::new());
    while let Some(checked) = verifier.step(20_000).unwrap() {
        seen += checked.chunks;
        damaged.extend(checked.damaged);
        let rounds = mainstay_storage::chunks::Rounds {
            next: Some(verifier.place()),
            begun_ms: 7,
            ended_ms: 0,
        };
        store.save_rounds(&rounds).unwrap();
        assert_eq!(store.rounds(), rounds);
    }
    assert_eq!(seen, KINDS);
    assert!(!damaged.is_empty() && damaged.len() <= flips);
    assert_eq!(store.stats().damaged, damaged.len() as u64);
    for kind in 0..KINDS {
        let record = record(kind);
        let expected = (!damaged.contains(&record.id)).then(|| record.verify().unwrap());
        assert_eq!(store.get(&record.id).unwrap(), expected);
    }
    drop(store);
    let store = reopen(dir.path());
    let lost = (0..KINDS).filter(|k| !store.contains(&id(*k))).count();
    assert_eq!(lost, damaged.len(), "a restart does not bring them back");
    store.put((0..KINDS).map(record).collect()).unwrap();
    let mut verifier = store.verify_from(mainstay_storage::chunks::Place::default());
    while let Some(checked) = verifier.step(1 << 20).unwrap() {
        assert!(checked.damaged.is_empty());
    }
    check(&store, &(0..KINDS).collect(), "healed");
    eprintln!(
        "{flips} bits flipped, {} of {KINDS} chunks damaged, all found and healed",
        damaged.len()
    );
}
