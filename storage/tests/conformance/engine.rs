//! The suite of every [`Engine`], and what only sled's files can show: reopening.

use crate::disk::{Event, PowerDisk};
use crate::support::Random;
use mainstay_storage::StorageError;
use mainstay_storage::engine::{Change, Engine, Loaded, MemoryEngine, SledEngine};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// sled hangs when eight or more are open in one process: these tests take turns.
static TURN: Mutex<()> = Mutex::new(());

pub(crate) fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn each(check: impl Fn(&Arc<dyn Engine>)) {
    let memory: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
    check(&memory);
    let _turn = turn();
    let dir = crate::support::tempdir();
    let sled: Arc<dyn Engine> = Arc::new(SledEngine::open(&dir.path().join("state")).unwrap());
    check(&sled);
}

fn set(key: &[u8], value: &[u8]) -> Change {
    (key.to_vec(), Some(value.to_vec()))
}

fn removed(key: &[u8]) -> Change {
    (key.to_vec(), None)
}

fn loaded(mark: &[u8], entries: &[(&[u8], &[u8])]) -> Loaded {
    Loaded {
        mark: Some(mark.to_vec()),
        entries: entries
            .iter()
            .map(|(k, v)| (k.to_vec(), v.to_vec()))
            .collect(),
    }
}

#[test]
fn a_new_engine_is_empty() {
    each(|engine| assert_eq!(engine.load().unwrap(), Loaded::default()));
}

#[test]
fn a_checkpoint_sets_removes_and_marks() {
    each(|engine| {
        let changes = [set(b"b", b"1"), set(b"", b"empty key"), set(b"a", b"")];
        engine.checkpoint(&changes, b"m1").unwrap();
        let expected = loaded(b"m1", &[(b"", b"empty key"), (b"a", b""), (b"b", b"1")]);
        assert_eq!(engine.load().unwrap(), expected);
        let changes = [removed(b"b"), removed(b"never there"), set(b"a", b"2")];
        engine.checkpoint(&changes, b"m2").unwrap();
        let expected = loaded(b"m2", &[(b"", b"empty key"), (b"a", b"2")]);
        assert_eq!(engine.load().unwrap(), expected);
        engine.checkpoint(&[], b"").unwrap();
        assert_eq!(engine.load().unwrap().mark, Some(Vec::new()));
    });
}

#[test]
fn the_last_change_of_a_key_wins() {
    each(|engine| {
        let changes = [
            set(b"k", b"1"),
            removed(b"k"),
            set(b"k", b"2"),
            set(b"l", b"3"),
            removed(b"l"),
        ];
        engine.checkpoint(&changes, b"m").unwrap();
        assert_eq!(engine.load().unwrap(), loaded(b"m", &[(b"k", b"2")]));
    });
}

#[test]
fn values_and_marks_of_any_size() {
    each(|engine| {
        let big = Random(1).bytes(300_000);
        for len in [0, 2799, 2800, 2801, 5600, 5601, 300_000, 10, 4000] {
            let value = &big[..len];
            // Keys that are prefixes of each other, and look like part numbers.
            let keys: [&[u8]; 3] = [b"k", b"k\0\0\0\x01", b"k\0\0\0\x02"];
            let changes: Vec<_> = keys.iter().map(|key| set(key, value)).collect();
            engine.checkpoint(&changes, value).unwrap();
            let expected = loaded(value, &keys.map(|key| (key, value)));
            assert_eq!(engine.load().unwrap(), expected, "{len}");
        }
    });
}

/// Whatever is changed, made or removed before or behind the place where the reader is.
#[test]
fn a_reader_sees_what_there_was_when_it_began() {
    each(|engine| {
        let big = Random(3).bytes(20_000);
        let key = |n: u8| vec![n];
        let first: Vec<_> = (0..100).map(|n| set(&key(2 * n), &[n])).collect();
        engine.checkpoint(&first, b"first").unwrap();
        engine.checkpoint(&[set(&key(50), &big)], b"cut").unwrap();
        let before = engine.load().unwrap();
        let (mark, mut entries) = engine.clone().view().unwrap();
        assert_eq!(mark.as_deref(), Some(&b"cut"[..]));
        let mut seen = vec![entries.next().unwrap().unwrap()];
        for round in 0..10u8 {
            let changes: Vec<_> = (0..200)
                .map(|n| match (n + round) % 4 {
                    0 => removed(&key(n)),
                    1 => set(&key(n), &big[..usize::from(round) * 1000]),
                    _ => set(&key(n), &[n, round]),
                })
                .collect();
            engine.checkpoint(&changes, &[round]).unwrap();
            seen.extend(entries.by_ref().take(7).map(Result::unwrap));
        }
        seen.extend(entries.map(Result::unwrap));
        assert!(before.entries == seen, "{} entries seen", seen.len());
        let now = engine.load().unwrap();
        assert_eq!(now.mark, Some(vec![9]));
        assert!(now.entries != seen);
    });
}

