//! Appending to a file with aligned direct writes: full speed of the disk without filling the page
//! cache. Where the file system refuses direct writes, the same bytes are written buffered.

use super::behind::{Behind, Buffer};
use super::io;
use super::record::{HEADER_LEN, Header};
use crate::Result;
use crate::disk::{Disk, DiskFile};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Direct writes start and end at multiples of this, and so do batches: a block that holds
/// something acknowledged is never written again.
pub(super) const BLOCK: usize = 4096;

/// Writes at the end of one file: one buffer is filled while another one is written.
pub(super) struct Appender {
    disk: Arc<dyn Disk>,
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    direct: bool,
    buffer: Buffer,
    /// The other one, unless it is being written.
    spare: Option<Buffer>,
    /// Started when the first buffer is full.
    behind: Option<Behind>,
}

impl Appender {
    /// Append to `path` at `offset` (a multiple of [`BLOCK`]).
    pub(super) fn open(disk: &Arc<dyn Disk>, path: &Path, offset: u64) -> Result<Self> {
        let (file, direct) = match disk.open_direct(path) {
            Ok(file) => (file, true),
            Err(_) => (disk.open(path).map_err(io("open", path))?, false),
        };
        Ok(Self {
            disk: Arc::clone(disk),
            file,
            path: path.to_owned(),
            direct,
            buffer: Buffer::at(offset),
            spare: None,
            behind: None,
        })
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> u64 {
        self.buffer.end()
    }

    /// Append; may or may not reach the file before [`Appender::commit`].
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let taken = self.buffer.take(bytes);
            bytes = &bytes[taken..];
            if self.buffer.is_full() {
                self.turn()?;
            }
        }
        Ok(())
    }

    /// Fill up to a whole block, write what is gathered, and make everything durable.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.pad()?;
        // In order: a process that dies leaves no gap before something whole.
        self.wait()?;
        let written = self.buffer.write_to(&*self.file);
        self.written(written, None)?;
        self.buffer.restart(self.buffer.end());
        self.file.sync_data().map_err(io("fdatasync", &self.path))
    }

    /// Give up what was pushed after `offset`: the file ends there again.
    pub(super) fn rewind(&mut self, offset: u64) -> Result<()> {
        // Nothing may be written behind the new end; whether it was written does not matter.
        let _ = self.wait();
        self.buffer.restart(offset);
        self.file
            .set_len(offset)
            .map_err(io("truncate", &self.path))
    }

    fn pad(&mut self) -> Result<()> {
        let block = BLOCK as u64;
        let over = usize::try_from(self.position() % block).unwrap_or(0);
        if over == 0 {
            return Ok(());
        }
        let mut gap = BLOCK - over;
        if gap < HEADER_LEN {
            gap += BLOCK;
        }
        let zeros = [0; 2 * BLOCK];
        let zeros = &zeros[..gap - HEADER_LEN];
        self.push(&Header::padding(zeros).encode())?;
        self.push(zeros)
    }

    /// The buffer is full: have it written, and go on with the other one.
    fn turn(&mut self) -> Result<()> {
        self.wait()?;
        let offset = self.buffer.end();
        let mut other = self.spare.take().unwrap_or_else(|| Buffer::at(offset));
        other.restart(offset);
        let full = std::mem::replace(&mut self.buffer, other);
        if self.behind.is_none() {
            self.behind = Behind::start().ok();
        }
        let refused = match &mut self.behind {
            Some(behind) => behind.write(Arc::clone(&self.file), full).err(),
            None => Some(full),
        };
        let Some(full) = refused else {
            return Ok(());
        };
        // No thread is to be had: slower, and as good.
        self.behind = None;
        let written = full.write_to(&*self.file);
        let written = self.written(written, Some(&full));
        self.spare = Some(full);
        written
    }

    /// Until nothing is being written behind.
    fn wait(&mut self) -> Result<()> {
        let Some(ended) = self.behind.as_mut().and_then(Behind::wait) else {
            return Ok(());
        };
        let (buffer, written) = ended.map_err(io("append to", &self.path))?;
        let written = self.written(written, Some(&buffer));
        self.spare = Some(buffer);
        written
    }

    /// How a write of that buffer (`None`: of the present one) ended; once more through the page
    /// cache if the file system takes the flag but not the write.
    fn written(&mut self, written: std::io::Result<()>, buffer: Option<&Buffer>) -> Result<()> {
        let Err(error) = written else {
            return Ok(());
        };
        if !self.direct || error.raw_os_error() != Some(EINVAL) {
            return Err(io("append to", &self.path)(error));
        }
        let file = self.disk.open(&self.path).map_err(io("open", &self.path))?;
        let again = buffer.unwrap_or(&self.buffer).write_to(&*file);
        self.file = file;
        again.map_err(io("append to", &self.path))
    }
}

