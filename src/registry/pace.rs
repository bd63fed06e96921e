//! Bytes a second that some work may move, as a mean over seconds: whoever has moved some waits until
//! more may be. Knows nothing of what is moved.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// A limit shared by all who do the same work.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// When everything moved so far is paid for.
    due: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(rate: u64) -> Self {
        Self {
            rate,
            due: Mutex::new(None),
        }
    }

    /// So many bytes were moved: how long to wait before more are.
    pub(super) fn spend(&self, bytes: u64) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let cost = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        let mut due = self.due.lock();
        // What was not used before now is not saved up.
        let next = due.map_or(now, |due| due.max(now)) + cost;
        *due = Some(next);
        next - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn costs_add_up_and_idle_time_is_not_saved() {
        let pace = Pace::new(1000);
        assert_eq!(pace.spend(500), Duration::from_millis(500));
        assert_eq!(pace.spend(500), Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(pace.spend(2000), Duration::from_secs(2));
        assert_eq!(Pace::new(0).spend(u64::MAX), Duration::ZERO);
    }
}
