//! The bytes of one snapshot file. Knows no directory.
//!
//! ```text
//! header   "MSTSNAP\0"  version u32  meta length u32  crc32 of these and meta  meta
//! entry    1u8  key length u32  value length u64  key  value          (keys strictly ascending)
//! end      0u8  number of entries u64  BLAKE3 of every byte before it (32)
//! ```
//! All integers are little-endian.

use super::encode::{SnapshotEncoder, length};
use crate::disk::{Disk, DiskFile, io_error};
use crate::{Result, StorageError};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"MSTSNAP\0";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 20;
pub(super) const ENTRY: u8 = 1;
pub(super) const END: u8 = 0;
/// Written at once.
const BUFFER_LEN: usize = 1 << 20;
/// Synced as it grows: one sync of everything would hold up those of the log on the same disk.
const SYNC_EVERY: u64 = 4 << 20;
/// Largest key, value and meta: a limit so that a length is never believed blindly.
pub(super) const LEN_MAX: u64 = 1 << 30;

/// What a verified snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Caller's meta.
    pub meta: Vec<u8>,
    /// Keys.
    pub entries: u64,
    /// Length of the file.
    pub bytes: u64,
    /// BLAKE3 over all of the file but these last 32 bytes.
    pub digest: [u8; 32],
}

/// A file being written: whole and synced when [`Output::finish`] returns.
pub(super) struct Output {
    file: std::sync::Arc<dyn DiskFile>,
    path: PathBuf,
    encoder: SnapshotEncoder,
    buffer: Vec<u8>,
    written: u64,
    synced: u64,
}

impl Output {
    pub(super) fn create(disk: &dyn Disk, path: &Path, meta: &[u8]) -> Result<Self> {
        let mut buffer = Vec::with_capacity(BUFFER_LEN);
        Ok(Self {
            encoder: SnapshotEncoder::begin(meta, &mut buffer)?,
            file: disk.create(path).map_err(io_error("create", path))?,
            path: path.to_path_buf(),
            buffer,
            written: 0,
            synced: 0,
        })
    }

    pub(super) fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.encoder.entry(key, value, &mut self.buffer)?;
        if self.buffer.len() >= BUFFER_LEN {
            self.write_out()?;
        }
        Ok(())
    }

    fn write_out(&mut self) -> Result<()> {
        self.file
            .write_all_at(&self.buffer, self.written)
            .map_err(io_error("write", &self.path))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER_LEN);
        if self.written - self.synced >= SYNC_EVERY {
            self.synced = self.written;
            let synced = self.file.sync_data();
            synced.map_err(io_error("sync", &self.path))?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<()> {
        let Self {
            file,
            path,
            encoder,
            mut buffer,
            written,
            synced: _,
        } = self;
        encoder.end(&mut buffer);
        file.write_all_at(&buffer, written)
            .map_err(io_error("write", &path))?;
        file.sync_data().map_err(io_error("sync", &path))
    }
}

pub(super) fn header(meta: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + meta.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&length(meta.len())?.to_le_bytes());
    bytes.extend_from_slice(&header_crc(&bytes, meta).to_le_bytes());
    bytes.extend_from_slice(meta);
    Ok(bytes)
}

fn header_crc(fixed: &[u8], meta: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fixed);
    hasher.update(meta);
    hasher.finalize()
}

/// Reads entries of a file that was verified as a whole when it was opened; uses constant memory.
#[derive(Debug)]
pub struct SnapshotReader {
    input: Input,
    info: SnapshotInfo,
}

impl SnapshotReader {
    /// Verify the whole file, then start again at its first entry.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io_error("open", path))?;
        Self::of(path, file)
    }

    /// The same of a file that is open already; `path` is for messages, the file may be gone from there.
    pub fn of(path: &Path, file: File) -> Result<Self> {
        let second = file.try_clone().map_err(io_error("open", path))?;
        let info = verify_file(Input::new(path, file)?)?;
        let mut input = Input::new(path, second)?;
        input.header()?;
        Ok(Self { input, info })
    }

    /// What the file is.
    pub fn info(&self) -> &SnapshotInfo {
        &self.info
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.input.path
    }

    /// Start again at the first entry.
    pub fn rewind(&mut self) -> Result<()> {
        self.input.restart()?;
        self.input.header().map(drop)
    }

    /// The entries from here on.
    pub fn entries(&mut self) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>)>> + '_ {
        std::iter::from_fn(|| self.next_entry().transpose())
    }

    /// The next key and value.
    pub fn next_entry(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        self.input.entry()
    }
}

