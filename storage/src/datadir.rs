//! A member's data directory: who it belongs to, which format it has, and the lock on it.
//! Knows nothing of what its parts hold.
//!
//! ```text
//! missing or empty -> lock -> identity written (tmp, fsync, rename, fsync) -> ours
//! ours             -> lock -> identity verified
//! being rebuilt    -> refused: the command that was interrupted must be run again
//! anything else    -> refused, nothing touched
//! ```
//!
//! A command that rebuilds a directory which no member runs on ([`DataDir::attach`]) brackets its work by
//! [`DataDir::begin`] and [`DataDir::done`]: in between, no member starts on it, also after a crash.

use crate::disk::{Disk, RealDisk, create_dir_durable, io_error, replace_file};
use crate::error::repair_hint;
use crate::{Result, StorageError};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"MAINSTAY";
/// Format of the whole directory. Raised when an older release could not read it any more; an
/// upgrade is a step from each version to the next.
const FORMAT: u32 = 1;
const IDENTITY: &str = "identity";
const IDENTITY_TEMP: &str = "identity.tmp";
const LOCK: &str = "lock";
/// Holds the command that rebuilds the directory, while it does.
const UNFINISHED: &str = "unfinished";
const UNFINISHED_TEMP: &str = "unfinished.tmp";
const CHUNKS: &str = "chunks";
pub(crate) const PARTS: [&str; 4] = ["log", "state", "snapshots", CHUNKS];
/// An identity is small; a longer file is not one.
const IDENTITY_LEN_MAX: u64 = 16 << 20;

/// Who this data directory belongs to. Written once, fsynced; `cluster_id` is filled in at founding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random, nonzero; never reused: a wiped directory gets another.
    pub member_id: u64,
    /// The member's name in the member list.
    pub name: String,
    /// The cluster it is part of; `None` until founded or joined.
    pub cluster_id: Option<String>,
    /// Release that created it.
    pub created_by: String,
    /// The founding protocol's promise and acceptance, opaque here.
    pub founding: Option<Vec<u8>>,
}

/// An open, locked data directory with its sub-directories:
/// `log/`, `state/`, `snapshots/`, `chunks/`. The lock is released when it is dropped.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    disk: Arc<dyn Disk>,
    _lock: File,
}

impl DataDir {
    /// Open or create and lock. `fresh` makes the identity of a new directory. Refuses a directory
    /// of another format version or of another program, with a sentence that says what to do.
    pub fn open(root: &Path, fresh: impl FnOnce() -> Identity) -> Result<(Self, Identity)> {
        Self::open_on(root, Arc::new(RealDisk), fresh)
    }

    /// Open on another disk.
    pub fn open_on(
        root: &Path,
        disk: Arc<dyn Disk>,
        fresh: impl FnOnce() -> Identity,
    ) -> Result<(Self, Identity)> {
        if root.exists() {
            refuse_strangers(root)?;
        }
        let dir = Self::locked(root, disk)?;
        if let Some(command) = dir.unfinished()? {
            return Err(StorageError::Foreign(format!(
                "{} was left half way by a command that was interrupted; run it again: `{command}`",
                root.display()
            )));
        }
        let identity = match dir.identity()? {
            Some(identity) => identity,
            None => {
                let identity = fresh();
                dir.save(&identity)?;
                tracing::info!(
                    path = %root.display(), member = identity.member_id, name = %identity.name,
                    "created a data directory"
                );
                identity
            }
        };
        dir.create_parts()?;
        Ok((dir, identity))
    }

    /// Lock a directory that is ours, or an empty or missing one (which is created), for a command that
    /// rebuilds it. Nothing in it is read or changed; no member can start on it meanwhile.
    pub fn attach(root: &Path) -> Result<Self> {
        if root.exists() {
            refuse_strangers(root)?;
        }
        Self::locked(root, Arc::new(RealDisk))
    }

    fn locked(root: &Path, disk: Arc<dyn Disk>) -> Result<Self> {
        create_dir_durable(&*disk, root)?;
        Ok(Self {
            root: root.to_path_buf(),
            disk,
            _lock: lock(root)?,
        })
    }

    /// From now on, and after any crash, no member starts here: it is told to run `command` again.
    /// Durable on return.
    pub fn begin(&self, command: &str) -> Result<()> {
        let (path, temp) = (self.path(UNFINISHED), self.path(UNFINISHED_TEMP));
        replace_file(&*self.disk, &path, &temp, command.as_bytes())
    }

    /// Everything is in place: a member may start here. Durable on return.
    pub fn done(&self) -> Result<()> {
        let path = self.path(UNFINISHED);
        self.disk.remove(&path).map_err(io_error("remove", &path))?;
        self.sync_root()
    }

