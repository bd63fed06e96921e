//! Which tags and artifacts changed lately, for those who follow them without looking at all of them
//! each time. In memory, not replicated, never compared: a shortcut only, bounded; who has been away
//! for too long looks at everything.

use crate::ids::{Sha256, TemplateId};
use std::collections::VecDeque;

/// Changes that are remembered.
const KEPT: usize = 4_096;

/// What has copies on members.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owned {
    /// A tag of a template, by number.
    Tag(TemplateId, u32),
    /// An artifact of a repository.
    Artifact(String, Sha256),
}

/// The last changes. Change number `n` (from 1 on) is at `n - forgotten - 1`.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal {
    forgotten: u64,
    changes: VecDeque<Owned>,
}

impl Journal {
    fn end(&self) -> u64 {
        self.forgotten + self.changes.len() as u64
    }

    pub(super) fn note(&mut self, owned: Owned) {
        if self.changes.len() == KEPT {
            self.changes.pop_front();
            self.forgotten += 1;
        }
        self.changes.push_back(owned);
    }

    pub(super) fn since(&self, seen: u64) -> (u64, Option<Vec<Owned>>) {
        let end = self.end();
        if seen < self.forgotten || seen > end {
            return (end, None);
        }
        let at = usize::try_from(seen - self.forgotten).unwrap_or(usize::MAX);
        let mut changed: Vec<Owned> = self.changes.iter().skip(at).cloned().collect();
        changed.sort_unstable();
        changed.dedup();
        (end, Some(changed))
    }

    /// Positions told so far are all from before this one.
    pub(super) fn succeed(&mut self, former: &Self) {
        self.forgotten = former.end() + 1;
        self.changes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(n: u32) -> Owned {
        Owned::Tag("t".into(), n)
    }

    #[test]
    fn tells_what_changed_or_that_it_does_not_know() {
        let mut journal = Journal::default();
        assert_eq!(journal.since(0), (0, Some(vec![])));
        for n in [3, 1, 3] {
            journal.note(tag(n));
        }
        assert_eq!(journal.since(0), (3, Some(vec![tag(1), tag(3)])));
        assert_eq!(journal.since(2), (3, Some(vec![tag(3)])));
        assert_eq!(journal.since(3), (3, Some(vec![])));
        assert_eq!(journal.since(4), (3, None), "never told");
        for n in 0..5000 {
            journal.note(tag(n));
        }
        assert_eq!(journal.since(3), (5003, None), "forgotten");
        let (end, changed) = journal.since(5003 - KEPT as u64);
        assert_eq!((end, changed.map(|c| c.len())), (5003, Some(KEPT)));

        let mut next = Journal::default();
        next.note(tag(1));
        next.succeed(&journal);
        assert_eq!(next.since(5003).1, None, "another state was installed");
        let (end, _) = next.since(0);
        assert_eq!(next.since(end), (end, Some(vec![])));
    }
}
