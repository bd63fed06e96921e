//! Where each chunk is and when it was last used: in memory for all packs; where they are also as a
//! file beside each sealed pack. An index file is a shortcut only: the packs alone can always tell.
//!
//! ```text
//! "MSCI" version u32 | pack length u64 | count u64 | count x (id, offset u32, stored u32, raw u32) | CRC-32
//! ```
//!
//! Whoever learns that a chunk is held marks it as used in the same step ([`Index::touch`]); whoever
//! removes one looks at that mark in the same step ([`Index::drop_dead`]). A chunk found at a start
//! counts as used then: nothing about use has to be durable.

use super::{ChunkId, io};
use crate::Result;
use crate::disk::{Disk, replace_file};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

const MAGIC: [u8; 4] = *b"MSCI";
const VERSION: u32 = 1;
pub(super) const HEAD: usize = 24;
pub(super) const ENTRY: usize = 44;
/// Parts of the map: a look at everything holds up writers for one of them at a time.
const SHARDS: usize = 64;
/// What one step of [`Tick`] is.
const TICK: Duration = Duration::from_millis(100);
/// In a slot's mark: no root reached the chunk since the time in the other bits.
const DEAD: u32 = 1 << 31;

/// Time since the store was opened, in steps of 100 ms: six years fit. Chunks that were dead when the
/// process before ended cleanly have been so since before: then the count begins at their age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tick(pub(super) u32);

impl Tick {
    /// So long ago; `None` if that was before the store was opened.
    pub(super) fn before(self, by: Duration) -> Option<Self> {
        let steps = by.as_millis().div_ceil(TICK.as_millis());
        self.0.checked_sub(u32::try_from(steps).ok()?).map(Self)
    }
}

/// Tells the time since some fixed moment; never goes back.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Where a record is. Offsets name its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub pack: u32,
    pub offset: u32,
    pub stored_len: u32,
    pub raw_len: u32,
}

/// A chunk and where it is.
pub(super) type Entry = (ChunkId, Location);

struct Slot {
    at: Location,
    mark: AtomicU32,
}

impl Slot {
    /// Dead, and since when.
    fn dead_since(&self) -> Option<Tick> {
        let mark = self.mark.load(Ordering::Relaxed);
        (mark & DEAD != 0).then_some(Tick(mark & !DEAD))
    }

    fn touch(&self, now: Tick) {
        if self.mark.load(Ordering::Relaxed) != now.0 {
            self.mark.store(now.0, Ordering::Relaxed);
        }
    }
}

/// The chunks of one pack by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PackUse {
    /// Used, or reached by a root.
    pub live: Sum,
    /// Dead, but not long enough.
    pub waiting: Sum,
    /// Dead long enough.
    pub dead: Sum,
}

/// Some chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// How many.
    pub chunks: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

impl Sum {
    pub(super) fn add(&mut self, stored_len: u32) {
        self.chunks += 1;
        self.bytes += u64::from(stored_len);
    }
}

impl std::ops::AddAssign for Sum {
    fn add_assign(&mut self, other: Self) {
        self.chunks += other.chunks;
        self.bytes += other.bytes;
    }
}

type Shard = RwLock<HashMap<ChunkId, Slot>>;

/// The map of all chunks.
pub(super) struct Index {
    shards: Vec<Shard>,
    chunks: AtomicU64,
    stored: AtomicU64,
    clock: Clock,
    start: Duration,
    /// The tick of the start.
    base: u32,
}

impl Index {
    pub(super) fn new(clock: Clock, base: u32) -> Self {
        let start = clock();
        Self {
            base,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            chunks: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            clock,
            start,
        }
    }

    fn shard(&self, id: &ChunkId) -> &Shard {
        &self.shards[usize::from(id.0[0]) % SHARDS]
    }

    /// Now.
    pub(super) fn now(&self) -> Tick {
        let passed = (self.clock)().saturating_sub(self.start);
        let steps = passed.as_millis() / TICK.as_millis();
        // At the end of time everything counts as used just now, and nothing is ever removed.
        let steps = u32::try_from(steps).unwrap_or(DEAD);
        Tick(self.base.saturating_add(steps).min(DEAD - 1))
    }

