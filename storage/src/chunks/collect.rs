//! Gives back the room of chunks that nothing needs. Refuses to know what a root is: the caller says
//! what is needed, between [`ChunkStore::begin_mark`] and [`ChunkStore::sweep`].
//!
//! ```text
//!  used ──nobody kept or used it since the mark began: condemn──► dead ──dead for the grace: sweep──► gone
//!   ▲                                                              │
//!   └───────────── kept by a mark, asked about, put, read ─────────┘
//! ```
//!
//! A sweep gives room back by whole packs. From one with enough dead bytes it drops the dead chunks (a
//! chunk that came back to life since is not dropped: both look at the same mark under the same
//! lock), has the writer copy the others to the growing pack, and only then has it removed:
//!
//! ```text
//! drop dead from the index -> read a batch, append, fdatasync, index names the copies -> ... -> remove index file, pack
//! ```
//! A crash between any two of these steps loses nothing: the pack is there until all that is needed
//! of it is durable elsewhere. What was dropped may be back after a restart, and is dropped again.

use super::direct::BLOCK;
use super::index::{Entry, PackUse, Sum, Tick};
use super::record::HEADER_LEN;
use super::{ChunkId, ChunkStore, writer};
use crate::Result;
use std::collections::HashMap;
use std::time::Duration;

/// A pack is rewritten when at least this part of it is not needed: 1/4.
const WASTE_PART: u64 = 4;
/// Bytes that are copied together: a put waits for no more than this.
const MOVE_BYTES: u64 = 8 << 20;
/// So many small packs are copied together.
const SMALL_PACKS: usize = 8;
/// A copy may take at most this part of the free room: 1/2.
const ROOM_PART: u64 = 2;

/// One look at what is needed.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    begun: Tick,
}

/// What a store holds, as of the last mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Needed, or used since the mark began.
    pub live: Sum,
    /// Not needed, but not for long enough.
    pub waiting: Sum,
    /// Not needed for long enough.
    pub dead: Sum,
    /// Packs, and their bytes.
    pub packs: u64,
    /// See `packs`.
    pub pack_bytes: u64,
    /// Bytes that a sweep would give back.
    pub reclaimable: u64,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Dead chunks that are gone.
    pub removed: Sum,
    /// Chunks that were copied to another pack.
    pub moved: Sum,
    /// Packs removed.
    pub packs: u64,
    /// Bytes of the packs that were removed; what was copied is not taken off.
    pub pack_bytes: u64,
    /// Packs that were left because the disk has no room for the copies.
    pub postponed: u64,
}

/// A pack that is worth its removal.
struct Choice {
    number: u32,
    /// Bytes to copy.
    kept: u64,
    /// Bytes to win.
    waste: u64,
}

impl ChunkStore {
    /// Begin to look at what is needed. Everything that is used from now on counts as needed.
    pub fn begin_mark(&self) -> Mark {
        Mark {
            begun: self.inner.shared.index.now(),
        }
    }

    /// These are needed: those that are held count as used now. How many are held.
    pub fn keep(&self, ids: &[ChunkId]) -> u64 {
        let shared = &self.inner.shared;
        let now = shared.index.now();
        let mut held = 0;
        for id in ids {
            if shared.index.touch(id).is_some() {
                held += 1;
            } else if let Some(bad) = shared.bad.lock().get_mut(id) {
                bad.needed = now;
            }
        }
        held
    }

    /// The look is complete: what was neither kept nor used since it began is dead from now on.
    pub fn condemn(&self, mark: &Mark) {
        let shared = &self.inner.shared;
        shared.index.condemn(mark.begun);
        shared.bad.lock().retain(|_, bad| bad.needed >= mark.begun);
    }

    /// What is held, and what a sweep would do.
    pub fn survey(&self, mark: &Mark, grace: Duration) -> Survey {
        let uses = self.inner.shared.index.survey(mark.begun.before(grace));
        let mut survey = Survey {
            reclaimable: self.choose(&uses).iter().map(|c| c.waste).sum(),
            ..Survey::default()
        };
        for pack in uses.values() {
            survey.live += pack.live;
            survey.waiting += pack.waiting;
            survey.dead += pack.dead;
        }
        (survey.packs, survey.pack_bytes) = self.inner.shared.packs().total();
        survey
    }

    /// Remove what has been dead for `grace` when this mark began, where that gives enough room back.
    /// The caller has seen to it that everything that was needed when the mark began, and is needed now,
    /// was kept since. One sweep at a time; the next waits.
    pub fn sweep(&self, mark: &Mark, grace: Duration) -> Result<Swept> {
        self.sweep_paced(mark, grace, &|_| true)
    }

