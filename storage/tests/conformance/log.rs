//! The suite of every [`Log`], and what only files can show: reopening.

use crate::support::{BOUND, Random, all, append, entry, small, wait};
use bytes::Bytes;
use mainstay_storage::StorageError;
use mainstay_storage::log::{Log, LogState, MemoryLog, Wal, WalOptions};
use std::sync::{Arc, Mutex, mpsc};

/// Run a check on every implementation.
fn each(check: impl Fn(Arc<dyn Log>)) {
    check(Arc::new(MemoryLog::new()));
    let dir = crate::support::tempdir();
    check(Arc::new(Wal::open(&dir.path().join("log")).unwrap()));
    check(Arc::new(small(&dir.path().join("small"))));
}

fn b(bytes: &'static [u8]) -> Bytes {
    Bytes::from_static(bytes)
}

/// Comparable between implementations and across a reopening.
fn state(log: &dyn Log) -> LogState {
    LogState {
        disk_bytes: 0,
        ..log.state()
    }
}

#[test]
fn a_new_log_is_empty() {
    each(|log| {
        assert_eq!(state(&*log), LogState::default());
        assert!(all(&*log).is_empty());
    });
}

#[test]
fn entries_are_read_at_once_and_in_order() {
    each(|log| {
        // No waiting before the read: visibility does not depend on the disk.
        let (tx, rx) = mpsc::channel();
        for i in 0..100u64 {
            let tx = tx.clone();
            log.append(
                vec![entry(i, format!("entry {i}").as_bytes())],
                Box::new(move |r| tx.send(r.map(|()| i)).unwrap()),
            );
            assert_eq!(log.state().last, Some(i));
            assert_eq!(
                log.read(i..i + 1, 1).unwrap()[0].bytes,
                format!("entry {i}")
            );
        }
        for i in 0..100 {
            let done = rx.recv_timeout(crate::support::BOUND).unwrap();
            assert_eq!(done.unwrap(), i);
        }
        assert_eq!(all(&*log).len(), 100);
    });
}

#[test]
fn callbacks_keep_the_order_of_mixed_changes() {
    each(|log| {
        let order = Arc::new(Mutex::new(Vec::new()));
        let (tx, rx) = mpsc::channel();
        let done = |n: usize| {
            let (order, tx) = (Arc::clone(&order), tx.clone());
            Box::new(move |_| {
                order.lock().unwrap().push(n);
                tx.send(()).unwrap();
            })
        };
        for round in 0..50u64 {
            let n = round as usize * 7;
            log.append(vec![entry(round * 2, b"a")], done(n));
            log.save_vote(b(b"vote"), done(n + 1));
            log.append(vec![entry(round * 2 + 1, b"b")], done(n + 2));
            log.save_committed(Some(b(b"c")), done(n + 3));
            log.truncate_after(Some(round * 2 + 1), done(n + 4));
            // A refusal waits for its turn as well.
            log.append(vec![entry(1_000_000, b"gap")], done(n + 5));
            log.purge(round * 2, b(b"p"), done(n + 6));
        }
        for _ in 0..350 {
            rx.recv_timeout(crate::support::BOUND).unwrap();
        }
        assert_eq!(*order.lock().unwrap(), (0..350).collect::<Vec<_>>());
    });
}

#[test]
fn a_callback_may_come_back_with_a_change() {
    each(|log| {
        let (tx, rx) = mpsc::channel();
        let again = Arc::clone(&log);
        log.append(
            vec![entry(0, b"first")],
            Box::new(move |_| {
                again.save_vote(
                    b(b"from a callback"),
                    Box::new(move |r| tx.send(r).unwrap()),
                );
            }),
        );
        rx.recv_timeout(crate::support::BOUND).unwrap().unwrap();
        assert_eq!(log.state().vote, Some(b(b"from a callback")));
    });
}

#[test]
fn a_gap_is_refused_and_changes_nothing() {
    each(|log| {
        append(&*log, 5, &[b"five", b"six"]).unwrap();
        for bad in [0, 5, 6, 8] {
            let refused = append(&*log, bad, &[b"x"]);
            assert!(
                matches!(refused, Err(StorageError::Misuse(_))),
                "{refused:?}"
            );
        }
        let holes = vec![entry(7, b""), entry(9, b"")];
        assert!(wait(|done| log.append(holes, done)).is_err());
        assert_eq!((log.state().first, log.state().last), (Some(5), Some(6)));
        append(&*log, 7, &[b"seven"]).unwrap();
    });
}

