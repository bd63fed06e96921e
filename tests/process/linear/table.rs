//! What a run of many schedules prints: a line for each, and a table of all.

use super::Outcome;
use super::plan::{KINDS, Kind};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// One schedule in a line.
pub(super) fn line(outcome: &Outcome) -> String {
    let j = &outcome.judgement;
    let verdict = match (j.violations.len(), j.undecided.len()) {
        (0, 0) => "linearizable".to_owned(),
        (bad, unclear) => format!("{bad} VIOLATIONS, {unclear} undecided"),
    };
    let saved = outcome.saved.as_ref();
    let saved = saved.map_or(String::new(), |path| format!(", see {}", path.display()));
    let terms: Vec<String> = outcome
        .done
        .iter()
        .map(|d| format!("{}-{}", d.terms.0, d.terms.1))
        .collect();
    format!(
        "{verdict}: {} operations, {} unknown, {} refused, {} objects; terms {}; ready in {:.1} s, healed in {:.1} s, judged in {:.2} s; {:.1} s{saved}",
        j.operations,
        j.unknown,
        j.refused,
        j.objects,
        terms.join(", "),
        outcome.ready.as_secs_f64(),
        outcome.healed.as_secs_f64(),
        outcome.judged.as_secs_f64(),
        outcome.took.as_secs_f64(),
    )
}

/// All schedules so far.
#[derive(Default)]
pub(super) struct Table {
    schedules: usize,
    /// Runs that proved nothing, or hung.
    pub(super) invalid: usize,
    /// Schedules with this fault, and how often it was inflicted.
    kinds: BTreeMap<Kind, (usize, usize)>,
    operations: usize,
    unknown: usize,
    refused: u64,
    objects: usize,
    violations: usize,
    undecided: usize,
    healed_max: Duration,
    took: Duration,
}

impl Table {
    pub(super) fn add(&mut self, outcome: &Outcome) {
        self.schedules += 1;
        for kind in KINDS {
            let times = outcome.done.iter().filter(|d| d.fault.kind == kind);
            let times = times.count();
            let entry = self.kinds.entry(kind).or_default();
            entry.0 += usize::from(times > 0);
            entry.1 += times;
        }
        let j = &outcome.judgement;
        self.operations += j.operations;
        self.unknown += j.unknown;
        self.refused += j.refused;
        self.objects += j.objects;
        self.violations += j.violations.len();
        self.undecided += j.undecided.len();
        self.healed_max = self.healed_max.max(outcome.healed);
        self.took += outcome.took;
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| fault | schedules | inflicted |\n| --- | --- | --- |")?;
        for (kind, (schedules, times)) in &self.kinds {
            writeln!(f, "| {kind:?} | {schedules} | {times} |")?;
        }
        writeln!(
            f,
            "{} schedules ({} invalid), {} operations ({} unknown, {} refused without effect), {} objects judged, {} violations, {} undecided",
            self.schedules + self.invalid,
            self.invalid,
            self.operations,
            self.unknown,
            self.refused,
            self.objects,
            self.violations,
            self.undecided,
        )?;
        write!(
            f,
            "healed within {:.1} s at most; {:.0} s in all",
            self.healed_max.as_secs_f64(),
            self.took.as_secs_f64()
        )
    }
}
