//! An instance: one VM from request to removal. States and their meaning are the wire contract's.

use crate::ids::{GroupId, InstanceId, NodeId, TemplateId};
use crate::limits;
use crate::metadata::Metadata;
use crate::node::Load;
use serde::{Deserialize, Serialize};

/// The reference system's states, spelt as on the wire.
///
/// ```text
/// Scheduling -> Pulling -> Started <-> Stopping (restart) <-> Stopped
///      \           \         \ \____ Pushing (save), then Terminating, Started or Stopping
///       \___________\_________\____________\__________________\___ Error
///                 any live state -> Terminating -> Terminated -> (forgotten)
/// ```
/// An instance that never had a VM goes from Terminating straight to forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum InstanceState {
    /// Accepted; waiting for a node, or being created on one.
    Scheduling,
    /// Its node fetches the image.
    Pulling,
    /// The VM runs; with script monitoring, the script ended with 0.
    Started,
    /// Being restarted: its VM is ended and started again on its disk.
    Stopping,
    /// VM exists, does not run.
    Stopped,
    /// Being saved as a tag: see [`crate::save`].
    Pushing,
    /// Failed; `message` says why.
    Error,
    /// End requested.
    Terminating,
    /// VM is gone.
    Terminated,
}

impl InstanceState {
    /// As it stands on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduling => "Scheduling",
            Self::Pulling => "Pulling",
            Self::Started => "Started",
            Self::Stopping => "Stopping",
            Self::Stopped => "Stopped",
            Self::Pushing => "Pushing",
            Self::Error => "Error",
            Self::Terminating => "Terminating",
            Self::Terminated => "Terminated",
        }
    }
}

/// A metadata value: the three kinds the wire allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Value {
    /// Text.
    Text(String),
    /// Whole number.
    Int(i64),
    /// Truth.
    Bool(bool),
}

/// A guest port to be reached from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRule {
    /// Free name, e.g. `ssh`.
    pub name: String,
    /// Port inside the guest.
    pub guest_port: u16,
    /// Port on the node; 0 = the node chooses.
    pub host_port: u16,
}

/// What to do when a monitored startup script fails. Numbers are the wire's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScriptFailure {
    /// Stop the VM (0).
    #[default]
    Stop,
    /// Keep it running (1).
    Keep,
    /// Delete it (2).
    Delete,
}

/// A startup script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// Decoded bytes, given to `/bin/sh`.
    #[serde(with = "crate::codec::bytes")]
    pub body: Vec<u8>,
    /// Wait for its end before `Started`, and keep its output.
    pub monitored: bool,
    /// Seconds until it is given up.
    pub timeout_s: u32,
    /// 0 = after the network is up, 1 = at boot.
    pub at_boot: bool,
    /// What a failure does to the VM.
    pub on_failure: ScriptFailure,
}

/// A start request after validation; defaults are filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartRequest {
    /// Template id.
    pub template: TemplateId,
    /// Tag name; the latest visible one when absent (fixed at apply).
    pub tag: Option<String>,
    /// Tag number; ignored when `tag` is given.
    pub version: Option<u32>,
    /// Shown name.
    pub name: Option<String>,
    /// Name for the VM with `$variables`.
    pub name_template: Option<String>,
    /// Caller's mark; not unique.
    pub external_id: Option<String>,
    /// Pin.
    pub node: Option<NodeId>,
    /// Node group.
    pub group: Option<GroupId>,
    /// 1..=10000, lower first.
    pub priority: u32,
    /// Startup script.
    pub script: Option<Box<Script>>,
    /// Virtual CPUs; the node's default when absent.
    pub vcpu: Option<u32>,
    /// Memory in MB.
    pub vram_mb: Option<u32>,
    /// Caller's key-values.
    pub metadata: Metadata,
    /// Replaces the template's rules when present.
    pub port_forwarding: Option<Vec<PortRule>>,
}

/// One instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Id.
    pub id: InstanceId,
    /// As requested, with the tag fixed.
    pub request: StartRequest,
    /// Tag name, fixed when accepted.
    pub tag: String,
    /// Tag number, fixed when accepted.
    pub tag_number: u32,
    /// Where it stands.
    pub state: InstanceState,
    /// Why, for `Error`; while in `Scheduling`, why the last node rejected it.
    pub message: Option<String>,
    /// Assigned node.
    pub node: Option<NodeId>,
    /// Fence: goes up with every decision about this instance; the agent and the planner act on
    /// one generation only.
    pub generation: u64,
    /// Accepted at.
    pub created_ms: u64,
    /// Last change at.
    pub updated_ms: u64,
    /// End (Terminated, or Terminating without a VM) since, for retention.
    pub ended_ms: Option<u64>,
    /// What its driver last said about the VM; kept after the end.
    pub vm: Option<Box<VmInfo>>,
    /// Result of a monitored script.
    pub script_result: Option<Box<ScriptResult>>,
    /// Architecture of its tag, fixed when accepted: `amd64`, `arm64` or empty.
    pub arch: String,
    /// In `Error`: the node said that nothing of the VM is left. Then it takes no room and a
    /// terminate need not wait for the node.
    pub vm_gone: bool,
    /// Nodes that could not take it, oldest first, each node once, bounded.
    pub rejections: Vec<Rejection>,
}

