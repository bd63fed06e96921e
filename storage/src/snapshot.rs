//! Snapshot files: a header (format version, caller's meta), keys and values, a checksum at the end.
//! Written to a temporary name, fsynced, renamed, directory fsynced; a reader verifies while it reads.
//! Knows nothing of what the keys mean.

mod encode;
mod file;

pub use encode::SnapshotEncoder;
pub use file::{SnapshotInfo, SnapshotReader, verify};

use crate::disk::{Disk, RealDisk, create_dir_durable, file_names, io_error};
use crate::{Result, StorageError};
use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Ends the name of a whole snapshot.
const SUFFIX: &str = ".snap";
/// Ends the name of one being written here.
const TEMP_SUFFIX: &str = ".tmp";
/// Ends the name of one being received.
const INCOMING_SUFFIX: &str = ".incoming";
/// Longest snapshot id: it becomes part of a file name.
const NAME_LEN_MAX: usize = 200;

/// A directory that keeps the newest snapshot file (and at most one being written or received).
///
/// Files are named `<order>-<name>.snap`; the highest order is the newest. A file that has this name is
/// whole: it was synced before it was renamed.
#[derive(Debug)]
pub struct SnapshotDir {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    /// Order of the newest file; held while one is made current.
    newest: Mutex<u64>,
    /// A damaged one was discarded, and no other has taken its place.
    lacking: AtomicBool,
}

impl SnapshotDir {
    /// Open or create; removes what a crash left half written.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_on(dir, Arc::new(RealDisk))
    }

    /// Open or create on another disk.
    pub fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        create_dir_durable(&*disk, dir)?;
        for name in file_names(dir)? {
            if name.ends_with(TEMP_SUFFIX) || name.ends_with(INCOMING_SUFFIX) {
                let path = dir.join(name);
                disk.remove(&path).map_err(io_error("remove", &path))?;
            }
        }
        let opened = Self {
            dir: dir.to_path_buf(),
            disk,
            newest: Mutex::new(0),
            lacking: AtomicBool::new(false),
        };
        if let Some((order, _)) = opened.newest()? {
            *opened.newest.lock() = order;
            opened.drop_older(order)?;
        }
        Ok(opened)
    }

    /// Write a whole snapshot, durable on return, and drop older ones. `name` is the snapshot id. Uses
    /// constant memory. Keys must come in order.
    pub fn write(
        &self,
        name: &str,
        meta: &[u8],
        entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
    ) -> Result<PathBuf> {
        let mut writer = self.begin(name, meta)?;
        for (key, value) in entries {
            writer.put(&key, &value)?;
        }
        writer.finish()
    }

    /// Begin a snapshot that is written entry by entry.
    pub fn begin(&self, name: &str, meta: &[u8]) -> Result<SnapshotWriter<'_>> {
        check_name(name)?;
        let temp = self.dir.join(format!("{name}{TEMP_SUFFIX}"));
        Ok(SnapshotWriter {
            output: Some(file::Output::create(&*self.disk, &temp, meta)?),
            dir: self,
            temp,
            name: name.to_owned(),
        })
    }

    /// A fresh path to receive a snapshot into; [`SnapshotDir::adopt`] makes it current. `name` is
    /// reduced to what a file name may hold, so that a name from outside never leaves the directory.
    pub fn incoming(&self, name: &str) -> PathBuf {
        let safe: String = name
            .chars()
            .filter(|c| is_name_char(*c))
            .take(NAME_LEN_MAX)
            .collect();
        self.dir.join(format!("in-{safe}{INCOMING_SUFFIX}"))
    }

    /// Verify a received file and make it the current one, durable on return.
    pub fn adopt(&self, incoming: &Path, name: &str) -> Result<PathBuf> {
        file::verify(incoming)?;
        self.adopt_verified(incoming, name)
    }

    /// The same of a file that was verified: a [`SnapshotReader`] has read it.
    pub fn adopt_verified(&self, incoming: &Path, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        let file = self
            .disk
            .open(incoming)
            .map_err(io_error("open", incoming))?;
        file.sync_data().map_err(io_error("sync", incoming))?;
        self.make_current(incoming, name)
    }

    /// The newest whole snapshot: path and meta. Only its header is verified: [`read`], [`verify`] and
    /// [`SnapshotReader`] verify the rest.
    pub fn current(&self) -> Result<Option<(PathBuf, Vec<u8>)>> {
        let _no_change = self.newest.lock();
        match self.newest()? {
            Some((_, path)) => {
                let meta = file::read_meta(&path)?;
                Ok(Some((path, meta)))
            }
            None => Ok(None),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Remove a file that was found damaged, so that another is made.
    pub fn discard(&self, path: &Path) -> Result<()> {
        let _no_change = self.newest.lock();
        tracing::warn!(path = %path.display(), "this snapshot file is damaged and is discarded: another one is made from the state");
        match self.disk.remove(path) {
            Ok(()) => {}
            // A newer one has taken its place meanwhile.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io_error("remove", path)(e)),
        }
        self.lacking.store(true, Ordering::SeqCst);
        self.disk
            .sync_dir(&self.dir)
            .map_err(io_error("sync directory", &self.dir))
    }

    /// Was a damaged one discarded, and has no other taken its place?
    pub fn lacking(&self) -> bool {
        self.lacking.load(Ordering::SeqCst)
    }

    fn make_current(&self, from: &Path, name: &str) -> Result<PathBuf> {
        let mut newest = self.newest.lock();
        let order = *newest + 1;
        let path = self.dir.join(format!("{order:020}-{name}{SUFFIX}"));
        self.disk
            .rename(from, &path)
            .map_err(io_error("rename", from))?;
        self.disk
            .sync_dir(&self.dir)
            .map_err(io_error("sync directory", &self.dir))?;
        *newest = order;
        self.lacking.store(false, Ordering::SeqCst);
        self.drop_older(order)?;
        Ok(path)
    }

    /// A reader that has an older file open keeps it until it closes it.
    fn drop_older(&self, order: u64) -> Result<()> {
        for name in file_names(&self.dir)? {
            if order_of(&name).is_some_and(|o| o < order) {
                let path = self.dir.join(name);
                self.disk.remove(&path).map_err(io_error("remove", &path))?;
            }
        }
        Ok(())
    }

    fn newest(&self) -> Result<Option<(u64, PathBuf)>> {
        let names = file_names(&self.dir)?;
        let newest = names
            .into_iter()
            .filter_map(|name| Some((order_of(&name)?, self.dir.join(&name))))
            .max();
        Ok(newest)
    }
}

/// A snapshot on its way; dropped before it is finished, it leaves nothing.
pub struct SnapshotWriter<'a> {
    dir: &'a SnapshotDir,
    output: Option<file::Output>,
    temp: PathBuf,
    name: String,
}