    /// The same at a pace: `pace` is told how many bytes were copied, returns when more may be, and
    /// says whether to go on. What was left is for the next sweep.
    pub fn sweep_paced(
        &self,
        mark: &Mark,
        grace: Duration,
        pace: &dyn Fn(u64) -> bool,
    ) -> Result<Swept> {
        let _alone = self.inner.sweeping.lock();
        let mut swept = Swept::default();
        let Some(cutoff) = mark.begun.before(grace) else {
            return Ok(swept);
        };
        let uses = self.inner.shared.index.survey(Some(cutoff));
        let backend = &self.inner.shared.backend;
        let (mut group, mut bytes) = (Vec::new(), 0);
        for choice in self.choose(&uses) {
            if choice.kept > 0 && backend.room()?.0 / ROOM_PART < choice.kept {
                swept.postponed += 1;
                continue;
            }
            group.push(choice.number);
            bytes += choice.kept;
            if bytes >= backend.group_bytes() {
                if !self.rewrite(&std::mem::take(&mut group), cutoff, &mut swept, pace)? {
                    return Ok(swept);
                }
                bytes = 0;
            }
        }
        self.rewrite(&group, cutoff, &mut swept, pace)?;
        Ok(swept)
    }

    /// The packs that are worth their removal, those with the least to copy first: they may make the
    /// room for the others.
    fn choose(&self, uses: &HashMap<u32, PackUse>) -> Vec<Choice> {
        let shared = &self.inner.shared;
        let active = shared.packs().active();
        let mut chosen = Vec::new();
        let mut small = Vec::new();
        for (number, len) in shared.packs().all() {
            let pack = uses.get(&number).copied().unwrap_or_default();
            let mut kept = pack.live;
            kept += pack.waiting;
            let kept = kept.bytes + kept.chunks * HEADER_LEN as u64;
            let waste = len.saturating_sub(BLOCK as u64).saturating_sub(kept);
            let empty = kept == 0 && number != active;
            let much = waste >= shared.waste_min && waste >= len / WASTE_PART;
            if empty || (much && shared.backend.rewrites(number)) {
                chosen.push(Choice {
                    number,
                    kept,
                    waste,
                });
            } else if len < shared.backend.small() && shared.backend.rewrites(number) {
                small.push(Choice {
                    number,
                    kept,
                    waste,
                });
            }
        }
        if small.len() >= SMALL_PACKS {
            chosen.append(&mut small);
        }
        chosen.sort_by_key(|choice| (choice.kept, choice.number));
        chosen
    }

    /// Copy what is needed of these packs elsewhere, and remove them. `false`: broken off between two
    /// batches. As after a crash, the packs are still there with all that was not copied.
    fn rewrite(
        &self,
        numbers: &[u32],
        cutoff: Tick,
        swept: &mut Swept,
        pace: &dyn Fn(u64) -> bool,
    ) -> Result<bool> {
        let shared = &self.inner.shared;
        let mut packs: Vec<(u32, Vec<Entry>)> = Vec::with_capacity(numbers.len());
        let mut left: Vec<Entry> = Vec::new();
        for &number in numbers {
            if number == shared.packs().active() && self.ask(writer::Job::Seal)? == number {
                continue;
            }
            let entries = self.entries(number)?;
            for (id, at) in &entries {
                if shared.index.drop_dead(id, at, cutoff) {
                    swept.removed.add(at.stored_len);
                } else if shared.index.peek(id) == Some(*at) {
                    left.push((*id, *at));
                }
            }
            packs.push((number, entries));
        }
        left.sort_unstable_by_key(|(_, at)| (at.pack, at.offset));
        let bytes_max = MOVE_BYTES.max(shared.backend.group_bytes());
        let mut rest = left.as_slice();
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(batch_len(rest, bytes_max));
            let before = swept.moved.bytes;
            self.move_on(batch, swept)?;
            if !pace(swept.moved.bytes - before) {
                return Ok(false);
            }
            rest = after;
        }
        for (number, entries) in packs {
            let removed = self.ask(|reply| writer::Job::Remove(number, entries, reply))?;
            // What was dropped may have been found there anew: then the pack stays for now.
            if let Some(len) = removed {
                swept.pack_bytes += len;
                swept.packs += 1;
            }
        }
        Ok(true)
    }

    fn move_on(&self, batch: &[Entry], swept: &mut Swept) -> Result<()> {
        let shared = &self.inner.shared;
        let seen = shared.read_entries(&mut batch.to_vec())?;
        for (id, at) in &seen.damaged {
            // The pack goes, and its index file with it.
            shared.quarantine(id, at);
        }
        for (_, at) in &seen.records {
            swept.moved.add(at.stored_len);
        }
        self.ask(|reply| writer::Job::Move(seen.records, reply))
    }
}

fn batch_len(entries: &[Entry], bytes_max: u64) -> usize {
    let mut bytes = 0;
    let fits = |(_, at): &&Entry| {
        bytes += u64::from(at.stored_len) + HEADER_LEN as u64;
        bytes <= bytes_max
    };
    entries.iter().take_while(fits).count().max(1)
}
