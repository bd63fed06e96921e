//! Packs as files in one directory. One of them grows; a full one is sealed and gets its index file.

use super::backend::{Backend, PackSet};
use super::direct::{Appender, BLOCK};
use super::index::{self, Clock, Entry, Index, Location};
use super::record::Header;
use super::{ChunkId, Record, io, pack};
use crate::disk::Disk;
use crate::{Result, StorageError};
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::{Advice, fadvise};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Open files kept; more than this and all are closed (they reopen on use).
const OPEN_FILES_MAX: usize = 64;

/// A directory of packs.
#[derive(Debug)]
pub(super) struct LocalPacks {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    packs: PackSet,
    pack_len: u64,
    /// Open packs by number.
    readers: Mutex<HashMap<u32, Arc<File>>>,
    growing: Mutex<Growing>,
}

/// The pack that grows.
struct Growing {
    pack: pack::Active,
    out: Appender,
    /// Of the last append; `settle` takes them.
    fresh: Vec<Entry>,
    /// Why nothing more is written: a failed fsync says nothing about what is on disk, so it is
    /// never tried again.
    stopped: Option<String>,
}

impl std::fmt::Debug for Growing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Growing")
            .field("number", &self.pack.number)
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}

impl LocalPacks {
    /// Open or create; with the index of all that is held.
    pub(super) fn open(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        pack_len: u64,
        clock: Clock,
    ) -> Result<(Self, Index)> {
        let opened = pack::open_all(&**disk, dir, clock)?;
        let path = pack::path(dir, opened.active.number);
        let out = Appender::open(disk, &path, opened.active.len)?;
        let packs = Self {
            dir: dir.to_owned(),
            disk: Arc::clone(disk),
            packs: PackSet::new(opened.lens, opened.active.number),
            pack_len: pack_len.min(2 << 30),
            readers: Mutex::default(),
            growing: Mutex::new(Growing {
                pack: opened.active,
                out,
                fresh: Vec::new(),
                stopped: None,
            }),
        };
        Ok((packs, opened.index))
    }

    fn file(&self, number: u32) -> Result<Arc<File>> {
        let mut readers = self.readers.lock();
        if let Some(file) = readers.get(&number) {
            return Ok(Arc::clone(file));
        }
        let path = pack::path(&self.dir, number);
        let file = Arc::new(File::open(&path).map_err(io("open", &path))?);
        if readers.len() >= OPEN_FILES_MAX {
            readers.clear();
        }
        readers.insert(number, Arc::clone(&file));
        Ok(file)
    }

    fn forget_pages(&self, number: u32, start: u64, len: usize) {
        let (Ok(file), Some(len)) = (self.file(number), NonZeroU64::new(len as u64)) else {
            return;
        };
        if let Err(error) = fadvise(&*file, start, Some(len), Advice::DontNeed) {
            let path = pack::path(&self.dir, number);
            let error = io("advise on", &path)(error.into());
            tracing::debug!(%error, "the system keeps what it has cached");
        }
    }

    fn roll(&self, growing: &mut Growing) -> Result<()> {
        pack::seal(&*self.disk, &self.dir, &growing.pack)?;
        growing.pack = pack::create(&*self.disk, &self.dir, growing.pack.number + 1)?;
        let path = pack::path(&self.dir, growing.pack.number);
        growing.out = Appender::open(&self.disk, &path, growing.pack.len)?;
        self.packs.note(growing.pack.number, growing.pack.len);
        self.packs.set_active(growing.pack.number);
        Ok(())
    }
}

impl Growing {
    fn working(&self) -> Result<()> {
        match &self.stopped {
            Some(why) => Err(StorageError::Stopped(why.clone())),
            None => Ok(()),
        }
    }

    fn push(&mut self, record: &Record) -> Result<Location> {
        let full = |_| StorageError::Stopped("a pack has grown past 4 GiB".to_owned());
        let offset = u32::try_from(self.out.position()).map_err(full)?;
        let header = Header::of(record);
        self.out.push(&header.encode())?;
        self.out.push(&record.data)?;
        Ok(Location {
            pack: self.pack.number,
            offset,
            stored_len: header.stored_len,
            raw_len: header.raw_len,
        })
    }

    /// Make what was appended durable, or let the pack end where it did.
    fn finish(&mut self, appended: Result<()>) -> Result<()> {
        if let Err(error) = appended {
            // Nothing of this batch was acknowledged (disk full).
            if let Err(worse) = self.out.rewind(self.pack.len) {
                self.stopped = Some(chain(&worse));
            }
            return Err(error);
        }
        match self.out.commit() {
            Ok(()) => {
                self.pack.len = self.out.position();
                debug_assert_eq!(self.pack.len % BLOCK as u64, 0);
                Ok(())
            }
            Err(error) if is_full(&error) && self.out.rewind(self.pack.len).is_ok() => Err(error),
            Err(error) => {
                self.stopped = Some(chain(&error));
                Err(error)
            }
        }
    }
}

impl Backend for LocalPacks {
    fn packs(&self) -> &PackSet {
        &self.packs
    }