/// What a file system answers that takes the flag but not the write.
const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Fails one write: the one that this many are before, with this error.
    #[derive(Debug)]
    struct Failing {
        left: Arc<AtomicUsize>,
        error: i32,
        /// Every write to a file opened for direct writes fails, and no other.
        always: bool,
    }

    #[derive(Debug)]
    struct FailingFile {
        file: Arc<dyn DiskFile>,
        left: Arc<AtomicUsize>,
        error: i32,
        always: bool,
    }

    impl Failing {
        fn wrap(&self, file: Arc<dyn DiskFile>, always: bool) -> Arc<dyn DiskFile> {
            Arc::new(FailingFile {
                file,
                left: Arc::clone(&self.left),
                error: self.error,
                always,
            })
        }
    }

    impl Disk for Failing {
        fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
            RealDisk.create(path)
        }
        fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
            Ok(self.wrap(RealDisk.open(path)?, false))
        }
        fn open_direct(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
            Ok(self.wrap(RealDisk.open(path)?, self.always))
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            RealDisk.rename(from, to)
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            RealDisk.remove(path)
        }
        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            RealDisk.sync_dir(dir)
        }
    }

    impl DiskFile for FailingFile {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.file.read_exact_at(buf, offset)
        }
        fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            let before = self.left.fetch_sub(1, Ordering::SeqCst);
            if self.always || before == 1 {
                return Err(io::Error::from_raw_os_error(self.error));
            }
            self.file.write_all_at(buf, offset)
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.file.set_len(len)
        }
        fn size(&self) -> io::Result<u64> {
            self.file.size()
        }
        fn sync_data(&self) -> io::Result<()> {
            self.file.sync_data()
        }
    }

    /// Five buffers and a bit; no two blocks of them are equal.
    fn bytes() -> Vec<u8> {
        (0..350_000u32).flat_map(u32::to_le_bytes).collect()
    }

    fn append(to: &mut Appender, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(70_001) {
            to.push(piece)?;
        }
        to.commit()
    }

    /// A file with one block, and an appender behind that.
    fn begin(dir: &Path, disk: Arc<dyn Disk>) -> (PathBuf, Appender) {
        let path = dir.join("pack");
        std::fs::write(&path, vec![7; BLOCK]).unwrap();
        let appender = Appender::open(&disk, &path, BLOCK as u64).unwrap();
        (path, appender)
    }

    fn holds(path: &Path, bytes: &[u8]) -> bool {
        let file = std::fs::read(path).unwrap();
        file.len().is_multiple_of(BLOCK)
            && file.len() < BLOCK + bytes.len() + 3 * BLOCK
            && file[..BLOCK].iter().all(|b| *b == 7)
            && &file[BLOCK..BLOCK + bytes.len()] == bytes
    }

    #[test]
    fn buffers_that_are_written_behind_lie_in_order() {
        let (dir, bytes) = (tempfile::tempdir().unwrap(), bytes());
        let (path, mut appender) = begin(dir.path(), Arc::new(RealDisk));
        append(&mut appender, &bytes).unwrap();
        assert!(holds(&path, &bytes));
        // And once more behind it.
        let end = appender.position();
        assert_eq!(end, std::fs::metadata(&path).unwrap().len());
        append(&mut appender, &bytes[..1000]).unwrap();
        let file = std::fs::read(&path).unwrap();
        let end = usize::try_from(end).unwrap();
        assert_eq!(&file[end..end + 1000], &bytes[..1000]);
    }

    #[test]
    fn a_write_that_fails_behind_is_an_error_and_leaves_the_file_as_it_was() {
        let bytes = bytes();
        // Six writes: five full buffers, the rest.
        for nth in 1..=6 {
            let dir = tempfile::tempdir().unwrap();
            let disk = Failing {
                left: Arc::new(AtomicUsize::new(nth)),
                error: rustix::io::Errno::NOSPC.raw_os_error(),
                always: false,
            };
            let (path, mut appender) = begin(dir.path(), Arc::new(disk));
            assert!(append(&mut appender, &bytes).is_err(), "write {nth}");
            appender.rewind(BLOCK as u64).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), BLOCK as u64);
            append(&mut appender, &bytes).unwrap();
            assert!(holds(&path, &bytes), "after write {nth} failed");
        }
    }

    #[test]
    fn what_may_not_be_written_directly_is_written_nevertheless() {
        let (dir, bytes) = (tempfile::tempdir().unwrap(), bytes());
        let disk = Failing {
            left: Arc::new(AtomicUsize::new(usize::MAX)),
            error: EINVAL,
            always: true,
        };
        let (path, mut appender) = begin(dir.path(), Arc::new(disk));
        append(&mut appender, &bytes).unwrap();
        assert!(holds(&path, &bytes));
    }
}
