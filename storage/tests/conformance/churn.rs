//! Endless change of the same keys: what the state store takes on disk follows what it holds, not what
//! was ever written. `MAINSTAY_CHURN=20000` is the long form (2 million writes).

use mainstay_storage::engine::{Change, Engine, SledEngine};

const KEYS: u64 = 2000;
const VALUE_LEN: usize = 300;
const PER_CHECKPOINT: u64 = 100;
/// What the store may take beside three times what it holds.
const BOUND: u64 = 32 << 20;

/// Scattered, as random ids are.
fn name(key: u64) -> Vec<u8> {
    let scattered = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    [&b"key/"[..], &scattered.to_be_bytes(), &key.to_be_bytes()].concat()
}

/// A value that does not compress, another for each turn.
fn value(key: u64, turn: u64) -> Vec<u8> {
    let mut state = key << 32 | turn | 1;
    let mut bytes = Vec::with_capacity(VALUE_LEN + 8);
    while bytes.len() < VALUE_LEN {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.extend_from_slice(&state.to_be_bytes());
    }
    bytes.truncate(VALUE_LEN);
    bytes
}

/// Rounds of the short form, or of the long one.
fn checkpoints() -> u64 {
    let asked = std::env::var("MAINSTAY_CHURN").ok();
    asked.and_then(|v| v.parse().ok()).unwrap_or(400)
}

/// Make the changes that `changes` gives for each turn; the most that was on disk.
fn churn(name: &str, changes: impl Fn(u64) -> Vec<Change>) {
    let checkpoints = checkpoints();
    let dir = tempfile::tempdir().unwrap();
    let engine = SledEngine::open(dir.path()).unwrap();
    let live = KEYS * (VALUE_LEN as u64 + 16);
    let mut worst = 0;
    for turn in 0..checkpoints {
        engine
            .checkpoint(&changes(turn), &turn.to_be_bytes())
            .unwrap();
        worst = worst.max(engine.disk_bytes());
        if turn % (checkpoints / 10).max(1) == 0 {
            let (disk, live) = (engine.disk_bytes() >> 10, live >> 10);
            eprintln!("{name}: {turn} checkpoints, {disk} KiB on disk, {live} KiB live");
        }
    }
    eprintln!(
        "{name}: at most {} KiB on disk, {} KiB live",
        worst >> 10,
        live >> 10
    );
    assert!(
        worst <= 3 * live + BOUND,
        "{name}: {worst} bytes for {live}"
    );
    assert_eq!(
        engine.load().unwrap().mark,
        Some((checkpoints - 1).to_be_bytes().to_vec())
    );
}

#[test]
fn disk_follows_what_is_held_when_the_same_keys_change() {
    churn("same keys", |turn| {
        let keys = (0..PER_CHECKPOINT).map(|i| (turn * 7919 + i * 31) % KEYS);
        keys.map(|key| (name(key), Some(value(key, turn))))
            .collect()
    });
}

#[test]
fn disk_follows_what_is_held_when_keys_come_and_go() {
    churn("new keys", |turn| {
        let new = turn * PER_CHECKPOINT..(turn + 1) * PER_CHECKPOINT;
        let gone = new.clone().filter_map(|key| key.checked_sub(KEYS));
        let gone = gone.map(|key| (name(key), None));
        new.map(|key| (name(key), Some(value(key, turn))))
            .chain(gone)
            .collect()
    });
}
