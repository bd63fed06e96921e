//! A file on this node of which some chunks are known to be right. The next tag takes from it what has not
//! changed, and other nodes get from it what they lack. Nothing leaves it that does not hash to its name.
//!
//! Beside a whole image lies `names`, so that a later run knows its chunks without hashing it:
//!
//! ```text
//! "MSNAMES1" | size of the file u64 | names, 32 bytes each | BLAKE3 of everything before, 32 bytes
//! ```

use super::image::CHUNK;
use super::{Id, WireRecord, ZERO_CHUNK, chunk_len_at};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The file with the names of an image's chunks.
pub const NAMES_FILE: &str = "names";
/// The same of the memory beside it.
pub const MEMORY_NAMES_FILE: &str = "memory.names";
const MAGIC: &[u8; 8] = b"MSNAMES1";
const HEAD: usize = 16;
/// Bytes of records, as they came, that are kept in memory: nodes that pull at once ask for what has just come.
const WARM_BYTES: usize = 64 << 20;
/// Places in the file that are looked at for one name: the same chunk may stand in thousands.
const PLACES: usize = 8;

/// What of an image is here.
#[derive(Debug)]
pub struct Holding {
    file: File,
    size: u64,
    names: Arc<Vec<Id>>,
    /// Numbers of all chunks, sorted by name.
    order: Vec<u32>,
    /// One bit a chunk: it is here.
    have: Vec<AtomicU64>,
    /// Chunks that have come: in the file, or on their way there.
    come: AtomicU64,
    warm: Mutex<Warm>,
}

/// Records that came lately, the oldest first.
#[derive(Debug, Default)]
struct Warm {
    records: HashMap<Id, WireRecord>,
    age: VecDeque<Id>,
    bytes: usize,
}

impl Holding {
    /// Of `file`, which has `size` bytes and shall consist of chunks with these names, everything but `lacking` is
    /// here.
    pub(super) fn new(file: File, size: u64, names: Arc<Vec<Id>>, lacking: &[u64]) -> Self {
        let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
        let mut order: Vec<u32> = (0..count)
            .filter(|n| names[*n as usize] != ZERO_CHUNK)
            .collect();
        order.sort_unstable_by_key(|n| names[*n as usize]);
        let have = (0..names.len().div_ceil(64)).map(|_| AtomicU64::new(u64::MAX));
        let have: Vec<_> = have.collect();
        for number in lacking {
            if let Some(word) = word(&have, *number) {
                word.fetch_and(!bit(*number), Ordering::Relaxed);
            }
        }
        let come = (names.len() as u64).saturating_sub(lacking.len() as u64);
        Self {
            file,
            size,
            names,
            order,
            have,
            come: AtomicU64::new(come),
            warm: Mutex::default(),
        }
    }

    /// A whole image in its folder, and the memory that belongs to it; an error if the image, or what is known of
    /// it, is not there or not whole.
    pub fn open(folder: &Path) -> std::io::Result<Vec<Self>> {
        let disk = Self::open_file(folder, NAMES_FILE, "disk")?;
        let memory = Self::open_file(folder, MEMORY_NAMES_FILE, "memory");
        Ok(std::iter::once(disk).chain(memory.ok()).collect())
    }

    fn open_file(folder: &Path, names: &str, file: &str) -> std::io::Result<Self> {
        let bad = |why: &str| Error::new(ErrorKind::InvalidData, why.to_owned());
        let bytes = std::fs::read(folder.join(names))?;
        let end = bytes.len().checked_sub(32).filter(|end| *end >= HEAD);
        let (body, sum) = bytes.split_at(end.ok_or_else(|| bad("cut short"))?);
        if &body[..8] != MAGIC || blake3::hash(body).as_bytes() != sum {
            return Err(bad("not the names of an image"));
        }
        let size = u64::from_le_bytes(body[8..HEAD].try_into().map_err(|_| bad("cut short"))?);
        let (names, rest) = body[HEAD..].as_chunks::<32>();
        if !rest.is_empty() || names.len() as u64 != size.div_ceil(super::CHUNK_LEN) {
            return Err(bad("names of another size"));
        }
        let file = File::open(folder.join(file))?;
        if file.metadata()?.len() != size {
            return Err(bad("the image has another size"));
        }
        Ok(Self::new(file, size, Arc::new(names.to_vec()), &[]))
    }

