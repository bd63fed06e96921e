//! The folder of a VM: paths, and the two small files that outlive us.
//!
//! `spec.json` says what the VM is; it is in place, with the overlay, before the folder has its final
//! name. `run.json` says that QEMU has been started; a folder without it holds nothing worth keeping,
//! unless `spec.json` says that it is being started again. Nor does one whose `spec.json` names a saved
//! memory while `run.json` does not say that its guest has come to life.

use super::super::{DriverError, VmSpec, check_id, now_ms};
use crate::wire::PortRule;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

/// Version of `spec.json` and `run.json`.
const VERSION: u32 = 1;

/// What the VM is. Written once, and before each restart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Spec {
    version: u32,
    pub(super) id: String,
    pub(super) generation: u64,
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) base: PathBuf,
    pub(super) base_format: String,
    pub(super) vcpu: u32,
    pub(super) ram_mb: u32,
    pub(super) forwards: Vec<PortRule>,
    pub(super) host_ip: String,
    /// Versioned machine type: a newer QEMU must not change a VM's hardware.
    pub(super) machine: String,
    pub(super) created_ms: u64,
    /// It has run before: its disk is worth keeping even where no `run.json` says so.
    #[serde(default)]
    pub(super) ran: bool,
    /// The ports it had before it was restarted.
    #[serde(default)]
    pub(super) had: Vec<PortRule>,
    /// It begins in this memory instead of booting.
    #[serde(default)]
    pub(super) memory: Option<Memory>,
    /// It was to begin in a saved memory: why it boots instead.
    #[serde(default)]
    pub(super) cold: String,
    /// Its image is that of a suspended VM: it must be given an identity of its own.
    #[serde(default)]
    pub(super) cloned: bool,
}

/// A saved memory that fits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) file: PathBuf,
    /// Its length.
    pub(super) bytes: u64,
    /// BLAKE3 of it, hex.
    pub(super) digest: String,
}

impl Spec {
    pub(super) fn new(spec: &VmSpec, machine: &str, vcpu: u32, ram_mb: u32) -> Spec {
        let uuid = uuid::Uuid::try_parse(&spec.id).unwrap_or_else(|_| uuid::Uuid::new_v4());
        Spec {
            version: VERSION,
            id: spec.id.clone(),
            generation: spec.generation,
            name: spec.name.clone(),
            uuid: uuid.to_string(),
            base: spec.base.clone(),
            base_format: spec.base_format.clone(),
            vcpu,
            ram_mb,
            forwards: spec.forwards.clone(),
            host_ip: spec.host_ip.clone(),
            machine: machine.to_string(),
            created_ms: now_ms(),
            ran: false,
            had: Vec::new(),
            memory: None,
            cold: String::new(),
            cloned: spec.saved.is_some(),
        }
    }

    /// Its guest is still to come to life in a saved memory.
    pub(super) fn awaits(&self, run: &Run) -> bool {
        self.memory.is_some() && !run.resumed
    }
}

/// What became of it. Rewritten as more is known.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Run {
    version: u32,
    pub(super) started_ms: u64,
    pub(super) accelerator: String,
    /// Ports in force.
    pub(super) forwards: Vec<PortRule>,
    /// The guest's address, once it had one.
    pub(super) ip: String,
    /// Its guest has come to life in a saved memory, and has an identity of its own.
    #[serde(default)]
    pub(super) resumed: bool,
    /// It was given an identity of its own.
    #[serde(default)]
    pub(super) renewed: bool,
}

impl Run {
    pub(super) fn new(accelerator: String, forwards: Vec<PortRule>) -> Run {
        Run {
            version: VERSION,
            started_ms: now_ms(),
            accelerator,
            forwards,
            ip: String::new(),
            resumed: false,
            renewed: false,
        }
    }

    /// What it runs on and, for the image of a suspended VM, how it began.
    pub(super) fn how(&self, spec: &Spec) -> String {
        match spec.cold.as_str() {
            _ if self.resumed => format!("{}, resumed", self.accelerator),
            "" => self.accelerator.clone(),
            why => format!("{}, booted cold: {why}", self.accelerator),
        }
    }
}

/// Paths of one VM.
#[derive(Clone, Debug)]
pub(super) struct VmDir {
    pub(super) id: String,
    vms: PathBuf,
}

