//! Small files that must survive a power cut: written whole, fsynced, renamed, directory fsynced.
//! Refuses to know what is in them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Replace `path` by `bytes`; after `Ok` the new content survives a power cut, after a crash in
/// between the old or the new content is there, never a mixture.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = parent(path)?;
    let mut part = path.as_os_str().to_owned();
    part.push(".tmp");
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&part, path)?;
    sync_dir(directory)
}

/// Remove `path` if it is there; durable after `Ok`.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Make what was created, renamed or removed in `directory` durable.
pub(crate) fn sync_dir(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path without a parent"))
}
