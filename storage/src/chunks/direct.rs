//! Appending to a file with aligned direct writes: full speed of the disk without filling the page
//! cache. Where the file system refuses direct writes, the same bytes are written buffered.

use super::io;
use super::record::{HEADER_LEN, Header};
use crate::Result;
use crate::disk::{Disk, DiskFile};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Direct writes start and end at multiples of this, and so do batches: a block that holds
/// something acknowledged is never written again.
pub(super) const BLOCK: usize = 4096;
/// Bytes gathered before they are written.
const BUFFER: usize = 8 << 20;

/// Writes at the end of one file.
pub(super) struct Appender {
    disk: Arc<dyn Disk>,
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    direct: bool,
    /// Over-allocated; the aligned part starts at `start` and is never moved.
    memory: Vec<u8>,
    start: usize,
    filled: usize,
    /// File offset of the buffer's first byte; a multiple of [`BLOCK`].
    offset: u64,
}

impl Appender {
    /// Append to `path` at `offset` (a multiple of [`BLOCK`]).
    pub(super) fn open(disk: &Arc<dyn Disk>, path: &Path, offset: u64) -> Result<Self> {
        let (file, direct) = match disk.open_direct(path) {
            Ok(file) => (file, true),
            Err(_) => (disk.open(path).map_err(io("open", path))?, false),
        };
        let memory = vec![0; BUFFER + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Ok(Self {
            disk: Arc::clone(disk),
            file,
            path: path.to_owned(),
            direct,
            memory,
            start,
            filled: 0,
            offset,
        })
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.filled as u64
    }

    /// Append; may or may not reach the file before [`Appender::commit`].
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let take = bytes.len().min(BUFFER - self.filled);
            let at = self.start + self.filled;
            self.memory[at..at + take].copy_from_slice(&bytes[..take]);
            self.filled += take;
            bytes = &bytes[take..];
            if self.filled == BUFFER {
                self.write_out()?;
            }
        }
        Ok(())
    }

    /// Fill up to a whole block, write what is gathered, and make everything durable.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.pad()?;
        self.write_out()?;
        self.file.sync_data().map_err(io("fdatasync", &self.path))
    }

    /// Give up what was pushed after `offset`: the file ends there again.
    pub(super) fn rewind(&mut self, offset: u64) -> Result<()> {
        self.filled = 0;
        self.offset = offset;
        self.file
            .set_len(offset)
            .map_err(io("truncate", &self.path))
    }

    fn pad(&mut self) -> Result<()> {
        let over = self.filled % BLOCK;
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

    fn write_out(&mut self) -> Result<()> {
        let bytes = &self.memory[self.start..self.start + self.filled];
        let written = self.file.write_all_at(bytes, self.offset);
        let refused = written
            .as_ref()
            .is_err_and(|e| e.raw_os_error() == Some(EINVAL));
        if refused && self.direct {
            self.file = self.disk.open(&self.path).map_err(io("open", &self.path))?;
            self.direct = false;
            self.file
                .write_all_at(bytes, self.offset)
                .map_err(io("append to", &self.path))?;
        } else {
            written.map_err(io("append to", &self.path))?;
        }
        self.offset += self.filled as u64;
        self.filled = 0;
        Ok(())
    }
}

/// What a file system answers that takes the flag but not the write.
const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();
