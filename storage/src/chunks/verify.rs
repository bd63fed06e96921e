//! Reads every chunk again, from the disk and not from memory, and compares it with its name. What is
//! bad is not held any more. Refuses to know when, and how fast: the caller asks for steps.

use super::index::Entry;
use super::read::end;
use super::record::HEADER_LEN;
use super::{ChunkId, ChunkStore};
use crate::Result;
use crate::disk::replace_file;
use std::collections::VecDeque;
use std::path::PathBuf;

const MAGIC: [u8; 4] = *b"MSCV";
const VERSION: u32 = 1;
const LEN: usize = 36;

/// A place in a store: a pack, and an offset in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Number of the pack.
    pub pack: u32,
    /// Everything of it before this offset was seen.
    pub offset: u32,
}

/// How far the looks at everything are; outlives the process. Times are the caller's, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rounds {
    /// Where the present one goes on; `None` between two.
    pub next: Option<Place>,
    /// When the present or the last one began; 0: there was none.
    pub begun_ms: u64,
    /// When the last whole one ended; 0: there was none.
    pub ended_ms: u64,
}

/// What one step has seen.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Chunks.
    pub chunks: u64,
    /// Their bytes on disk.
    pub bytes: u64,
    /// Those that are bad; they are not held any more.
    pub damaged: Vec<ChunkId>,
}

/// One look at everything, step by step.
#[derive(Debug)]
pub struct Verifier {
    store: ChunkStore,
    next: Place,
    /// What is left of the present pack.
    rest: VecDeque<Entry>,
}

impl ChunkStore {
    /// Look at everything from `place` on.
    pub fn verify_from(&self, place: Place) -> Verifier {
        Verifier {
            store: self.clone(),
            next: place,
            rest: VecDeque::new(),
        }
    }

    fn rounds_path(&self) -> PathBuf {
        self.dir().join("verified")
    }

    /// What was saved last; nothing if that cannot be read.
    pub fn rounds(&self) -> Rounds {
        let read = || {
            let bytes = std::fs::read(self.rounds_path()).ok()?;
            let bytes: &[u8; LEN] = bytes.as_slice().try_into().ok()?;
            let word = |at: usize| Some(u32::from_le_bytes(bytes[at..at + 4].try_into().ok()?));
            let long = |at: usize| Some(u64::from_le_bytes(bytes[at..at + 8].try_into().ok()?));
            let good = bytes[..4] == MAGIC
                && word(4)? == VERSION
                && word(32)? == crc32fast::hash(&bytes[..32]);
            let (pack, offset) = (word(8)?, word(12)?);
            good.then_some(Rounds {
                next: (pack > 0).then_some(match self.shared() {
                    // Numbers of packs in a bucket do not outlive a process.
                    true => Place::default(),
                    false => Place { pack, offset },
                }),
                begun_ms: long(16)?,
                ended_ms: long(24)?,
            })
        };
        read().unwrap_or_default()
    }

    /// Remember how far the looks are.
    pub fn save_rounds(&self, rounds: &Rounds) -> Result<()> {
        let place = rounds.next.unwrap_or_default();
        let mut out = Vec::with_capacity(LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        // Packs are counted from 1: 0 is no place.
        let pack = rounds.next.map_or(0, |place| place.pack.max(1));
        out.extend_from_slice(&pack.to_le_bytes());
        out.extend_from_slice(&place.offset.to_le_bytes());
        out.extend_from_slice(&rounds.begun_ms.to_le_bytes());
        out.extend_from_slice(&rounds.ended_ms.to_le_bytes());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        let path = self.rounds_path();
        let disk = &*self.inner.shared.disk;
        replace_file(disk, &path, &path.with_extension("tmp"), &out)
    }
}

impl Verifier {
    /// Everything before this was seen.
    pub fn place(&self) -> Place {
        self.next
    }

    /// Bytes of the packs that were seen, and of all.
    pub fn progress(&self) -> (u64, u64) {
        let packs = self.store.inner.shared.packs();
        let (seen, total) = packs.bytes_below(self.next.pack);
        (seen + u64::from(self.next.offset), total)
    }

    /// Look at about `bytes_max` bytes more; `None`: everything was seen. What was put or moved since the
    /// look began may or may not be seen by it.
    pub fn step(&mut self, bytes_max: u64) -> Result<Option<Checked>> {
        while self.rest.is_empty() {
            if !self.load()? {
                return Ok(None);
            }
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some((_, at)) = self.rest.front() {
            let len = u64::from(at.stored_len) + HEADER_LEN as u64;
            if bytes > 0 && bytes + len > bytes_max {
                break;
            }
            bytes += len;
            batch.extend(self.rest.pop_front());
        }
        let checked = self.check(batch, bytes)?;
        if self.rest.is_empty() {
            self.next = Place {
                pack: self.next.pack + 1,
                offset: 0,
            };
        }
        Ok(Some(checked))
    }

    /// Take up the next pack; `false`: there is none.
    fn load(&mut self) -> Result<bool> {
        let shared = &self.store.inner.shared;
        // What several members rely on one of them looks after.
        let mut from = self.next.pack;
        let number = loop {
            match shared.packs().next_from(from) {
                None => return Ok(false),
                Some(number) if shared.backend.rewrites(number) => break number,
                Some(number) => from = number + 1,
            }
        };
        let from = if number == self.next.pack {
            self.next.offset
        } else {
            0
        };
        let mut entries = self.store.entries(number)?;
        entries.retain(|(id, at)| at.offset >= from && shared.index.peek(id) == Some(*at));
        entries.sort_unstable_by_key(|(_, at)| at.offset);
        self.rest = entries.into();
        self.next = if self.rest.is_empty() {
            Place {
                pack: number + 1,
                offset: 0,
            }
        } else {
            Place {
                pack: number,
                offset: from,
            }
        };
        Ok(true)
    }

    fn check(&mut self, mut batch: Vec<Entry>, bytes: u64) -> Result<Checked> {
        let shared = &self.store.inner.shared;
        let mut checked = Checked {
            chunks: batch.len() as u64,
            bytes,
            damaged: Vec::new(),
        };
        let Some((_, last)) = batch.last() else {
            return Ok(checked);
        };
        self.next.offset = u32::try_from(end(last)).unwrap_or(u32::MAX);
        let seen = shared.read_stored(&mut batch)?;
        let mut bad = seen.damaged;
        let other = seen.records.iter().filter(|(r, _)| r.check().is_err());
        bad.extend(other.map(|(record, at)| (record.id, *at)));
        // Not those that were moved or removed meanwhile.
        bad.retain(|(id, at)| shared.quarantine(id, at));
        checked.damaged = bad.iter().map(|(id, _)| *id).collect();
        self.store.strike(bad);
        Ok(checked)
    }
}