impl VmDir {
    pub(super) fn new(state: &Path, id: &str) -> VmDir {
        VmDir {
            id: id.to_string(),
            vms: state.join("vms"),
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.vms.join(&self.id)
    }

    pub(super) fn making(&self) -> PathBuf {
        self.vms.join(format!(".{}.new", self.id))
    }

    fn leaving(&self) -> PathBuf {
        self.vms.join(format!(".{}.gone", self.id))
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(super) fn pidfile(&self) -> PathBuf {
        self.file("pid")
    }

    pub(super) fn exists(&self) -> bool {
        self.path().is_dir()
    }

    pub(super) fn spec(&self) -> Result<Option<Spec>, DriverError> {
        read(&self.file("spec.json"))
    }

    pub(super) fn run(&self) -> Result<Option<Run>, DriverError> {
        read(&self.file("run.json"))
    }

    /// Are the files there and nonsense? Not so where the disk or the system cannot say.
    pub(super) fn garbled(&self) -> bool {
        garbled::<Spec>(&self.file("spec.json")) || garbled::<Run>(&self.file("run.json"))
    }

    pub(super) fn set_run(&self, run: &Run) -> Result<(), DriverError> {
        write(&self.file("run.json"), run).map_err(|e| self.error("keep the state", &e))
    }

    /// From here on it is a VM that never ran, durably.
    pub(super) fn forget_run(&self) -> Result<(), DriverError> {
        let forget = || match std::fs::remove_file(self.file("run.json")) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => std::fs::File::open(self.path())?.sync_all(),
        };
        forget().map_err(|e| self.error("forget the start", &e))
    }

    pub(super) fn set_spec(&self, spec: &Spec) -> Result<(), DriverError> {
        write(&self.file("spec.json"), spec).map_err(|e| self.error("keep what it is", &e))
    }

    /// A new generation of the VM that is to be started again. Its end is durable before what was known of
    /// its last run goes: a folder with neither would be taken for one that never ran.
    pub(super) fn set_again(&self, spec: &Spec) -> Result<(), DriverError> {
        let write = || {
            write(&self.file("spec.json"), spec)?;
            std::fs::File::open(self.path())?.sync_all()?;
            match std::fs::remove_file(self.file("run.json")) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            }
        };
        write().map_err(|e| self.error("write down the restart", &e))
    }

    /// An empty folder to make the VM in.
    pub(super) fn begin(&self) -> Result<PathBuf, DriverError> {
        let making = self.making();
        remove_tree(&making)
            .and_then(|()| std::fs::create_dir(&making))
            .map_err(|e| self.error("make the folder", &e))?;
        Ok(making)
    }

    /// The folder is complete: give it its name.
    pub(super) fn commit(&self, spec: &Spec) -> Result<(), DriverError> {
        let rename = || {
            write(&self.making().join("spec.json"), spec)?;
            std::fs::rename(self.making(), self.path())?;
            std::fs::File::open(&self.vms)?.sync_all()
        };
        rename().map_err(|e| self.error("complete the folder", &e))
    }

    /// First step of removal: from now on there is no such VM.
    pub(super) fn bury(&self) -> Result<(), DriverError> {
        match std::fs::rename(self.path(), self.leaving()) {
            Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                // An earlier removal of the same id was interrupted.
                remove_tree(&self.leaving())
                    .and_then(|()| std::fs::rename(self.path(), self.leaving()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
        .map_err(|e| self.error("remove the folder", &e))
    }

    /// A pid file that QEMU wrote while the folder was being renamed.
    pub(super) fn buried_pidfile(&self) -> PathBuf {
        self.leaving().join("pid")
    }

    /// Last step of removal.
    pub(super) fn clean(&self) -> Result<(), DriverError> {
        remove_tree(&self.making())
            .and_then(|()| remove_tree(&self.leaving()))
            .map_err(|e| self.error("remove the folder", &e))
    }

    /// The end of the serial console, for messages.
    pub(super) fn console_tail(&self) -> String {
        let tail = || -> std::io::Result<String> {
            let mut file = std::fs::File::open(self.file(super::args::CONSOLE_LOG))?;
            let from = file.metadata()?.len().saturating_sub(400);
            file.seek(std::io::SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.take(400).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes)
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "))
        };
        tail()
            .ok()
            .filter(|text| !text.is_empty())
            .unwrap_or_else(|| "(nothing)".into())
    }

    fn error(&self, what: &str, e: &std::io::Error) -> DriverError {
        DriverError::Busy(format!("cannot {what} of VM {}: {e}", self.id))
    }
}

/// What is in the folder of folders.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Whole VMs.
    pub(super) ids: Vec<String>,
    /// Ids of interrupted makings and removals.
    pub(super) leftovers: Vec<String>,
}

pub(super) fn scan(state: &Path) -> Result<Found, DriverError> {
    let vms = state.join("vms");
    let busy = |e: std::io::Error| DriverError::Busy(format!("cannot read {}: {e}", vms.display()));
    let mut found = Found::default();
    for entry in std::fs::read_dir(&vms).map_err(busy)? {
        let entry = entry.map_err(busy)?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if check_id(&name).is_ok() {
            found.ids.push(name);
            continue;
        }
        let inner = name.strip_prefix('.').unwrap_or_default();
        let id = inner
            .strip_suffix(".new")
            .or_else(|| inner.strip_suffix(".gone"));
        // A whole VM of the same id is not to be removed for a leftover.
        if let Some(id) = id.filter(|id| check_id(id).is_ok() && !vms.join(id).exists()) {
            found.leftovers.push(id.to_string());
        }
    }
    Ok(found)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DriverError> {
    let broken = |e: &dyn std::fmt::Display| {
        DriverError::Busy(format!("cannot read {}: {e}", path.display()))
    };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| broken(&e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(broken(&e)),
    }
}

fn garbled<T: DeserializeOwned>(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|bytes| serde_json::from_slice::<T>(&bytes).is_err())
}

/// Whole or not at all.
fn write<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    let new = path.with_extension("tmp");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.sync_all()?;
    std::fs::rename(new, path)
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