    /// Every dead chunk, and for how long it has been dead, in ticks.
    pub(super) fn ages(&self) -> Vec<(ChunkId, u32)> {
        let now = self.now();
        let mut ages = Vec::new();
        for shard in &self.shards {
            let shard = shard.read();
            let dead = shard.iter().filter_map(|(id, slot)| {
                let since = slot.dead_since()?;
                Some((*id, now.0.saturating_sub(since.0)))
            });
            ages.extend(dead);
        }
        ages
    }

    /// These have been dead for so long already. Only before anybody uses the store.
    pub(super) fn age(&self, ages: &[(ChunkId, u32)]) {
        let now = self.now();
        for (id, age) in ages {
            if let Some(slot) = self.shard(id).read().get(id) {
                let since = now.0.saturating_sub(*age);
                slot.mark.store(since | DEAD, Ordering::Relaxed);
            }
        }
    }

    /// Where it is; only for those who do not tell anybody that it is held.
    pub(super) fn peek(&self, id: &ChunkId) -> Option<Location> {
        self.shard(id).read().get(id).map(|slot| slot.at)
    }

    /// Where it is, if it is held: it counts as used now.
    pub(super) fn touch(&self, id: &ChunkId) -> Option<Location> {
        let now = self.now();
        let shard = self.shard(id).read();
        let slot = shard.get(id)?;
        slot.touch(now);
        Some(slot.at)
    }

    /// Later entries win: a chunk that was found bad and put again lies in a later pack.
    pub(super) fn insert(&self, entries: &[Entry]) {
        let now = self.now();
        for (id, at) in entries {
            let slot = Slot {
                at: *at,
                mark: AtomicU32::new(now.0),
            };
            let old = self.shard(id).write().insert(*id, slot);
            self.count(at);
            if let Some(old) = old {
                self.uncount(&old.at);
            }
        }
    }

    /// What others wrote: where a chunk lies already, the place that `better(new pack, old pack)` says
    /// is named from now on; that is no use of it.
    pub(super) fn insert_better(&self, entries: &[Entry], better: impl Fn(u32, u32) -> bool) {
        let now = self.now();
        for (id, at) in entries {
            let mut shard = self.shard(id).write();
            match shard.get_mut(id) {
                Some(slot) if better(at.pack, slot.at.pack) => {
                    self.uncount(&slot.at);
                    slot.at = *at;
                }
                Some(_) => continue,
                None => {
                    let mark = AtomicU32::new(now.0);
                    shard.insert(*id, Slot { at: *at, mark });
                }
            }
            self.count(at);
        }
    }

    fn count(&self, at: &Location) {
        self.chunks.fetch_add(1, Ordering::Relaxed);
        self.stored
            .fetch_add(u64::from(at.stored_len), Ordering::Relaxed);
    }

    fn uncount(&self, at: &Location) {
        self.chunks.fetch_sub(1, Ordering::Relaxed);
        self.stored
            .fetch_sub(u64::from(at.stored_len), Ordering::Relaxed);
    }

    /// The same chunk lies elsewhere now; it is not used by that. Only if it was still at `from`.
    pub(super) fn relocate(&self, id: &ChunkId, from: &Location, to: Location) -> bool {
        let mut shard = self.shard(id).write();
        match shard.get_mut(id) {
            Some(slot) if slot.at == *from => {
                slot.at = to;
                true
            }
            _ => false,
        }
    }

    /// It is not held any more; only if it was still at `at`.
    pub(super) fn remove(&self, id: &ChunkId, at: &Location) -> bool {
        self.remove_if(id, |slot| slot.at == *at)
    }

    /// The same, if it has been dead since `cutoff` or longer.
    pub(super) fn drop_dead(&self, id: &ChunkId, at: &Location, cutoff: Tick) -> bool {
        self.remove_if(id, |slot| {
            slot.at == *at && slot.dead_since().is_some_and(|since| since <= cutoff)
        })
    }

    fn remove_if(&self, id: &ChunkId, condition: impl Fn(&Slot) -> bool) -> bool {
        let mut shard = self.shard(id).write();
        let Some(slot) = shard.get(id) else {
            return false;
        };
        if !condition(slot) {
            return false;
        }
        self.uncount(&slot.at);
        shard.remove(id);
        true
    }

