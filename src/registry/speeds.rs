//! How fast other members sent lately, so that one that is far slower than the others loses its turns to
//! them. Soft; forgotten after a while, so that it gets another chance.

use mainstay_model::MemberId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// Who sends less than this part of what the fastest other one does is slow: 1/4.
const SLOW_PART: f64 = 4.0;
/// An answer is not judged earlier than this.
pub(super) const JUDGED_AFTER: Duration = Duration::from_secs(2);
/// Shorter answers say nothing but how long a request takes.
const BYTES_MIN: u64 = 256 << 10;
/// What was seen counts for so long.
const KEPT: Duration = Duration::from_secs(60);

/// Bytes a second of one answer, by member, and when that was seen.
#[derive(Debug, Default)]
pub(super) struct Speeds(Mutex<BTreeMap<MemberId, (f64, Instant)>>);

fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(0.001)
}

impl Speeds {
    /// A member sent so many bytes in so much time, to the end of its answer or until it was given up.
    pub(super) fn note(&self, source: MemberId, bytes: u64, took: Duration) {
        if bytes < BYTES_MIN && took < JUDGED_AFTER {
            return;
        }
        let (seen, now) = (rate(bytes, took), Instant::now());
        let mut known = self.0.lock();
        let former = known.get(&source).filter(|(_, at)| *at + KEPT > now);
        let mean = former.map_or(seen, |(former, _)| f64::midpoint(*former, seen));
        known.insert(source, (mean, now));
    }

    /// The fastest of the others.
    fn best_beside(&self, source: MemberId) -> Option<f64> {
        let now = Instant::now();
        let known = self.0.lock();
        let others = known.iter().filter(|(id, _)| **id != source);
        let fresh = others.filter(|(_, (_, at))| *at + KEPT > now);
        fresh.map(|(_, (rate, _))| *rate).reduce(f64::max)
    }

    /// Is a member that has sent so much in so much time far slower than another one was?
    pub(super) fn is_slow(&self, source: MemberId, bytes: u64, took: Duration) -> bool {
        let slow = |best| rate(bytes, took) * SLOW_PART < best;
        took >= JUDGED_AFTER && self.best_beside(source).is_some_and(slow)
    }

    /// Those that were far slower than another one go to the end.
    pub(super) fn order(&self, sources: &mut [MemberId]) {
        let now = Instant::now();
        let slow = |id: &MemberId| {
            let known = self.0.lock().get(id).copied();
            let seen = known.filter(|(_, at)| *at + KEPT > now);
            let best = self.best_beside(*id);
            matches!((seen, best), (Some((rate, _)), Some(best)) if rate * SLOW_PART < best)
        };
        sources.sort_by_cached_key(slow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_slow_one_goes_last_until_it_is_forgotten() {
        let ids = [1, 2, 3].map(MemberId);
        let [a, b, c] = ids;
        let speeds = Speeds::default();
        let order = |from: [MemberId; 3]| {
            let mut sources = from;
            speeds.order(&mut sources);
            sources
        };
        assert_eq!(order([c, b, a]), [c, b, a], "nothing is known");
        let second = Duration::from_secs(1);
        speeds.note(a, 10 << 20, second);
        speeds.note(b, 1, second);
        assert_eq!(order([b, a, c]), [b, a, c], "one byte says nothing");
        assert!(!speeds.is_slow(b, 0, second), "too early to say");
        assert!(speeds.is_slow(b, 1 << 20, second * 2));
        assert!(!speeds.is_slow(b, 8 << 20, second * 2));
        assert!(!speeds.is_slow(a, 0, second * 9), "nobody else is known");
        speeds.note(b, 1 << 20, second * 3);
        assert_eq!(order([b, a, c]), [a, c, b]);
        tokio::time::advance(KEPT).await;
        assert_eq!(order([b, a, c]), [b, a, c]);
    }
}
