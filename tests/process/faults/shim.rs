//! The test's side of `tests/faults/shim.c`: compiles it, attaches it to a member, and changes what it
//! does while the member runs.

use crate::cluster::Cluster;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Calls that the library counts.
pub(crate) mod op {
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const SYNC: u32 = 2;
    pub(crate) const RENAME: u32 = 4;
    pub(crate) const RESIZE: u32 = 8;
    pub(crate) const CREATE: u32 = 16;
    pub(crate) const REMOVE: u32 = 32;
    pub(crate) const ALL: u32 = WRITE | SYNC | RENAME | RESIZE | CREATE | REMOVE;
}

pub(crate) const EIO: u32 = 5;
pub(crate) const ENOSPC: u32 = 28;

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing; calls are counted.
    None,
    /// This one fails.
    Once(u32),
    /// This one and all later ones fail.
    Always(u32),
    /// This one and the next `calls - 1` take so long.
    Delay { ms: u32, calls: u64 },
    /// This one, a write, is cut in half.
    Short,
    /// This one is interrupted by a signal.
    Interrupt,
    /// The process is killed in its place.
    Kill,
}

const MATCH_AT: u64 = 48;
const LAST_AT: u64 = 560;
const LEN: u64 = 1072;

/// One member's disk.
pub(crate) struct Shim {
    control: File,
    path: PathBuf,
    library: PathBuf,
}

impl Shim {
    /// For calls whose path holds one of `parts`; nothing happens yet.
    pub(crate) fn new(dir: &Path, parts: &[String]) -> Self {
        let library = dir.join("shim.so");
        if !library.exists() {
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/shim.c");
            let compiled = Command::new("gcc")
                .args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"])
                .arg(&library)
                .args([source, "-ldl"])
                .status()
                .expect("gcc is among the packages that `make deps` installs");
            assert!(compiled.success(), "{source} does not compile");
        }
        let joined = parts.join("|");
        let name = joined.replace(['/', '|'], "-");
        let path = dir.join(&name[name.len().saturating_sub(100)..]);
        let control = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        control.set_len(LEN).unwrap();
        assert!(joined.len() < 511);
        control.write_all_at(joined.as_bytes(), MATCH_AT).unwrap();
        let shim = Self {
            control,
            path,
            library,
        };
        shim.set(op::ALL, 1, Fault::None);
        shim
    }

    /// Member `n` is started under it from now on.
    pub(crate) fn attach(&self, cluster: &mut Cluster, n: usize) {
        cluster.env.entry(n).or_default().extend(self.environment());
    }

    /// A process with this environment runs under it.
    pub(crate) fn environment(&self) -> [(OsString, OsString); 2] {
        [
            ("LD_PRELOAD".into(), self.library.clone().into()),
            ("MAINSTAY_FAULTS".into(), self.path.clone().into()),
        ]
    }

    /// Count anew; `fault` happens to the call number `at` (from 1) of those in `ops`.
    pub(crate) fn set(&self, ops: u32, at: u64, fault: Fault) {
        let (mode, error, delay_ms, until) = match fault {
            Fault::None => (0_u32, 0, 0, 0),
            Fault::Once(error) => (1, error, 0, 0),
            Fault::Always(error) => (2, error, 0, 0),
            Fault::Delay { ms, calls } => (3, 0, ms, at + calls - 1),
            Fault::Short => (4, 0, 0, 0),
            Fault::Interrupt => (5, 0, 0, 0),
            Fault::Kill => (6, 0, 0, 0),
        };
        // Off while the numbers change.
        self.put(0, 0_u32.to_ne_bytes());
        for (at, word) in [(4, error), (8, ops), (12, delay_ms)] {
            self.put(at, word.to_ne_bytes());
        }
        for (place, word) in [(16, at), (24, until), (32, 0), (40, 0)] {
            self.put(place, word.to_ne_bytes());
        }
        self.put(LAST_AT, [0]);
        self.put(0, mode.to_ne_bytes());
    }

    fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.control.write_all_at(&bytes, at).unwrap();
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, at).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Matching calls since the last `set`.
    pub(crate) fn count(&self) -> u64 {
        self.word(32)
    }

    /// Faults since then.
    pub(crate) fn hits(&self) -> u64 {
        self.word(40)
    }

    /// The last call that was hit, e.g. `fdatasync of /tmp/.../log/00000000000000000001.wal`.
    pub(crate) fn last(&self) -> String {
        let mut bytes = [0; 512];
        self.control.read_exact_at(&mut bytes, LAST_AT).unwrap();
        let len = bytes.iter().position(|b| *b == 0).unwrap_or(512);
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }
}
