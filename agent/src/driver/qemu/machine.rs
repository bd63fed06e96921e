//! What a saved memory belongs to: the machine, pinned in every respect that decides whether a memory can be
//! loaded. QEMU itself notices only some of what does not fit: a memory that is loaded into another processor
//! is a dead guest, without a word. So everything is compared here, and what differs is booted.

use super::super::{MACHINE_BYTES_MAX, Saved};
use super::accel::Acceleration;
use super::dir::{Memory, Spec};
use super::{QemuDriver, args};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of the document.
const VERSION: u32 = 1;

/// `machine.json`: beside a saved memory, what it belongs to. More members may come with a higher version only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Machine {
    version: u32,
    driver: String,
    /// First line of `qemu-system-x86_64 --version`: the form of a memory is QEMU's own affair.
    qemu: String,
    /// Versioned machine type.
    machine: String,
    /// `kvm` or `tcg`.
    accelerator: String,
    /// The processor that the guest sees.
    cpu: String,
    pub(super) vcpu: u32,
    pub(super) ram_mb: u32,
    /// The devices, in their order.
    devices: Vec<String>,
    /// The disk that it was saved with ([`crate::transfer::FileEntry::content`]).
    disk: String,
    /// Length of the memory.
    bytes: u64,
    /// BLAKE3 of the memory, hex.
    blake3: String,
}

/// Processors that a machine of any type has at most.
const VCPU_MAX: u32 = 4096;

impl Machine {
    /// Is it what a machine can be? Its sizes are those of VMs that say nothing else, even where they boot.
    fn check(&self) -> Result<(), String> {
        if !(1..=VCPU_MAX).contains(&self.vcpu) {
            return Err(format!("{} processors", self.vcpu));
        }
        // Each page has its place in the file.
        if self.ram_mb == 0 || u64::from(self.ram_mb) << 20 > self.bytes {
            let (ram_mb, bytes) = (self.ram_mb, self.bytes);
            return Err(format!("{ram_mb} MB of memory in {bytes} bytes"));
        }
        Ok(())
    }

    /// Why a memory of this machine is of no use to `here`; the first difference.
    fn differs(&self, here: &Self) -> Option<String> {
        let mut pairs = vec![
            ("a driver", &self.driver, &here.driver),
            ("a QEMU", &self.qemu, &here.qemu),
            ("a machine", &self.machine, &here.machine),
            ("an accelerator", &self.accelerator, &here.accelerator),
            ("a processor", &self.cpu, &here.cpu),
        ];
        let numbers = [self, here].map(|m| [m.vcpu, m.ram_mb].map(|n| n.to_string()));
        pairs.push(("a number of processors", &numbers[0][0], &numbers[1][0]));
        pairs.push(("a memory of MB", &numbers[0][1], &numbers[1][1]));
        let devices = [self, here].map(|m| m.devices.join(" "));
        pairs.push(("devices", &devices[0], &devices[1]));
        let (what, saved, here) = pairs.into_iter().find(|(_, saved, here)| saved != here)?;
        Some(format!(
            "it was saved with {what} {saved:?}, here it is {here:?}"
        ))
    }
}

/// Read the document; the error is a sentence.
pub(super) async fn read(path: &Path) -> Result<Machine, String> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || -> Result<Machine, String> {
        let length = std::fs::metadata(&path).map_err(|e| e.to_string())?.len();
        if length > MACHINE_BYTES_MAX {
            return Err(format!("it has {length} bytes"));
        }
        let bytes = std::fs::read(&path).map_err(|e| e.to_string())?;
        let read: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        if read["version"] != VERSION {
            return Err(format!("version {} is not known", read["version"]));
        }
        let machine: Machine = serde_json::from_value(read).map_err(|e| e.to_string())?;
        machine.check().map(|()| machine)
    });
    let read = read.await.unwrap_or_else(|e| Err(e.to_string()));
    read.map_err(|why| format!("the description of its machine cannot be read: {why}"))
}

/// Write the document, durably.
pub(super) fn write(path: &Path, machine: &Machine) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(&serde_json::to_vec_pretty(machine)?)?;
    file.sync_all()
}

impl QemuDriver {
    /// The machine that `spec` gets here, with this disk and a memory of this length and digest.
    pub(super) fn machine_of(
        &self,
        spec: &Spec,
        disk: String,
        (bytes, blake3): (u64, String),
    ) -> Machine {
        let (accelerator, cpu) = match &self.acceleration {
            Acceleration::Kvm => ("kvm", host_processor()),
            Acceleration::Tcg(_) => ("tcg", args::TCG_CPU.to_owned()),
        };
        Machine {
            version: VERSION,
            driver: "qemu".to_owned(),
            qemu: self.tools.version.clone(),
            machine: spec.machine.clone(),
            accelerator: accelerator.to_owned(),
            cpu,
            vcpu: spec.vcpu,
            ram_mb: spec.ram_mb,
            devices: args::DEVICES.map(str::to_owned).to_vec(),
            disk,
            bytes,
            blake3,
        }
    }