/// A node could not take an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejection {
    /// Which node.
    pub node: NodeId,
    /// When, by the state clock.
    pub at_ms: u64,
}

/// What the assigned node shall do about an instance at its present generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Make it run, or keep it running.
    Run,
    /// Leave whatever is there as it is (`Error`, `Stopped`): its user may still want to look.
    Keep,
    /// End the VM and start it again on its disk, once at this generation.
    Restart,
    /// Save it as a tag, once for each save; then leave it as it is.
    Save,
    /// Destroy it and report `Gone`.
    Gone,
}

impl Instance {
    /// Accepted, without a node, to be placed.
    pub fn waits(&self) -> bool {
        self.state == InstanceState::Scheduling && self.node.is_none()
    }
    /// Has a node and was not seen running there yet.
    pub fn starts(&self) -> bool {
        matches!(
            self.state,
            InstanceState::Scheduling | InstanceState::Pulling
        ) && self.node.is_some()
    }
    /// The node on which this instance takes room.
    pub fn occupies(&self) -> Option<&NodeId> {
        match self.ended_ms {
            None if !self.vm_gone => self.node.as_ref(),
            _ => None,
        }
    }
    /// Not ended, not failed, not asked to end.
    pub fn live(&self) -> bool {
        use InstanceState::{Error, Terminated, Terminating};
        !matches!(self.state, Error | Terminating | Terminated)
    }
    /// What its node shall do.
    pub fn wanted(&self) -> Wanted {
        use InstanceState::{
            Pulling, Pushing, Scheduling, Started, Stopping, Terminated, Terminating,
        };
        match self.state {
            Stopping => Wanted::Restart,
            Pushing => Wanted::Save,
            Scheduling | Pulling | Started => Wanted::Run,
            Terminating | Terminated => Wanted::Gone,
            _ => Wanted::Keep,
        }
    }
    /// What it takes of a node.
    pub fn demand(&self) -> Load {
        let request = &self.request;
        Load {
            count: 1,
            vcpu: u64::from(request.vcpu.unwrap_or(limits::DEFAULT_VCPU)),
            ram_mb: u64::from(request.vram_mb.unwrap_or(limits::DEFAULT_VRAM_MB)),
        }
    }
}

/// A VM as its driver sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The VM's own UUID.
    pub uuid: String,
    /// VM name on the node.
    pub name: String,
    /// `running`, `stopped`, `suspended`, `failed`, `deleted`.
    pub status: String,
    /// Guest address, empty until known.
    pub ip: String,
    /// Address that reaches forwarded ports.
    pub host_ip: String,
    /// Virtual CPUs.
    pub cpu_cores: u32,
    /// Memory in MB.
    pub ram_mb: u32,
    /// Ports in force.
    pub port_forwarding: Vec<PortRule>,
    /// VNC port, 0 = none.
    pub vnc_port: u16,
    /// Created at (ms).
    pub created_ms: u64,
    /// Started at (ms).
    pub started_ms: u64,
    /// How it runs, e.g. `kvm` or `tcg (why)`.
    pub accelerator: String,
}

/// How a monitored script ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ScriptResult {
    /// Exit code.
    pub return_code: i32,
    /// Given up.
    pub did_timeout: bool,
    /// Last part of its output.
    pub stdout: String,
    /// Last part of its error output.
    pub stderr: String,
}

/// One observed fact from a node: instance `id` at `generation` is in `phase`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Which.
    pub id: InstanceId,
    /// The generation the node acted on; an older one is refused.
    pub generation: u64,
    /// What it saw.
    pub phase: ObservedPhase,
    /// VM facts, when there is a VM.
    pub vm: Option<VmInfo>,
    /// Script result, once ended.
    pub script: Option<ScriptResult>,
}

/// What a node can say about an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObservedPhase {
    /// Fetching the image.
    Pulling,
    /// Image is there; VM being made, booted, or script running.
    Starting,
    /// Runs (and its monitored script ended with 0).
    Running,
    /// VM is there but does not run.
    Stopped,
    /// Failed for good, with the reason.
    Failed(String),
    /// This node could not, another may try: unbind and schedule again, with the reason.
    Rejected(String),
    /// VM is deleted; nothing of it is left on the node.
    Gone,
}
