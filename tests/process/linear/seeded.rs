//! Is the checker, with these clients and these faults, able to find anything? Members with a bug on
//! purpose: each bug must be found within a round of kinds. `cargo test --features seeded-bugs`.

use super::plan::KINDS;
use super::run;
use crate::{Dice, turn};

/// Schedules within which a bug must be found.
const WITHIN: u64 = KINDS.len() as u64;

/// Run schedules until one is judged wrong.
async fn found(bug: &'static str) {
    let first = (Dice::new(bug).0 >> 12) % 1_000_000;
    for n in 0..WITHIN {
        // A member that a bug stops makes a run that proves nothing: the next one.
        let Ok(outcome) = tokio::spawn(run(first + n, Some(bug))).await else {
            continue;
        };
        if !outcome.judgement.violations.is_empty() {
            eprintln!("{bug}: found by schedule {}", n + 1);
            return;
        }
    }
    panic!("{bug}: not found within {WITHIN} schedules");
}

/// A follower answers reads without asking the leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stale_read_is_found() {
    let _turn = turn().await;
    found("stale-read").await;
}

/// A leader answers reads without asking a majority whether it still leads.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_read_by_a_former_leader_is_found() {
    let _turn = turn().await;
    found("lease-read").await;
}

/// A member that starts has lost the last entries that it acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_lost_write_is_found() {
    let _turn = turn().await;
    found("lost-write").await;
}

/// A command that is proposed again is applied again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_command_applied_twice_is_found() {
    let _turn = turn().await;
    found("double-apply").await;
}
