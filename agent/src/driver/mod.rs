//! What runs VMs. Every verb is idempotent; `list` is the truth; slow verbs can be cancelled by
//! dropping their future. Knows nothing of controllers, templates or desired sets.
//!
//! * [`qemu`]: real VMs.
//! * [`fake`]: VMs that exist only in memory, for tests and for rehearsing scale.

pub mod fake;
pub mod qemu;

use crate::tunnel::held::AnyStream;
use crate::wire::{PortRule, Script, ScriptResult, VmFacts};
use async_trait::async_trait;
use futures::future::BoxFuture;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a VM shall be.
#[derive(Clone, Debug, Default)]
pub struct VmSpec {
    /// Instance id: the driver's key for the VM.
    pub id: String,
    /// Generation, kept with the VM so that it survives the agent.
    pub generation: u64,
    /// VM name.
    pub name: String,
    /// Read-only base disk (qcow2 or raw), shared by all its clones.
    pub base: PathBuf,
    /// `qcow2` or `raw`.
    pub base_format: String,
    /// What a VM on this base was in the middle of: it goes on there, if this node can give it the very
    /// same machine; else it boots.
    pub saved: Option<Saved>,
    /// Virtual CPUs; 0 = those of `saved`, or the driver's default.
    pub vcpu: u32,
    /// Memory in MB; 0 likewise.
    pub ram_mb: u32,
    /// Ports; `host_port` 0 = choose.
    pub forwards: Vec<PortRule>,
    /// Address to show for forwarded ports.
    pub host_ip: String,
}

/// The memory of a suspended VM, and what it needs to be of use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its memory and the state of its devices, in the hypervisor's own form.
    pub memory: PathBuf,
    /// A JSON document: the machine that it belongs to, pinned in every respect that matters.
    pub machine: PathBuf,
    /// The disk that lies beside it, as [`crate::transfer::FileEntry::content`] names it: a memory goes on with
    /// the very disk that it was saved with, or not at all.
    pub disk: String,
}

/// What [`Driver::suspend`] made.
#[derive(Clone, Debug)]
pub struct Suspended {
    /// A disk that needs no other file.
    pub disk: PathBuf,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Memory and machine.
    pub saved: Saved,
}

/// Longest description of a machine, in bytes.
pub const MACHINE_BYTES_MAX: u64 = 64 << 10;

/// A VM that is really there.
#[derive(Clone, Debug)]
pub struct VmSeen {
    /// Instance id.
    pub id: String,
    /// Generation it was made for.
    pub generation: u64,
    /// Facts; `facts.status` is `running`, `stopped` or `failed`.
    pub facts: VmFacts,
    /// Why it is not `running`, in a sentence; empty if it is.
    pub message: String,
}

/// Why a driver could not.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// This node cannot now, another might (no memory, no disk, too many).
    #[error("{0}")]
    Busy(String),
    /// It will not work anywhere (bad image, bad request).
    #[error("{0}")]
    Failed(String),
}

/// What of a VM one can be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plug {
    /// Its serial console; one connection at a time.
    Console,
    /// Its screen: the RFB protocol.
    Vnc,
    /// A port of the guest.
    Tcp(u16),
}

/// A program to run in a guest.
#[derive(Clone, Debug, Default)]
pub struct Exec {
    /// The program, looked up in the guest's path, and its arguments; not empty.
    pub argv: Vec<String>,
    /// Its standard input.
    pub input: Vec<u8>,
    /// Killed after this time.
    pub within: Option<Duration>,
}

/// How it ended.
#[derive(Clone, Debug, Default)]
pub struct Executed {
    /// Exit code; 128 and the signal's number if it was killed.
    pub code: i32,
    /// Killed for its time.
    pub did_timeout: bool,
    /// It wrote more than was kept.
    pub truncated: bool,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// Why there is no end of it.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It was not run.
    #[error("{0}")]
    NotRun(String),
    /// It was, or may have been, and nothing more is known.
    #[error("{0}")]
    Unknown(String),
}

/// Bytes that are kept of what a VM's console said, at least: its end.
pub const CONSOLE_KEPT: u64 = 1 << 20;