/// Read a whole file and check everything; uses constant memory.
pub fn verify(path: &Path) -> Result<SnapshotInfo> {
    let file = File::open(path).map_err(io_error("open", path))?;
    verify_file(Input::new(path, file)?)
}

/// Meta from the header, which has a checksum of its own.
pub(super) fn read_meta(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(io_error("open", path))?;
    Input::new(path, file)?.header()
}

fn verify_file(mut input: Input) -> Result<SnapshotInfo> {
    let meta = input.header()?;
    let mut last: Option<Vec<u8>> = None;
    let mut entries = 0u64;
    while let Some((key, _)) = input.entry()? {
        if last.as_ref().is_some_and(|last| *last >= key) {
            return Err(input.damaged("its keys are not in order"));
        }
        last = Some(key);
        entries += 1;
    }
    let count = u64::from_le_bytes(input.array()?);
    let digest = *input.hasher.finalize().as_bytes();
    let claimed: [u8; 32] = input.array()?;
    if digest != claimed || count != entries {
        return Err(input.damaged("its content does not match its checksum"));
    }
    if input.left != 0 {
        return Err(input.damaged("bytes follow its end"));
    }
    Ok(SnapshotInfo {
        meta,
        entries,
        bytes: input.len,
        digest,
    })
}

#[derive(Debug)]
struct Input {
    path: PathBuf,
    reader: BufReader<File>,
    hasher: Box<blake3::Hasher>,
    len: u64,
    left: u64,
}

impl Input {
    fn new(path: &Path, file: File) -> Result<Self> {
        let len = file.metadata().map_err(io_error("read", path))?.len();
        let mut input = Self {
            path: path.to_path_buf(),
            reader: BufReader::with_capacity(1 << 18, file),
            hasher: Box::default(),
            len,
            left: len,
        };
        input.restart()?;
        Ok(input)
    }

    fn restart(&mut self) -> Result<()> {
        self.reader.rewind().map_err(io_error("read", &self.path))?;
        self.hasher.reset();
        self.left = self.len;
        Ok(())
    }

    fn damaged(&self, what: &str) -> StorageError {
        StorageError::Corrupt {
            path: self.path.clone(),
            detail: what.to_owned(),
        }
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        if buf.len() as u64 > self.left {
            return Err(self.damaged("it ends too early"));
        }
        self.reader
            .read_exact(buf)
            .map_err(io_error("read", &self.path))?;
        self.left -= buf.len() as u64;
        self.hasher.update(buf);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// A field of a claimed length, which is checked before memory is taken for it.
    fn bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        if len > LEN_MAX || len > self.left {
            return Err(self.damaged("a length in it is impossible"));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn header(&mut self) -> Result<Vec<u8>> {
        let fixed: [u8; 16] = self.array()?;
        let crc = u32::from_le_bytes(self.array()?);
        if &fixed[..8] != MAGIC {
            return Err(self.damaged("it is not a snapshot file"));
        }
        let field = |at: usize| {
            u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]])
        };
        let meta = self.bytes(u64::from(field(12)))?;
        if crc != header_crc(&fixed, &meta) {
            return Err(self.damaged("its header does not match its checksum"));
        }
        if field(8) != VERSION {
            return Err(StorageError::Foreign(format!(
                "{} is a snapshot of format {}, which another release wrote; use a release that reads it",
                self.path.display(),
                field(8)
            )));
        }
        Ok(meta)
    }

    fn entry(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        match self.array::<1>()?[0] {
            ENTRY => {
                let key_len = u32::from_le_bytes(self.array()?);
                let value_len = u64::from_le_bytes(self.array()?);
                let key = self.bytes(u64::from(key_len))?;
                let value = self.bytes(value_len)?;
                Ok(Some((key, value)))
            }
            END => Ok(None),
            _ => Err(self.damaged("an entry in it has an unknown kind")),
        }
    }
}
