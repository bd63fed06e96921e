//! Power cuts and failing disks under the log: what was acknowledged is there, whatever else is lost.

use crate::disk::{Event, Luck, PowerDisk};
use crate::support::{BOUND, Random, all, append, entry, small_options, wait};
use bytes::Bytes;
use mainstay_storage::StorageError;
use mainstay_storage::log::{Log, LogEntry, MemoryLog, Wal, WalOptions};
use std::path::Path;
use std::sync::{Arc, mpsc};

/// All that must survive; committed marks may lag.
type Kept = (Option<Bytes>, Option<(u64, Bytes)>, Vec<LogEntry>);

fn kept(log: &dyn Log) -> Kept {
    let s = log.state();
    (s.vote, s.purged, all(log))
}

fn on(disk: &PowerDisk) -> WalOptions {
    WalOptions {
        disk: Arc::new(disk.clone()),
        ..small_options()
    }
}

#[derive(Clone)]
enum Step {
    Append(Vec<LogEntry>),
    Vote(Bytes),
    Committed(Bytes),
    Truncate(u64),
    Purge(u64, Bytes),
}

fn perform(log: &dyn Log, step: Step, done: mainstay_storage::log::Done) {
    match step {
        Step::Append(entries) => log.append(entries, done),
        Step::Vote(vote) => log.save_vote(vote, done),
        Step::Committed(mark) => log.save_committed(Some(mark), done),
        Step::Truncate(after) => log.truncate_after(Some(after), done),
        Step::Purge(index, mark) => log.purge(index, mark, done),
    }
}

fn next_step(random: &mut Random, log: &dyn Log) -> Step {
    let s = log.state();
    let next = s.last.or(s.purged.map(|p| p.0)).map_or(0, |l| l + 1);
    let near = next.saturating_sub(1 + random.below(6));
    match random.below(12) {
        0 => Step::Vote(random.bytes(8).into()),
        1 => Step::Committed(random.bytes(8).into()),
        2 if s.first.is_some_and(|first| near >= first) => Step::Truncate(near),
        3 => Step::Purge(near, random.bytes(4).into()),
        _ => {
            let count = 1 + random.below(3);
            let len = random.below(150) as usize;
            Step::Append(
                (next..next + count)
                    .map(|i| entry(i, &random.bytes(len)))
                    .collect(),
            )
        }
    }
}

/// Ask for random changes, some together, and note what was asked for and acknowledged. Returns what the
/// log held after each change.
fn work(
    random: &mut Random,
    wal: &Wal,
    model: &MemoryLog,
    disk: &PowerDisk,
    steps: usize,
) -> Vec<Kept> {
    let mut history = vec![kept(model)];
    let (tx, rx) = mpsc::channel();
    let mut waiting = 0;
    for n in 1..=steps {
        let step = next_step(random, model);
        drop(wait(|done| perform(model, step.clone(), done)));
        history.push(kept(model));
        disk.note(Event::Asked(n));
        let (disk, tx) = (disk.clone(), tx.clone());
        perform(
            wal,
            step,
            Box::new(move |result| {
                if result.is_ok() {
                    disk.note(Event::Acked(n));
                }
                tx.send(()).unwrap();
            }),
        );
        waiting += 1;
        if random.below(3) == 0 {
            for _ in 0..std::mem::take(&mut waiting) {
                rx.recv_timeout(BOUND).unwrap();
            }
        }
    }
    for _ in 0..waiting {
        rx.recv_timeout(BOUND).unwrap();
    }
    history
}

/// Changes acknowledged and asked for in the first `cut` events.
fn bounds(events: &[Event]) -> (usize, usize) {
    events
        .iter()
        .fold((0, 0), |(acked, asked), event| match event {
            Event::Acked(n) => (*n, asked),
            Event::Asked(n) => (acked, *n),
            _ => (acked, asked),
        })
}

