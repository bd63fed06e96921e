//! Names of uploaded blobs: which chunk describes the bytes that a scope knows by a SHA-256. One small
//! file a name, durable before it is told; all of them in memory. Refuses to know what the bytes mean.
//!
//! A name is a promise for a while, not for good: its owner lets those expire that nobody renewed. A file
//! that cannot be read may hold such a promise, so none is thrown away: one of a later version stays as it
//! is, for the release that knows it; one with a single wrong bit is mended; any other is set aside as
//! `NAME.damaged`. Only `NAME.tmp`, of which nobody was told, is removed.
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
/// What an unfinished file's name ends with.
const UNFINISHED: &str = ".tmp";
/// What a damaged file's name ends with.
const DAMAGED: &str = ".damaged";
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
    /// Files that are no name for this release, and why.
    aside: RwLock<BTreeMap<String, String>>,
    /// Held while files change, so that file and memory agree.
    changing: Mutex<()>,
}

impl BlobNames {
    /// Open or create.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_on(dir, Arc::new(RealDisk))
    }

    /// On another disk.
    pub fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        create_dir_durable(disk.as_ref(), dir)?;
        let names = Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                disk,
                map: RwLock::default(),
                aside: RwLock::default(),
                changing: Mutex::new(()),
            }),
        };
        for name in file_names(dir)? {
            names.load(name)?;
        }
        Ok(names)
    }

    fn load(&self, name: String) -> Result<()> {
        let (inner, path) = (&self.inner, self.inner.dir.join(&name));
        if name.ends_with(UNFINISHED) {
            return inner.disk.remove(&path).map_err(io_error("remove", &path));
        }
        if name.ends_with(DAMAGED) {
            let why = "set aside at an earlier start".to_owned();
            inner.aside.write().insert(name, why);
            return Ok(());
        }
        let bytes = std::fs::read(&path).map_err(io_error("read", &path))?;
        match read(&name, &bytes) {
            Read::Whole(key, entry) => {
                inner.map.write().insert(key, entry);
            }
            Read::Mended(key, entry) => {
                tracing::warn!(file = %path.display(), "one bit of an upload's name was wrong and is put right");
                // What it says is known now; the file may as well be mended at the next start.
                if let Err(error) = inner.write(&key, &entry) {
                    tracing::warn!(%error, "could not write it");
                }
                inner.map.write().insert(key, entry);
            }
            Read::Later(version) => {
                let why = format!("of format {version}, which a later release wrote");
                tracing::error!(file = %path.display(), why, "an upload's name is left alone and not served: start the release that wrote it, or push the blob again");
                inner.aside.write().insert(name, why);
            }
            Read::Damaged => {
                let other = format!("{name}{DAMAGED}");
                tracing::error!(file = %path.display(), "the name of an upload is damaged and set aside as {other}: its blob must be pushed again");
                let moved = inner.disk.rename(&path, &inner.dir.join(&other));
                let moved = moved.and_then(|()| inner.disk.sync_dir(&inner.dir));
                if let Err(error) = moved {
                    tracing::warn!(%error, "could not set it aside");
                }
                inner.aside.write().insert(other, "damaged".to_owned());
            }
        }
        Ok(())
    }

    /// Files that are no name for this release, and why.
    pub fn aside(&self) -> Vec<(String, String)> {
        let aside = self.inner.aside.read();
        aside.iter().map(|(n, w)| (n.clone(), w.clone())).collect()
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
        let _one = self.inner.changing.lock();
        self.inner.write(&key, &entry)?;
        // What a later release said of it is replaced.
        self.inner.aside.write().remove(&file_name(&key));
        self.inner.map.write().insert(key, entry);
        Ok(())
    }

    /// It was asked for at `seen_ms`; durable on return. `false` if it is not there (any more): a name that
    /// was removed meanwhile does not come back.
    pub fn renew(&self, scope: &str, name: &BlobName, seen_ms: u64) -> Result<bool> {
        let key = (scope.to_owned(), *name);
        let _one = self.inner.changing.lock();
        let Some(entry) = self.inner.map.read().get(&key).copied() else {
            return Ok(false);
        };
        let entry = BlobEntry { seen_ms, ..entry };
        self.inner.write(&key, &entry)?;
        self.inner.map.write().insert(key, entry);
        Ok(true)
    }

    /// Forget a name, for good once this returns; `false` if there was none. A file of a later release
    /// under this name goes as well: whoever asks means the blob, not its format.
    pub fn remove(&self, scope: &str, name: &BlobName) -> Result<bool> {
        let key = (scope.to_owned(), *name);
        let _one = self.inner.changing.lock();
        let file = file_name(&key);
        let there = self.inner.aside.read().contains_key(&file);
        if there {
            let path = self.inner.dir.join(&file);
            let removed = self.inner.disk.remove(&path);
            removed.map_err(io_error("remove", &path))?;
            self.inner.aside.write().remove(&file);
        }
        let removed = there | self.remove_key(&key)?;
        if removed {
            let dir = &self.inner.dir;
            let synced = self.inner.disk.sync_dir(dir);
            synced.map_err(io_error("sync directory", dir))?;
        }
        Ok(removed)
    }

    /// Forget those not seen since `before_ms`; how many. They may be back after a power cut.
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

