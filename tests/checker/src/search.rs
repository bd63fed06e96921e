//! The search for an order. Depth first over configurations: which operations have taken effect,
//! and the state they made. A configuration is looked at once.
//!
//! Two cuts, neither of which loses an answer:
//!
//! * An operation that only observes, may come next, and agrees with the state, comes next: to
//!   move it forward in any order that works changes no state and breaks no precedence, because
//!   whatever must precede it already does.
//! * Of operations that are alike, the one with the earliest return comes first: in any order that
//!   works, two that stand the other way round can change places.

use crate::{Interval, Limit, Model, Verdict};
use std::collections::HashSet;

/// Ends the list of operations that wait.
const END: usize = usize::MAX;

/// Is there an order of these operations, each at a moment within its interval, that explains every
/// answer from `initial` on? Intervals that only touch count as overlapping.
pub fn check<M: Model>(
    model: &M,
    initial: &M::State,
    history: &[Interval<M::Op>],
    limit: Limit,
) -> Verdict {
    let mut search = Search::new(model, history);
    let mut seen: HashSet<(Box<[u64]>, M::State)> = HashSet::new();
    let mut path: Vec<Step<M::State>> = Vec::new();
    let mut state = initial.clone();
    loop {
        let observed = search.observe(&state);
        if search.owed == 0 {
            return Verdict::Linearizable {
                order: search.original(&search.order),
            };
        }
        let fresh = seen.insert((search.done.clone(), state.clone()));
        if seen.len() > limit.configurations {
            return Verdict::Undecided {
                looked_at: seen.len(),
            };
        }
        let choices = if fresh {
            search.choices(&state)
        } else {
            Vec::new()
        };
        path.push(Step {
            observed,
            choices,
            taken: None,
        });
        match search.advance(&mut path) {
            Some(next) => state = next,
            None => return search.violation(),
        }
    }
}

/// A configuration on the path to the present one.
struct Step<S> {
    /// Observing operations that were put in order on arrival.
    observed: usize,
    /// What is still to be tried next, best last, with the state it makes.
    choices: Vec<(usize, S)>,
    /// What was tried and led on.
    taken: Option<usize>,
}

struct Search<'h, M: Model> {
    model: &'h M,
    history: &'h [Interval<M::Op>],
    /// Positions in `history`, by invocation: everything below speaks of indexes into this.
    by_start: Vec<usize>,
    /// A doubly linked list of what waits, by invocation. `next[len]` is its head.
    next: Vec<usize>,
    prev: Vec<usize>,
    done: Box<[u64]>,
    order: Vec<usize>,
    /// Answered operations that wait: when none is owed, the rest may never take effect.
    owed: usize,
    longest: Vec<usize>,
    stuck: Vec<usize>,
}

impl<'h, M: Model> Search<'h, M> {
    fn new(model: &'h M, history: &'h [Interval<M::Op>]) -> Self {
        // What observes and has no answer says nothing.
        let says = |n: &usize| history[*n].returned.is_some() || !model.observes(&history[*n].op);
        let mut by_start: Vec<usize> = (0..history.len()).filter(says).collect();
        by_start.sort_by_key(|n| (history[*n].invoked, history[*n].returned));
        let len = by_start.len();
        let answered = |n: &&usize| history[**n].returned.is_some();
        let owed = by_start.iter().filter(answered).count();
        let mut next: Vec<usize> = (1..=len).collect();
        if let Some(last) = next.last_mut() {
            *last = END;
        }
        next.push(if len == 0 { END } else { 0 });
        let mut prev = vec![len];
        prev.extend(0..len);
        Self {
            model,
            history,
            by_start,
            next,
            prev,
            done: vec![0; len.div_ceil(64)].into(),
            order: Vec::new(),
            owed,
            longest: Vec::new(),
            stuck: Vec::new(),
        }
    }

    fn at(&self, n: usize) -> &'h Interval<M::Op> {
        &self.history[self.by_start[n]]
    }

    fn returned(&self, n: usize) -> u64 {
        self.at(n).returned.unwrap_or(u64::MAX)
    }

    /// Take effect.
    fn take(&mut self, n: usize) {
        let (before, after) = (self.prev[n], self.next[n]);
        self.next[before] = after;
        if after != END {
            self.prev[after] = before;
        }
        self.done[n / 64] |= 1 << (n % 64);
        self.order.push(n);
        self.owed -= usize::from(self.at(n).returned.is_some());
        if self.order.len() > self.longest.len() {
            self.longest.clone_from(&self.order);
            self.stuck.clear();
        }
    }

    /// The last one did not take effect.
    fn undo(&mut self) {
        let Some(n) = self.order.pop() else { return };
        let (before, after) = (self.prev[n], self.next[n]);
        self.next[before] = n;
        if after != END {
            self.prev[after] = n;
        }
        self.done[n / 64] &= !(1 << (n % 64));
        self.owed += usize::from(self.at(n).returned.is_some());
    }

    /// What waits and is preceded by nothing that waits.
    fn candidates(&self) -> Vec<usize> {
        let mut found = Vec::new();
        let mut first_return = u64::MAX;
        let mut n = self.next[self.by_start.len()];
        while n != END && self.at(n).invoked <= first_return {
            first_return = first_return.min(self.returned(n));
            found.push(n);
            n = self.next[n];
        }
        found
    }

    /// Put everything in order that only observes and agrees; how many.
    fn observe(&mut self, state: &M::State) -> usize {
        let mut count = 0;
        loop {
            let mut agreeing = self.candidates();
            agreeing.retain(|n| {
                let op = &self.at(*n).op;
                self.model.observes(op) && self.model.apply(state, op).is_some()
            });
            if agreeing.is_empty() {
                return count;
            }
            count += agreeing.len();
            for n in agreeing {
                self.take(n);
            }
        }
    }

    /// What may change the state next, with the state after it; the most urgent last.
    fn choices(&mut self, state: &M::State) -> Vec<(usize, M::State)> {
        let candidates = self.candidates();
        let mut changing = candidates.clone();
        changing.retain(|n| !self.model.observes(&self.at(*n).op));
        changing.sort_by_key(|n| self.returned(*n));
        let mut kept: Vec<(usize, M::State)> = Vec::new();
        for n in changing {
            let op = &self.at(n).op;
            let alike = |(other, _): &(usize, M::State)| self.model.alike(&self.at(*other).op, op);
            if kept.iter().any(alike) {
                continue;
            }
            if let Some(after) = self.model.apply(state, op) {
                kept.push((n, after));
            }
        }
        kept.reverse();
        if self.order.len() == self.longest.len() && self.stuck.is_empty() {
            self.stuck = candidates;
        }
        kept
    }

    /// The next configuration to look at; `None` when all were.
    fn advance(&mut self, path: &mut Vec<Step<M::State>>) -> Option<M::State> {
        while let Some(step) = path.last_mut() {
            if step.taken.take().is_some() {
                self.undo();
            }
            if let Some((n, after)) = step.choices.pop() {
                step.taken = Some(n);
                self.take(n);
                return Some(after);
            }
            for _ in 0..step.observed {
                self.undo();
            }
            path.pop();
        }
        None
    }

    fn original(&self, order: &[usize]) -> Vec<usize> {
        order.iter().map(|n| self.by_start[*n]).collect()
    }

    fn violation(&self) -> Verdict {
        Verdict::Violation {
            order: self.original(&self.longest),
            stuck: self.original(&self.stuck),
        }
    }
}
