//! What time a proposer says it is. Clocks of members differ, and one may be years ahead; the state's clock
//! only ever goes forward, so after such a member's word it would stand still until all others have
//! caught up: nothing that has ended would be forgotten, and no node that turned an instance down would
//! be asked again. So a member whose clock is behind the state's goes on from there, at nine tenths of
//! the pace, until its clock is right again. Knows no clock itself.

/// One member's sense of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// What was said when the clock fell behind, and when that was by the time that passes.
    from: Option<(u64, u64)>,
}

impl Pace {
    /// Milliseconds since the Unix epoch, as this member shall say it: never before `state_ms`, the
    /// state's clock, and never standing still. `wall_ms` is this machine's clock; `passed_ms` are
    /// milliseconds since any fixed moment, by a clock that nobody sets.
    pub fn now(&mut self, wall_ms: u64, passed_ms: u64, state_ms: u64) -> u64 {
        let own = self.from.map_or(0, |(said, at)| {
            let passed = passed_ms.saturating_sub(at);
            said.saturating_add(passed - passed / 10)
        });
        if wall_ms >= own.max(state_ms) {
            self.from = None;
            return wall_ms;
        }
        if self.from.is_none() || state_ms > own {
            self.from = Some((own.max(state_ms), passed_ms));
        }
        own.max(state_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_clock_is_told_as_it_is() {
        let mut pace = Pace::default();
        assert_eq!(pace.now(1_000, 7, 900), 1_000);
        assert_eq!(pace.now(1_000, 9, 1_000), 1_000);
        assert_eq!(pace.now(990_000, 10, 5_000), 990_000);
    }

    #[test]
    fn behind_the_state_time_goes_on_from_there_until_the_clock_is_right_again() {
        let mut pace = Pace::default();
        assert_eq!(pace.now(1_000, 0, 61_000), 61_000);
        assert_eq!(pace.now(11_000, 10_000, 61_000), 70_000);
        // Its own word has become the state's; another member's is newer.
        assert_eq!(pace.now(21_000, 20_000, 70_000), 79_000);
        assert_eq!(pace.now(21_000, 20_000, 80_000), 80_000);
        assert_eq!(pace.now(31_000, 30_000, 80_000), 89_000);
        // A tenth of the way is made good each time; then it is as if nothing had been.
        let mut passed = 30_000;
        let mut last = 0;
        while pace.now(1_000 + passed, passed, 0) > 1_000 + passed {
            let now = pace.now(1_000 + passed, passed, 0);
            assert!(now > last, "time stood still");
            last = now;
            passed += 1_000;
        }
        assert!((500_000..700_000).contains(&passed), "{passed}");
        assert_eq!(
            pace.now(5, passed, 0),
            5,
            "a clock that is set back with nobody ahead of it"
        );
    }
}
