//! Names of uploaded blobs: which chunk describes the bytes that a scope knows by a SHA-256. One small
//! file a name, durable before it is told; all of them in memory. Refuses to know what the bytes mean.
//!
//! A name is a promise for a while, not for good: its owner lets those expire that nobody renewed.
//!
//! ```text
//! "MSTBLOB\0"  version u32 (1)  size u64  seen_ms u64  chunk (32 bytes)  name (32 bytes)  scope
//! crc32 of everything before
//! ```

use crate::Result;
use crate::chunks::ChunkId;
use crate::disk::{Disk, RealDisk, create_dir_durable, file_names, io_error, replace_file};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"MSTBLOB\0";
const VERSION: u32 = 1;
/// Everything but the scope.
const FIXED_LEN: usize = 8 + 4 + 8 + 8 + 32 + 32 + 4;
/// Bytes of a scope.
pub const SCOPE_LEN_MAX: usize = 1024;

/// SHA-256 of the blob.
pub type BlobName = [u8; 32];

/// What is known of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobEntry {
    /// Its length.
    pub size: u64,
    /// The chunk that describes it.
    pub chunk: ChunkId,
    /// When it was last asked to stay, in ms since the Unix epoch.
    pub seen_ms: u64,
}

/// A name within a scope.
type Key = (String, BlobName);

/// The names. Cheap to clone; changes block.
#[derive(Clone, Debug)]
pub struct BlobNames {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    map: RwLock<BTreeMap<Key, BlobEntry>>,
    /// Held while files change, so that file and memory agree.
    changing: Mutex<()>,
}

impl BlobNames {
    /// Open or create. A file that is not whole is removed: its client was not answered, or uploads again.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_on(dir, Arc::new(RealDisk))
    }

    /// On another disk.
    pub fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        create_dir_durable(disk.as_ref(), dir)?;
        let mut map = BTreeMap::new();
        for name in file_names(dir)? {
            let path = dir.join(&name);
            let bytes = std::fs::read(&path).map_err(io_error("read", &path))?;
            match decode(&bytes) {
                Some((key, entry)) if file_name(&key) == name => {
                    map.insert(key, entry);
                }
                _ => {
                    tracing::warn!(file = %path.display(), "removed the name of an upload that is not whole");
                    disk.remove(&path).map_err(io_error("remove", &path))?;
                }
            }
        }
        let inner = Inner {
            dir: dir.to_owned(),
            disk,
            map: RwLock::new(map),
            changing: Mutex::new(()),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// What this scope knows by this name.
    pub fn get(&self, scope: &str, name: &BlobName) -> Option<BlobEntry> {
        let key = (scope.to_owned(), *name);
        self.inner.map.read().get(&key).copied()
    }

    /// The first name of a scope.
    pub fn first_in(&self, scope: &str) -> Option<(BlobName, BlobEntry)> {
        let map = self.inner.map.read();
        let ((found, name), entry) = map.range((scope.to_owned(), [0; 32])..).next()?;
        (found == scope).then_some((*name, *entry))
    }

    /// All of them, with their scopes.
    pub fn all(&self) -> Vec<(String, BlobName, BlobEntry)> {
        let map = self.inner.map.read();
        map.iter()
            .map(|((scope, name), entry)| (scope.clone(), *name, *entry))
            .collect()
    }

    /// Set a name; durable on return.
    pub fn put(&self, scope: &str, name: BlobName, entry: BlobEntry) -> Result<()> {
        if scope.len() > SCOPE_LEN_MAX {
            return Err(crate::StorageError::Misuse("the scope is too long".into()));
        }
        let key = (scope.to_owned(), name);
        let path = self.inner.dir.join(file_name(&key));
        let _one = self.inner.changing.lock();
        let temp = path.with_extension("tmp");
        replace_file(
            self.inner.disk.as_ref(),
            &path,
            &temp,
            &encode(&key, &entry),
        )?;
        self.inner.map.write().insert(key, entry);
        Ok(())
    }

    /// Forget a name; `false` if there was none. It may be back after a power cut.
    pub fn remove(&self, scope: &str, name: &BlobName) -> Result<bool> {
        let key = (scope.to_owned(), *name);
        let _one = self.inner.changing.lock();
        self.remove_key(&key)
    }

    /// Forget those not seen since `before_ms`; how many.
    pub fn expire(&self, before_ms: u64) -> Result<usize> {
        let _one = self.inner.changing.lock();
        let old: Vec<Key> = {
            let map = self.inner.map.read();
            let old = map.iter().filter(|(_, entry)| entry.seen_ms < before_ms);
            old.map(|(key, _)| key.clone()).collect()
        };
        for key in &old {
            self.remove_key(key)?;
        }
        Ok(old.len())
    }

    fn remove_key(&self, key: &Key) -> Result<bool> {
        if !self.inner.map.read().contains_key(key) {
            return Ok(false);
        }
        let path = self.inner.dir.join(file_name(key));
        match self.inner.disk.remove(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error("remove", &path)(e));
            }
            _ => {}
        }
        self.inner.map.write().remove(key);
        Ok(true)
    }
}

