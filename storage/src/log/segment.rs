//! Segment files: their names, the files that are open, and creating and deleting them durably.

use super::record::{HEADER_LEN, Place, Record, Start, decode};
use crate::disk::{Disk, DiskFile, io_error};
use crate::{Result, StorageError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One file of the log.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn DiskFile>,
    /// Bytes of records in it.
    pub(super) len: u64,
    /// Highest entry that was ever written to it: once that is purged nothing in it is needed.
    pub(super) highest: Option<u64>,
}

/// `00000000000000000007.wal`.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.wal"))
}

/// The number in a segment's file name.
pub(super) fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".wal")?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

/// Create a segment that begins with `start`; it and its name are durable on return.
pub(super) fn create(disk: &dyn Disk, dir: &Path, number: u64, start: Start) -> Result<Segment> {
    let path = path(dir, number);
    let mut bytes = Vec::new();
    let place = Place {
        segment: number,
        offset: 0,
        durable: 0,
    };
    Record::Start(start).encode(place, &mut bytes);
    let file = disk.create(&path).map_err(io_error("create", &path))?;
    file.write_all_at(&bytes, 0)
        .map_err(io_error("write", &path))?;
    file.sync_data().map_err(io_error("sync", &path))?;
    disk.sync_dir(dir)
        .map_err(io_error("sync directory", dir))?;
    Ok(Segment {
        number,
        path,
        file,
        len: bytes.len() as u64,
        highest: None,
    })
}

/// Read back and verify the entry written at `offset`.
pub(super) fn read_entry(
    segment: &Segment,
    offset: u64,
    len: usize,
    index: u64,
) -> Result<bytes::Bytes> {
    let mut buf = vec![0; HEADER_LEN + 8 + len];
    segment
        .file
        .read_exact_at(&mut buf, offset)
        .map_err(io_error("read", &segment.path))?;
    match decode(&buf, 0, offset, segment.number) {
        Ok(found) => match found.record {
            Record::Entry(at, bytes) if at == index => Ok(bytes),
            other => Err(StorageError::corrupt(
                &segment.path,
                format!("at byte {offset}: expected entry {index}, found {other:?}"),
            )),
        },
        Err(_) => Err(StorageError::corrupt(
            &segment.path,
            format!("at byte {offset}: entry {index} does not match its checksum"),
        )),
    }
}

/// Delete files that are not needed any more, oldest first, then make that durable. A file that
/// cannot be deleted costs room, not correctness: it is left for the next start.
pub(super) fn delete(disk: &dyn Disk, dir: &Path, gone: &[Segment]) {
    if gone.is_empty() {
        return; // Called after every batch: an fsync of the directory each time doubled its cost.
    }
    for segment in gone {
        if let Err(error) = disk.remove(&segment.path) {
            tracing::warn!(path = %segment.path.display(), %error, "cannot delete a purged log segment");
            return;
        }
    }
    if let Err(error) = disk.sync_dir(dir) {
        tracing::warn!(path = %dir.display(), %error, "cannot sync the log directory after a purge");
    }
}
