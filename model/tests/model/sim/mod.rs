//! A cloud in virtual time: the model, the leader's decisions (`plan`) and the agents' core
//! (`mainstay_agent::converge::rehearsal`), put together by a seed, with a network, clocks and people
//! that do their worst. What must hold is checked after every command and every change of a VM
//! ([`truth`]); then the faults stop, and everything must come to rest.
//!
//! * `world`: time and events; `cluster`: log, members and leaders; `fleet`: nodes and their agents;
//! * `people`: clients, operators and faults; `saves`: instances that become tags; `truth`: what must hold; `oracle`: a slow planner beside the real one.
//!
//! `MAINSTAY_SEED=n` runs one seed, `MAINSTAY_SIM_SEEDS=n` so many instead of what CI has time for (from
//! `MAINSTAY_SIM_FIRST=n` on), `MAINSTAY_SIM_LEVEL=n` with the commands of an older feature level.

mod cluster;
mod fleet;
mod oracle;
mod people;
mod saves;
mod truth;
mod world;

use std::collections::BTreeMap;
use world::World;

/// Seeds that CI runs, and events of each before the faults stop.
const SEEDS: u64 = 1_000;
const EVENTS: u64 = 1_000;
/// One seed in so many has thousands of nodes.
const LARGE: u64 = 250;

/// How a cloud is.
#[derive(Clone, Copy, Debug)]
struct Shape {
    nodes: u64,
    /// Instances that are asked for and have not ended, about.
    instances: usize,
    beat_ms: u64,
    unreachable_ms: u64,
    lease_ms: u64,
    /// Whole checks are made after one command in so many.
    check_every: u64,
}

const SMALL: Shape = Shape {
    nodes: 7,
    instances: 25,
    beat_ms: 1_200,
    unreachable_ms: 4_000,
    lease_ms: 9_000,
    check_every: 1,
};
const THOUSANDS: Shape = Shape {
    nodes: 2_000,
    instances: 3_000,
    beat_ms: 30_000,
    unreachable_ms: 100_000,
    lease_ms: 300_000,
    check_every: 200,
};

#[allow(clippy::disallowed_methods)] // the test harness, not the model, asks
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What one seed did, or what went wrong, with the last events before it.
fn run(seed: u64) -> Result<BTreeMap<&'static str, u64>, String> {
    let shape = if seed % LARGE == LARGE - 1 {
        THOUSANDS
    } else {
        SMALL
    };
    let live = |trace| {
        let mut world = World::new(seed, shape, trace);
        let done = world.storm(EVENTS).and_then(|()| world.calm());
        (done, world)
    };
    let (done, world) = live(false);
    if done.is_ok() {
        return Ok(world.tally);
    }
    // Equal seeds have equal lives.
    let (done, world) = live(true);
    let why = done
        .err()
        .unwrap_or_else(|| "not again: it is not deterministic".to_owned());
    Err(format!(
        "seed {seed}: {why}\nlast events:\n{}\nagain: MAINSTAY_SEED={seed} cargo test -p mainstay-model --test model sim -- --nocapture",
        world.last_events()
    ))
}

fn all(seeds: impl Iterator<Item = u64>) -> BTreeMap<&'static str, u64> {
    let mut total = BTreeMap::new();
    for seed in seeds {
        let tally = run(seed).unwrap_or_else(|why| panic!("{why}"));
        for (what, count) in tally {
            *total.entry(what).or_default() += count;
        }
    }
    total
}

#[test]
#[allow(clippy::print_stderr)] // what was exercised, for who looks
fn whatever_happens_no_instance_is_lost_or_runs_twice() {
    if let Some(seed) = number("MAINSTAY_SEED") {
        eprintln!("{:#?}", all(std::iter::once(seed)));
        return;
    }
    let seeds = number("MAINSTAY_SIM_SEEDS").unwrap_or(SEEDS);
    let first = number("MAINSTAY_SIM_FIRST").unwrap_or(0);
    eprintln!("seeds {first} to {}", first + seeds - 1);
    let total = all(first..first + seeds);
    eprintln!("{total:#?}");
    assert!(total["events"] >= seeds * EVENTS);
    // A run that did not exercise its faults proves nothing.
    for needed in [
        "leader changes",
        "links cut",
        "agents killed",
        "machines rebooted",
        "VMs died",
        "VMs lost",
        "clocks jumped",
        "commands lost",
        "commands late",
        "commands twice",
        "reports lost",
        "nodes lost",
        "nodes removed",
        "nodes back",
        "drains",
        "groups deleted",
        "templates deleted",
        "terminated while starting",
        "rejected",
        "VMs made",
        "VMs removed",
        "forgotten",
        "plans",
        "plans compared",
        "left behind",
        "saves done",
        "saves failed",
    ] {
        assert!(
            total.get(needed).is_some_and(|n| *n > 20),
            "too seldom: {needed}"
        );
    }
}

/// Can this find anything? Each bug within so many seeds, and none of them without looking.
#[cfg(feature = "seeded-bugs")]
#[test]
#[allow(clippy::print_stderr)] // which seed found what, for who looks
fn bugs_on_purpose_are_found() {
    use mainstay_model::seeded::{Bug, plant};
    const WITHIN: u64 = 200;
    let found = |bug: Option<Bug>, seeds: u64| {
        plant(bug);
        let found = (0..seeds).find_map(|seed| Some((seed, run(seed).err()?)));
        plant(None);
        found
    };
    assert_eq!(found(None, WITHIN), None, "there is no bug");
    for bug in [
        Bug::Overfull,
        Bug::StaleReport,
        Bug::NothingLeft,
        Bug::HastyEnd,
        Bug::NoGrace,
    ] {
        assert_eq!(found(Some(bug), 0), None, "{bug:?}: nobody has looked");
        let (seed, why) =
            found(Some(bug), WITHIN).unwrap_or_else(|| panic!("{bug:?} is not found"));
        let why = why.lines().next().unwrap_or_default();
        eprintln!("{bug:?}: found by seed {seed} of {WITHIN}: {why}");
    }
}
