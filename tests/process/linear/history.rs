//! What clients saw, and the judgement over it: split by object, each part handed to the checker.
//! Knows nothing of processes or faults.

use mainstay_checker::models::{
    ABSENT, Membership, MembershipOp, Pile, PileOp, Registers, RegistersOp,
};
use mainstay_checker::{Interval, Limit, Model, Verdict, check};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::ops::Range;

/// Metadata keys of an instance that clients write.
pub(crate) const KEYS: usize = 3;
/// What a read of an instance saw that was not there. No write has this value.
pub(crate) const MISSING: u32 = u32::MAX;

/// An operation, and what its answer said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum What {
    /// Set keys of an instance, each to a value of its own.
    Write(usize, Vec<(usize, u32)>),
    /// All keys of an instance.
    Read(usize, Vec<u32>),
    /// Take the newest tag from a template.
    Take(usize),
    /// How many tags a template has.
    Count(usize, u32),
    /// Make an instance with this number in its external id.
    Create(u32),
    /// All instances: keys of those that are written, and how often each number is there.
    List(Vec<Vec<u32>>, BTreeMap<u32, u32>),
}

/// An operation as its client saw it; times in microseconds of the test's clock.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) client: usize,
    /// The member that was asked last.
    pub(crate) member: usize,
    pub(crate) invoked: u64,
    /// `None`: unknown.
    pub(crate) returned: Option<u64>,
    pub(crate) what: What,
}

/// A stale read's header: this member's process had applied so much.
#[derive(Clone, Debug)]
pub(crate) struct Glance {
    /// Member, and which of its processes.
    pub(crate) process: (usize, u32),
    pub(crate) invoked: u64,
    pub(crate) returned: u64,
    pub(crate) applied: u64,
}

/// A request for a new instance, with all its repetitions.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) number: u32,
    /// All of them had the same `Idempotency-Key`.
    pub(crate) keyed: bool,
    /// Those that may have happened.
    pub(crate) sends: u32,
}

/// Everything that was seen in one schedule.
#[derive(Default)]
pub(crate) struct History {
    pub(crate) events: Vec<Event>,
    pub(crate) glances: Vec<Glance>,
    pub(crate) made: Vec<Made>,
    /// Answers that must not be, e.g. that an instance is not there.
    pub(crate) surprises: Vec<String>,
    /// Answers that said that nothing was changed.
    pub(crate) refused: u64,
}

/// What the judgement counted, and what it found wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Judgement {
    pub(crate) operations: usize,
    pub(crate) unknown: usize,
    pub(crate) refused: u64,
    pub(crate) objects: usize,
    pub(crate) violations: Vec<String>,
    pub(crate) undecided: Vec<String>,
}

impl Judgement {
    /// Nothing is wrong, and nothing is unclear.
    pub(crate) fn clean(&self) -> bool {
        self.violations.is_empty() && self.undecided.is_empty()
    }

    fn judge<M: Model>(
        &mut self,
        name: &str,
        model: &M,
        initial: &M::State,
        part: &[Interval<M::Op>],
    ) {
        self.objects += 1;
        match check(model, initial, part, Limit::default()) {
            Verdict::Linearizable { .. } => {}
            Verdict::Undecided { looked_at } => self.undecided.push(format!(
                "{name}: undecided after {looked_at} configurations"
            )),
            Verdict::Violation { order, stuck } => {
                let mut text = format!("{name}: no order explains the answers. It works up to\n");
                for n in &order[order.len().saturating_sub(12)..] {
                    let _ = writeln!(text, "    {:?}", part[*n]);
                }
                text.push_str("  and then none of these can come next:\n");
                for n in &stuck {
                    let _ = writeln!(text, "    {:?}", part[*n]);
                }
                self.violations.push(text);
            }
        }
    }
}

impl History {
    pub(crate) fn add(&mut self, other: Self) {
        self.events.extend(other.events);
        self.glances.extend(other.glances);
        self.made.extend(other.made);
        self.surprises.extend(other.surprises);
        self.refused += other.refused;
    }

