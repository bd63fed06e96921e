//! The outcomes of the newest commands, so that a retry of a command (through any member, after
//! any crash) answers what it answered first and changes nothing.
//!
//! Bounded by `limits::RECENT_COMMANDS` and by `limits::RECENT_IDS`, oldest first. A retry that
//! comes after more than that many other commands is applied as if it were new: proposers must
//! give up long before. Knows nothing of what a command does.

use crate::ids::CommandId;
use crate::limits::{RECENT_COMMANDS, RECENT_IDS};
use crate::outcome::Outcome;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Neighbouring slots that are stored under one key, from feature level
/// [`crate::feature::RECENT_BLOCKS`] on: a key for each command would be most of what a checkpoint
/// writes. Small, because outcomes that name a thousand instances are stored like this too.
const BLOCK: u32 = 16;
const _: () = assert!(RECENT_COMMANDS.is_multiple_of(BLOCK as usize));

/// Where a remembered command is stored. At a level that has blocks, all commands of a block are stored
/// in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Alone.
    Slot(u32),
    /// With its neighbours.
    Block(u32),
}

impl Place {
    fn holds(self, sequence: u64) -> bool {
        match self {
            Self::Slot(at) => slot(sequence) == at,
            Self::Block(at) => slot(sequence) / BLOCK == at,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Recent {
    /// Sequence number of the oldest remembered command; the others follow without a gap.
    first: u64,
    order: VecDeque<(CommandId, Outcome)>,
    sequences: BTreeMap<CommandId, u64>,
    ids: usize,
    /// Blocks whose commands are still stored alone, at a level that has blocks. Each moves as a whole
    /// when one of its slots is used again: so the move costs a command no more than a few keys, and
    /// what is stored says by itself how far it is.
    alone: BTreeSet<u32>,
}

/// Where a sequence number is stored: slots are used again, so that a steady stream of commands
/// overwrites keys instead of making and removing them.
fn slot(sequence: u64) -> u32 {
    (sequence % RECENT_COMMANDS as u64) as u32
}

fn weight(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Started(ids) => ids.len(),
        Outcome::Asked(ids) => ids.len(),
        _ => 0,
    }
}

impl Recent {
    pub(super) fn get(&self, id: CommandId) -> Option<&Outcome> {
        let sequence = self.sequences.get(&id)?;
        Some(&self.order.get((sequence - self.first) as usize)?.1)
    }

    /// Remember one more; tells the places whose content changed. `blocks`: the level has them.
    pub(super) fn remember(
        &mut self,
        id: CommandId,
        outcome: Outcome,
        blocks: bool,
        mut changed: impl FnMut(Place),
    ) {
        let sequence = self.first + self.order.len() as u64;
        self.touch(slot(sequence), blocks, &mut changed);
        self.ids += weight(&outcome);
        self.order.push_back((id, outcome));
        self.sequences.insert(id, sequence);
        while self.order.len() > RECENT_COMMANDS || (self.ids > RECENT_IDS && self.order.len() > 1)
        {
            self.touch(slot(self.first), blocks, &mut changed);
            self.forget_oldest();
        }
    }

    fn touch(&mut self, slot: u32, blocks: bool, changed: &mut impl FnMut(Place)) {
        if !blocks {
            return changed(Place::Slot(slot));
        }
        let block = Self::block(slot);
        if self.alone.remove(&block) {
            let slots = block * BLOCK..(block + 1) * BLOCK;
            slots.for_each(|slot| changed(Place::Slot(slot)));
        }
        changed(Place::Block(block));
    }

    /// The level has blocks from now on; what is stored alone stays so until it is touched.
    pub(super) fn move_gradually(&mut self) {
        self.alone = self.blocks().collect();
    }

    /// Are the commands of this block still stored alone, at a level that has blocks?
    pub(super) fn is_alone(&self, block: u32) -> bool {
        self.alone.contains(&block)
    }

    fn forget_oldest(&mut self) {
        if let Some((id, outcome)) = self.order.pop_front() {
            self.sequences.remove(&id);
            self.ids -= weight(&outcome);
            self.first += 1;
        }
    }

    /// The block that a slot belongs to.
    pub(super) fn block(slot: u32) -> u32 {
        slot / BLOCK
    }

    /// What stands in a block: sequence number, command, outcome, in the order of slots.
    pub(super) fn in_block(&self, block: u32) -> impl Iterator<Item = (u64, CommandId, &Outcome)> {
        (block * BLOCK..(block + 1) * BLOCK).filter_map(|slot| self.at_slot(slot))
    }

    /// What stands in a slot.
    pub(super) fn at_slot(&self, wanted: u32) -> Option<(u64, CommandId, &Outcome)> {
        let ahead = u64::from(wanted) + RECENT_COMMANDS as u64 - u64::from(slot(self.first));
        let offset = ahead % RECENT_COMMANDS as u64;
        let (id, outcome) = self.order.get(offset as usize)?;
        Some((self.first + offset, *id, outcome))
    }

    /// Occupied blocks in ascending order.
    pub(super) fn blocks(&self) -> impl Iterator<Item = u32> {
        let mut last = None;
        let new = move |block: &u32| last.replace(*block) != Some(*block);
        self.slots().map(Self::block).filter(new)
    }

    /// Occupied slots in ascending order.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> {
        let start = slot(self.first);
        let length = self.order.len() as u32;
        let wrapped = (start + length).saturating_sub(RECENT_COMMANDS as u32);
        (0..wrapped).chain(start..start + length - wrapped)
    }

    /// From stored entries in any order. `blocks`: their level has them.
    pub(super) fn rebuild(
        entries: Vec<(Place, u64, CommandId, Outcome)>,
        blocks: bool,
    ) -> Result<Self, String> {
        let mut sorted = BTreeMap::new();
        let (mut alone, mut together) = (BTreeSet::new(), BTreeSet::new());
        for (place, sequence, id, outcome) in entries {
            if !place.holds(sequence) {
                return Err(format!("remembered command {sequence} stands in {place:?}"));
            }
            match place {
                Place::Slot(slot) => alone.insert(Self::block(slot)),
                Place::Block(block) => together.insert(block),
            };
            sorted.insert(sequence, (id, outcome));
        }
        if !alone.is_disjoint(&together) || !(blocks || together.is_empty()) {
            return Err("remembered commands are stored in two ways".into());
        }
        if !blocks {
            alone.clear();
        }
        let mut recent = Self {
            first: sorted.keys().next().copied().unwrap_or(0),
            alone,
            ..Self::default()
        };
        for (sequence, (id, outcome)) in sorted {
            if sequence != recent.first + recent.order.len() as u64 {
                return Err(format!(
                    "remembered commands have a gap before number {sequence}"
                ));
            }
            recent.ids += weight(&outcome);
            recent.order.push_back((id, outcome));
            recent.sequences.insert(id, sequence);
        }
        recent.check()?;
        Ok(recent)
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.order.len() > RECENT_COMMANDS || self.sequences.len() != self.order.len() {
            return Err("remembered commands: wrong number".into());
        }
        let ids: usize = self.order.iter().map(|(_, o)| weight(o)).sum();
        if ids != self.ids {
            return Err("remembered commands: wrong count of ids".into());
        }
        let empty = |block: &u32| self.in_block(*block).next().is_none();
        if self.alone.iter().any(empty) {
            return Err("remembered commands: nothing is left to move".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::InstanceId;

    fn stored(recent: &Recent) -> Vec<(Place, u64, CommandId, Outcome)> {
        let of = |b| {
            let place = Place::Block(b);
            let tagged = move |(n, id, o): (u64, CommandId, &Outcome)| (place, n, id, o.clone());
            recent.in_block(b).map(tagged)
        };
        recent.blocks().flat_map(of).collect()
    }

    #[test]
    fn the_oldest_is_forgotten_and_slots_are_used_again() {
        let mut recent = Recent::default();
        for i in 0..RECENT_COMMANDS as u128 + 3 {
            let mut places = Vec::new();
            let outcome = Outcome::Bound(i as u32);
            recent.remember(CommandId(i), outcome, true, |place| places.push(place));
            let block = (i % RECENT_COMMANDS as u128) as u32 / BLOCK;
            assert_eq!(places[0], Place::Block(block));
        }
        assert_eq!(recent.get(CommandId(2)), None);
        assert_eq!(recent.get(CommandId(3)), Some(&Outcome::Bound(3)));
        let entries = stored(&recent);
        assert_eq!(entries.len(), RECENT_COMMANDS);
        assert!(recent.blocks().is_sorted(), "blocks ascend");
        assert_eq!(recent.blocks().count(), RECENT_COMMANDS / BLOCK as usize);
        assert_eq!(Recent::rebuild(entries, true).unwrap(), recent);
    }

    #[test]
    fn large_outcomes_are_forgotten_sooner() {
        let mut recent = Recent::default();
        let ids = vec![InstanceId::from("i"); 1_000];
        for i in 0..300_u128 {
            recent.remember(CommandId(i), Outcome::Started(ids.clone()), true, |_| {});
        }
        assert_eq!(recent.order.len(), RECENT_IDS / 1_000);
        assert_eq!(recent.get(CommandId(0)), None);
        assert!(recent.get(CommandId(299)).is_some());
        assert_eq!(Recent::rebuild(stored(&recent), true).unwrap(), recent);
    }

    #[test]
    fn gaps_and_wrong_places_are_refused() {
        let e = |block, n, id| (Place::Block(block), n, CommandId(id), Outcome::Done);
        let blocks = |entries| Recent::rebuild(entries, true);
        assert!(blocks(vec![e(0, 0, 1), e(0, 1, 2)]).is_ok());
        assert!(blocks(vec![e(0, 0, 1), e(0, 2, 2)]).is_err());
        assert!(blocks(vec![e(1, 0, 1)]).is_err());
        assert!(blocks(vec![e(0, 0, 1), e(0, 1, 1)]).is_err());
        let alone = |slot, n: u64| (Place::Slot(slot), n, CommandId(n.into()), Outcome::Done);
        let moving = blocks(vec![alone(15, 15), e(1, 16, 99)]).unwrap();
        assert!(moving.is_alone(0) && !moving.is_alone(1));
        assert!(
            blocks(vec![alone(1, 1), e(0, 2, 9)]).is_err(),
            "in two ways"
        );
        assert!(blocks(vec![alone(0, 1)]).is_err());
        assert!(
            !Recent::rebuild(vec![alone(1, 1)], false)
                .unwrap()
                .is_alone(0)
        );
        assert!(Recent::rebuild(vec![e(0, 1, 1)], false).is_err());
    }
}