#[test]
fn truncation_is_exclusive_and_the_index_can_be_written_again() {
    each(|log| {
        append(&*log, 1, &[b"1", b"2", b"3", b"4"]).unwrap();
        wait(|done| log.truncate_after(Some(2), done)).unwrap();
        append(&*log, 3, &[b"3 again"]).unwrap();
        wait(|done| log.truncate_after(Some(9), done)).unwrap();
        let expected = [entry(1, b"1"), entry(2, b"2"), entry(3, b"3 again")];
        assert_eq!(all(&*log), expected);
        wait(|done| log.truncate_after(None, done)).unwrap();
        assert_eq!(state(&*log), LogState::default());
        append(&*log, 1, &[b"1 again"]).unwrap();
        assert_eq!(all(&*log), [entry(1, b"1 again")]);
    });
}

#[test]
fn purge_keeps_its_mark_and_may_pass_the_end() {
    each(|log| {
        append(&*log, 1, &[b"1", b"2", b"3"]).unwrap();
        wait(|done| log.purge(2, b(b"two"), done)).unwrap();
        assert_eq!(all(&*log), [entry(3, b"3")]);
        wait(|done| log.purge(1, b(b"older"), done)).unwrap();
        assert_eq!(log.state().purged, Some((2, b(b"two"))));
        wait(|done| log.purge(10, b(b"ten"), done)).unwrap();
        let s = log.state();
        assert_eq!(
            (s.first, s.last, s.purged),
            (None, None, Some((10, b(b"ten"))))
        );
        assert!(append(&*log, 4, &[b"4"]).is_err());
        append(&*log, 11, &[b"11"]).unwrap();
        assert_eq!(all(&*log), [entry(11, b"11")]);
    });
}

#[test]
fn reads_are_bounded_but_never_empty() {
    each(|log| {
        append(&*log, 1, &[&[7; 100], &[8; 100], &[9; 100]]).unwrap();
        for (max, count) in [(0, 1), (100, 1), (199, 1), (200, 2), (1000, 3)] {
            assert_eq!(log.read(1..10, max).unwrap().len(), count, "{max}");
        }
        assert_eq!(log.read(3..10, 0).unwrap(), [entry(3, &[9; 100])]);
        assert!(log.read(4..10, 1000).unwrap().is_empty());
        assert!(log.read(0..1, 1000).unwrap().is_empty());
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = log.read(3..1, 1000).unwrap();
        assert!(backwards.is_empty());
    });
}

#[test]
fn votes_and_marks_are_kept() {
    let dir = crate::support::tempdir();
    let log = Wal::open(dir.path()).unwrap();
    wait(|done| log.save_vote(b(b"v1"), done)).unwrap();
    wait(|done| log.save_vote(b(b"v2"), done)).unwrap();
    wait(|done| log.save_committed(Some(b(b"c1")), done)).unwrap();
    append(&log, 0, &[b"zero", b""]).unwrap();
    let before = state(&log);
    drop(log);
    let log = Wal::open(dir.path()).unwrap();
    assert_eq!(state(&log), before);
    assert_eq!(before.vote, Some(b(b"v2")));
    assert_eq!(before.committed, Some(b(b"c1")));
    assert_eq!(all(&log), [entry(0, b"zero"), entry(1, b"")]);
    wait(|done| log.save_committed(None, done)).unwrap();
    drop(log);
    assert_eq!(Wal::open(dir.path()).unwrap().state().committed, None);
}

#[test]
fn purged_segments_are_deleted_and_everything_else_survives() {
    let dir = crate::support::tempdir();
    let log = small(dir.path());
    wait(|done| log.save_vote(b(b"the vote of the first segment"), done)).unwrap();
    for i in 0..200u64 {
        append(&log, i, &[&[i as u8; 64]]).unwrap();
    }
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    assert!(files() > 20);
    let full = log.state().disk_bytes;
    wait(|done| log.purge(190, b(b"p"), done)).unwrap();
    // Deletion follows the callback: the next change waits for it.
    append(&log, 200, &[b"after"]).unwrap();
    assert!(files() < 5, "{} files", files());
    assert!(log.state().disk_bytes < full / 4);
    let (before, entries) = (state(&log), all(&log));
    assert_eq!(entries.len(), 10);
    drop(log);
    let log = small(dir.path());
    assert_eq!(state(&log), before);
    assert_eq!(all(&log), entries);
}

