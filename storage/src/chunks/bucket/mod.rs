//! Packs as objects in a bucket that several members share. Each member writes packs of its own and
//! relies on everybody's. Refuses to know how objects are stored and reached: see [`Bucket`].
//!
//! * `names`: names of objects. `object`: a pack's form. `cache`: blocks that were used lately.
//! * `claims`: who relies on which pack; how one is given up, and deleted.
//!
//! ```text
//! append: claim the name -> create the object (durable) -> copy of its index here -> held
//! look:   list what others wrote -> ask for a claim -> nobody is deleting it? it is there? -> claim -> held
//! ```
//! A copy of the index of each pack that this member relies on lies in the directory `index/MEMBER`: a start
//! needs no bucket. A pack whose copy is there is claimed; the other way round is made good by `tidy`.

mod cache;
mod claims;
mod names;
mod object;

use self::cache::{BLOCK, Cache};
use self::names::PackName;
use super::backend::{Backend, PackSet};
use super::index::{self, Clock, Entry, Index, Location};
use super::record::HEADER_LEN;
use super::{ChunkId, Record, io as disk_error};
use crate::disk::{Disk, RealDisk};
use crate::{Result, StorageError};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// A pack is closed at about this length: many chunks an object, few bytes lost by one that fails.
const PACK_LEN: u64 = 32 << 20;
/// Packs below this part of that length are copied together once there are enough of them: 1/8.
const SMALL_PART: u64 = 8;
/// Between the news that a pack is to be deleted and its deletion.
const SETTLE: Duration = Duration::from_secs(60);
/// What the object `store` begins with; the cluster follows.
const STORE: &str = "MAINSTAY-BUCKET 1 ";

/// Objects by name: what this store asks of a bucket. Calls block. Whoever asks after an answered change
/// sees that change, also in a list (S3 has promised that since 2020).
pub trait Bucket: std::fmt::Debug + Send + Sync + 'static {
    /// Store an object, in place of one of that name: durable on return.
    fn put(&self, key: &str, body: Bytes) -> io::Result<()>;
    /// Store an object unless there is one of that name; `false`: there is.
    fn create(&self, key: &str, body: Bytes) -> io::Result<bool>;
    /// Bytes of an object, fewer where it ends before. [`io::ErrorKind::NotFound`]: there is none.
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Bytes>;
    /// Bytes in an object; `NotFound`: there is none.
    fn size(&self, key: &str) -> io::Result<u64>;
    /// Names that begin with `prefix`, a folder with its slash, with their sizes; behind `after` only.
    fn list(&self, prefix: &str, after: Option<&str>) -> io::Result<Vec<(String, u64)>>;
    /// Delete; it is no error if there is none.
    fn delete(&self, key: &str) -> io::Result<()>;
}

/// How a shared store is opened.
#[derive(Clone)]
pub struct SharedOptions {
    /// Who this is: never used by anybody else, nor again.
    pub member: u64,
    /// Whose the bucket is: a bucket of another owner is refused.
    pub owner: String,
    /// Length at which packs are closed.
    pub pack_len: u64,
    /// Bytes of the local copies of what was read and written lately.
    pub cache_bytes: u64,
    /// From a pack's doom to its deletion.
    pub settle: Duration,
    /// By which the collector's grace is measured.
    pub clock: Clock,
}

impl SharedOptions {
    /// The usual.
    pub fn new(member: u64, owner: &str, cache_bytes: u64) -> Self {
        let opened = Instant::now();
        Self {
            member,
            owner: owner.to_owned(),
            pack_len: PACK_LEN,
            cache_bytes,
            settle: SETTLE,
            clock: Arc::new(move || opened.elapsed()),
        }
    }
}

/// Who there is, as of the state that the caller has just read behind a barrier.
#[derive(Clone, Debug, Default)]
pub struct Members {
    /// Now in the cluster.
    pub present: BTreeSet<u64>,
    /// Taken out, never to come back: their claims are void.
    pub gone: BTreeSet<u64>,
}

/// A pack that this member relies on.
#[derive(Clone, Copy, Debug)]
struct Known {
    name: PackName,
    size: u64,
}

/// A pack that this member has come to rely on.
#[derive(Debug)]
pub(super) struct Adopted {
    pub number: u32,
    pub len: u64,
    pub entries: Vec<Entry>,
}