impl SnapshotWriter<'_> {
    /// The next entry. Keys must ascend.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match &mut self.output {
            Some(output) => output.put(key, value),
            None => Err(StorageError::Misuse("the snapshot is finished".into())),
        }
    }

    /// Make it the current one, durable on return, and drop older ones.
    pub fn finish(mut self) -> Result<PathBuf> {
        if let Some(output) = self.output.take() {
            output.finish()?;
        }
        self.dir.make_current(&self.temp, &self.name)
    }
}

impl Drop for SnapshotWriter<'_> {
    fn drop(&mut self) {
        if self.output.take().is_some() {
            // Best effort: what stays is removed when the directory is opened next.
            let _ = self.dir.disk.remove(&self.temp);
        }
    }
}

fn order_of(name: &str) -> Option<u64> {
    let (order, _) = name.strip_suffix(SUFFIX)?.split_once('-')?;
    (order.len() == 20).then(|| order.parse().ok())?
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > NAME_LEN_MAX || !name.chars().all(is_name_char) {
        return Err(StorageError::Misuse(format!(
            "snapshot name {name:?}: use 1 to {NAME_LEN_MAX} letters, digits, '-', '_' and '.'"
        )));
    }
    Ok(())
}

/// A verified snapshot in memory.
#[derive(Debug)]
pub struct SnapshotContent {
    /// Caller's meta.
    pub meta: Vec<u8>,
    /// Keys and values in key order.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Read and verify a snapshot file (checksum over everything) before anything of it is used.
pub fn read(path: &Path) -> Result<SnapshotContent> {
    let mut reader = SnapshotReader::open(path)?;
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        entries.push(entry);
    }
    Ok(SnapshotContent {
        meta: reader.info().meta.clone(),
        entries,
    })
}
