//! A saved snapshot on its way to disk: under a temporary name until it was read again and found good,
//! then under its own. Whatever happens, the file of that name is whole or the former one.

use super::inspect::{Inspected, inspect};
use anyhow::{Context as _, bail};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Ends the temporary name.
const SUFFIX: &str = ".partial";

/// A file that is being received. Dropped, it is removed.
#[derive(Debug)]
pub struct Partial {
    file: File,
    path: PathBuf,
    target: PathBuf,
    replace: bool,
    finished: bool,
}

impl Partial {
    /// For `target`; what an interrupted attempt left is overwritten. `replace`: an existing `target` may go.
    pub fn create(target: &Path, replace: bool) -> anyhow::Result<Self> {
        let Some(name) = target.file_name() else {
            bail!("{} is not the name of a file", target.display())
        };
        if target.is_dir() {
            bail!("{} is a directory: name a file in it", target.display());
        }
        if !replace && target.exists() {
            bail!(
                "{} exists: choose another name, or add --force to replace it",
                target.display()
            );
        }
        let mut name = name.to_owned();
        name.push(SUFFIX);
        let path = target.with_file_name(name);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another process is saving to {}: choose another name",
                target.display()
            ),
            Err(TryLockError::Error(e)) => Err(e)?,
        }
        let mut partial = Self {
            file,
            path,
            target: target.to_owned(),
            replace,
            finished: false,
        };
        partial.restart()?;
        Ok(partial)
    }

    /// Begin again: what was received so far came from a member that failed.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        use std::io::Seek;
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Append.
    pub fn write(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        self.file
            .write_all(piece)
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Read it all again and check it.
    pub fn check(&self) -> anyhow::Result<Inspected> {
        inspect(&self.path)
    }

    /// Give it its name. Durable on return.
    pub fn finish(mut self) -> anyhow::Result<()> {
        let target = self.target.display();
        self.file
            .sync_all()
            .with_context(|| format!("cannot sync {}", self.path.display()))?;
        if !self.replace && self.target.exists() {
            bail!("{target} appeared meanwhile: choose another name, or add --force to replace it");
        }
        std::fs::rename(&self.path, &self.target)
            .with_context(|| format!("cannot rename {} to {target}", self.path.display()))?;
        self.finished = true;
        sync_dir_of(&self.target).with_context(|| format!("cannot sync the directory of {target}"))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: the next attempt overwrites what stays.
            std::fs::remove_file(&self.path).ok();
        }
    }
}

fn sync_dir_of(file: &Path) -> std::io::Result<()> {
    let dir = file
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}
