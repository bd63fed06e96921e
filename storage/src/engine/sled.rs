//! The state store on sled: the only file that names it. Knows sled's ways of losing data, and what to do
//! about each:
//!
//! * `flush()` does not fsync on Linux: every flush is followed by `fdatasync` on a descriptor of ours.
//! * Long values go to files under `blobs/` that are never synced: no value is longer than about 3 KiB,
//!   and should a page end up there all the same, its file is synced before a checkpoint returns.
//! * A kill during recovery leaves `snap.*.generating`, with which it never opens again: deleted before.
//! * Its own flush thread is off: one caller writes, and knows what is durable when.
//! * Damage in the middle of its file it takes for a torn end, and goes back to an older state without a
//!   word (58 of 60 flipped bits): a file of ours says how many commits were durable, and fewer are refused.
//! * A failed write is final: every later call is refused.
//! * Closing, it syncs once more and panics when that fails: a server never closes it.

use super::durable::Durable;
use super::layout::{self, Root};
use super::overlay::{Overlay, Step};
use super::{Change, Engine, Entries};
use crate::disk::{Disk, DiskFile, RealDisk, create_dir_durable, io_error};
use crate::error::repair_hint;
use crate::{Result, StorageError};
use parking_lot::Mutex;
use sled::Batch;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Pages kept in memory. The whole state is in memory above us; this is for writing.
const CACHE_BYTES: u64 = 16 << 20;
/// How long an earlier handle of this process may keep the lock after it was dropped.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// About the bytes and the keys in one batch of a large change: bounds memory and the length of a flush.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_KEYS: usize = 1024;

/// A durable key-value store in a directory of its own.
#[derive(Debug)]
pub struct SledEngine {
    dir: PathBuf,
    db: sled::Db,
    /// Where the descriptors are opened that we sync.
    disk: Arc<dyn Disk>,
    /// Ours, of the file that holds everything.
    file: Arc<dyn DiskFile>,
    durable: Durable,
    state: Mutex<State>,
    for_good: bool,
}

#[derive(Debug, Default)]
struct State {
    root: Root,
    /// Files under `blobs/` that were synced.
    synced: BTreeSet<PathBuf>,
    /// Of those who read while it is changed.
    readers: Vec<Weak<Overlay>>,
    stopped: Option<String>,
}

