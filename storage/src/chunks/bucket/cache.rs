//! Blocks of packs that were read or written lately, as files of bounded total size. Nothing in it is
//! needed: what is torn or lost is read from the bucket again.

use super::PackName;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Bytes of a block: read and kept as a whole.
pub(super) const BLOCK: u64 = 1 << 20;
/// A CRC-32 stands before a block's bytes.
const CRC: usize = 4;

/// A block of a pack.
type Key = (PackName, u32);

/// Recently used blocks.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    bytes_max: u64,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    next: u64,
    bytes: u64,
    blocks: HashMap<Key, (u64, u64)>,
    /// The longest unused first.
    by_use: BTreeMap<u64, Key>,
}

impl Known {
    fn note(&mut self, key: Key, len: u64) {
        self.forget(&key);
        self.next += 1;
        self.bytes += len;
        self.blocks.insert(key, (self.next, len));
        self.by_use.insert(self.next, key);
    }

    fn forget(&mut self, key: &Key) {
        if let Some((turn, len)) = self.blocks.remove(key) {
            self.by_use.remove(&turn);
            self.bytes -= len;
        }
    }
}

impl Cache {
    /// Whatever an earlier life left there is used on, up to the limit.
    pub(super) fn open(dir: &Path, bytes_max: u64) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut known = Known::default();
        for file in std::fs::read_dir(dir)? {
            let file = file?;
            match file.file_name().to_str().and_then(parse) {
                Some(key) => known.note(key, file.metadata()?.len()),
                None => std::fs::remove_file(file.path())?,
            }
        }
        let cache = Self {
            dir: dir.to_owned(),
            bytes_max,
            known: Mutex::new(known),
        };
        cache.shrink();
        Ok(cache)
    }

    fn path(&self, (name, block): &Key) -> PathBuf {
        self.dir.join(format!("{name}-{block:08x}"))
    }

    /// The bytes of a block.
    pub(super) fn get(&self, key: Key) -> Option<Bytes> {
        let len = self.known.lock().blocks.get(&key)?.1;
        let read = std::fs::read(self.path(&key)).ok();
        let good = read.and_then(|bytes| {
            let (crc, data) = bytes.split_first_chunk::<CRC>()?;
            (crc32fast::hash(data) == u32::from_le_bytes(*crc))
                .then(|| Bytes::from(bytes).slice(CRC..))
        });
        let mut known = self.known.lock();
        match &good {
            Some(_) => known.note(key, len),
            None => known.forget(&key),
        }
        good
    }

    /// Keep it; on a full disk nothing is kept.
    pub(super) fn put(&self, key: Key, data: &[u8]) {
        let len = (data.len() + CRC) as u64;
        if len > self.bytes_max {
            return;
        }
        let mut bytes = Vec::with_capacity(data.len() + CRC);
        bytes.extend_from_slice(&crc32fast::hash(data).to_le_bytes());
        bytes.extend_from_slice(data);
        if let Err(error) = std::fs::write(self.path(&key), bytes) {
            tracing::debug!(%error, "a block could not be kept");
            let _ = std::fs::remove_file(self.path(&key));
            self.known.lock().forget(&key);
            return;
        }
        self.known.lock().note(key, len);
        self.shrink();
    }

    /// Not these.
    pub(super) fn forget(&self, keys: impl Iterator<Item = Key>) {
        for key in keys {
            self.known.lock().forget(&key);
            let _ = std::fs::remove_file(self.path(&key));
        }
    }

    fn shrink(&self) {
        loop {
            let mut known = self.known.lock();
            if known.bytes <= self.bytes_max {
                return;
            }
            let Some(key) = known.by_use.first_key_value().map(|(_, key)| *key) else {
                return;
            };
            known.forget(&key);
            drop(known);
            let _ = std::fs::remove_file(self.path(&key));
        }
    }
}

fn parse(file: &str) -> Option<Key> {
    let (name, block) = file.rsplit_once('-')?;
    Some((PackName::parse(name)?, u32::from_str_radix(block, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_first_and_torn_blocks_are_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let name = PackName { seq: 7, writer: 1 };
        let cache = Cache::open(dir.path(), 3 * 104).unwrap();
        for block in 0..3 {
            cache.put((name, block), &[block as u8; 100]);
        }
        assert_eq!(cache.get((name, 0)).unwrap(), [0; 100][..]);
        cache.put((name, 3), &[3; 100]);
        assert!(cache.get((name, 1)).is_none(), "it was used longest ago");
        assert!(cache.get((name, 0)).is_some());
        cache.put((name, 4), &[4; 1000]);
        assert!(
            cache.get((name, 4)).is_none(),
            "longer than all there may be"
        );
        std::fs::write(cache.path(&(name, 2)), [1; 60]).unwrap();
        drop(cache);
        let cache = Cache::open(dir.path(), 3 * 104).unwrap();
        assert!(cache.get((name, 2)).is_none());
        assert_eq!(cache.get((name, 3)).unwrap(), [3; 100][..]);
        assert!(std::fs::read_dir(dir.path()).unwrap().count() <= 3);
    }
}
