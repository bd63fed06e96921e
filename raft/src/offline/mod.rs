//! What is done to a member's stores while no member runs on them: look at what they hold, make them a
//! group of one, fill new ones from a snapshot. The caller holds the lock of the directory they lie in,
//! and keeps members from starting on it until the whole is done.

mod point;
mod seed;
mod survivor;

pub use point::Point;
pub use seed::{Seed, seed};
pub use survivor::{OpenEntry, OpenKind, Survivor, become_sole, examine};

use crate::store::fault::chain;
use mainstay_storage::log::Done;
use std::io;
use std::sync::mpsc;

/// Make one change of the log and wait until it is durable.
fn durable(change: impl FnOnce(Done)) -> io::Result<()> {
    let (tx, rx) = mpsc::channel();
    change(Box::new(move |result| {
        // The receiver waits below.
        let _ = tx.send(result);
    }));
    rx.recv()
        .map_err(|_| io::Error::other("the log's writer is gone"))?
        .map_err(storage)
}

fn storage(error: mainstay_storage::StorageError) -> io::Error {
    io::Error::other(chain(&error))
}