    /// Was an operation under way between these two moments?
    pub(crate) fn overlaps(&self, begin: u64, end: u64) -> bool {
        self.events
            .iter()
            .any(|e| e.invoked <= end && e.returned.is_none_or(|r| r >= begin))
    }

    /// Is there an order of everything that explains every answer? `piles` says how many tags each
    /// template had in the beginning.
    pub(crate) fn judge(&self, instances: usize, piles: &[u32]) -> Judgement {
        let unknown = self.events.iter().filter(|e| e.returned.is_none()).count();
        let mut judgement = Judgement {
            operations: self.events.len(),
            unknown,
            refused: self.refused,
            violations: self.surprises.clone(),
            ..Judgement::default()
        };
        let start = vec![ABSENT; KEYS * instances];
        for n in 0..instances {
            let part = Registers::without_unseen(self.registers(n..n + 1));
            judgement.judge(&format!("instance {n}"), &Registers, &start, &part);
        }
        // Lists show several instances at once: each being right does not make a list right.
        let whole = Registers::without_unseen(self.registers(0..instances));
        judgement.judge("all instances", &Registers, &start, &whole);
        for (n, start) in piles.iter().enumerate() {
            judgement.judge(&format!("pile {n}"), &Pile, start, &self.pile(n));
        }
        for made in &self.made {
            let part = self.membership(made);
            let name = format!("create {}", made.number);
            judgement.judge(&name, &Membership, &false, &part);
        }
        self.judge_sets(&mut judgement.violations);
        self.judge_glances(&mut judgement.violations);
        judgement
    }

    fn part<O>(&self, op: impl Fn(&What) -> Option<O>) -> Vec<Interval<O>> {
        let interval = |e: &Event| {
            Some(Interval {
                invoked: e.invoked,
                returned: e.returned,
                op: op(&e.what)?,
            })
        };
        self.events.iter().filter_map(interval).collect()
    }

    /// What was done to these instances; their keys are numbered one instance after the other.
    fn registers(&self, which: Range<usize>) -> Vec<Interval<RegistersOp>> {
        let key = |instance: usize, key: usize| instance * KEYS + key;
        let seen = |instance: usize, values: &[u32]| {
            let values = values.iter().enumerate();
            let pairs: Vec<_> = values.map(|(k, v)| (key(instance, k), *v)).collect();
            pairs
        };
        self.part(|what| match what {
            What::Write(at, pairs) if which.contains(at) => {
                let pairs = pairs.iter().map(|(k, v)| (key(*at, *k), *v));
                Some(RegistersOp::Write(pairs.collect()))
            }
            What::Read(at, values) if which.contains(at) => {
                Some(RegistersOp::Read(seen(*at, values)))
            }
            What::List(all, _) => {
                let pairs = which.clone().flat_map(|n| seen(n, &all[n]));
                Some(RegistersOp::Read(pairs.collect()))
            }
            _ => None,
        })
    }

    fn pile(&self, n: usize) -> Vec<Interval<PileOp>> {
        self.part(|what| match what {
            What::Take(at) if *at == n => Some(PileOp::Take),
            What::Count(at, left) if *at == n => Some(PileOp::Count(*left)),
            _ => None,
        })
    }

    fn membership(&self, made: &Made) -> Vec<Interval<MembershipOp>> {
        self.part(|what| match what {
            What::Create(number) if *number == made.number => Some(MembershipOp::Add),
            What::List(_, counts) => Some(MembershipOp::Look(counts.contains_key(&made.number))),
            _ => None,
        })
    }

    /// Every list, the last one of each member included: nothing is there that nobody asked for, nor
    /// more often than it was asked for, however often a request with a key was sent.
    fn judge_sets(&self, violations: &mut Vec<String>) {
        let allowed = |made: &Made| (made.number, if made.keyed { 1 } else { made.sends });
        let most: BTreeMap<u32, u32> = self.made.iter().map(allowed).collect();
        let mut found = BTreeSet::new();
        for event in &self.events {
            let What::List(_, counts) = &event.what else {
                continue;
            };
            for (number, count) in counts {
                let most = most.get(number).copied().unwrap_or(0);
                if *count > most && found.insert(*number) {
                    violations.push(format!(
                        "create {number}: {count} instances, member {}; at most {most} were asked for",
                        event.member
                    ));
                }
            }
        }
    }