impl SledEngine {
    /// Open or create. Removes what an interrupted [`Engine::replace`] left.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_on(dir, Arc::new(RealDisk))
    }

    /// Open with our own syncs going through another disk; sled's own reads and writes cannot.
    pub fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        create_dir_durable(&*disk, dir)?;
        remove_half_snapshots(dir)?;
        let db = open_db(dir)?;
        let kept = db.clone();
        let opened = Self::look_over(dir, disk, db);
        // Closing, it syncs again, and panics when that fails: the error would never be told.
        if matches!(opened, Err(StorageError::Io { .. })) {
            std::mem::forget(kept);
        }
        opened
    }

    /// Make sure that what was opened is what was durable, and durable now.
    fn look_over(dir: &Path, disk: Arc<dyn Disk>, db: sled::Db) -> Result<Self> {
        let path = dir.join("db");
        let (durable, commits) = Durable::open(&*disk, dir)?;
        let engine = Self {
            durable,
            file: disk.open(&path).map_err(io_error("open", &path))?,
            disk,
            dir: dir.to_path_buf(),
            db,
            state: Mutex::default(),
            for_good: false,
        };
        engine.sync_names()?;
        let mut state = engine.state.lock();
        if let Some(bytes) = engine.get(layout::ROOT_KEY)? {
            state.root = layout::parse_root(&bytes)
                .ok_or_else(|| engine.damaged("its root does not match its checksum"))?;
        }
        if state.root.commits < commits {
            return Err(engine.damaged(format!(
                "commit {} was durable, but the newest that can be read is {}",
                commits, state.root.commits
            )));
        }
        engine.drop_others(&mut state)?;
        drop(state);
        Ok(engine)
    }

    /// Never close the store: the process ends with it. Closing, it syncs its file once more, and
    /// panics when that fails, although everything that was promised is durable already.
    #[must_use]
    pub fn for_good(mut self) -> Self {
        self.for_good = true;
        self
    }

    /// Creation must survive a power cut: the files, and the names of the files.
    fn sync_names(&self) -> Result<()> {
        self.db.flush().map_err(|e| fault(&self.dir, "flush", e))?;
        for name in ["db", "conf"] {
            let path = self.dir.join(name);
            let file = File::open(&path).map_err(io_error("open", &path))?;
            file.sync_all().map_err(io_error("sync", &path))?;
        }
        for dir in [self.dir.join("blobs"), self.dir.clone()] {
            self.disk
                .sync_dir(&dir)
                .map_err(io_error("sync directory", &dir))?;
        }
        Ok(())
    }

    fn damaged(&self, what: impl std::fmt::Display) -> StorageError {
        StorageError::corrupt(&self.dir, what)
    }

    fn get(&self, key: &[u8]) -> Result<Option<sled::IVec>> {
        self.db.get(key).map_err(|e| fault(&self.dir, "read", e))
    }

    /// Run a change; when it fails the engine is stopped for good. A refusal changes nothing.
    fn change(&self, change: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(why) = &state.stopped {
            return Err(StorageError::Stopped(why.clone()));
        }
        let result = change(&mut state);
        if let Err(error) = &result
            && !matches!(error, StorageError::Misuse(_))
        {
            tracing::error!(%error, path = %self.dir.display(), "the state store stopped");
            state.stopped = Some(error.to_string());
        }
        result
    }

    /// Add to a batch what sets or removes one key, and account for it in `root`; `readers` keep what
    /// the key holds now.
    fn prepare(
        &self,
        batch: &mut Batch,
        root: &mut Root,
        readers: &[Arc<Overlay>],
        (key, value): (&[u8], Option<&[u8]>),
    ) -> Result<()> {
        let generation = root.generation;
        let head_key = layout::head_key(generation, key);
        let mut old_parts = 0;
        let old = self.get(&head_key)?;
        for reader in readers.iter().filter(|reader| reader.needs(key)) {
            let older = old.as_ref().map(|head| self.whole(generation, key, head));
            reader.keep(key.to_vec(), older.transpose()?);
        }
        if let Some(old) = old {
            let old = layout::parse_head(&old).ok_or_else(|| self.damaged("a value is cut"))?;
            old_parts = old.parts();
            root.count = root.count.wrapping_sub(1);
            root.sum = root.sum.wrapping_sub(old.digest);
        }
        let mut new_parts = 0;
        match value {
            Some(value) => {
                new_parts = insert(batch, root, key, value);
            }
            None => batch.remove(head_key),
        }
        for part in new_parts + 1..=old_parts {
            batch.remove(layout::part_key(generation, key, part));
        }
        Ok(())
    }

    fn apply(&self, batch: Batch) -> Result<()> {
        self.db
            .apply_batch(batch)
            .map_err(|e| fault(&self.dir, "write", e))
    }

    /// Make everything applied so far durable.
    fn sync(&self, state: &mut State) -> Result<()> {
        self.db.flush().map_err(|e| fault(&self.dir, "flush", e))?;
        self.sync_blobs(state)?;
        let path = self.dir.join("db");
        self.file.sync_data().map_err(io_error("sync", &path))
    }

    fn sync_blobs(&self, state: &mut State) -> Result<()> {
        let dir = self.dir.join("blobs");
        let mut present = BTreeSet::new();
        for item in std::fs::read_dir(&dir).map_err(io_error("list", &dir))? {
            let path = item.map_err(io_error("list", &dir))?.path();
            if !state.synced.contains(&path) {
                match File::open(&path) {
                    Ok(file) => file.sync_all().map_err(io_error("sync", &path))?,
                    // The store's own cleaning may remove one at any time.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(io_error("open", &path)(e)),
                }
            }
            present.insert(path);
        }
        if !present.is_subset(&state.synced) {
            self.disk
                .sync_dir(&dir)
                .map_err(io_error("sync directory", &dir))?;
        }
        state.synced = present;
        Ok(())
    }

    /// Write the root with a batch, and make both durable.
    fn commit(&self, state: &mut State, mut batch: Batch, mut root: Root) -> Result<()> {
        root.commits = state.root.commits + 1;
        batch.insert(layout::ROOT_KEY, layout::encode_root(root));
        self.apply(batch)?;
        self.sync(state)?;
        state.root = root;
        self.durable.note(root.commits)
    }

    /// Remove every key that does not belong to the current generation, in bounded batches.
    fn drop_others(&self, state: &mut State) -> Result<()> {
        let mut dropped = 0usize;
        for range in layout::other_generations(state.root.generation) {
            loop {
                let mut batch = Batch::default();
                let mut keys = 0;
                for key in self.db.range(range.clone()).keys().take(BATCH_KEYS) {
                    batch.remove(key.map_err(|e| fault(&self.dir, "read", e))?);
                    keys += 1;
                }
                if keys == 0 {
                    break;
                }
                self.apply(batch)?;
                self.sync(state)?;
                dropped += keys;
            }
        }
        if dropped > 0 {
            tracing::info!(path = %self.dir.display(), keys = dropped, "dropped an old generation of the state");
        }
        Ok(())
    }

    /// Write a new generation beside the current one; not visible yet.
    fn write_generation(
        &self,
        state: &mut State,
        entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
    ) -> Result<Root> {
        let mut root = Root {
            generation: state.root.generation + 1,
            ..Root::default()
        };
        let mut batch = Batch::default();
        let (mut keys, mut bytes) = (0, 0);
        let mut last: Option<Vec<u8>> = None;
        for (key, value) in entries {
            if last.as_ref().is_some_and(|last| *last >= key) {
                self.sync(state)?;
                self.drop_others(state)?;
                return Err(StorageError::Misuse("keys must ascend".into()));
            }
            insert(&mut batch, &mut root, &layout::entry_key(&key), &value);
            keys += 1;
            bytes += key.len() + value.len();
            if keys >= BATCH_KEYS || bytes >= BATCH_BYTES {
                self.apply(std::mem::take(&mut batch))?;
                self.sync(state)?;
                (keys, bytes) = (0, 0);
            }
            last = Some(key);
        }
        self.apply(batch)?;
        self.sync(state)?;
        Ok(root)
    }

    /// Put a value together from its head and parts, and verify it.
    fn whole(&self, generation: u64, key: &[u8], head: &[u8]) -> Result<(Vec<u8>, u64)> {
        let cut = || self.damaged(format!("the value of key {} is cut", hex::encode(key)));
        let head = layout::parse_head(head).ok_or_else(cut)?;
        let mut value = head.first.to_vec();
        for part in 1..=head.parts() {
            let part = self.get(&layout::part_key(generation, key, part))?;
            value.extend_from_slice(&part.ok_or_else(cut)?);
        }
        if value.len() as u64 != head.len || layout::digest(key, &value) != head.digest {
            return Err(self.damaged(format!(
                "the value of key {} does not match its checksum",
                hex::encode(key)
            )));
        }
        Ok((value, head.digest))
    }
}