    /// What was not used since `begun` is dead from now on, if it was not already.
    pub(super) fn condemn(&self, begun: Tick) {
        for shard in &self.shards {
            let shard = shard.read();
            let now = self.now().0;
            for slot in shard.values() {
                let mark = slot.mark.load(Ordering::Relaxed);
                if mark & DEAD == 0 && mark < begun.0 {
                    // A touch between the two steps wins.
                    let _ = slot.mark.compare_exchange(
                        mark,
                        now | DEAD,
                        Ordering::Relaxed,
                        Ordering::Relaxed,
                    );
                }
            }
        }
    }

    /// Every pack's chunks by their state; `None`: nothing has been dead for long enough.
    pub(super) fn survey(&self, cutoff: Option<Tick>) -> HashMap<u32, PackUse> {
        let mut packs: HashMap<u32, PackUse> = HashMap::new();
        for shard in &self.shards {
            for slot in shard.read().values() {
                let pack = packs.entry(slot.at.pack).or_default();
                let sum = match slot.dead_since() {
                    None => &mut pack.live,
                    Some(since) if cutoff.is_some_and(|c| since <= c) => &mut pack.dead,
                    Some(_) => &mut pack.waiting,
                };
                sum.add(slot.at.stored_len);
            }
        }
        packs
    }

    /// All that lies in one pack; looks at everything.
    pub(super) fn in_pack(&self, number: u32) -> Vec<Entry> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.read();
            let here = shard.iter().filter(|(_, slot)| slot.at.pack == number);
            found.extend(here.map(|(id, slot)| (*id, slot.at)));
        }
        found
    }

    pub(super) fn held(&self) -> Sum {
        Sum {
            chunks: self.chunks.load(Ordering::Relaxed),
            bytes: self.stored.load(Ordering::Relaxed),
        }
    }
}

/// Write the index file of a sealed pack; whole or not at all.
pub(super) fn save(disk: &dyn Disk, path: &Path, pack_len: u64, entries: &[Entry]) -> Result<()> {
    let out = encode(pack_len, entries);
    replace_file(disk, path, &path.with_extension("idx.tmp"), &out)
}

/// The form of an index file.
pub(super) fn encode(pack_len: u64, entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD + entries.len() * ENTRY + 4);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&pack_len.to_le_bytes());
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    for (id, at) in entries {
        out.extend_from_slice(&id.0);
        for word in [at.offset, at.stored_len, at.raw_len] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// Read it back; `None` if it is missing, damaged or about another pack.
pub(super) fn load(path: &Path, pack: u32, pack_len: u64) -> Option<Vec<Entry>> {
    let (len, entries) = parse(&std::fs::read(path).ok()?, pack)?;
    (len == pack_len).then_some(entries)
}

/// The length that the pack had, and what it holds; `None`: damaged.
pub(super) fn parse(bytes: &[u8], pack: u32) -> Option<(u64, Vec<Entry>)> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) || body.len() < HEAD {
        return None;
    }
    let (head, rows) = body.split_at(HEAD);
    let pack_len = u64::from_le_bytes(head[8..16].try_into().ok()?);
    let count = u64::from_le_bytes(head[16..24].try_into().ok()?);
    let good = head[..4] == MAGIC
        && head[4..8] == VERSION.to_le_bytes()
        && rows.len() % ENTRY == 0
        && (rows.len() / ENTRY) as u64 == count;
    if !good {
        return None;
    }
    let entries = rows
        .chunks_exact(ENTRY)
        .map(|row| {
            let word = |at: usize| Some(u32::from_le_bytes(row[at..at + 4].try_into().ok()?));
            let id = ChunkId(row[..32].try_into().ok()?);
            let (offset, stored_len, raw_len) = (word(32)?, word(36)?, word(40)?);
            Some((
                id,
                Location {
                    pack,
                    offset,
                    stored_len,
                    raw_len,
                },
            ))
        })
        .collect::<Option<_>>()?;
    Some((pack_len, entries))
}

/// Make a created, renamed or removed file's name durable.
pub(super) fn sync_dir(disk: &dyn Disk, dir: &Path) -> Result<()> {
    disk.sync_dir(dir).map_err(io("fsync", dir))
}
