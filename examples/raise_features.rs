//! How long writes wait when a feature level is raised: `raise_features LEVEL [remembered] [dir]`.
//!
//! One member with its log and state store on disk, level 0 and that many remembered commands (default:
//! as many as are ever remembered); sixteen writers; in their midst the level is raised. Prints the
//! longest time without an acknowledged write in the two seconds before, and in the four after.
// A tool for the terminal: it prints what it measured, and ends at the first thing that fails.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use mainstay::app::App;
use mainstay::machine::ModelMachine;
use mainstay_model::limits::RECENT_COMMANDS;
use mainstay_model::{Command, State};
use mainstay_raft::transport::memory::Switchboard;
use mainstay_raft::{Group, GroupConfig, Member};
use mainstay_storage::engine::SledEngine;
use mainstay_storage::log::Wal;
use mainstay_storage::snapshot::SnapshotDir;
use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const WRITERS: usize = 16;

async fn open(dir: &Path) -> App {
    let state = Arc::new(RwLock::new(State::default()));
    let group = Group::start(
        GroupConfig::new(1, "example"),
        Arc::new(Wal::open(&dir.join("log")).unwrap()),
        Arc::new(SledEngine::open(&dir.join("state")).unwrap()),
        SnapshotDir::open(&dir.join("snapshots")).unwrap(),
        Arc::new(ModelMachine::new(Arc::clone(&state))),
        Switchboard::new().dialer(1),
    )
    .await
    .unwrap();
    let alone = BTreeMap::from([(1, Member::default())]);
    group.initialize(alone).await.unwrap();
    App::new(group, state)
}

/// Commands that change nothing, until `enough` were acknowledged or told to stop; when each was.
async fn write(
    app: App,
    left: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    at: Arc<parking_lot::Mutex<Vec<Instant>>>,
) {
    let one = |n: usize| n.checked_sub(1);
    while !stop.load(Ordering::Relaxed)
        && left
            .try_update(Ordering::Relaxed, Ordering::Relaxed, one)
            .is_ok()
    {
        app.submit(Command::Noop).await.unwrap();
        at.lock().push(Instant::now());
    }
}

fn longest(at: &[Instant], from: Instant, to: Instant) -> Duration {
    let inside = at.iter().filter(|at| (from..to).contains(*at));
    let mut all: Vec<Instant> = inside.copied().chain([from, to]).collect();
    all.sort();
    let gaps = all.windows(2).map(|two| two[1] - two[0]);
    gaps.max().unwrap_or_default()
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let level: u32 = arguments.next().map_or(5, |a| a.parse().unwrap());
    let count: usize = arguments
        .next()
        .map_or(RECENT_COMMANDS, |a| a.parse().unwrap());
    let dir = arguments.next().unwrap_or_else(|| ".".to_owned());
    let dir = tempfile::tempdir_in(dir).unwrap();
    let app = open(dir.path()).await;
    let at = Arc::default();
    let run = |writers: usize, enough: usize, stop: &Arc<AtomicBool>| {
        let left = Arc::new(AtomicUsize::new(enough));
        let one = |_| write(app.clone(), left.clone(), stop.clone(), Arc::clone(&at));
        (0..writers).map(one).map(tokio::spawn).collect::<Vec<_>>()
    };
    for writer in run(256, count, &Arc::default()) {
        writer.await.unwrap();
    }
    let stop = Arc::default();
    let writers = run(WRITERS, usize::MAX, &stop);
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let raised = Instant::now();
    app.submit(Command::SetFeatures { level }).await.unwrap();
    let answered = raised.elapsed();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let ended = Instant::now();
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let at = at.lock().clone();
    println!(
        "level {level}, {count} remembered: answered in {} ms; longest gap {} ms before, {} ms after",
        answered.as_millis(),
        longest(&at, began, raised).as_millis(),
        longest(&at, raised, ended).as_millis(),
    );
    app.group().shutdown().await;
}
