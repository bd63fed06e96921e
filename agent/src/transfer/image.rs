//! The local file: where its holes are, what its chunks hash to, and aligned writes into it.
//! Everything here blocks.

use super::{CHUNK_LEN, Id, ZERO_CHUNK, chunk_len_at};
use rustix::fs::{FallocateFlags, SeekFrom};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Alignment of direct writes.
const BLOCK: usize = 4096;
/// A chunk's length in memory.
pub(super) const CHUNK: usize = 64 << 10;

/// Byte ranges that hold data, ascending; all of it where the file system cannot tell.
pub(super) fn data_ranges(file: &File, size: u64) -> std::io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                return Ok(std::iter::once(0..size).collect());
            }
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        if start >= size || end <= start {
            break;
        }
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// Does any of `ranges` touch `span`?
pub(super) fn touches(ranges: &[Range<u64>], span: &Range<u64>) -> bool {
    let next = ranges.partition_point(|r| r.end <= span.start);
    ranges.get(next).is_some_and(|r| r.start < span.end)
}

/// Names of the chunks with these numbers; holes are not read.
pub(super) fn hash_chunks(
    file: &File,
    size: u64,
    ranges: &[Range<u64>],
    chunks: Range<u64>,
) -> std::io::Result<Vec<Id>> {
    // 1 MiB at a time: fewer calls, and room for the kernel to read ahead.
    const STRIDE: u64 = 16;
    let mut ids = Vec::with_capacity(usize::try_from(chunks.end - chunks.start).unwrap_or(0));
    let mut buffer = vec![0; STRIDE as usize * CHUNK];
    let mut at = chunks.start;
    while at < chunks.end {
        let until = (at + STRIDE).min(chunks.end);
        let span = at * CHUNK_LEN..(until * CHUNK_LEN).min(size);
        if touches(ranges, &span) {
            let buffer = &mut buffer[..(span.end - span.start) as usize];
            file.read_exact_at(buffer, span.start)?;
            ids.extend(buffer.chunks(CHUNK).map(name_of));
        } else {
            ids.extend((at..until).map(|_| ZERO_CHUNK));
        }
        at = until;
    }
    Ok(ids)
}

/// A chunk's name: zeros have their own.
pub fn name_of(chunk: &[u8]) -> Id {
    if is_zero(chunk) {
        ZERO_CHUNK
    } else {
        *blake3::hash(chunk).as_bytes()
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    bytes.chunks(BLOCK).all(|b| *b == ZEROS[..b.len()])
}

/// Memory for direct writes, in slots of one chunk.
pub(super) struct Slots {
    memory: Vec<u8>,
    start: usize,
}

impl Slots {
    pub(super) fn new(count: usize) -> Self {
        let memory = vec![0; count * CHUNK + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self { memory, start }
    }

    /// Slots `range` as one slice.
    pub(super) fn get(&self, range: Range<usize>) -> &[u8] {
        &self.memory[self.start + range.start * CHUNK..self.start + range.end * CHUNK]
    }

    pub(super) fn slot(&mut self, number: usize) -> &mut [u8] {
        let at = self.start + number * CHUNK;
        &mut self.memory[at..at + CHUNK]
    }
}

/// A file that is being made equal to an image.
pub(super) struct Target {
    file: File,
    /// For whole aligned chunks, where the file system takes it: keeps a large pull from filling
    /// the page cache and stalling in the last fsync.
    direct: Option<File>,
    pub(super) size: u64,
}

impl Target {
    /// Open or create `path` with exactly `size` bytes; what it holds stays.
    pub(super) fn open(path: &Path, size: u64) -> std::io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_len(size)?;
        let flag = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
        let direct = OpenOptions::new()
            .write(true)
            .custom_flags(flag)
            .open(path)
            .ok();
        Ok(Self { file, direct, size })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Write consecutive chunks from `first` on; `bytes` begins at an aligned address.
    pub(super) fn write(&self, first: u64, bytes: &[u8]) -> std::io::Result<()> {
        let at = first * CHUNK_LEN;
        let whole = bytes.len() / CHUNK * CHUNK;
        let (whole, tail) = bytes.split_at(whole);
        let refused = match &self.direct {
            Some(direct) => match direct.write_all_at(whole, at) {
                Ok(()) => false,
                Err(e) if e.kind() == ErrorKind::InvalidInput => true,
                Err(e) => return Err(e),
            },
            None => true,
        };
        if refused {
            self.file.write_all_at(whole, at)?;
        }
        self.file.write_all_at(tail, at + whole.len() as u64)
    }

    /// Make a chunk read as zeros.
    pub(super) fn zero(&self, number: u64) -> std::io::Result<()> {
        let (at, len) = (number * CHUNK_LEN, chunk_len_at(self.size, number));
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.file, flags, at, len).is_ok() {
            return Ok(());
        }
        let zeros =
            vec![0; usize::try_from(len).map_err(|e| Error::new(ErrorKind::InvalidInput, e))?];
        self.file.write_all_at(&zeros, at)
    }

    /// Everything durable, and findable by its name.
    pub(super) fn sync(&self, path: &Path) -> std::io::Result<()> {
        self.file.sync_all()?;
        let dir = path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(dir)?.sync_all()
    }
}