impl Inner {
    /// Durable on return.
    fn write(&self, key: &Key, entry: &BlobEntry) -> Result<()> {
        let path = self.dir.join(file_name(key));
        let temp = self.dir.join(format!("{}{UNFINISHED}", file_name(key)));
        replace_file(self.disk.as_ref(), &path, &temp, &encode(key, entry))
    }
}

/// What a file says.
enum Read {
    Whole(Key, BlobEntry),
    Mended(Key, BlobEntry),
    /// Of this version.
    Later(u32),
    Damaged,
}

fn read(name: &str, bytes: &[u8]) -> Read {
    let fits = |bytes: &[u8]| decode(bytes).filter(|(key, _)| file_name(key) == name);
    if let Some((key, entry)) = fits(bytes) {
        return Read::Whole(key, entry);
    }
    // The checksum finds one wrong bit by trying all; the blob itself is verified wherever it is read.
    if bytes.len() <= FIXED_LEN + SCOPE_LEN_MAX {
        let mut bent = bytes.to_vec();
        for bit in 0..bytes.len() * 8 {
            let (at, mask) = (bit / 8, 1 << (bit % 8));
            bent[at] ^= mask;
            if let Some((key, entry)) = fits(&bent) {
                return Read::Mended(key, entry);
            }
            bent[at] ^= mask;
        }
    }
    let version = bytes.strip_prefix(MAGIC).and_then(<[u8]>::first_chunk::<4>);
    match version.map(|v| u32::from_le_bytes(*v)) {
        Some(version) if version > VERSION => Read::Later(version),
        _ => Read::Damaged,
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

    const KEY: [u8; 32] = [7; 32];

    /// A directory with one name, its file, and the file's bytes.
    fn one() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let names = BlobNames::open(dir.path()).unwrap();
        names.put("scope", KEY, entry(7)).unwrap();
        let file = dir.path().join(file_name(&("scope".to_owned(), KEY)));
        let whole = std::fs::read(&file).unwrap();
        (dir, file, whole)
    }

    fn damaged(file: &Path) -> PathBuf {
        PathBuf::from(format!("{}{DAMAGED}", file.display()))
    }

    #[test]
    fn one_wrong_bit_is_put_right() {
        let (dir, file, whole) = one();
        for bit in (0..whole.len() * 8).step_by(5) {
            let mut bent = whole.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&file, &bent).unwrap();
            let names = BlobNames::open(dir.path()).unwrap();
            let wanted = [("scope".to_owned(), KEY, entry(7))];
            assert_eq!(names.all(), wanted, "bit {bit}");
            assert_eq!(std::fs::read(&file).unwrap(), whole, "bit {bit}");
            assert_eq!(names.aside(), []);
        }
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_nothing_of_it_is_lost() {
        let (dir, file, whole) = one();
        let mut scrambled = whole.clone();
        scrambled[30..40].fill(0xa5);
        let cuts = (0..whole.len()).map(|at| whole[..at].to_vec());
        for bytes in cuts.chain([scrambled]) {
            std::fs::write(&file, &bytes).unwrap();
            for _ in 0..2 {
                let names = BlobNames::open(dir.path()).unwrap();
                assert_eq!(names.all(), []);
                assert_eq!(names.aside().len(), 1);
                assert!(!file.exists());
                assert_eq!(std::fs::read(damaged(&file)).unwrap(), bytes);
            }
        }
        let names = BlobNames::open(dir.path()).unwrap();
        names.put("scope", KEY, entry(8)).unwrap();
        let again = BlobNames::open(dir.path()).unwrap();
        assert_eq!(again.get("scope", &KEY), Some(entry(8)));
        // Under another's name; and an unfinished one, which was told to nobody.
        std::fs::write(dir.path().join("other"), &whole).unwrap();
        std::fs::write(format!("{}{UNFINISHED}", file.display()), &whole).unwrap();
        let names = BlobNames::open(dir.path()).unwrap();
        assert_eq!(names.all().len(), 1);
        assert_eq!(names.aside()[1].0, "other.damaged");
        assert_eq!(file_names(dir.path()).unwrap().len(), 3);
    }

    /// A release that went back and comes again finds what it had said.
    #[test]
    fn a_file_of_a_later_release_is_left_alone_and_not_served() {
        let (dir, file, whole) = one();
        let later = |with_sum: bool| {
            let mut bytes = whole[..whole.len() - 4].to_vec();
            bytes[8..12].copy_from_slice(&2_u32.to_le_bytes());
            bytes.extend_from_slice(b"something new");
            let crc = crc32fast::hash(&bytes);
            if with_sum {
                bytes.extend_from_slice(&crc.to_le_bytes());
            }
            bytes
        };
        for with_sum in [true, false] {
            std::fs::write(&file, later(with_sum)).unwrap();
            for _ in 0..2 {
                let names = BlobNames::open(dir.path()).unwrap();
                assert_eq!(names.all(), []);
                assert!(names.aside()[0].1.contains("format 2"));
                assert_eq!(names.expire(u64::MAX).unwrap(), 0);
                assert_eq!(std::fs::read(&file).unwrap(), later(with_sum));
            }
        }
        // What a client does counts: a delete is one, and so is an upload.
        let names = BlobNames::open(dir.path()).unwrap();
        assert!(names.remove("scope", &KEY).unwrap());
        assert!(!file.exists() && names.aside().is_empty());
        std::fs::write(&file, later(true)).unwrap();
        let names = BlobNames::open(dir.path()).unwrap();
        names.put("scope", KEY, entry(9)).unwrap();
        assert_eq!(names.aside(), []);
        let again = BlobNames::open(dir.path()).unwrap();
        assert_eq!(again.get("scope", &KEY), Some(entry(9)));
    }

    #[test]
    fn a_name_that_was_removed_is_not_renewed() {
        let (dir, _, _) = one();
        let names = BlobNames::open(dir.path()).unwrap();
        assert!(names.renew("scope", &KEY, 5000).unwrap());
        let again = BlobNames::open(dir.path()).unwrap();
        assert_eq!(again.get("scope", &KEY).unwrap().seen_ms, 5000);
        assert!(names.remove("scope", &KEY).unwrap());
        assert!(!names.renew("scope", &KEY, 6000).unwrap());
        assert_eq!(BlobNames::open(dir.path()).unwrap().all(), []);
    }
}