    /// What a process has applied only grows.
    fn judge_glances(&self, violations: &mut Vec<String>) {
        for later in &self.glances {
            let back = self.glances.iter().find(|earlier| {
                earlier.process == later.process
                    && earlier.returned < later.invoked
                    && earlier.applied > later.applied
            });
            if let Some(earlier) = back {
                violations.push(format!("stale reads go back: {earlier:?}, then {later:?}"));
            }
        }
    }

    /// The whole history as text, for whoever has to understand a violation.
    pub(crate) fn dump(&self) -> String {
        let mut events: Vec<&Event> = self.events.iter().collect();
        events.sort_by_key(|e| e.invoked);
        let mut text = String::new();
        for e in events {
            let end = e.returned.map_or("?".to_owned(), |r| r.to_string());
            let _ = writeln!(
                text,
                "{}-{end} client {} member {}: {:?}",
                e.invoked, e.client, e.member, e.what
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(invoked: u64, returned: u64, what: What) -> Event {
        Event {
            client: 0,
            member: 0,
            invoked,
            returned: Some(returned),
            what,
        }
    }

    fn list(value: u32, counts: &[(u32, u32)]) -> What {
        What::List(vec![vec![value, 0, 0]], counts.iter().copied().collect())
    }

    fn made(number: u32, keyed: bool, sends: u32) -> Made {
        Made {
            number,
            keyed,
            sends,
        }
    }

    fn judge(events: Vec<Event>, made: Vec<Made>) -> Judgement {
        let history = History {
            events,
            made,
            ..History::default()
        };
        history.judge(1, &[5])
    }

    #[test]
    fn each_kind_of_wrong_answer_is_found() {
        let write = event(0, 1, What::Write(0, vec![(0, 7)]));
        let create = event(0, 1, What::Create(1));
        let take = event(0, 1, What::Take(0));
        let base = vec![write, create, take];
        let with = |what| [base.clone(), vec![event(2, 3, what)]].concat();
        let one = || vec![made(1, true, 3)];
        assert!(judge(with(list(7, &[(1, 1)])), one()).clean());
        assert!(judge(with(What::Count(0, 4)), one()).clean());
        for wrong in [
            list(0, &[(1, 1)]),
            list(7, &[]),
            list(7, &[(1, 2)]),
            list(7, &[(1, 1), (2, 1)]),
            What::Count(0, 3),
            What::Read(0, vec![MISSING; KEYS]),
        ] {
            let judgement = judge(with(wrong.clone()), one());
            let found = &judgement.violations;
            let whole = found.iter().filter(|v| v.starts_with("all instances"));
            assert_eq!(found.len() - whole.count(), 1, "{wrong:?}: {judgement:?}");
        }
        // Sent twice without a key: two are what was asked for, three are not.
        let twice = || vec![made(1, false, 2)];
        assert!(judge(with(list(7, &[(1, 2)])), twice()).clean());
        assert!(!judge(with(list(7, &[(1, 3)])), twice()).clean());
    }

    #[test]
    fn a_process_that_goes_back_is_found() {
        let glance = |process, invoked, applied| Glance {
            process,
            invoked,
            returned: invoked + 1,
            applied,
        };
        let judge = |glances| {
            let history = History {
                glances,
                ..History::default()
            };
            history.judge(0, &[]).violations.len()
        };
        let after = |process| vec![glance((0, 1), 0, 9), glance(process, 5, 8)];
        assert_eq!(judge(after((0, 1))), 1);
        assert_eq!(judge(after((0, 2))), 0);
        assert_eq!(judge(after((1, 1))), 0);
    }
}
