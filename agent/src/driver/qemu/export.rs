//! A VM's disk as one that stands by itself: a copy of its base, with what its overlay says written over it. Every
//! cluster that the VM did not write stays where the base has it, byte by byte, also a compressed one: of such a
//! disk a registry that has the base is sent only what is new. Never `qemu-img commit`: others stand on the base.

use super::super::DriverError;
use super::dir::VmDir;
use super::{QemuDriver, Vm};
use rustix::fs::SeekFrom;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::task::spawn_blocking;

/// Bytes copied at once.
const PIECE: usize = 1 << 20;

impl QemuDriver {
    pub(super) async fn export_locked(
        &self,
        vm: &Arc<Vm>,
        dest: &Path,
    ) -> Result<String, DriverError> {
        let Some(spec) = vm.dir.spec()? else {
            return Err(DriverError::Failed(format!("there is no VM {}", vm.dir.id)));
        };
        if vm.process()?.is_some() {
            return Err(DriverError::Failed(format!("VM {} runs", vm.dir.id)));
        }
        let (base, format) = (&spec.base, spec.base_format.as_str());
        self.tools.check_base(base, format).await?;
        let (from, to) = (base.clone(), dest.to_owned());
        blocking(dest, move || copy(&from, &to)).await?;
        let overlay = vm.dir.file("overlay.qcow2");
        self.tools.lay_over((base, format), &overlay, dest).await?;
        let made = dest.to_owned();
        blocking(dest, move || File::open(made)?.sync_all()).await?;
        Ok(spec.base_format)
    }
}

/// Bytes that base and overlay take on disk: a disk made of both takes no more, but for tables.
pub(super) fn bytes(dir: &VmDir) -> Result<u64, DriverError> {
    let Some(spec) = dir.spec()? else {
        return Err(DriverError::Failed(format!("there is no VM {}", dir.id)));
    };
    let taken = |path: PathBuf| {
        let facts = std::fs::metadata(&path);
        facts
            .map(|m| m.blocks() * 512)
            .map_err(|e| failure(&path, &e))
    };
    Ok(taken(spec.base)? + taken(dir.file("overlay.qcow2"))?)
}

async fn blocking(
    dest: &Path,
    work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
) -> Result<(), DriverError> {
    let done = spawn_blocking(work).await.map_err(std::io::Error::other);
    done.and_then(|done| done).map_err(|e| failure(dest, &e))
}

fn failure(path: &Path, e: &std::io::Error) -> DriverError {
    DriverError::Busy(format!("{}: {e}", path.display()))
}

/// A file equal to `from`; shares its blocks where the file system can do that, else with its holes.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let source = File::open(from)?;
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let target = options.read(true).write(true).create_new(true).open(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let Some((start, end)) = data_from(&source, at, size)? else {
            break;
        };
        at = start;
        while at < end {
            let len = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
            source.read_exact_at(&mut buffer[..len], at)?;
            target.write_all_at(&buffer[..len], at)?;
            at += len as u64;
        }
    }
    Ok(())
}

/// The next run of data at `at` or behind; all of the rest where the file system cannot tell.
fn data_from(file: &File, at: u64, size: u64) -> std::io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
            return Ok(Some((at, size)));
        }
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
    Ok((end > start).then_some((start, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_equal_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(&[8; 3 << 20], 9 << 20).unwrap();
        file.set_len(40 << 20).unwrap();
        let mut frozen = file.metadata().unwrap().permissions();
        frozen.set_readonly(true);
        file.set_permissions(frozen).unwrap();
        std::fs::write(&to, b"what was there").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        let facts = std::fs::metadata(&to).unwrap();
        assert!(facts.blocks() * 512 < 8 << 20, "{}", facts.blocks());
        assert!(!facts.permissions().readonly(), "it is to be written to");
    }
}
