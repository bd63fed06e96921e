//! A member whose disk is slow should not lead: every write of the group waits for the leader's log.
//! Looks at how long the log's own writes take, and makes it a reason in [`fitness`](super::fitness).
//! Knows no other member's disk: when all are slow, all are reluctant and the leader stays.
//!
//! ```text
//!  fit ──3 slow writes within 30 s, or one under way for 3 s──► reluctant
//!  reluctant ──no slow write for `calm`──► fit          (calm doubles with every relapse, up to 16 times)
//! ```

use super::{Inner, Unfit};
use mainstay_storage::log::{Pace, SLOW};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Whose reason it is.
const KEY: &str = "slow disk";
/// The writes are looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// So many slow writes ...
const STRIKES: usize = 3;
/// ... within this time are a slow disk; fewer are a hiccup.
const WINDOW: Duration = Duration::from_secs(30);
/// One write that takes this long is a slow disk by itself.
const STUCK: Duration = Duration::from_secs(3);
/// A disk that was slow again and again is trusted after at most this many times the first pause.
const CALM_FACTOR_MAX: u32 = 16;

/// Follow the log's pace until the member ends.
pub(super) fn spawn(inner: &Arc<Inner>) {
    let inner = inner.clone();
    tokio::spawn(async move {
        let mut judge = Judge::new(inner.config.slow_disk_calm, Instant::now());
        let cancel = inner.cancel.clone();
        let look = async {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let reason = judge.look(inner.log.pace(), Instant::now());
                inner.fitness.set(KEY, reason.map(Unfit::Reluctant));
            }
        };
        cancel.run_until_cancelled(look).await;
    });
}

/// What is remembered between two looks.
struct Judge {
    /// The first pause.
    calm_min: Duration,
    /// The present one.
    calm: Duration,
    seen: u64,
    strikes: VecDeque<Instant>,
    last_slow: Instant,
    /// When the last verdict was lifted.
    trusted: Option<Instant>,
    reason: Option<String>,
}

impl Judge {
    fn new(calm: Duration, now: Instant) -> Self {
        Self {
            calm_min: calm,
            calm,
            seen: 0,
            strikes: VecDeque::new(),
            last_slow: now,
            trusted: None,
            reason: None,
        }
    }

    /// Why this member should not lead, as of `now`.
    fn look(&mut self, pace: Pace, now: Instant) -> Option<String> {
        for _ in self.seen..pace.slow.min(self.seen + STRIKES as u64) {
            self.strikes.push_back(now);
        }
        if pace.slow > self.seen {
            self.last_slow = now;
        }
        self.seen = pace.slow;
        self.strikes
            .retain(|at| now.saturating_duration_since(*at) < WINDOW);
        let under_way = pace.under_way.filter(|took| *took >= SLOW);
        if under_way.is_some() {
            self.last_slow = now;
        }
        let stuck = under_way.filter(|took| *took >= STUCK);
        if stuck.is_some() || self.strikes.len() >= STRIKES {
            self.condemn(stuck.unwrap_or(pace.last_slow), now);
        } else if self.reason.is_some()
            && now.saturating_duration_since(self.last_slow) >= self.calm
        {
            self.reason = None;
            self.trusted = Some(now);
        }
        self.reason.clone()
    }

    fn condemn(&mut self, took: Duration, now: Instant) {
        if self.reason.is_some() {
            return;
        }
        let longest = self.calm_min * CALM_FACTOR_MAX;
        let relapse = |at: Instant| now.saturating_duration_since(at) < longest;
        self.calm = if self.trusted.is_some_and(relapse) {
            (self.calm * 2).min(longest)
        } else {
            self.calm_min
        };
        self.reason = Some(format!(
            "its disk is slow: a write of the log took {:.1} s",
            took.as_secs_f64()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: Duration = Duration::from_secs(60);

    struct Run {
        judge: Judge,
        now: Instant,
        pace: Pace,
    }

    impl Run {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                judge: Judge::new(CALM, now),
                now,
                pace: Pace::default(),
            }
        }

        /// After `secs` more, with `slow` further slow writes and one under way for `under_way`.
        fn after(&mut self, secs: u64, slow: u64, under_way: Option<u64>) -> bool {
            self.now += Duration::from_secs(secs);
            self.pace.slow += slow;
            self.pace.last_slow = Duration::from_secs(1);
            self.pace.under_way = under_way.map(Duration::from_secs);
            self.judge.look(self.pace, self.now).is_some()
        }
    }

    #[test]
    fn hiccups_are_forgiven_and_slowness_is_not() {
        let mut run = Run::new();
        assert!(!run.after(1, 2, None));
        assert!(!run.after(31, 2, None), "the first two are forgotten");
        assert!(run.after(5, 1, None));
        assert!(run.after(59, 0, None), "not calm for long enough");
        assert!(run.after(0, 1, None), "and again");
        assert!(run.after(59, 0, None));
        assert!(!run.after(1, 0, None));
        assert!(!run.after(1, 0, Some(2)));
        assert!(run.after(1, 0, Some(3)), "it hangs");
        assert!(run.after(600, 0, Some(603)));
    }

    #[test]
    fn every_relapse_doubles_the_pause_up_to_a_limit() {
        let mut run = Run::new();
        let mut calm = 60;
        for _ in 0..8 {
            assert!(run.after(1, 3, None));
            assert!(run.after(calm - 1, 0, None), "{calm}");
            assert!(!run.after(1, 0, None), "{calm}");
            calm = (calm * 2).min(960);
        }
        // Good for long: as if nothing had been.
        assert!(!run.after(2000, 0, None));
        assert!(run.after(1, 3, None));
        assert!(!run.after(60, 0, None));
    }
}