fn check(image: &Path, history: &[Kept], events: &[Event], what: &str) {
    let (acked, asked) = bounds(events);
    let wal = Wal::open_with(image, small_options()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let found = kept(&wal);
    assert!(
        history[acked..=asked].contains(&found) || is_partial(&history[acked..=asked], &found),
        "{what}: acked {acked}, asked {asked}, found {found:?}, expected at least {:?}",
        history[acked]
    );
}

/// Between two states: some of an append's entries, which was not acknowledged yet.
fn is_partial(history: &[Kept], found: &Kept) -> bool {
    history.windows(2).any(|w| {
        (&w[0].0, &w[0].1) == (&found.0, &found.1)
            && found.2.starts_with(&w[0].2)
            && w[1].2.starts_with(&found.2)
    })
}

/// The sync comes before the callback: with nothing kept that was not synced, at every moment, everything
/// acknowledged is there.
#[test]
fn nothing_is_acknowledged_before_it_is_synced() {
    let dir = crate::support::tempdir();
    let (from, image) = (dir.path().join("log"), dir.path().join("image"));
    std::fs::create_dir(&from).unwrap();
    let disk = PowerDisk::over(&from);
    let wal = Wal::open_with(&from, on(&disk)).unwrap();
    let history = work(&mut Random(11), &wal, &MemoryLog::new(), &disk, 150);
    drop(wal);
    let events = disk.events();
    assert_eq!(bounds(&events), (150, 150));
    for cut in 0..=events.len() {
        if matches!(
            events.get(cut.wrapping_sub(1)),
            Some(Event::Acked(_) | Event::SyncDir)
        ) {
            disk.cut_power(cut, Luck::None, &from, &image);
            check(&image, &history, &events[..cut], &format!("cut {cut}"));
        }
    }
}

/// Power cuts at any moment, keeping any sectors; after each the log goes on from what was left.
#[test]
fn power_cuts_lose_nothing_acknowledged() {
    for seed in 1..=6 {
        let mut random = Random(seed * 7919);
        let dir = crate::support::tempdir();
        let (from, image) = (dir.path().join("log"), dir.path().join("image"));
        std::fs::create_dir(&from).unwrap();
        for life in 0..12 {
            let disk = PowerDisk::over(&from);
            let model = MemoryLog::new();
            let wal = Wal::open_with(&from, on(&disk)).unwrap();
            copy(&wal, &model);
            let history = work(&mut random, &wal, &model, &disk, 40);
            drop(wal);
            let events = disk.events();
            for _ in 0..20 {
                let cut = random.below(events.len() as u64 + 1) as usize;
                disk.cut_power(cut, Luck::Random(&mut random), &from, &image);
                // Before the log was opened again nothing else can have been lost either.
                let what = format!("seed {seed} life {life} cut {cut}");
                check(&image, &history, &events[..cut], &what);
            }
            let cut = random.below(events.len() as u64 + 1) as usize;
            let next = dir.path().join("next");
            disk.cut_power(cut, Luck::Random(&mut random), &from, &next);
            std::fs::remove_dir_all(&from).unwrap();
            std::fs::rename(&next, &from).unwrap();
        }
    }
}

fn copy(from: &Wal, to: &MemoryLog) {
    let s = from.state();
    if let Some((index, mark)) = s.purged {
        wait(|done| to.purge(index, mark, done)).unwrap();
    }
    if let Some(vote) = s.vote {
        wait(|done| to.save_vote(vote, done)).unwrap();
    }
    wait(|done| to.append(all(from), done)).unwrap();
}

#[test]
fn after_a_failure_every_change_fails() {
    for count in 0..12 {
        let dir = crate::support::tempdir();
        let (from, image) = (dir.path().join("log"), dir.path().join("image"));
        std::fs::create_dir(&from).unwrap();
        let disk = PowerDisk::over(&from);
        let wal = Wal::open_with(&from, on(&disk)).unwrap();
        append(&wal, 0, &[b"good"]).unwrap();
        disk.fail_after(count);
        let mut good = 1;
        let error = loop {
            match append(&wal, good, &[b"more"]) {
                Ok(()) => good += 1,
                Err(error) => break error,
            }
            assert!(good < 100, "the disk never failed");
        };
        assert!(matches!(error, StorageError::Stopped(_)), "{error:?}");
        assert!(error.to_string().contains("Input/output error"), "{error}");
        // The disk works again; the log must not.
        disk.fail_after(usize::MAX);
        let vote = wait(|done| wal.save_vote(Bytes::from_static(b"v"), done));
        assert!(matches!(vote, Err(StorageError::Stopped(_))));
        assert!(wait(|done| wal.save_committed(None, done)).is_err());
        assert!(wait(|done| wal.purge(0, Bytes::new(), done)).is_err());
        assert!(append(&wal, good + 1, &[b"x"]).is_err());
        let vote = wal.state().vote;
        assert_eq!(vote, None, "a refused change became visible");
        drop(wal);
        disk.cut_power(disk.events().len(), Luck::None, &from, &image);
        let found = all(&Wal::open_with(&image, small_options()).unwrap());
        assert!(found.len() as u64 >= good, "{} of {good}", found.len());
    }
}

/// A process dies between a write and its sync; the next one finds the record, tells its callers, and then
/// the power goes: what it told must be there.
#[test]
fn what_a_start_finds_is_durable() {
    for count in 0..12 {
        let dir = crate::support::tempdir();
        let (from, image) = (dir.path().join("log"), dir.path().join("image"));
        std::fs::create_dir(&from).unwrap();
        let disk = PowerDisk::over(&from);
        let wal = Wal::open_with(&from, on(&disk)).unwrap();
        disk.fail_after(count);
        let mut next = 0;
        while append(&wal, next, &[b"an entry"]).is_ok() {
            next += 1;
        }
        drop(wal);
        disk.fail_after(usize::MAX);
        // Still open at the cut: closing it would sync.
        let wal = Wal::open_with(&from, on(&disk)).unwrap();
        let (told, opened) = (all(&wal), disk.events().len());
        disk.cut_power(opened, Luck::None, &from, &image);
        let found = all(&Wal::open_with(&image, small_options()).unwrap());
        assert_eq!(found, told, "failed after {count}");
    }
}

#[test]
fn changes_that_wait_share_a_sync() {
    let dir = crate::support::tempdir();
    let disk = PowerDisk::over(dir.path());
    let options = WalOptions {
        disk: Arc::new(disk.clone()),
        ..WalOptions::default()
    };
    let wal = Wal::open_with(dir.path(), options).unwrap();
    // The writer is held in a callback while others queue behind it.
    let (release, held) = mpsc::channel::<()>();
    wal.append(
        vec![entry(0, b"first")],
        Box::new(move |_| held.recv_timeout(BOUND).unwrap()),
    );
    let syncs = || {
        disk.events()
            .iter()
            .filter(|e| matches!(e, Event::Sync(_)))
            .count()
    };
    let (tx, rx) = mpsc::channel();
    for i in 1..=500 {
        let tx = tx.clone();
        wal.append(vec![entry(i, b"x")], Box::new(move |r| tx.send(r).unwrap()));
    }
    let writes = || {
        disk.events()
            .iter()
            .filter(|e| matches!(e, Event::Write(..)))
            .count()
    };
    let before = (syncs(), writes());
    release.send(()).unwrap();
    for _ in 0..500 {
        rx.recv_timeout(BOUND).unwrap().unwrap();
    }
    // One for the batch; the first may still have had its own ahead of `before`, and a mark may follow.
    assert!(syncs() - before.0 <= 2, "{} syncs", syncs() - before.0);
    assert!(writes() - before.1 <= 3, "{} writes", writes() - before.1);
    let before = syncs();
    wait(|done| wal.save_committed(Some(Bytes::from_static(b"c")), done)).unwrap();
    assert_eq!(syncs(), before, "a committed mark needs no sync");
}
