//! Real processes on loopback: three servers, agents, real VMs, killed for real. Each test makes its
//! own cluster in its own directory and ends every process it started. They run one at a time: they
//! measure nothing, but two clusters and a VM on two cores would only slow each other down.
//!
//! Longer forms of the same tests: `make torture` (see docs/testing.md).

#![allow(clippy::unwrap_used, clippy::print_stderr)] // a test says what failed by failing

mod access;
mod big_push;
mod bootstrap;
mod clean_stop;
mod clients;
mod cluster;
mod distribute;
mod faults;
mod fleet;
mod gc;
mod journey;
mod kills;
mod leader_kills;
mod linear;
mod load;
mod members;
mod membership;
mod node_loss;
mod nodes_pull;
mod oci;
mod push;
mod refused;
mod rescue;
mod reverted;
mod save;
mod shared_store;
#[path = "../../storage/tests/conformance/sharing.rs"]
mod sharing;
mod snapshots;
mod suspended;
mod thin_line;
mod upgrade;

use tokio::sync::{Mutex, MutexGuard};

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Held for the length of a test.
async fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().await
}

/// How often a randomised test repeats: few times by default, more from the environment.
fn rounds(variable: &str, default: usize) -> usize {
    std::env::var(variable)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// A small generator for schedules; its seed is printed first, so that `MAINSTAY_SEED` replays a run.
struct Dice(u64);

impl Dice {
    fn new(test: &str) -> Self {
        let seed = std::env::var("MAINSTAY_SEED")
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or_else(|| {
                let now = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .unwrap();
                now.as_nanos() as u64 | 1
            });
        eprintln!("{test}: MAINSTAY_SEED={seed} replays this schedule");
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