/// Add a whole value to a batch and to the root's account; returns the number of its parts.
fn insert(batch: &mut Batch, root: &mut Root, key: &[u8], value: &[u8]) -> u32 {
    let digest = layout::digest(key, value);
    let (head, parts) = layout::split(digest, value);
    batch.insert(layout::head_key(root.generation, key), head);
    let mut count = 0;
    for (number, part) in parts {
        batch.insert(layout::part_key(root.generation, key, number), part);
        count = number;
    }
    root.count = root.count.wrapping_add(1);
    root.sum = root.sum.wrapping_add(digest);
    count
}

impl Engine for SledEngine {
    fn read(&self) -> Result<(Option<Vec<u8>>, Entries<'_>)> {
        scan(self)
    }

    fn view(self: Arc<Self>) -> Result<(Option<Vec<u8>>, Entries<'static>)> {
        scan(self)
    }

    fn checkpoint(&self, changes: &[Change], mark: &[u8]) -> Result<()> {
        // The last change of a key wins, and it must be accounted for once.
        let changes: BTreeMap<Vec<u8>, Option<&[u8]>> = changes
            .iter()
            .map(|(key, value)| (layout::entry_key(key), value.as_deref()))
            .collect();
        self.change(|state| {
            let mut root = state.root;
            let mut batch = Batch::default();
            let readers = state.readers();
            let mark = (layout::MARK_KEY, Some(mark));
            let changes = changes.iter().map(|(key, value)| (&key[..], *value));
            for change in changes.chain([mark]) {
                self.prepare(&mut batch, &mut root, &readers, change)?;
            }
            self.commit(state, batch, root)
        })
    }