    /// What `names` beside the image says.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD + self.names.len() * 32 + 32);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(self.names.as_flattened());
        let sum = blake3::hash(&out);
        out.extend_from_slice(sum.as_bytes());
        out
    }

    /// Chunks that have come, holes included.
    pub fn held(&self) -> u64 {
        self.come.load(Ordering::Relaxed)
    }

    /// This chunk has been verified and written.
    pub(super) fn mark(&self, number: u64) {
        if let Some(word) = word(&self.have, number) {
            // Whoever sees the bit sees what was written before it was set.
            word.fetch_or(bit(number), Ordering::Release);
        }
    }

    /// These have come and were verified just now: others can have them before the disk has.
    pub(super) fn warm(&self, records: Vec<WireRecord>) {
        self.come.fetch_add(records.len() as u64, Ordering::Relaxed);
        let mut warm = self.warm.lock();
        for record in records {
            let (id, bytes) = (record.id, record.framed_len());
            if warm.records.insert(id, record).is_none() {
                warm.age.push_back(id);
                warm.bytes += bytes;
            }
        }
        while warm.bytes > WARM_BYTES {
            let Some(oldest) = warm.age.pop_front() else {
                return;
            };
            let gone = warm.records.remove(&oldest);
            warm.bytes -= gone.map_or(0, |r| r.framed_len());
        }
    }

    /// Nobody will ask for what came lately any more: give its memory back.
    pub fn cool(&self) {
        *self.warm.lock() = Warm::default();
    }

    /// Those of these chunks that are here, each once and verified. Blocks.
    pub fn records(&self, ids: &[Id]) -> Vec<WireRecord> {
        let mut out = Vec::with_capacity(ids.len());
        for id in ids {
            let warm = self.warm.lock().records.get(id).cloned();
            let record = warm.or_else(|| {
                let data = self.read(id)?.into();
                Some(WireRecord::raw(*id, data))
            });
            out.extend(record);
        }
        out
    }

    /// A chunk's bytes, if it is here and is what it should be. Blocks.
    pub(super) fn read(&self, id: &Id) -> Option<Vec<u8>> {
        let number = self.find(id)?;
        let len = usize::try_from(chunk_len_at(self.size, number)).ok()?;
        let mut bytes = vec![0; len.min(CHUNK)];
        self.file
            .read_exact_at(&mut bytes, number * super::CHUNK_LEN)
            .ok()?;
        if blake3::hash(&bytes).as_bytes() == id {
            return Some(bytes);
        }
        tracing::warn!(
            chunk = hex::encode(id),
            "a chunk of a cached image is damaged"
        );
        None
    }

    /// Where it stands.
    fn find(&self, id: &Id) -> Option<u64> {
        let name = |n: &u32| &self.names[*n as usize];
        let first = self.order.partition_point(|n| name(n) < id);
        let places = self.order[first..].iter().take(PLACES);
        places
            .take_while(|n| name(n) == id)
            .map(|n| u64::from(*n))
            .find(|n| {
                word(&self.have, *n).is_some_and(|w| w.load(Ordering::Acquire) & bit(*n) != 0)
            })
    }
}

fn word(have: &[AtomicU64], number: u64) -> Option<&AtomicU64> {
    have.get(usize::try_from(number / 64).ok()?)
}

fn bit(number: u64) -> u64 {
    1 << (number % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three chunks: noise, the same noise, a short one; beside them their names.
    fn image(dir: &Path) -> Vec<Id> {
        let mut bytes = vec![7; 2 * CHUNK];
        bytes.extend_from_slice(b"the end");
        std::fs::write(dir.join("disk"), &bytes).unwrap();
        bytes.chunks(CHUNK).map(super::super::name_of).collect()
    }

    fn holding(dir: &Path, lacking: &[u64]) -> (Holding, Vec<Id>) {
        let names = image(dir);
        let file = File::open(dir.join("disk")).unwrap();
        let size = 2 * CHUNK as u64 + 7;
        let holding = Holding::new(file, size, Arc::new(names.clone()), lacking);
        (holding, names)
    }

    #[test]
    fn only_what_is_here_and_right_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let (holding, names) = holding(dir.path(), &[0, 2]);
        assert_eq!(holding.held(), 1);
        let got = holding.records(&[names[0], names[2], [9; 32]]);
        assert_eq!(got.len(), 1, "the second place of the same chunk will do");
        assert_eq!(got[0].decode().unwrap(), vec![7; CHUNK]);
        holding.mark(2);
        holding.mark(2);
        assert_eq!(holding.held(), 1, "what comes is counted when it comes");
        assert_eq!(
            holding.records(&names[2..])[0].decode().unwrap(),
            b"the end"
        );
        std::fs::write(dir.path().join("disk"), vec![8; 2 * CHUNK + 7]).unwrap();
        assert!(holding.records(&names).is_empty(), "spoilt");
        holding.warm(vec![WireRecord::encode(b"the end")]);
        assert_eq!(holding.held(), 2);
        assert_eq!(
            holding.records(&names).len(),
            1,
            "but what came lately is known"
        );
        holding.cool();
        assert!(holding.records(&names).is_empty());
    }

    #[test]
    fn names_are_read_back_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (holding, names) = holding(dir.path(), &[]);
        let file = dir.path().join(NAMES_FILE);
        std::fs::write(&file, holding.to_bytes()).unwrap();
        let again = Holding::open(dir.path()).unwrap().remove(0);
        assert_eq!(again.names.as_slice(), names);
        assert_eq!(again.held(), 3);
        for at in [0, 9, 20, 111] {
            let mut bytes = holding.to_bytes();
            bytes[at] ^= 1;
            std::fs::write(&file, bytes).unwrap();
            assert!(Holding::open(dir.path()).is_err(), "byte {at}");
        }
        std::fs::write(&file, &holding.to_bytes()[..40]).unwrap();
        assert!(Holding::open(dir.path()).is_err());
        std::fs::write(&file, holding.to_bytes()).unwrap();
        std::fs::write(dir.path().join("disk"), b"short").unwrap();
        assert!(Holding::open(dir.path()).is_err());
    }

    #[test]
    fn memory_of_what_came_lately_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let (holding, _) = holding(dir.path(), &[]);
        let record = |n: u32| WireRecord::raw([0; 32], vec![0; 1 << 20].into()).renamed(n);
        holding.warm((0..70).map(record).collect());
        let warm = holding.warm.lock();
        assert!(warm.bytes <= WARM_BYTES);
        assert_eq!((warm.records.len(), warm.age.len()), (63, 63));
    }

    impl WireRecord {
        fn renamed(mut self, n: u32) -> Self {
            self.id[..4].copy_from_slice(&n.to_le_bytes());
            self
        }
    }
}
