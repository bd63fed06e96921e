//! What runs VMs. Every verb is idempotent; `list` is the truth; slow verbs can be cancelled by
//! dropping their future.

use crate::wire::{PortRule, Script, ScriptResult, VmFacts};
use async_trait::async_trait;
use std::path::PathBuf;

/// What a VM shall be.
#[derive(Clone, Debug)]
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
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MB.
    pub ram_mb: u32,
    /// Ports; `host_port` 0 = choose.
    pub forwards: Vec<PortRule>,
    /// Address to show for forwarded ports.
    pub host_ip: String,
}

/// A VM that is really there.
#[derive(Clone, Debug)]
pub struct VmSeen {
    /// Instance id.
    pub id: String,
    /// Generation it was made for.
    pub generation: u64,
    /// Facts; `facts.status` is `running`, `stopped` or `failed`.
    pub facts: VmFacts,
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

/// Runs VMs.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// Name, e.g. `qemu`.
    fn name(&self) -> &'static str;
    /// Everything that exists, read from what is really there (processes, sockets, disks).
    async fn list(&self) -> Result<Vec<VmSeen>, DriverError>;
    /// Make the VM and start it; returns once its process runs. A VM of this id that exists already
    /// is left as it is.
    async fn start(&self, spec: &VmSpec) -> Result<VmFacts, DriverError>;
    /// Wait until the guest answers (agent and, unless `at_boot`, an address), bounded.
    async fn ready(&self, id: &str, need_network: bool) -> Result<VmFacts, DriverError>;
    /// Run a script in the guest and wait for its end, or for its timeout.
    async fn run_script(&self, id: &str, script: &Script) -> Result<ScriptResult, DriverError>;
    /// Stop it (ask, then force). Nothing to do if it does not run.
    async fn stop(&self, id: &str) -> Result<(), DriverError>;
    /// Stop it and remove everything of it. Nothing to do if it does not exist.
    async fn delete(&self, id: &str) -> Result<(), DriverError>;
}
