//! The tiny guest's disk, built once for each target directory and again when its sources change.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// Its path. Fails with the sentence that says what to install.
pub(crate) fn tiny() -> PathBuf {
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let dir = target.join("guest");
    std::fs::create_dir_all(&dir).unwrap();
    let disk = dir.join("tiny.qcow2");
    // Tests of several processes may want it at once.
    let lock = std::fs::File::create(dir.join("lock")).unwrap();
    lock.lock().unwrap();
    let built = std::fs::metadata(&disk).and_then(|m| m.modified());
    if built.is_ok_and(|built| built > newest(&repo.join("guest"))) {
        return disk;
    }
    let run = Command::new("sh")
        .arg(repo.join("guest/build.sh"))
        .arg(&disk)
        .env("MAINSTAY_GUEST_TARGET", target.join("guest-static"))
        .env("MAINSTAY_GUEST_CACHE", dir.join("cache"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(
        run.status.success(),
        "the tiny guest cannot be built: {said}"
    );
    disk
}

fn newest(path: &Path) -> SystemTime {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let own = meta.modified().unwrap();
    if !meta.is_dir() {
        return own;
    }
    let inner = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| newest(&entry.unwrap().path()));
    inner.max().map_or(own, |newest| newest.max(own))
}
