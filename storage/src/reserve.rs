//! Room that is kept for the log and the state when others fill the disk: a file that holds blocks and
//! no data. Given up when nothing else is left, taken back when there is room again. Knows no mark:
//! when the disk counts as full is its owner's to say.
//!
//! ```text
//!   held ──release: removed, its blocks are free──► given up ──make: allocated, synced──► held
//! ```
//!
//! Two things release it: its owner, who watches the disk, and [`GuardedDisk`], when a write finds the
//! disk full before its owner did. A write that found no room is written again, once: nothing of it was
//! promised to anyone, and the same bytes go to the same place. A *sync* is never repeated.

use crate::disk::{Disk, DiskFile, RealDisk, io_error};
use crate::{Result, StorageError};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Its name in the data directory.
pub const NAME: &str = "reserve";
/// Written at once where the file system cannot allocate without writing.
const PIECE: usize = 1 << 20;

/// The file and whether it is there.
#[derive(Debug)]
pub struct Reserve {
    dir: PathBuf,
    path: PathBuf,
    bytes: u64,
    held: Mutex<bool>,
}

impl Reserve {
    /// Of `bytes` in the data directory `dir`. Touches nothing: what an earlier process left is held.
    pub fn new(dir: &Path, bytes: u64) -> Self {
        let path = dir.join(NAME);
        let held = path.exists();
        Self {
            dir: dir.to_path_buf(),
            path,
            bytes,
            held: Mutex::new(held),
        }
    }

    /// Bytes it takes when it is held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Is it there?
    pub fn held(&self) -> bool {
        *self.held.lock()
    }

    /// Take the room, if it is not held yet. On failure nothing stays behind.
    pub fn make(&self) -> Result<()> {
        let mut held = self.held.lock();
        if *held || self.bytes == 0 {
            return Ok(());
        }
        let made = File::create(&self.path).and_then(|file| {
            take(&file, self.bytes)?;
            file.sync_all()?;
            RealDisk.sync_dir(&self.dir)
        });
        if let Err(error) = made {
            // What could be taken would be missing elsewhere; if it cannot be removed, it is held.
            *held = std::fs::remove_file(&self.path).is_err() && self.path.exists();
            return Err(io_error("allocate", &self.path)(error));
        }
        *held = true;
        Ok(())
    }

    /// Give the room to whoever writes next; was there any?
    pub fn release(&self) -> Result<bool> {
        let mut held = self.held.lock();
        if !*held {
            return Ok(false);
        }
        match std::fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error("remove", &self.path)(e)),
        }
        *held = false;
        tracing::warn!(
            path = %self.path.display(), bytes = self.bytes,
            "the disk is full: gave up the reserve, so that log and state can be written for a while"
        );
        Ok(true)
    }
}

/// Blocks for `bytes`, whatever the file system calls it.
fn take(mut file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    let piece = vec![0xA5; PIECE];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(PIECE as u64);
        file.write_all(&piece[..usize::try_from(now).unwrap_or(PIECE)])?;
        left -= now;
    }
    Ok(())
}

/// The operating system's disk, with a reserve behind it.
#[derive(Clone, Debug)]
pub struct GuardedDisk(Arc<Reserve>);

impl GuardedDisk {
    /// Writes that find the disk full take `reserve`.
    pub fn new(reserve: Arc<Reserve>) -> Self {
        Self(reserve)
    }

    fn file(&self, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        Arc::new(GuardedFile {
            file,
            reserve: Arc::clone(&self.0),
        })
    }
}

/// Do it; if there is no room, give up the reserve and do it once more.
fn with<T>(reserve: &Reserve, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match work() {
        Err(e) if full(&e) && reserve.release().unwrap_or(false) => work(),
        other => other,
    }
}

fn full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

impl Disk for GuardedDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = with(&self.0, || RealDisk.create(path))?;
        Ok(self.file(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk.open(path).map(|file| self.file(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        with(&self.0, || RealDisk.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.sync_dir(dir)
    }
}

#[derive(Debug)]
struct GuardedFile {
    file: Arc<dyn DiskFile>,
    reserve: Arc<Reserve>,
}

impl DiskFile for GuardedFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        with(&self.reserve, || self.file.write_all_at(buf, offset))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        with(&self.reserve, || self.file.set_len(len))
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl StorageError {
    /// Is it that the disk is full?
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if full(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn it_takes_room_and_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(dir.path(), 3 << 20);
        assert!(!reserve.held());
        assert!(!reserve.release().unwrap());
        reserve.make().unwrap();
        let blocks = std::fs::metadata(dir.path().join(NAME)).unwrap().blocks();
        assert!(
            blocks * 512 >= 3 << 20,
            "{blocks} blocks are a promise only"
        );
        // What an earlier process left is ours.
        let again = Reserve::new(dir.path(), 3 << 20);
        assert!(again.held());
        assert!(again.release().unwrap());
        assert!(!dir.path().join(NAME).exists());
        // Removed behind our back: nothing to give, no error.
        reserve.release().unwrap();
        assert!(!reserve.held());
    }

    #[test]
    fn a_write_that_finds_no_room_takes_the_reserve_once() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(dir.path(), 4096);
        reserve.make().unwrap();
        let attempts = std::cell::Cell::new(0);
        let no_room = || -> io::Result<()> {
            attempts.set(attempts.get() + 1);
            Err(io::ErrorKind::StorageFull.into())
        };
        assert!(with(&reserve, no_room).is_err());
        assert_eq!((attempts.get(), reserve.held()), (2, false));
        assert!(with(&reserve, no_room).is_err());
        assert_eq!(attempts.get(), 3, "there is no second reserve");
        let broken = || -> io::Result<()> {
            attempts.set(attempts.get() + 1);
            Err(io::Error::from_raw_os_error(5))
        };
        reserve.make().unwrap();
        assert!(with(&reserve, broken).is_err());
        assert_eq!((attempts.get(), reserve.held()), (4, true));
    }
}