    fn append(&self, records: &[&Record]) -> Result<Vec<Location>> {
        let mut growing = self.growing.lock();
        growing.working()?;
        let mut places = Vec::with_capacity(records.len());
        let appended = records.iter().try_for_each(|record| {
            places.push(growing.push(record)?);
            Ok(())
        });
        growing.finish(appended)?;
        let ids = records.iter().map(|record| record.id);
        growing.fresh = ids.zip(places.iter().copied()).collect();
        Ok(places)
    }

    fn settle(&self) {
        let mut growing = self.growing.lock();
        let fresh = std::mem::take(&mut growing.fresh);
        growing.pack.entries.extend(fresh);
        self.packs.note(growing.pack.number, growing.pack.len);
        if growing.pack.len >= self.pack_len
            && let Err(error) = self.roll(&mut growing)
        {
            // This batch is safe; the next one has nowhere to go.
            growing.stopped = Some(chain(&error));
        }
    }

    fn seal(&self) -> Result<u32> {
        let mut growing = self.growing.lock();
        growing.working()?;
        if growing.pack.len > BLOCK as u64
            && let Err(error) = self.roll(&mut growing)
        {
            growing.stopped = Some(chain(&error));
            return Err(error);
        }
        Ok(growing.pack.number)
    }

    fn read(&self, number: u32, start: u64, len: usize) -> Result<Bytes> {
        let file = self.file(number)?;
        let mut bytes = vec![0; len];
        let path = pack::path(&self.dir, number);
        let got = read_up_to(&file, &mut bytes, start).map_err(io("read", &path))?;
        bytes.truncate(got);
        Ok(bytes.into())
    }

    fn entries(&self, number: u32) -> Result<Vec<Entry>> {
        if number == self.packs.active() {
            let growing = self.growing.lock();
            if growing.pack.number == number {
                return Ok(growing.pack.entries.clone());
            }
        }
        pack::entries_of(&*self.disk, &self.dir, number).map(|(entries, _)| entries)
    }

    fn strike(&self, bad: &[Entry]) -> Result<()> {
        let bad: HashSet<(ChunkId, u32, u32)> = bad
            .iter()
            .map(|(id, at)| (*id, at.pack, at.offset))
            .collect();
        let good = |(id, at): &Entry| !bad.contains(&(*id, at.pack, at.offset));
        let mut growing = self.growing.lock();
        growing.pack.entries.retain(good);
        let mut packs: Vec<u32> = bad.iter().map(|(_, pack, _)| *pack).collect();
        packs.sort_unstable();
        packs.dedup();
        for number in packs {
            let len = self.packs.len_of(number);
            let (Some(len), true) = (len, number != growing.pack.number) else {
                continue;
            };
            let path = pack::index_path(&self.dir, number);
            if let Some(mut entries) = index::load(&path, number, len) {
                entries.retain(good);
                index::save(&*self.disk, &path, len, &entries)?;
            }
        }
        Ok(())
    }

    /// The index file first: a pack without one is scanned, an index file without a pack is nothing.
    fn remove(&self, number: u32) -> Result<u64> {
        let growing = self.growing.lock();
        growing.working()?;
        if number == growing.pack.number {
            let why = format!("pack {number} still grows");
            return Err(StorageError::Misuse(why));
        }
        drop(growing);
        let len = self.packs.forget(number).unwrap_or(0);
        let removed = pack::remove(&*self.disk, &self.dir, number);
        // Behind the removal, so that nobody opens it again: only then its room is given back.
        self.readers.lock().remove(&number);
        if removed.is_err() {
            self.packs.note(number, len);
        }
        removed.map(|()| len)
    }

    /// What the disk has counts, not what is in memory; and others' pages are not to be pushed out.
    fn read_stored(&self, number: u32, start: u64, len: usize) -> Result<Bytes> {
        self.forget_pages(number, start, len);
        let read = self.read(number, start, len);
        self.forget_pages(number, start, len);
        read
    }

    fn room(&self) -> Result<(u64, u64)> {
        file_system(&self.dir)
    }
}

/// Free and total bytes of the file system that a directory lies on.
pub(super) fn file_system(dir: &Path) -> Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| io("look at", dir)(e.into()))?;
    Ok((
        stat.f_bavail.saturating_mul(stat.f_frsize),
        stat.f_blocks.saturating_mul(stat.f_frsize),
    ))
}

/// A file shorter than its index says is damage of the chunks behind its end, not a failed read.
fn read_up_to(file: &File, bytes: &mut [u8], start: u64) -> std::io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], start + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

/// A full disk refuses a write before it happens; the data written so far is as it was.
fn is_full(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { action: "append to", source, .. }
        if source.kind() == std::io::ErrorKind::StorageFull)
}

/// With its cause.
pub(super) fn chain(error: &StorageError) -> String {
    match error {
        StorageError::Io { source, .. } => format!("{error}: {source}"),
        StorageError::Unavailable { source, .. } => format!("{error}: {source}"),
        other => other.to_string(),
    }
}