/// One writes, another reads all the time: each reading is one checkpoint's content, whole.
#[test]
fn readers_beside_a_writer_see_one_checkpoint_each() {
    const KEYS: u64 = 200;
    let _turn = turn();
    let dir = crate::support::tempdir();
    let engine = Arc::new(SledEngine::open(dir.path()).unwrap());
    // What checkpoint `n` leaves: keys change, come and go, by their own clocks.
    let value = |key: u64, n: u64| {
        let at = n - (n + key) % 7;
        let len = if key.is_multiple_of(9) { 6000 } else { 30 };
        (!(at + key).is_multiple_of(5)).then(|| Random(key * 1000 + at + 1).bytes(len))
    };
    let content = |n: u64| -> Vec<_> {
        let all = (0..KEYS).map(|key| (key.to_be_bytes().to_vec(), value(key, n)));
        all.collect()
    };
    engine
        .checkpoint(&content(100), &100u64.to_le_bytes())
        .unwrap();
    let written = std::sync::atomic::AtomicBool::new(false);
    let readings = std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 101..300u64 {
                let old = content(n - 1);
                let mut changes = content(n);
                changes.retain(|change| !old.contains(change));
                engine.checkpoint(&changes, &n.to_le_bytes()).unwrap();
            }
            written.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let mut readings = 0;
        while !written.load(std::sync::atomic::Ordering::SeqCst) {
            let (mark, entries) = engine.clone().view().unwrap();
            let n = u64::from_le_bytes(mark.unwrap().try_into().unwrap());
            let seen: Vec<_> = entries.map(Result::unwrap).collect();
            let there = content(n).into_iter();
            let there: Vec<_> = there
                .filter_map(|(key, value)| Some((key, value?)))
                .collect();
            assert!(seen == there, "at {n}");
            readings += 1;
        }
        readings
    });
    assert!(readings > 3, "{readings} readings");
}

#[test]
fn a_replacement_ends_a_reading() {
    let _turn = turn();
    let dir = crate::support::tempdir();
    let engine = Arc::new(SledEngine::open(dir.path()).unwrap());
    let changes: Vec<_> = (0..100u8).map(|n| set(&[n], b"v")).collect();
    engine.checkpoint(&changes, b"m").unwrap();
    let (_, mut entries) = engine.clone().view().unwrap();
    assert!(entries.next().unwrap().is_ok());
    engine.replace(&mut std::iter::empty(), b"n").unwrap();
    let rest: Vec<_> = entries.collect();
    assert!(
        matches!(rest[..], [Err(StorageError::Misuse(_))]),
        "{}",
        rest.len()
    );
}

#[test]
fn replace_leaves_nothing_of_the_old() {
    each(|engine| {
        let big = Random(2).bytes(20_000);
        engine
            .checkpoint(&[set(b"old", &big), set(b"both", &big)], b"m1")
            .unwrap();
        let new = vec![
            (b"both".to_vec(), b"new".to_vec()),
            (b"new".to_vec(), big.clone()),
        ];
        engine.replace(&mut new.clone().into_iter(), b"m2").unwrap();
        let expected = Loaded {
            mark: Some(b"m2".to_vec()),
            entries: new,
        };
        assert_eq!(engine.load().unwrap(), expected);
        engine.checkpoint(&[removed(b"new")], b"m3").unwrap();
        assert_eq!(engine.load().unwrap(), loaded(b"m3", &[(b"both", b"new")]));
        engine.replace(&mut std::iter::empty(), b"m4").unwrap();
        assert_eq!(engine.load().unwrap(), loaded(b"m4", &[]));
    });
}

#[test]
fn replace_refuses_disorder_and_changes_nothing() {
    each(|engine| {
        engine.checkpoint(&[set(b"k", b"v")], b"m").unwrap();
        let twice = vec![(b"a".to_vec(), Vec::new()), (b"a".to_vec(), Vec::new())];
        let refused = engine.replace(&mut twice.into_iter(), b"x");
        assert!(
            matches!(refused, Err(StorageError::Misuse(_))),
            "{refused:?}"
        );
        assert_eq!(engine.load().unwrap(), loaded(b"m", &[(b"k", b"v")]));
        engine.checkpoint(&[set(b"l", b"w")], b"m2").unwrap();
        assert_eq!(
            engine.load().unwrap(),
            loaded(b"m2", &[(b"k", b"v"), (b"l", b"w")])
        );
    });
}