#[derive(Debug, Default)]
struct State {
    by_number: BTreeMap<u32, Known>,
    by_name: HashMap<PackName, u32>,
    next_number: u32,
    /// The last sequence number that was given to a pack of ours.
    last_seq: u64,
    /// How far each writer's packs were looked at.
    seen: HashMap<u64, u64>,
    /// Were about to be deleted when they were looked at, or their copy here is damaged.
    skipped: BTreeSet<PackName>,
    /// Of the last append; `settle` takes it.
    fresh: Option<(u32, u64)>,
    members: Members,
    /// What we are about to delete, and since when.
    dooms: HashMap<String, Duration>,
}

impl State {
    fn add(&mut self, name: PackName, size: u64) -> u32 {
        self.next_number += 1;
        let number = self.next_number;
        self.by_number.insert(number, Known { name, size });
        self.by_name.insert(name, number);
        number
    }
}

/// The packs of a bucket, as one member sees them.
#[derive(Debug)]
pub(super) struct BucketPacks {
    bucket: Arc<dyn Bucket>,
    me: u64,
    owner: String,
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    pack_len: u64,
    settle: Duration,
    clock: ClockOf,
    cache: Cache,
    packs: PackSet,
    state: Mutex<State>,
    /// The bucket was found to be ours.
    greeted: Mutex<bool>,
}

/// A clock that can be shown.
struct ClockOf(Clock);

impl std::fmt::Debug for ClockOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// The bucket could not be asked.
fn unavailable(action: &'static str) -> impl Fn(io::Error) -> StorageError {
    move |source| StorageError::Unavailable {
        action,
        source: Arc::new(source),
    }
}

fn is_absent<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::NotFound)
}

impl BucketPacks {
    /// What this member relied on when it ended; asks the bucket nothing.
    pub(super) fn open(
        dir: &Path,
        bucket: Arc<dyn Bucket>,
        options: &SharedOptions,
    ) -> Result<(Self, Index)> {
        let copies = copies_of(dir, options.member);
        forget_others(dir, &copies)?;
        std::fs::create_dir_all(&copies).map_err(disk_error("create", &copies))?;
        let cache_dir = dir.join("cache");
        let cache =
            Cache::open(&cache_dir, options.cache_bytes).map_err(disk_error("open", &cache_dir))?;
        let packs = Self {
            bucket,
            me: options.member,
            owner: options.owner.clone(),
            dir: dir.to_owned(),
            disk: Arc::new(RealDisk),
            pack_len: options.pack_len,
            settle: options.settle,
            clock: ClockOf(Arc::clone(&options.clock)),
            cache,
            packs: PackSet::default(),
            state: Mutex::default(),
            greeted: Mutex::new(false),
        };
        let index = Index::new(Arc::clone(&options.clock), 0);
        for (name, size) in packs.copies()? {
            let path = packs.copy_path(&name, size);
            let number = packs.state.lock().add(name, size);
            let Some(entries) = index::load(&path, number, size) else {
                // Until `look` has read it again it is not relied on, but the claim stays.
                tracing::warn!(copy = %path.display(), "the copy of a pack's index is damaged: read again");
                std::fs::remove_file(&path).map_err(disk_error("remove", &path))?;
                packs.drop_number(number);
                packs.state.lock().skipped.insert(name);
                continue;
            };
            index.insert_better(&entries, |new, old| packs.better(new, old));
            packs.packs.note(number, size);
            let mut state = packs.state.lock();
            let seen = state.seen.entry(name.writer).or_default();
            *seen = (*seen).max(name.seq);
            if name.writer == packs.me {
                state.last_seq = state.last_seq.max(name.seq);
            }
        }
        Ok((packs, index))
    }

    fn copy_path(&self, name: &PackName, size: u64) -> PathBuf {
        copies_of(&self.dir, self.me).join(format!("{name}-{size:x}.idx"))
    }

