//! Group commit of the log: entries of 256 bytes appended by 1, 64 and 256 writers, each waiting for its
//! own to be durable. `cargo run --release --example wal_bench -p mainstay-storage [directory]`

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use bytes::Bytes;
use mainstay_storage::log::{Log, LogEntry, Wal};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

const ENTRY_LEN: usize = 256;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);

fn main() {
    let dir = std::env::args().nth(1).map_or_else(
        || std::env::temp_dir().join("mainstay-wal-bench"),
        PathBuf::from,
    );
    for writers in [1, 64, 256] {
        let mut rates: Vec<f64> = (0..ROUNDS).map(|_| round(&dir, writers)).collect();
        rates.sort_by(f64::total_cmp);
        println!(
            "{writers:>4} writers: {:>9.0} appends/s (median of {ROUNDS}; {:.0} to {:.0})",
            rates[ROUNDS / 2],
            rates[0],
            rates[ROUNDS - 1]
        );
    }
}

/// Each writer has one append in flight; all are driven from the callbacks' channel, as a leader drives
/// its clients.
fn round(dir: &std::path::Path, writers: usize) -> f64 {
    drop(std::fs::remove_dir_all(dir));
    let wal = Arc::new(Wal::open(dir).unwrap());
    let next = Arc::new(Mutex::new(0u64));
    let bytes = Bytes::from(vec![7; ENTRY_LEN]);
    let (tx, rx) = mpsc::channel();
    let append = || {
        let mut next = next.lock().unwrap();
        let entry = LogEntry {
            index: *next,
            bytes: bytes.clone(),
        };
        *next += 1;
        let tx = tx.clone();
        wal.append(
            vec![entry],
            Box::new(move |result| tx.send(result).unwrap()),
        );
    };
    let start = Instant::now();
    for _ in 0..writers {
        append();
    }
    let mut count = 0u32;
    while start.elapsed() < ROUND {
        rx.recv().unwrap().unwrap();
        count += 1;
        append();
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    drop(wal);
    drop(std::fs::remove_dir_all(dir));
    rate
}