    /// The command that began and has not finished.
    pub fn unfinished(&self) -> Result<Option<String>> {
        let path = self.path(UNFINISHED);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }

    /// Empty log, state and snapshots, and leave the chunks. Only between [`DataDir::begin`] and
    /// [`DataDir::done`]: a crash leaves any part of it done.
    pub fn empty(&self) -> Result<()> {
        for part in PARTS.into_iter().filter(|part| *part != CHUNKS) {
            let path = self.path(part);
            match std::fs::remove_dir_all(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(io_error("remove", &path)(e)),
            }
        }
        self.sync_root()?;
        self.create_parts()
    }

    fn create_parts(&self) -> Result<()> {
        for part in PARTS {
            create_dir_durable(&*self.disk, &self.path(part))?;
        }
        Ok(())
    }

    fn sync_root(&self) -> Result<()> {
        self.disk
            .sync_dir(&self.root)
            .map_err(io_error("sync directory", &self.root))
    }

    /// Replace the identity file; durable on return.
    pub fn save(&self, identity: &Identity) -> Result<()> {
        let bytes = encode(identity)?;
        let (path, temp) = (self.path(IDENTITY), self.path(IDENTITY_TEMP));
        replace_file(&*self.disk, &path, &temp, &bytes)
    }

    /// Path of a sub-directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Whose it is; `None` in a new one.
    pub fn identity(&self) -> Result<Option<Identity>> {
        let path = self.path(IDENTITY);
        match std::fs::metadata(&path) {
            Ok(meta) if meta.len() > IDENTITY_LEN_MAX => {
                return Err(StorageError::corrupt(&path, "it is too long"));
            }
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("read", &path)(e)),
        }
        let bytes = std::fs::read(&path).map_err(io_error("read", &path))?;
        decode(&path, &bytes).map(Some)
    }
}

/// A directory with something in it, but without our identity, is somebody else's.
fn refuse_strangers(root: &Path) -> Result<()> {
    if !root.is_dir() {
        return Err(StorageError::Foreign(format!(
            "{} is not a directory; give the path of an empty or new directory",
            root.display()
        )));
    }
    let mut stranger = None;
    for item in std::fs::read_dir(root).map_err(io_error("list", root))? {
        let name = item.map_err(io_error("list", root))?.file_name();
        match name.to_str() {
            Some(IDENTITY | UNFINISHED) => return Ok(()),
            // What our own interrupted creation leaves, and what a new file system has.
            Some(IDENTITY_TEMP | UNFINISHED_TEMP | LOCK | "lost+found") => {}
            _ => stranger = stranger.or(Some(name)),
        }
    }
    match stranger {
        None => Ok(()),
        Some(name) => Err(StorageError::Foreign(format!(
            "{} is not a Mainstay data directory: it holds {name:?} but no file named \"{IDENTITY}\"; \
             give the path of an empty or new directory, or restore the missing file",
            root.display()
        ))),
    }
}

fn lock(root: &Path) -> Result<File> {
    let path = root.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StorageError::Locked(root.to_path_buf())),
        Err(TryLockError::Error(e)) => Err(io_error("lock", &path)(e)),
    }
}

/// Magic, format u32, crc32 of format and body u32, body (bincode).
fn encode(identity: &Identity) -> Result<Vec<u8>> {
    let body = bincode::serde::encode_to_vec(identity, bincode::config::standard())
        .map_err(|e| StorageError::Misuse(format!("identity cannot be written: {e}")))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&checksum(FORMAT, &body).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn checksum(format: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&format.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn decode(path: &Path, bytes: &[u8]) -> Result<Identity> {
    let damaged = |what: &str| StorageError::corrupt(path, what);
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if bytes.get(..8) != Some(MAGIC) {
        return Err(StorageError::Foreign(format!(
            "{} is not a Mainstay identity file; give the path of an empty or new directory; if it was a \
             member's, {}",
            path.display(),
            repair_hint(path)
        )));
    }
    let (Some(format), Some(crc)) = (word(8), word(12)) else {
        return Err(damaged("it is too short"));
    };
    let body = &bytes[16..];
    if crc != checksum(format, body) {
        return Err(damaged("it does not match its checksum"));
    }
    if format != FORMAT {
        return Err(StorageError::Foreign(format!(
            "{} has format {format} and this release reads format {FORMAT}; start the release that wrote it",
            path.display()
        )));
    }
    // The encoding is the standard one; a length in it is not believed beyond this.
    let limits = bincode::config::standard().with_limit::<{ 16 << 20 }>();
    let (identity, used) = bincode::serde::decode_from_slice(body, limits)
        .map_err(|e| damaged(&format!("it cannot be read ({e})")))?;
    if used != body.len() {
        return Err(damaged("bytes follow its end"));
    }
    Ok(identity)
}
