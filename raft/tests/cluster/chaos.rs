//! A seeded storm: crashes, partitions, delays and resets under writes through every member. Then
//! the faults stop and everything must add up: each acknowledged write took effect exactly once,
//! each unknown one at most once.

use crate::support::{BOUND, Cluster, command};
use mainstay_raft::GroupConfig;
use mainstay_raft::transport::memory::Way;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Small, seeded, good enough to vary a schedule.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn tune(config: &mut GroupConfig) {
    config.snapshot_log_bytes = 16 << 10;
    config.keep_entries = 5;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_adds_up() {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(20_240_607);
    println!("SEED={seed}");
    let mut dice = Dice(seed);
    let mut cluster = Cluster::founded(3, tune).await;
    let (acknowledged, unknown) = (AtomicU64::new(0), AtomicU64::new(0));
    let (mut crashes, mut cuts) = (0, 0);
    for _ in 0..12 {
        let stop = AtomicBool::new(false);
        let victim = 1 + dice.roll(3);
        let crash = dice.roll(2) == 0;
        let hold = Duration::from_millis(100 + dice.roll(700));
        let delay = Duration::from_millis(dice.roll(10));
        {
            let writers =
                (0..6u64).map(|i| write(&cluster, 1 + i % 3, &stop, &acknowledged, &unknown));
            let fault = async {
                let way = Way { cut: false, delay };
                cluster.net.set(victim, 1 + victim % 3, way);
                if !crash {
                    cluster.net.isolate(victim, &cluster.ids(), true);
                }
                tokio::time::sleep(hold).await;
                stop.store(true, Ordering::Relaxed);
            };
            tokio::join!(futures::future::join_all(writers), fault);
        }
        if crash {
            crashes += 1;
            cluster.halt(victim).await;
            cluster.start(victim).await;
        } else {
            cuts += 1;
            cluster.net.isolate(victim, &cluster.ids(), false);
        }
        for other in cluster.ids() {
            cluster.net.set(victim, other, Way::default());
        }
    }
    assert!(
        crashes > 0 && cuts > 0,
        "the storm must hold both: {crashes} crashes, {cuts} cuts"
    );
    cluster.leader().await;
    cluster.converge().await;
    let sum = cluster.get(1, "a").await;
    let (sure, open) = (acknowledged.into_inner(), unknown.into_inner());
    println!("{sure} acknowledged, {open} unknown, sum {sum}, {crashes} crashes, {cuts} cuts");
    assert!(sure > 100, "the storm let nothing through: {sure}");
    assert!(
        (sure..=sure + open).contains(&sum),
        "{sure} <= {sum} <= {}",
        sure + open
    );
}

async fn write(
    cluster: &Cluster,
    via: u64,
    stop: &AtomicBool,
    acknowledged: &AtomicU64,
    unknown: &AtomicU64,
) {
    let end = Instant::now() + BOUND;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        let command = command(cluster.command_id(), "a", 1);
        let soon = Duration::from_millis(1500);
        match cluster.nodes[&via].group().propose(command, soon).await {
            Ok(_) => acknowledged.fetch_add(1, Ordering::Relaxed),
            Err(mainstay_raft::GroupError::Unknown) => unknown.fetch_add(1, Ordering::Relaxed),
            Err(_) => 0,
        };
    }
}