    /// The memory, if `spec` gets just the machine that it was saved with; else why not.
    pub(super) fn fitting(
        &self,
        saved: &Saved,
        pinned: &Machine,
        spec: &Spec,
    ) -> Result<Memory, String> {
        let memory = (pinned.bytes, pinned.blake3.clone());
        let here = self.machine_of(spec, saved.disk.clone(), memory);
        if let Some(why) = pinned.differs(&here) {
            return Err(why);
        }
        if pinned.disk != here.disk {
            return Err("it was saved with another disk".to_owned());
        }
        let file = std::fs::canonicalize(&saved.memory).and_then(|file| {
            let length = std::fs::metadata(&file)?.len();
            Ok((file, length))
        });
        let (file, length) = file.map_err(|e| format!("its memory cannot be read: {e}"))?;
        if length != pinned.bytes {
            return Err(format!(
                "its memory has {length} bytes, it was saved with {}",
                pinned.bytes
            ));
        }
        Ok(Memory {
            file,
            bytes: pinned.bytes,
            digest: pinned.blake3.clone(),
        })
    }

    /// Is the memory what was saved? Each file is read once for as long as it does not change.
    pub(super) async fn check_memory(&self, memory: &Memory) -> Result<(), String> {
        let seen = {
            let mut checked = self.checked.lock();
            Arc::clone(checked.entry(memory.file.clone()).or_default())
        };
        // Held meanwhile: clones that start at once wait for one look.
        let mut seen = seen.lock().await;
        let bad = |e: std::io::Error| format!("its memory cannot be read: {e}");
        let mark = mark_of(&memory.file).map_err(bad)?;
        if seen.as_ref() == Some(&mark) {
            return Ok(());
        }
        let (_, digest) = digest_of(&memory.file).await.map_err(bad)?;
        if digest != memory.digest {
            return Err("its memory is damaged".to_owned());
        }
        *seen = Some(mark);
        Ok(())
    }
}

/// What changes when a file does: length, time of change, inode.
type Mark = (u64, Option<std::time::SystemTime>, u64);
/// Files that were what they should be, as they were then.
pub(super) type Checked = Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<Option<Mark>>>>>;

fn mark_of(path: &Path) -> std::io::Result<Mark> {
    use std::os::unix::fs::MetadataExt as _;
    let facts = std::fs::metadata(path)?;
    Ok((facts.len(), facts.modified().ok(), facts.ino()))
}

/// Length and BLAKE3 (hex) of a file.
pub(super) async fn digest_of(path: &Path) -> std::io::Result<(u64, String)> {
    let path: PathBuf = path.to_owned();
    let hash = move || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(path)?)?;
        Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
    };
    tokio::task::spawn_blocking(hash)
        .await
        .map_err(std::io::Error::other)?
}

/// The host's processor as a guest with `-cpu host` sees it: its name, and all that it can do.
fn host_processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |key: &str| {
        let line = text
            .lines()
            .find(|l| l.split(':').next().map(str::trim) == Some(key));
        let value = line.and_then(|l| l.split_once(':'));
        value.map_or("", |(_, value)| value.trim())
    };
    let flags = blake3::hash(of("flags").as_bytes()).to_hex();
    let kind = ["cpu family", "model", "stepping"].map(of).join("/");
    format!("host {} {kind} {}", of("model name"), &flags[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        serde_json::from_str(GOLDEN).unwrap()
    }

    const GOLDEN: &str = r#"{
        "version": 1, "driver": "qemu", "qemu": "QEMU emulator version 10.0.2 (Debian 1:10.0.2)",
        "machine": "pc-i440fx-10.0", "accelerator": "tcg", "cpu": "max", "vcpu": 1, "ram_mb": 128,
        "devices": ["virtio-blk-pci,drive=disk0", "VGA,vgamem_mb=8"], "disk": "cd", "bytes": 140000000, "blake3": "ab"
    }"#;

    #[test]
    fn every_difference_is_seen_and_said() {
        let saved = machine();
        assert_eq!(saved.differs(&machine()), None);
        type Change = fn(&mut Machine);
        let changes: [(&str, Change); 8] = [
            ("driver", |m| m.driver = "fake".into()),
            ("QEMU", |m| m.qemu.push('1')),
            ("machine", |m| m.machine.push('1')),
            ("accelerator", |m| m.accelerator = "kvm".into()),
            ("processor", |m| m.cpu = "host".into()),
            ("processors", |m| m.vcpu = 2),
            ("MB", |m| m.ram_mb = 256),
            ("devices", |m| m.devices.truncate(1)),
        ];
        for (what, change) in changes {
            let mut here = machine();
            change(&mut here);
            let said = saved.differs(&here).unwrap();
            assert!(said.contains(what), "{what}: {said}");
        }
    }

    #[tokio::test]
    async fn documents_that_are_not_known_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine.json");
        let look = async |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(&path).await
        };
        assert_eq!(look(GOLDEN).await.unwrap(), machine());
        for (text, why) in [
            (
                GOLDEN.replace("\"version\": 1", "\"version\": 2"),
                "version 2 is not known",
            ),
            ("{}".to_owned(), "version null"),
            ("\u{0}".repeat(70_000), "70000 bytes"),
            ("[".to_owned(), "cannot be read"),
            (GOLDEN.replace("\"vcpu\": 1,", ""), "vcpu"),
            (GOLDEN.replace("\"vcpu\": 1", "\"vcpu\": 0"), "0 processors"),
            (
                GOLDEN.replace("\"vcpu\": 1", "\"vcpu\": 5000"),
                "5000 processors",
            ),
            (GOLDEN.replace("128", "0"), "0 MB of memory"),
            (GOLDEN.replace("128", "4294967295"), "in 140000000 bytes"),
            (GOLDEN.replace("128", "-1"), "cannot be read"),
        ] {
            let said = look(&text).await.unwrap_err();
            assert!(said.contains(why), "{said}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(read(&path).await.is_err());
    }
}
