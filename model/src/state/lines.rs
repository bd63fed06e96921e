//! Who waits for a node: one line for those that ask for the same thing, so that a plan need not look at
//! each of a hundred thousand that nobody can take. Decides nothing.

use crate::ids::{GroupId, InstanceId, NodeId, TemplateId};
use crate::instance::Instance;
use crate::node::Load;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::btree_set::{self, BTreeSet};

/// Priority, created at, id: the order of placement.
pub(super) type WaitKey = (u32, u64, InstanceId);

/// What decides which nodes can take an instance; never changes but for `alone`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    template: TemplateId,
    tag_number: u32,
    arch: String,
    pin: Option<NodeId>,
    group: Option<GroupId>,
    demand: Load,
    /// Nodes rejected it: it has a line of its own.
    alone: Option<InstanceId>,
}

impl Kind {
    pub(super) fn of(instance: &Instance, alone: bool) -> Self {
        Self {
            template: instance.request.template.clone(),
            tag_number: instance.tag_number,
            arch: instance.arch.clone(),
            pin: instance.request.node.clone(),
            group: instance.request.group.clone(),
            demand: instance.demand(),
            alone: alone.then(|| instance.id.clone()),
        }
    }

    /// Its turn, in whatever line.
    pub(super) fn turn(instance: &Instance) -> WaitKey {
        (
            instance.request.priority,
            instance.created_ms,
            instance.id.clone(),
        )
    }
}

/// All lines, merged in the order of placement; a line that is not told to go on ends.
pub(crate) struct Lines<'a> {
    heads: BinaryHeap<Reverse<(&'a WaitKey, usize)>>,
    behind: Vec<btree_set::Iter<'a, WaitKey>>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(lines: impl Iterator<Item = &'a BTreeSet<WaitKey>>) -> Self {
        let mut behind: Vec<_> = lines.map(BTreeSet::iter).collect();
        let first = |(line, behind): (usize, &mut btree_set::Iter<'a, WaitKey>)| {
            behind.next().map(|key| Reverse((key, line)))
        };
        Self {
            heads: behind.iter_mut().enumerate().filter_map(first).collect(),
            behind,
        }
    }

    /// Who is next of all, and the number of its line.
    pub(crate) fn pop(&mut self) -> Option<(&'a InstanceId, usize)> {
        let Reverse(((_, _, id), line)) = self.heads.pop()?;
        Some((id, line))
    }

    /// The next of this line may come, in its turn.
    pub(crate) fn go_on(&mut self, line: usize) {
        if let Some(key) = self.behind[line].next() {
            self.heads.push(Reverse((key, line)));
        }
    }

    /// How many wait in this line behind the one that came last.
    pub(crate) fn behind(&self, line: usize) -> usize {
        self.behind[line].len()
    }
}