    fn replace(
        &self,
        entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
        mark: &[u8],
    ) -> Result<()> {
        self.change(|state| {
            state.readers().iter().for_each(|reader| reader.replaced());
            let mut root = self.write_generation(state, entries)?;
            let mut batch = Batch::default();
            insert(&mut batch, &mut root, layout::MARK_KEY, mark);
            self.commit(state, batch, root)?;
            self.drop_others(state)
        })
    }

    fn disk_bytes(&self) -> u64 {
        let file = self.file.size().unwrap_or(0);
        let blobs = std::fs::read_dir(self.dir.join("blobs"))
            .into_iter()
            .flatten()
            .filter_map(|item| Some(item.ok()?.metadata().ok()?.len()))
            .sum::<u64>();
        file + blobs
    }
}

impl State {
    /// Those who still read.
    fn readers(&mut self) -> Vec<Arc<Overlay>> {
        let readers: Vec<_> = self.readers.iter().filter_map(Weak::upgrade).collect();
        self.readers.retain(|reader| reader.strong_count() > 0);
        readers
    }
}

/// Mark and entries as they are now.
fn scan<'a, E>(engine: E) -> Result<(Option<Vec<u8>>, Entries<'a>)>
where
    E: Deref<Target = SledEngine> + Send + 'a,
{
    let overlay = Arc::new(Overlay::default());
    let root = {
        let mut state = engine.state.lock();
        state.readers.push(Arc::downgrade(&overlay));
        state.root
    };
    let mut scan = Scan::new(engine, root, overlay);
    // The mark has the lowest key.
    let mut mark = None;
    let mut first = scan.next_value()?;
    if let Some((key, value)) = first.take_if(|(key, _)| layout::caller_key(key).is_none()) {
        debug_assert_eq!(key, layout::MARK_KEY);
        mark = Some(value);
    }
    let first = first.map(|(key, value)| Ok((key[1..].to_vec(), value)));
    Ok((mark, Box::new(first.into_iter().chain(scan))))
}

/// A key within a generation, and its value as far as it could be read.
struct Read {
    key: Vec<u8>,
    /// With its digest. An error counts only if nobody changed it meanwhile.
    value: Result<(Vec<u8>, u64)>,
}

/// All values of a generation as they were at a time, verified one by one, and as a whole at the end.
struct Scan<E> {
    engine: E,
    heads: sled::Iter,
    overlay: Arc<Overlay>,
    /// The next in the store, if it was read already.
    ahead: Option<Read>,
    exhausted: bool,
    root: Root,
    seen: Root,
    ended: bool,
}

impl<E: Deref<Target = SledEngine>> Scan<E> {
    fn new(engine: E, root: Root, overlay: Arc<Overlay>) -> Self {
        Self {
            heads: engine.db.scan_prefix(layout::heads_of(root.generation)),
            engine,
            overlay,
            ahead: None,
            exhausted: false,
            root,
            seen: Root {
                generation: root.generation,
                commits: root.commits,
                ..Root::default()
            },
            ended: false,
        }
    }