/// Random checkpoints and replacements, reopened now and then, against a map.
#[test]
fn sled_agrees_with_a_map_across_reopenings() {
    let _turn = turn();
    let mut random = Random(77);
    let dir = crate::support::tempdir();
    let mut engine = SledEngine::open(dir.path()).unwrap();
    let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    for step in 0..120u64 {
        let mark = step.to_le_bytes();
        if random.below(15) == 0 {
            model = (0..random.below(300))
                .map(|_| (random.bytes(3), random.bytes(40)))
                .collect();
            engine
                .replace(&mut model.clone().into_iter(), &mark)
                .unwrap();
        } else {
            let changes: Vec<Change> = (0..random.below(20))
                .map(|_| {
                    let len = if random.below(10) == 0 { 9000 } else { 50 };
                    let value = (random.below(3) > 0).then(|| random.bytes(len));
                    (vec![random.below(64) as u8], value)
                })
                .collect();
            engine.checkpoint(&changes, &mark).unwrap();
            for (key, value) in changes {
                match value {
                    Some(value) => model.insert(key, value),
                    None => model.remove(&key),
                };
            }
        }
        if random.below(6) == 0 {
            drop(engine);
            engine = SledEngine::open(dir.path()).unwrap();
        }
        let expected = Loaded {
            mark: Some(mark.to_vec()),
            entries: model.clone().into_iter().collect(),
        };
        assert_eq!(engine.load().unwrap(), expected, "step {step}");
    }
    assert!(engine.disk_bytes() > 0);
}

#[test]
fn a_half_written_recovery_snapshot_does_not_keep_it_shut() {
    let _turn = turn();
    let dir = crate::support::tempdir();
    let engine = SledEngine::open(dir.path()).unwrap();
    engine.checkpoint(&[set(b"k", b"v")], b"m").unwrap();
    drop(engine);
    let left = dir.path().join("snap.0000000000001234.generating");
    std::fs::write(&left, b"half").unwrap();
    let engine = SledEngine::open(dir.path()).unwrap();
    assert!(!left.exists());
    assert_eq!(engine.load().unwrap(), loaded(b"m", &[(b"k", b"v")]));
}

/// sled's `flush` alone is not durable: each checkpoint and replacement ends with a sync of ours.
#[test]
fn nothing_returns_before_our_own_sync() {
    let _turn = turn();
    let dir = crate::support::tempdir();
    let disk = PowerDisk::over(dir.path());
    let engine = SledEngine::open_on(dir.path(), Arc::new(disk.clone())).unwrap();
    let syncs = || {
        disk.events()
            .iter()
            .filter(|e| matches!(e, Event::Sync(_)))
            .count()
    };
    for n in 0..10u8 {
        let before = syncs();
        engine.checkpoint(&[set(&[n], b"v")], &[n]).unwrap();
        assert_eq!(syncs(), before + 1);
    }
    let before = syncs();
    engine.replace(&mut std::iter::empty(), b"m").unwrap();
    assert!(
        syncs() >= before + 2,
        "the new content, then the switch to it"
    );
}

#[test]
fn after_a_failed_sync_every_change_fails() {
    let _turn = turn();
    let dir = crate::support::tempdir();
    let disk = PowerDisk::over(dir.path());
    let engine = SledEngine::open_on(dir.path(), Arc::new(disk.clone())).unwrap();
    engine.checkpoint(&[set(b"k", b"v")], b"m").unwrap();
    disk.fail_after(0);
    let failed = engine.checkpoint(&[set(b"k", b"w")], b"n");
    assert!(matches!(failed, Err(StorageError::Io { .. })), "{failed:?}");
    disk.fail_after(usize::MAX);
    let refused = engine.checkpoint(&[], b"o");
    assert!(
        matches!(refused, Err(StorageError::Stopped(_))),
        "{refused:?}"
    );
    let refused = engine.replace(&mut std::iter::empty(), b"o");
    assert!(
        matches!(refused, Err(StorageError::Stopped(_))),
        "{refused:?}"
    );
}

/// Flipped bits in the store's file: refused, or without effect. Never other content, and never an older
/// checkpoint, to which sled goes back in silence.
#[test]
fn flipped_bits_are_noticed() {
    let _turn = turn();
    let source = crate::support::tempdir();
    let engine = SledEngine::open(source.path()).unwrap();
    for n in 0..40u8 {
        let len = if n % 7 == 0 { 9000 } else { 200 };
        let changes = [
            set(&[n % 16], &Random(u64::from(n) + 1).bytes(len)),
            removed(&[(n + 8) % 16]),
        ];
        engine.checkpoint(&changes, &[n]).unwrap();
    }
    let last = Some(engine.load().unwrap());
    drop(engine);
    let (mut refused, mut same) = (0, 0);
    let mut random = Random(99);
    for _ in 0..60 {
        let dir = crate::support::tempdir();
        for item in std::fs::read_dir(source.path()).unwrap() {
            let path = item.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        let db = dir.path().join("db");
        let mut bytes = std::fs::read(&db).unwrap();
        let used = bytes.iter().rposition(|b| *b != 0).unwrap() as u64;
        bytes[random.below(used) as usize] ^= 1 << random.below(8);
        std::fs::write(&db, bytes).unwrap();
        match SledEngine::open(dir.path()).and_then(|engine| engine.load()) {
            Err(error) => {
                assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
                assert!(
                    error
                        .to_string()
                        .contains("mainstay member repair --data-dir "),
                    "{error}"
                );
                refused += 1;
            }
            Ok(found) => {
                assert_eq!(Some(found), last);
                same += 1;
            }
        }
    }
    assert!(refused >= 30, "refused {refused}, without effect {same}");
}
