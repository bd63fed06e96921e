//! How long dead chunks have been dead, from a clean end of the store to its next opening: so that the
//! collector's grace does not begin anew with every upgrade. The time between the two does not count.
//!
//! ```text
//! "MSCD" version u32 | count u64 | count x (id, age u32 in steps of 100 ms) | CRC-32
//! ```
//!
//! The file is true only while nobody uses the store: it is written when the last user has gone, and
//! removed, durably, before the first one comes. After a crash there is none, and everything counts
//! as used just now.

use super::{ChunkId, io};
use crate::Result;
use crate::disk::{Disk, replace_file};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 4] = *b"MSCD";
const VERSION: u32 = 1;
const HEAD: usize = 16;
const ROW: usize = 36;
/// Longer ages are of no use to any grace: one year.
const AGE_MAX: u32 = 365 * 24 * 3600 * 10;

fn path(dir: &Path) -> PathBuf {
    dir.join("dead")
}

/// Write them; whole or not at all.
pub(super) fn save(disk: &dyn Disk, dir: &Path, ages: &[(ChunkId, u32)]) -> Result<()> {
    let mut out = Vec::with_capacity(HEAD + ages.len() * ROW + 4);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(ages.len() as u64).to_le_bytes());
    for (id, age) in ages {
        out.extend_from_slice(&id.0);
        out.extend_from_slice(&age.to_le_bytes());
    }
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    let path = path(dir);
    replace_file(disk, &path, &path.with_extension("tmp"), &out)
}

/// Read them and remove the file; none if it is missing or not good.
pub(super) fn take(disk: &dyn Disk, dir: &Path) -> Result<Vec<(ChunkId, u32)>> {
    let path = path(dir);
    let left = path.with_extension("tmp");
    if left.exists() {
        disk.remove(&left).map_err(io("remove", &left))?;
    }
    let Ok(bytes) = std::fs::read(&path) else {
        if path.exists() {
            disk.remove(&path).map_err(io("remove", &path))?;
            disk.sync_dir(dir).map_err(io("fsync", dir))?;
        }
        return Ok(Vec::new());
    };
    disk.remove(&path).map_err(io("remove", &path))?;
    disk.sync_dir(dir).map_err(io("fsync", dir))?;
    let ages = decode(&bytes);
    if ages.is_none() {
        tracing::warn!(path = %path.display(), "not a list of dead chunks: their grace begins anew");
    }
    Ok(ages.unwrap_or_default())
}

fn decode(bytes: &[u8]) -> Option<Vec<(ChunkId, u32)>> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) || body.len() < HEAD {
        return None;
    }
    let (head, rows) = body.split_at(HEAD);
    let count = u64::from_le_bytes(head[8..16].try_into().ok()?);
    let good = head[..4] == MAGIC
        && head[4..8] == VERSION.to_le_bytes()
        && rows.len() % ROW == 0
        && (rows.len() / ROW) as u64 == count;
    if !good {
        return None;
    }
    let row = |row: &[u8]| {
        let id = ChunkId(row[..32].try_into().ok()?);
        let age = u32::from_le_bytes(row[32..].try_into().ok()?);
        Some((id, age.min(AGE_MAX)))
    };
    rows.chunks_exact(ROW).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    #[test]
    fn a_list_is_read_once_and_a_bent_one_never() {
        let dir = tempfile::tempdir().unwrap();
        let ages = vec![(ChunkId([1; 32]), 5), (ChunkId([2; 32]), 7_000)];
        save(&RealDisk, dir.path(), &ages).unwrap();
        let good = std::fs::read(path(dir.path())).unwrap();
        assert_eq!(take(&RealDisk, dir.path()).unwrap(), ages);
        assert_eq!(take(&RealDisk, dir.path()).unwrap(), []);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), None, "byte {at}");
            assert_eq!(decode(&good[..at]), None, "cut at {at}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
