//! How long the disk takes for what the log writes. Measures only: when a disk is too slow is the
//! consensus layer's to judge.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// A batch that takes this long to write and sync is a slow one: the disks that a log belongs on take
/// a hundredth of it.
pub const SLOW: Duration = Duration::from_millis(800);

/// What was measured since the log was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Batches written and synced.
    pub batches: u64,
    /// Those of them that took [`SLOW`] or longer.
    pub slow: u64,
    /// How long the last slow one took.
    pub last_slow: Duration,
    /// The one that is being written has taken so long.
    pub under_way: Option<Duration>,
}

/// The writer's clock.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<(Pace, Option<Instant>)>);

impl Meter {
    pub(super) fn begin(&self) {
        self.0.lock().1 = Some(Instant::now());
    }

    pub(super) fn end(&self) {
        let mut meter = self.0.lock();
        let (pace, begun) = &mut *meter;
        let Some(begun) = begun.take() else {
            return;
        };
        let took = begun.elapsed();
        pace.batches += 1;
        if took >= SLOW {
            pace.slow += 1;
            pace.last_slow = took;
        }
    }

    pub(super) fn pace(&self) -> Pace {
        let (pace, begun) = *self.0.lock();
        Pace {
            under_way: begun.map(|begun| begun.elapsed()),
            ..pace
        }
    }
}