/// Thousands of random changes on both, files reopened now and then: they must never differ.
#[test]
fn files_and_memory_agree() {
    for seed in 1..=8 {
        let mut random = Random(seed * 0x9E37_79B9);
        let dir = crate::support::tempdir();
        let mut wal = small(dir.path());
        let memory = MemoryLog::new();
        for step in 0..400 {
            random_change(&mut random, &wal, &memory);
            if random.below(12) == 0 {
                drop(wal);
                wal = small(dir.path());
            }
            assert_eq!(state(&wal), state(&memory), "seed {seed} step {step}");
            assert_eq!(all(&wal), all(&memory), "seed {seed} step {step}");
        }
    }
}

fn random_change(random: &mut Random, wal: &Wal, memory: &MemoryLog) {
    let s = memory.state();
    let next = s
        .last
        .or(s.purged.as_ref().map(|p| p.0))
        .map_or(0, |l| l + 1);
    let low = s.first.unwrap_or(next);
    let near = low + random.below(next - low + 3);
    let mark = Bytes::from(random.bytes(5));
    let what = random.below(16);
    let entries: Vec<_> = (next..next + 1 + random.below(4))
        .map(|i| {
            let len = random.below(200) as usize;
            entry(i, &random.bytes(len))
        })
        .collect();
    for log in [wal as &dyn Log, memory] {
        let (mark, entries) = (mark.clone(), entries.clone());
        let result = wait(|done| match what {
            0 => log.save_vote(mark, done),
            1 => log.save_committed(Some(mark), done),
            2 => log.save_committed(None, done),
            3 | 4 => log.truncate_after(Some(near), done),
            5 => log.purge(near, mark, done),
            6 if s.purged.is_none() => log.truncate_after(None, done),
            _ => log.append(entries, done),
        });
        result.unwrap();
    }
}

#[test]
fn a_crash_in_memory_loses_what_was_held() {
    let log = MemoryLog::new();
    append(&log, 1, &[b"durable"]).unwrap();
    log.hold();
    let (tx, rx) = mpsc::channel();
    let tx2 = tx.clone();
    log.append(
        vec![entry(2, b"held")],
        Box::new(move |r| tx.send(r).unwrap()),
    );
    assert_eq!(all(&log).len(), 2);
    assert!(rx.try_recv().is_err(), "no callback while the disk is held");
    log.release();
    rx.try_recv().unwrap().unwrap();
    log.hold();
    log.append(
        vec![entry(3, b"lost")],
        Box::new(move |r| tx2.send(r).unwrap()),
    );
    let after = log.crash();
    assert!(rx.try_recv().unwrap().is_err());
    assert_eq!(all(&after), [entry(1, b"durable"), entry(2, b"held")]);
    assert!(append(&log, 4, &[b"x"]).is_err());
    append(&after, 3, &[b"again"]).unwrap();
}

/// The old entry reaches the file after it was replaced: its place must not be taken for the new one's.
#[test]
fn a_replaced_entry_is_never_read_from_its_old_place() {
    let dir = crate::support::tempdir();
    let options = WalOptions {
        cache_bytes: 0,
        batch_bytes: 1,
        ..WalOptions::default()
    };
    let wal = Arc::new(Wal::open_with(dir.path(), options).unwrap());
    let (release, held) = mpsc::channel::<()>();
    wal.append(
        vec![entry(0, b"first")],
        Box::new(move |_| held.recv_timeout(BOUND).unwrap()),
    );
    let (tx, rx) = mpsc::channel();
    let reader = Arc::clone(&wal);
    // Runs when the old entry was written and the new one was not.
    wal.append(
        vec![entry(1, b"old")],
        Box::new(move |_| tx.send(reader.read(1..2, 100)).unwrap()),
    );
    wal.truncate_after(Some(0), Box::new(drop));
    wal.append(vec![entry(1, b"new")], Box::new(drop));
    release.send(()).unwrap();
    let read = rx.recv_timeout(BOUND).unwrap().unwrap();
    assert_eq!(read, [entry(1, b"new")]);
    append(&*wal, 2, &[b"last"]).unwrap();
    assert_eq!(all(&*wal)[1], entry(1, b"new"));
}