    fn copies(&self) -> Result<Vec<(PackName, u64)>> {
        let dir = copies_of(&self.dir, self.me);
        let mut found = Vec::new();
        for file in crate::disk::file_names(&dir)? {
            let parsed = file.strip_suffix(".idx").and_then(|stem| {
                let (name, size) = stem.rsplit_once('-')?;
                Some((PackName::parse(name)?, u64::from_str_radix(size, 16).ok()?))
            });
            match parsed {
                Some(copy) => found.push(copy),
                // An interrupted write.
                None => {
                    let path = dir.join(&file);
                    std::fs::remove_file(&path).map_err(disk_error("remove", &path))?;
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn known(&self, number: u32) -> Option<Known> {
        self.state.lock().by_number.get(&number).copied()
    }

    fn drop_number(&self, number: u32) -> Option<Known> {
        let mut state = self.state.lock();
        let known = state.by_number.remove(&number)?;
        state.by_name.remove(&known.name);
        Some(known)
    }

    /// Is the pack `new` to be relied on rather than `old`, where both have a chunk? The same answer
    /// on every member.
    pub(super) fn better(&self, new: u32, old: u32) -> bool {
        let state = self.state.lock();
        let name = |number: u32| state.by_number.get(&number).map(|known| known.name);
        name(new) > name(old)
    }

    /// The same once more: it may have been emptied, or given to others.
    fn greet_again(&self) -> Result<()> {
        *self.greeted.lock() = false;
        self.greet()
    }

    /// See to it that the bucket is ours, and that others know of us.
    pub(super) fn greet(&self) -> Result<()> {
        let mut greeted = self.greeted.lock();
        if *greeted {
            return Ok(());
        }
        let ours = format!("{STORE}{}\n", self.owner);
        let failed = unavailable("ask whose the bucket is");
        let created = self.bucket.create("store", Bytes::from(ours.clone()));
        if !created.map_err(&failed)? {
            let there = self.bucket.get("store", 0..4096).map_err(&failed)?;
            if there != ours.as_bytes() {
                let there = String::from_utf8_lossy(&there);
                let owner = there
                    .trim_end()
                    .strip_prefix(STORE)
                    .unwrap_or("something else");
                return Err(StorageError::Foreign(format!(
                    "the bucket belongs to {owner}, this is {}: give each cluster a prefix of its own; if this one takes that one's place (after `member recover` or `snapshot restore`), delete the object `store` below the prefix",
                    self.owner
                )));
            }
        }
        self.bucket
            .put(&names::member(self.me), Bytes::from_static(b"1"))
            .map_err(unavailable("make this member known in the bucket"))?;
        *greeted = true;
        Ok(())
    }

    /// Keep a copy of a pack's index: from then on this member relies on the pack.
    fn keep_copy(&self, name: &PackName, size: u64, entries: &[Entry]) -> Result<()> {
        index::save(&*self.disk, &self.copy_path(name, size), size, entries)
    }

    fn next_name(&self) -> PackName {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(0);
        let mut state = self.state.lock();
        // Behind all that is known, whoever's clock was ahead: a copy must be better than what it was made of.
        let newest = state.by_name.keys().map(|name| name.seq).max().unwrap_or(0);
        state.last_seq = now.max(state.last_seq + 1).max(newest + 1);
        PackName {
            seq: state.last_seq,
            writer: self.me,
        }
    }

    /// Blocks of a pack that `start..end` touches.
    fn blocks(start: u64, end: u64) -> Range<u32> {
        let number = |at: u64| u32::try_from(at / BLOCK).unwrap_or(u32::MAX);
        number(start)..number(end.saturating_sub(1)).saturating_add(1)
    }

    fn cache_object(&self, name: PackName, body: &[u8]) {
        for (block, data) in (0..).zip(body.chunks(BLOCK as usize)) {
            self.cache.put((name, block), data);
        }
    }

    /// Bytes of a pack from the bucket.
    fn get(&self, known: &Known, range: Range<u64>) -> Result<Bytes> {
        let key = known.name.key();
        let got = self.bucket.get(&key, range);
        if is_absent(&got) {
            // Like a lost file: see `read::gone`.
            return Err(disk_error("read", Path::new(&key))(
                io::ErrorKind::NotFound.into(),
            ));
        }
        got.map_err(unavailable("read a pack from the bucket"))
    }

    /// These blocks from the bucket, and kept.
    fn fetch(&self, known: Known, blocks: Range<u32>) -> Result<Vec<Bytes>> {
        let from = u64::from(blocks.start) * BLOCK;
        let to = (u64::from(blocks.end) * BLOCK).min(known.size);
        let body = self.get(&known, from..to)?;
        let mut pieces = Vec::new();
        for (at, block) in blocks.enumerate() {
            let start = (at * BLOCK as usize).min(body.len());
            let end = (start + BLOCK as usize).min(body.len());
            let piece = body.slice(start..end);
            self.cache.put((known.name, block), &piece);
            pieces.push(piece);
        }
        Ok(pieces)
    }
}

impl Backend for BucketPacks {
    fn packs(&self) -> &PackSet {
        &self.packs
    }

    fn append(&self, records: &[&Record]) -> Result<Vec<Location>> {
        self.greet()?;
        let failed = unavailable("write a pack to the bucket");
        let number = {
            let mut state = self.state.lock();
            state.next_number += 1;
            state.next_number
        };
        let (body, entries) = object::encode(records, number)?;
        let (body, size) = (Bytes::from(body), body_len(records));
        debug_assert_eq!(size, body.len() as u64);
        loop {
            let name = self.next_name();
            // First: a pack without a claim may be deleted by anybody.
            let claim = names::claim(self.me, &name);
            self.bucket
                .put(&claim, Bytes::from_static(claims::CLAIM))
                .map_err(&failed)?;
            // If the answer is lost, the claim is taken back by `tidy`, and the pack goes.
            if !self
                .bucket
                .create(&name.key(), body.clone())
                .map_err(&failed)?
            {
                self.bucket.delete(&claim).map_err(&failed)?;
                continue;
            }
            self.keep_copy(&name, size, &entries)?;
            let mut state = self.state.lock();
            state.by_number.insert(number, Known { name, size });
            state.by_name.insert(name, number);
            state.fresh = Some((number, size));
            drop(state);
            self.cache_object(name, &body);
            return Ok(entries.into_iter().map(|(_, at)| at).collect());
        }
    }

    fn settle(&self) {
        let fresh = self.state.lock().fresh.take();
        if let Some((number, size)) = fresh {
            self.packs.note(number, size);
        }
    }

    /// None grows.
    fn seal(&self) -> Result<u32> {
        Ok(0)
    }

    fn read(&self, number: u32, start: u64, len: usize) -> Result<Bytes> {
        let Some(known) = self.known(number) else {
            return Err(disk_error("read", &self.dir)(
                io::ErrorKind::NotFound.into(),
            ));
        };
        let end = (start + len as u64).min(known.size);
        if start >= end {
            return Ok(Bytes::new());
        }
        let wanted = Self::blocks(start, end);
        let first = u64::from(wanted.start) * BLOCK;
        let mut pieces: Vec<Option<Bytes>> = wanted
            .clone()
            .map(|block| self.cache.get((known.name, block)))
            .collect();
        // What is lacking is read with one request for each stretch.
        let mut at = 0;
        while at < pieces.len() {
            let run = pieces[at..].iter().take_while(|p| p.is_none()).count();
            if run == 0 {
                at += 1;
                continue;
            }
            let from = wanted.start + u32::try_from(at).unwrap_or(u32::MAX);
            let to = from + u32::try_from(run).unwrap_or(u32::MAX);
            for piece in self.fetch(known, from..to)? {
                pieces[at] = Some(piece);
                at += 1;
            }
        }
        let mut all = BytesMut::with_capacity(pieces.len() * BLOCK as usize);
        pieces
            .into_iter()
            .flatten()
            .for_each(|p| all.extend_from_slice(&p));
        let skip = usize::try_from(start - first)
            .unwrap_or(usize::MAX)
            .min(all.len());
        let stop = (skip + usize::try_from(end - start).unwrap_or(0)).min(all.len());
        Ok(all.freeze().slice(skip..stop))
    }

    fn read_stored(&self, number: u32, start: u64, len: usize) -> Result<Bytes> {
        let gone = || disk_error("read", &self.dir)(io::ErrorKind::NotFound.into());
        let known = self.known(number).ok_or_else(gone)?;
        let end = (start + len as u64).min(known.size);
        if start >= end {
            return Ok(Bytes::new());
        }
        self.get(&known, start..end)
    }

    fn entries(&self, number: u32) -> Result<Vec<Entry>> {
        let gone = || disk_error("read", &self.dir)(io::ErrorKind::NotFound.into());
        let known = self.known(number).ok_or_else(gone)?;
        let path = self.copy_path(&known.name, known.size);
        index::load(&path, number, known.size).ok_or_else(gone)
    }

    /// Only what the bucket has wrong as well: a copy here, or the way, may have spoilt it.
    fn strike(&self, bad: &[Entry]) -> Result<()> {
        let mut by_pack: BTreeMap<u32, HashSet<(ChunkId, u32)>> = BTreeMap::new();
        for (id, at) in bad {
            by_pack.entry(at.pack).or_default().insert((*id, at.offset));
        }
        for (number, struck) in by_pack {
            let Some(known) = self.known(number) else {
                continue;
            };
            let path = self.copy_path(&known.name, known.size);
            let Some(mut entries) = index::load(&path, number, known.size) else {
                continue;
            };
            let mut failure = None;
            entries.retain(|(id, at)| {
                if !struck.contains(&(*id, at.offset)) {
                    return true;
                }
                let from = u64::from(at.offset);
                let to = from + HEADER_LEN as u64 + u64::from(at.stored_len);
                self.cache
                    .forget(Self::blocks(from, to).map(|block| (known.name, block)));
                match self.bucket.get(&known.name.key(), from..to) {
                    Ok(bytes) => super::read::parse(&bytes, 0, id, at)
                        .is_some_and(|record| record.verify().is_ok()),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                    Err(error) => {
                        failure = Some(error);
                        true
                    }
                }
            });
            if let Some(error) = failure {
                return Err(unavailable("look at a damaged chunk in the bucket")(error));
            }
            index::save(&*self.disk, &path, known.size, &entries)?;
        }
        Ok(())
    }

    /// The copy of its index first: from then on this member does not rely on it. A claim that stays
    /// because the bucket does not answer is taken back by `tidy`.
    fn remove(&self, number: u32) -> Result<u64> {
        let Some(known) = self.known(number) else {
            return Ok(0);
        };
        let path = self.copy_path(&known.name, known.size);
        self.disk
            .remove(&path)
            .map_err(disk_error("remove", &path))?;
        let dir = copies_of(&self.dir, self.me);
        self.disk
            .sync_dir(&dir)
            .map_err(disk_error("fsync", &dir))?;
        self.drop_number(number);
        self.packs.forget(number);
        self.cache
            .forget(Self::blocks(0, known.size).map(|block| (known.name, block)));
        if let Err(error) = self.bucket.delete(&names::claim(self.me, &known.name)) {
            tracing::warn!(%error, pack = %known.name, "a claim that is not needed any more stays for now");
        }
        Ok(known.size)
    }

    fn room(&self) -> Result<(u64, u64)> {
        Ok((u64::MAX, u64::MAX))
    }

    /// Its writer does, or for one who is gone the first of those who are there.
    fn rewrites(&self, number: u32) -> bool {
        let state = self.state.lock();
        let Some(known) = state.by_number.get(&number) else {
            return false;
        };
        let writer = known.name.writer;
        let present = &state.members.present;
        writer == self.me
            || (present.first() == Some(&self.me)
                && !present.contains(&writer)
                && state.members.gone.contains(&writer))
    }

    fn group_bytes(&self) -> u64 {
        self.pack_len
    }

    fn small(&self) -> u64 {
        self.pack_len / SMALL_PART
    }

    fn common(&self) -> Option<&BucketPacks> {
        Some(self)
    }
}

/// Where the copies of a member's packs' indexes are.
fn copies_of(dir: &Path, member: u64) -> PathBuf {
    dir.join("index").join(format!("{member:016x}"))
}

/// A directory whose member has a new identity: the claims of the old one are void.
fn forget_others(dir: &Path, ours: &Path) -> Result<()> {
    let all = dir.join("index");
    std::fs::create_dir_all(&all).map_err(disk_error("create", &all))?;
    for entry in std::fs::read_dir(&all).map_err(disk_error("list", &all))? {
        let path = entry.map_err(disk_error("list", &all))?.path();
        if path != ours && path.is_dir() {
            std::fs::remove_dir_all(&path).map_err(disk_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Length of the object of these records.
fn body_len(records: &[&Record]) -> u64 {
    let data: usize = records.iter().map(|r| r.data.len() + HEADER_LEN).sum();
    (16 + data + index::HEAD + records.len() * index::ENTRY + 4 + 16) as u64
}
