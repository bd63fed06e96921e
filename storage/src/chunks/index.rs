//! Where each chunk is: in memory for all packs, and as a file beside each sealed pack.
//! An index file is a shortcut only: the packs alone can always tell.
//!
//! ```text
//! "MSCI" version u32 | pack length u64 | count u64 | count x (id, offset u32, stored u32, raw u32) | CRC-32
//! ```

use super::{ChunkId, ChunkStats, io};
use crate::Result;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

const MAGIC: [u8; 4] = *b"MSCI";
const VERSION: u32 = 1;
const HEAD: usize = 24;
const ENTRY: usize = 44;

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

/// The map of all chunks.
#[derive(Default)]
pub(super) struct Index {
    map: RwLock<(HashMap<ChunkId, Location>, u64)>,
}

impl Index {
    pub(super) fn get(&self, id: &ChunkId) -> Option<Location> {
        self.map.read().0.get(id).copied()
    }

    /// Several at once; absent ones are left out.
    pub(super) fn locate(&self, ids: &[ChunkId]) -> Vec<Entry> {
        let map = self.map.read();
        ids.iter()
            .filter_map(|id| Some((*id, *map.0.get(id)?)))
            .collect()
    }

    /// Later entries win: a chunk that was found bad and put again lies in a later pack.
    pub(super) fn insert(&self, entries: &[Entry]) {
        let mut map = self.map.write();
        for (id, location) in entries {
            map.1 += u64::from(location.stored_len);
            if let Some(old) = map.0.insert(*id, *location) {
                map.1 -= u64::from(old.stored_len);
            }
        }
    }

    pub(super) fn remove(&self, id: &ChunkId) {
        let mut map = self.map.write();
        if let Some(old) = map.0.remove(id) {
            map.1 -= u64::from(old.stored_len);
        }
    }

    pub(super) fn stats(&self) -> ChunkStats {
        let map = self.map.read();
        ChunkStats {
            chunks: map.0.len() as u64,
            stored_bytes: map.1,
        }
    }
}

/// Write the index file of a sealed pack; whole or not at all.
pub(super) fn save(path: &Path, pack_len: u64, entries: &[Entry]) -> Result<()> {
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

    let scratch = path.with_extension("idx.tmp");
    let mut file = File::create(&scratch).map_err(io("create", &scratch))?;
    file.write_all(&out).map_err(io("write", &scratch))?;
    file.sync_all().map_err(io("fsync", &scratch))?;
    std::fs::rename(&scratch, path).map_err(io("rename", &scratch))?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Read it back; `None` if it is missing, damaged or about another pack.
pub(super) fn load(path: &Path, pack: u32, pack_len: u64) -> Option<Vec<Entry>> {
    let bytes = std::fs::read(path).ok()?;
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) || body.len() < HEAD {
        return None;
    }
    let (head, rows) = body.split_at(HEAD);
    let count = u64::from_le_bytes(head[16..24].try_into().ok()?);
    let good = head[..4] == MAGIC
        && head[4..8] == VERSION.to_le_bytes()
        && head[8..16] == pack_len.to_le_bytes()
        && rows.len() % ENTRY == 0
        && (rows.len() / ENTRY) as u64 == count;
    if !good {
        return None;
    }
    rows.chunks_exact(ENTRY)
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
        .collect()
}

/// Make a created or renamed file findable after a crash.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io("fsync", dir))
}
