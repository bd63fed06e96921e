//! `kill -9` at any moment: a child process appends, checkpoints and says on its standard output what was
//! acknowledged; each next child must find all of it.

use crate::support::{Random, append, wait};
use bytes::Bytes;
use mainstay_storage::engine::{Change, Engine, SledEngine};
use mainstay_storage::log::{Log, Wal, WalOptions};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DIR: &str = "MAINSTAY_KILL_TEST_DIR";
/// At least so many kills, so many of them before the child was ready; more until both are true.
const KILLS: usize = 36;
const EARLY: usize = 3;
const KILLS_MAX: usize = 300;

fn payload(index: u64) -> Vec<u8> {
    Random(index + 1).bytes(50 + (index % 300) as usize)
}

/// What checkpoint `n` changes.
fn changes(n: u64) -> Vec<Change> {
    let len = if n.is_multiple_of(17) { 12_000 } else { 100 };
    vec![
        (vec![(n % 50) as u8], Some(Random(n + 1).bytes(len))),
        (vec![((n + 25) % 50) as u8], None),
    ]
}

/// What the store holds after checkpoint `n`.
fn content(n: u64) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut all = BTreeMap::new();
    for (key, value) in (1..=n).flat_map(changes) {
        match value {
            Some(value) => all.insert(key, value),
            None => all.remove(&key),
        };
    }
    all
}

fn say(what: &str, number: u64) {
    let mut out = std::io::stdout().lock();
    // In one write: a kill must not cut a line.
    out.write_all(format!("@{what} {number}\n").as_bytes())
        .unwrap();
    out.flush().unwrap();
}

/// The child's part. Without the variable (a plain test run) there is nothing to do: `survives_kills`
/// is the test.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let dir = Path::new(&dir);
    let options = WalOptions {
        segment_bytes: 8 << 10,
        cache_bytes: 4 << 10,
        ..WalOptions::default()
    };
    let wal = Wal::open_with(&dir.join("log"), options).expect("the log opens");
    let engine = SledEngine::open(&dir.join("state")).expect("the state opens");
    let s = wal.state();
    let last = s.last.or(s.purged.map(|p| p.0)).unwrap_or(0);
    for entry in wal.read(0..u64::MAX, usize::MAX).expect("the log reads") {
        assert_eq!(entry.bytes, payload(entry.index), "entry {}", entry.index);
    }
    let loaded = engine.load().expect("the state loads");
    let mark = loaded
        .mark
        .map_or(0, |m| u64::from_le_bytes(m.try_into().unwrap()));
    assert_eq!(
        loaded.entries,
        content(mark).into_iter().collect::<Vec<_>>()
    );
    say(
        "vote",
        s.vote
            .map_or(0, |v| u64::from_le_bytes(v[..].try_into().unwrap())),
    );
    say("log", last);
    say("state", mark);
    say("open", 0);
    work(&wal, &engine, last, mark);
}

fn work(wal: &Wal, engine: &SledEngine, mut last: u64, mut mark: u64) {
    loop {
        for _ in 0..4 {
            append(wal, last + 1, &[&payload(last + 1), &payload(last + 2)]).unwrap();
            last += 2;
            say("log", last);
        }
        let vote = Bytes::copy_from_slice(&last.to_le_bytes());
        wait(|done| wal.save_vote(vote, done)).unwrap();
        say("vote", last);
        mark += 1;
        engine
            .checkpoint(&changes(mark), &mark.to_le_bytes())
            .unwrap();
        say("state", mark);
        if mark.is_multiple_of(11) {
            mark += 1;
            let all = content(mark);
            engine
                .replace(&mut all.into_iter(), &mark.to_le_bytes())
                .unwrap();
            say("state", mark);
        }
        if mark.is_multiple_of(5) {
            wait(|done| wal.purge(last - 3, Bytes::from_static(b"p"), done)).unwrap();
        }
    }
}

fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::child", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn survives_kills() {
    let dir = crate::support::tempdir();
    let mut random = Random(0xC0FFEE);
    let mut acked: BTreeMap<String, u64> = BTreeMap::new();
    let (mut opened, mut early) = (0, 0);
    for kill in 0..KILLS_MAX {
        if kill >= KILLS && early >= EARLY {
            break;
        }
        let mut child = spawn(dir.path());
        let out = BufReader::new(child.stdout.take().unwrap());
        // Every third is killed by time, mostly while it recovers; the others after some acknowledgements.
        let killer = (kill % 3 == 2).then(|| {
            let pid = child.id();
            let after = Duration::from_millis(random.below(20));
            std::thread::spawn(move || {
                let until = Instant::now() + after;
                while Instant::now() < until {
                    std::thread::yield_now();
                }
                kill_9(pid);
            })
        });
        let (lines, open) = listen(
            out,
            &child,
            (killer.is_none()).then(|| random.below(60)),
            &acked,
        );
        let status = child.wait().unwrap();
        drop(killer.map(std::thread::JoinHandle::join));
        if status.code().is_some() {
            let mut error = String::new();
            drop(std::io::Read::read_to_string(
                &mut child.stderr.take().unwrap(),
                &mut error,
            ));
            panic!("kill {kill}: the child failed ({status}): {error}");
        }
        if open {
            opened += 1
        } else {
            early += 1
        }
        acked.extend(lines);
    }
    assert!(opened >= KILLS / 2, "{opened} opened");
    assert!(early >= EARLY, "{early} kills hit the recovery");
    assert!(acked["log"] > 100 && acked["state"] > 10, "{acked:?}");
}

/// Read what the child says; kill it after `limit` acknowledgements. What it finds at its start must be
/// at least what was acknowledged before.
fn listen(
    out: impl BufRead,
    child: &Child,
    limit: Option<u64>,
    before: &BTreeMap<String, u64>,
) -> (BTreeMap<String, u64>, bool) {
    let mut said = BTreeMap::new();
    let mut open = false;
    let mut count = 0;
    for line in out.lines() {
        let line = line.unwrap();
        // The test harness shares the line with its own words.
        let Some((_, words)) = line.split_once('@') else {
            continue;
        };
        let (what, number) = words.split_once(' ').unwrap();
        let number: u64 = number.parse().unwrap();
        if what == "open" {
            open = true;
        } else if !open {
            let expected = before.get(what).copied().unwrap_or(0);
            assert!(
                number >= expected,
                "{what}: {expected} was acknowledged, {number} found"
            );
        }
        said.insert(what.to_owned(), number);
        count += u64::from(open);
        if limit.is_some_and(|limit| count > limit) {
            kill_9(child.id());
        }
    }
    (said, open)
}

fn kill_9(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    // An error says that it is gone already.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}