/// The scope may be any text, so its hash stands in the file's name.
fn file_name((scope, name): &Key) -> String {
    let scope = blake3::hash(scope.as_bytes());
    format!("{}-{}", hex::encode(name), &scope.to_hex()[..32])
}

fn encode((scope, name): &Key, entry: &BlobEntry) -> Vec<u8> {
    let mut out = Vec::with_capacity(FIXED_LEN + scope.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&entry.size.to_le_bytes());
    out.extend_from_slice(&entry.seen_ms.to_le_bytes());
    out.extend_from_slice(&entry.chunk.0);
    out.extend_from_slice(name);
    out.extend_from_slice(scope.as_bytes());
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

fn decode(bytes: &[u8]) -> Option<(Key, BlobEntry)> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (magic, rest) = body.split_first_chunk::<8>()?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    if magic != MAGIC || u32::from_le_bytes(*version) != VERSION {
        return None;
    }
    let (size, rest) = rest.split_first_chunk::<8>()?;
    let (seen, rest) = rest.split_first_chunk::<8>()?;
    let (chunk, rest) = rest.split_first_chunk::<32>()?;
    let (name, scope) = rest.split_first_chunk::<32>()?;
    let entry = BlobEntry {
        size: u64::from_le_bytes(*size),
        seen_ms: u64::from_le_bytes(*seen),
        chunk: ChunkId(*chunk),
    };
    Some(((String::from_utf8(scope.to_vec()).ok()?, *name), entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seed: u8) -> BlobEntry {
        BlobEntry {
            size: u64::from(seed) << 33,
            chunk: ChunkId([seed; 32]),
            seen_ms: 1000 + u64::from(seed),
        }
    }

    #[test]
    fn names_outlive_the_process_and_belong_to_their_scope() {
        let dir = tempfile::tempdir().unwrap();
        let names = BlobNames::open(dir.path()).unwrap();
        names.put("a/b", [1; 32], entry(1)).unwrap();
        names.put("a", [1; 32], entry(2)).unwrap();
        names.put("a", [2; 32], entry(3)).unwrap();
        names.put("a", [2; 32], entry(4)).unwrap();
        assert!(names.remove("a/b", &[1; 32]).unwrap());
        assert!(!names.remove("a/b", &[1; 32]).unwrap());
        assert!(names.put(&"x".repeat(2000), [1; 32], entry(1)).is_err());
        let again = BlobNames::open(dir.path()).unwrap();
        assert_eq!(again.all(), names.all());
        assert_eq!(again.get("a", &[2; 32]), Some(entry(4)));
        assert_eq!(again.get("a/b", &[1; 32]), None);
        assert_eq!(again.first_in("a"), Some(([1; 32], entry(2))));
        assert_eq!(again.first_in("b"), None);
        assert_eq!(again.expire(1003).unwrap(), 1);
        assert_eq!(again.get("a", &[1; 32]), None);
        assert_eq!(BlobNames::open(dir.path()).unwrap().all().len(), 1);
    }

    /// Cut anywhere, or with any byte changed: not there, and out of the way.
    #[test]
    fn a_file_that_is_not_whole_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let names = BlobNames::open(dir.path()).unwrap();
        names.put("scope", [7; 32], entry(7)).unwrap();
        let file = dir.path().join(file_name(&("scope".to_owned(), [7; 32])));
        let whole = std::fs::read(&file).unwrap();
        for at in 0..whole.len() {
            let mut bent = whole.clone();
            bent[at] ^= 0x10;
            for bytes in [&whole[..at], &bent] {
                std::fs::write(&file, bytes).unwrap();
                let names = BlobNames::open(dir.path()).unwrap();
                assert_eq!(names.all(), [], "{at}");
                assert!(!file.exists());
            }
        }
        // Under another's name, and an unfinished one.
        std::fs::write(dir.path().join("other"), &whole).unwrap();
        std::fs::write(file.with_extension("tmp"), &whole).unwrap();
        assert_eq!(BlobNames::open(dir.path()).unwrap().all(), []);
        assert_eq!(file_names(dir.path()).unwrap(), [""; 0]);
    }
}