/// Runs VMs.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// Name, e.g. `qemu`.
    fn name(&self) -> &'static str;
    /// Everything that exists, read from what is really there (processes, sockets, disks).
    async fn list(&self) -> Result<Vec<VmSeen>, DriverError>;
    /// Make the VM and start it; returns once its process runs. A VM of this id that exists already
    /// is left as it is, also when it has stopped: look at the status of the facts.
    async fn start(&self, spec: &VmSpec) -> Result<VmFacts, DriverError>;
    /// Wait until the guest answers (agent and, unless `at_boot`, an address), bounded. One that was made from a
    /// saved memory has been given randomness, time and a name of its own by then. If that does not work out,
    /// it is booted from its base, and the facts say why.
    async fn ready(&self, id: &str, need_network: bool) -> Result<VmFacts, DriverError>;
    /// Run a script in the guest and wait for its end, or for its timeout. Of each of its outputs the last
    /// `keep` bytes are kept.
    async fn run_script(
        &self,
        id: &str,
        script: &Script,
        keep: usize,
    ) -> Result<ScriptResult, DriverError>;
    /// Run a program in the guest once and wait for its end. When `give_up` is over before that, or its time is, it
    /// is killed with all that it started.
    async fn exec(
        &self,
        id: &str,
        exec: &Exec,
        give_up: BoxFuture<'static, ()>,
    ) -> Result<Executed, ExecError>;
    /// Be connected to something of a VM that runs.
    async fn connect(&self, id: &str, plug: Plug) -> Result<AnyStream, DriverError>;
    /// What its console said from place `from` on, or the last [`CONSOLE_KEPT`] bytes, and the place after it. At most
    /// that much at once; what is not kept any more is left out. Also of a VM that failed or, for a while, is deleted.
    async fn console_log(&self, id: &str, from: Option<u64>)
    -> Result<(Vec<u8>, u64), DriverError>;
    /// End the VM's process at once and start it again on the same disk, at `generation`, with the same
    /// ports where they are still free; returns once its process runs. A VM that was restarted to this
    /// generation and runs is left as it is. Failed if there is no VM; whatever goes wrong, its disk stays.
    async fn restart(&self, id: &str, generation: u64) -> Result<VmFacts, DriverError>;
    /// Freeze a running VM whose guest answers, write its disk, its memory and its machine into the folder
    /// `into`, which must be empty, and end it. If that fails it runs on, unless it was ended already. The
    /// files are durable; `machine` is written last.
    async fn suspend(&self, id: &str, into: &Path) -> Result<Suspended, DriverError>;
    /// Stop it (ask, then force). Nothing to do if it does not run.
    async fn stop(&self, id: &str) -> Result<(), DriverError>;
    /// Most bytes that [`Driver::export`] would write.
    async fn export_bytes(&self, id: &str) -> Result<u64, DriverError>;
    /// Write a disk to `dest`, durably, that stands by itself and reads as the VM's does; what is at `dest`
    /// is replaced. It is as like the VM's base, byte by byte, as can be: only what the VM wrote differs. Its
    /// format: `qcow2` or `raw`. Failed if the VM runs; its own disk, and its base, are only read.
    async fn export(&self, id: &str, dest: &Path) -> Result<String, DriverError>;
    /// Remove it with everything of it. Its disk goes with it, so a running guest is not asked to
    /// shut down first; call `stop` before to let it. Nothing to do if it does not exist.
    async fn delete(&self, id: &str) -> Result<(), DriverError>;
}

/// Bytes of a startup script's output that are kept, from its end: every heartbeat tells them again, and
/// the controller's state keeps no more.
pub const OUTPUT_KEPT: usize = 64 << 10;

/// The same of a script that runs before a save: it is told until the controller knows it, and no longer.
pub const SAVE_OUTPUT_KEPT: usize = 1 << 20;

/// The last `keep` bytes of a script's output.
fn kept_output(text: &str, keep: usize) -> &str {
    let from = text.len().saturating_sub(keep);
    &text[text.ceil_char_boundary(from)..]
}

/// Ids become file names and process arguments: letters, digits, `-`, `_` and inner dots.
fn check_id(id: &str) -> Result<(), DriverError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=100).contains(&id.len()) && !id.starts_with(['.', '-']) && id.chars().all(plain) {
        Ok(())
    } else {
        Err(DriverError::Failed(format!("{id:?} cannot name a VM")))
    }
}

/// Milliseconds since the epoch.
fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
