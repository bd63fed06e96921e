//! Stands in for the published crate of this name, as far as openraft uses it: counts of values in
//! buckets whose bounds are powers of two. Ours, because the published one builds a table for each of
//! sixteen resolutions when the first histogram is made, 22 MiB that stay in memory, and openraft makes
//! one even with its statistics switched off. See docs/decisions/2026-11-27-idle-memory.md.

use std::fmt;
use std::marker::PhantomData;

/// Values 0, 1, 2-3, 4-7, ... up to `u64::MAX`.
const BUCKETS: usize = u64::BITS as usize + 1;

/// How often values of each magnitude were seen. `T` is there for the signature.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: [u64; BUCKETS],
    of: PhantomData<T>,
}

impl<T> Histogram<T> {
    /// Nothing seen yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            counts: [0; BUCKETS],
            of: PhantomData,
        }
    }

    /// One more value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// The same value `count` times.
    pub fn record_n(&mut self, value: u64, count: u64) {
        let slot = &mut self.counts[bucket(value)];
        *slot = slot.saturating_add(count);
    }

    /// How many values were recorded.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Lower bounds of the buckets that hold the named percentiles; 0 when nothing was recorded.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total(),
            p0_1: self.at(1),
            p1: self.at(10),
            p5: self.at(50),
            p10: self.at(100),
            p50: self.at(500),
            p90: self.at(900),
            p99: self.at(990),
            p99_9: self.at(999),
        }
    }

    /// Lower bound of the bucket below whose upper bound `permille` of the values lie.
    fn at(&self, permille: u128) -> u64 {
        let rank = (u128::from(self.total()) * permille).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank {
                return lower_bound(bucket);
            }
        }
        0
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for Histogram<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.percentile_stats().fmt(f)
    }
}

fn bucket(value: u64) -> usize {
    (u64::BITS - value.leading_zeros()) as usize
}

fn lower_bound(bucket: usize) -> u64 {
    bucket.checked_sub(1).map_or(0, |power| 1 << power)
}

/// A few percentiles of a [`Histogram`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PercentileStats {
    /// Values recorded.
    pub samples: u64,
    /// A thousandth of the values is not above it; so on with the others.
    pub p0_1: u64,
    /// 1%.
    pub p1: u64,
    /// 5%.
    pub p5: u64,
    /// 10%.
    pub p10: u64,
    /// Half of them.
    pub p50: u64,
    /// 90%.
    pub p90: u64,
    /// 99%.
    pub p99: u64,
    /// 99.9%.
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            samples,
            p50,
            p90,
            p99,
            p99_9,
            ..
        } = self;
        write!(
            f,
            "{samples} values, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}"
        )
    }
}

/// Several histograms side by side, as text.
#[derive(Clone, Debug, Default)]
pub struct AsciiChart {
    rows: Vec<(String, Histogram)>,
}

impl AsciiChart {
    /// Without rows.
    #[must_use]
    pub const fn new() -> Self {
        Self { rows: Vec::new() }
    }

    /// With one more row.
    #[must_use]
    pub fn add(mut self, name: impl Into<String>, histogram: Histogram) -> Self {
        self.rows.push((name.into(), histogram));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, histogram) in &self.rows {
            writeln!(f, "{name}: {}", histogram.percentile_stats())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_lies_between_the_bounds_of_its_bucket() {
        for value in [0, 1, 2, 3, 4, 7, 8, 1023, 1024, u64::MAX - 1, u64::MAX] {
            let found = bucket(value);
            assert!(lower_bound(found) <= value, "{value}");
            if found + 1 < BUCKETS {
                assert!(value < lower_bound(found + 1), "{value}");
            }
        }
    }

    #[test]
    fn percentiles_are_lower_bounds_of_what_was_recorded() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats().p50, 0);
        histogram.record_n(5, 90);
        histogram.record_n(100, 9);
        histogram.record(u64::MAX);
        let stats = histogram.percentile_stats();
        assert_eq!(stats.samples, 100);
        assert_eq!((stats.p50, stats.p90, stats.p99), (4, 4, 64));
        assert_eq!(stats.p99_9, 1 << 63);
        let chart = AsciiChart::new().add("row", histogram).to_string();
        assert_eq!(
            chart,
            "row: 100 values, p50 4, p90 4, p99 64, p99.9 9223372036854775808\n"
        );
    }
}