    fn look_ahead(&mut self) -> Result<()> {
        if self.ahead.is_some() || self.exhausted {
            return Ok(());
        }
        let Some(item) = self.heads.next() else {
            self.exhausted = true;
            return Ok(());
        };
        let (stored, head) = item.map_err(|e| fault(&self.engine.dir, "read", e))?;
        let key = stored[layout::KEY_PREFIX_LEN..].to_vec();
        let value = self.engine.whole(self.root.generation, &key, &head);
        self.ahead = Some(Read { key, value });
        Ok(())
    }

    /// The next key within the generation, and its value.
    fn next_value(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        loop {
            self.look_ahead()?;
            let found = self.ahead.as_ref().map(|read| &read.key[..]);
            let step = self.overlay.next(found);
            let (key, (value, digest)) = match step {
                Step::Before(key, older) => (key, older),
                Step::End => return self.whole().map(|()| None),
                Step::Over => {
                    let why = "the state was replaced while it was read";
                    return Err(StorageError::Misuse(why.into()));
                }
                Step::Found | Step::Instead(_) | Step::Skip => {
                    let Some(read) = self.ahead.take() else {
                        continue;
                    };
                    match step {
                        Step::Instead(older) => (read.key, older),
                        Step::Skip => continue,
                        _ => (read.key, read.value?),
                    }
                }
            };
            self.seen.count += 1;
            self.seen.sum = self.seen.sum.wrapping_add(digest);
            return Ok(Some((key, value)));
        }
    }

    fn whole(&self) -> Result<()> {
        if self.seen == self.root {
            return Ok(());
        }
        Err(self.engine.damaged(format!(
            "it holds {} values where {} were written, or others than those",
            self.seen.count, self.root.count
        )))
    }
}

impl<E: Deref<Target = SledEngine>> Iterator for Scan<E> {
    type Item = Result<(Vec<u8>, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.next_value().and_then(|next| {
            let Some((key, value)) = next else {
                return Ok(None);
            };
            match layout::caller_key(&key) {
                Some(key) => Ok(Some((key.to_vec(), value))),
                None => Err(self.engine.damaged("an entry has the key of the mark")),
            }
        });
        self.ended = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

impl Drop for SledEngine {
    fn drop(&mut self) {
        if self.for_good || self.state.lock().stopped.is_some() {
            // One handle more than will ever be dropped.
            std::mem::forget(self.db.clone());
        }
    }
}

/// A handle that was dropped may hold the lock a little longer (sled's own threads do): wait for that.
fn open_db(dir: &Path) -> Result<sled::Db> {
    let config = sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None);
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match config.open() {
            Ok(db) => return Ok(db),
            Err(sled::Error::Io(e)) if e.to_string().contains("could not acquire lock") => {
                if Instant::now() >= until {
                    return Err(StorageError::Locked(dir.to_path_buf()));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(e) => return Err(fault(dir, "open", e)),
        }
    }
}

/// A kill while it recovers leaves these, and then it refuses to open (sled issues #1527, #1533).
fn remove_half_snapshots(dir: &Path) -> Result<()> {
    for name in crate::disk::file_names(dir)? {
        if name.starts_with("snap.") && name.ends_with(".generating") {
            let path = dir.join(name);
            tracing::info!(path = %path.display(), "removing what an interrupted start of the state store left");
            std::fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

fn nonsense(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind;
    matches!(
        kind,
        ErrorKind::InvalidData
            | ErrorKind::InvalidInput
            | ErrorKind::UnexpectedEof
            | ErrorKind::Other
    )
}

fn fault(dir: &Path, action: &'static str, error: sled::Error) -> StorageError {
    match error {
        // What it cannot make sense of comes as an error of the system, too.
        sled::Error::Io(source) if nonsense(source.kind()) => StorageError::corrupt(dir, source),
        sled::Error::Io(source) => io_error(action, dir)(source),
        sled::Error::Corruption { .. } => StorageError::corrupt(dir, error),
        other => StorageError::Stopped(format!(
            "{action} {}: {other}; {}",
            dir.display(),
            repair_hint(dir)
        )),
    }
}
