//! The protocol between agent and controller: JSON over HTTP on the API port. Any member answers.
//!
//! | call | meaning |
//! | --- | --- |
//! | `POST /agent/v1/register` [`RegisterRequest`] -> [`RegisterResponse`] | join or come back; idempotent by node id |
//! | `GET /agent/v1/desired?node_id=N&tunnels=1` -> stream of [`DesiredSet`], one JSON object per line | first line at once, then one whenever the set or the members change, and the same again every few seconds as keepalive. To an agent that says `tunnels=1`, in between: orders, of which only `tunnel` counts |
//! | `GET /agent/v1/tunnel?node_id=N`, an upgrade | what an order asks for: see [`crate::tunnel`] |
//! | `POST /agent/v1/report` [`Report`] -> [`ReportResponse`] | heartbeat and observations; refused by a member without a quorum behind it |
//!
//! Images come from the registry port: see [`crate::transfer::api`].

use serde::{Deserialize, Serialize};

/// An agent introduces itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RegisterRequest {
    /// UUID made by the agent at its first start and kept on its disk.
    pub node_id: String,
    /// Shown name.
    pub name: String,
    /// Address CI can reach.
    pub ip_address: String,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// Physical CPUs.
    pub cpu_count: u32,
    /// Memory in MB.
    pub ram_mb: u64,
    /// Disk size in bytes.
    pub disk_bytes: u64,
    /// Most VMs at once.
    pub capacity: u32,
    /// Node groups asked for.
    pub groups: Vec<String>,
    /// Release.
    pub agent_version: String,
    /// Driver name.
    pub driver: String,
}

/// The controller's answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RegisterResponse {
    /// Echo.
    pub node_id: String,
    /// An agent refuses to serve another cluster than its first one.
    pub cluster_id: String,
    /// Heartbeat interval.
    pub heartbeat_ms: u64,
    /// How long instances may run without any controller having heard of us.
    pub lease_ms: u64,
    /// API addresses of all members.
    pub controllers: Vec<String>,
    /// Registry addresses of all members.
    pub registries: Vec<String>,
    /// What nodes of this cluster show each other; empty from a member of a release that knows none.
    pub share_key: String,
}

/// Everything this node shall run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DesiredSet {
    /// Only ever grows for one node; an agent refuses an older one.
    pub generation: u64,
    /// The whole set. An instance that the agent runs and that is not here is unknown: it is
    /// reported, not destroyed; only `run == false` destroys.
    pub instances: Vec<DesiredInstance>,
    /// Images to fetch before an instance needs them, until they were fetched once.
    pub images: Vec<ImageRef>,
    /// Images to drop as soon as no VM stands on them: of each, template id and number count.
    pub evict: Vec<ImageRef>,
    /// API addresses of all members, as of now: told at once when they change. Empty: nothing is said.
    pub controllers: Vec<String>,
    /// Registry addresses of all members, likewise.
    pub registries: Vec<String>,
    /// This is no set, but an order.
    pub tunnel: Option<TunnelOrder>,
}

/// Dial out to the member that says this, and name the tunnel. To be done once, now or never.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TunnelOrder {
    /// A secret of one use.
    pub id: String,
}

/// What a tunnel is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Access {
    /// Instance id.
    pub instance: String,
    /// `exec`, `console`, `vnc`, `tcp`, `log`.
    pub kind: String,
    /// With `tcp`: port in the guest.
    pub port: u16,
    /// With `log`: go on for as long as there is a console.
    pub follow: bool,
}

/// A program to run in a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecCommand {
    /// The program, looked up in the guest's path, and its arguments.
    pub argv: Vec<String>,
    /// Killed after so many seconds; 0 = never.
    pub timeout_s: u32,
}

/// How a program ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecEnd {
    /// Exit code; 128 and the signal's number if it was killed.
    pub code: i32,
    /// Killed for its time.
    pub did_timeout: bool,
    /// It wrote more than the guest agent keeps: the outputs are not whole.
    pub truncated: bool,
}

/// Why a tunnel does not do what it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TunnelRefusal {
    /// A sentence.
    pub message: String,
    /// Of a program: it may have run. Else nothing was done.
    pub unknown: bool,
}

/// One instance of the desired set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DesiredInstance {
    /// Instance id.
    pub id: String,
    /// Fence; echoed in every observation.
    pub generation: u64,
    /// `true`: shall run. `false`: shall be gone.
    pub run: bool,
    /// With `run`: whatever is there (also nothing) stays as it is and is reported, `gone` if there
    /// is nothing. Nothing is begun; a start that is under way is broken off.
    pub keep: bool,
    /// With `run`: the VM that is there is ended and started again on its disk, once at this generation.
    /// `keep` is set as well, for agents that know no `restart`.
    pub restart: bool,
    /// With `run`: the VM is to be saved as a tag. `keep` is set as well, for agents that know no `save`.
    pub save: Option<SaveOrder>,
    /// From what.
    pub image: ImageRef,
    /// VM name.
    pub name: String,
    /// Virtual CPUs, 0 = default.
    pub vcpu: u32,
    /// Memory in MB, 0 = default.
    pub ram_mb: u32,
    /// Startup script.
    pub script: Option<Script>,
    /// Ports.
    pub forwards: Vec<PortRule>,
}

/// Save a VM's disk as a tag: run a script in it, stop it, push what its disk is. Once for each id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SaveOrder {
    /// Which save.
    pub id: String,
    /// The controller knows that this node knows of it: only now it may begin.
    pub go: bool,
    /// Run in the guest first; its end is waited for.
    pub script: Option<Script>,
    /// The controller knows how the script ended: it need not be told again.
    pub script_known: bool,
    /// A script that does not end with 0 ends the save, and the VM runs on.
    pub cancel_on_script_failure: bool,
    /// Name of the template that the tag goes to: for its quota, and for messages.
    pub template: String,
    /// Name of the tag, for messages.
    pub tag: String,
}

/// Names the bytes of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageRef {
    /// Template id.
    pub template_id: String,
    /// Template name, for messages.
    pub template: String,
    /// Tag name.
    pub tag: String,
    /// Tag number.
    pub number: u32,
    /// BLAKE3 of the manifest, hex.
    pub manifest: String,
}

/// A startup script.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Script {
    /// Standard base64.
    pub body: String,
    /// Wait for its end and report output.
    pub monitored: bool,
    /// Seconds.
    pub timeout_s: u32,
    /// `true`: do not wait for the network.
    pub at_boot: bool,
    /// 0 stop, 1 keep, 2 delete.
    pub on_failure: u8,
}

/// A forwarded port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortRule {
    /// Free name.
    pub name: String,
    /// Port in the guest.
    pub guest_port: u16,
    /// Port on the node; 0 = choose one.
    pub host_port: u16,
}

/// Heartbeat with all that the agent observes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Reporter.
    pub node_id: String,
    /// The newest desired generation that was received.
    pub generation: u64,
    /// Every instance that the agent knows of (also unknown ones it adopted).
    pub observed: Vec<Observed>,
    /// Whole images in the cache.
    pub images: Vec<ImageRef>,
    /// Of the desired set's images, those that are being fetched, or could not be. An agent that says
    /// nothing here knows no such images.
    pub pulls: Option<Vec<ImagePull>>,
    /// Soft figures.
    pub stats: NodeStats,
}

/// How far an image of the desired set is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImagePull {
    /// Template id.
    pub template_id: String,
    /// Tag number.
    pub number: u32,
    /// Part that is here, 0..1.
    pub progress: f32,
    /// Why the last attempt failed; it is tried again.
    pub error: String,
}

/// One observed instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Observed {
    /// Instance id.
    pub id: String,
    /// Generation acted on.
    pub generation: u64,
    /// `pulling`, `starting`, `running`, `stopped`, `failed`, `rejected`, `gone`.
    pub phase: String,
    /// Reason for `failed` and `rejected`.
    pub message: String,
    /// Pull progress 0..1.
    pub progress: f32,
    /// VM facts.
    pub vm: Option<VmFacts>,
    /// Monitored script's result.
    pub script: Option<ScriptResult>,
    /// How far the save is that was asked for.
    pub save: Option<SaveSeen>,
}

/// How far a save is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SaveSeen {
    /// Which.
    pub id: String,
    /// `begun`, `pushed` (the tag is visible), `failed`.
    pub phase: String,
    /// Why it failed.
    pub message: String,
    /// It failed after the VM was stopped for it.
    pub stopped: bool,
    /// How its script ended, until the controller knows. Last 1 MiB at most of each output.
    pub script: Option<ScriptResult>,
    /// Part of the disk that is pushed, 0..1.
    pub progress: f32,
}

/// A VM as its driver sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmFacts {
    /// VM UUID.
    pub uuid: String,
    /// VM name.
    pub name: String,
    /// `running`, `stopped`, `suspended`, `failed`.
    pub status: String,
    /// Guest address.
    pub ip: String,
    /// Address that reaches forwarded ports.
    pub host_ip: String,
    /// Virtual CPUs.
    pub cpu_cores: u32,
    /// MB.
    pub ram_mb: u32,
    /// In force.
    pub port_forwarding: Vec<PortRule>,
    /// 0 = none.
    pub vnc_port: u16,
    /// ms since epoch.
    pub created_ms: u64,
    /// ms since epoch.
    pub started_ms: u64,
    /// `kvm`, `tcg (reason)`, `fake`.
    pub accelerator: String,
}

/// How a script ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScriptResult {
    /// Exit code.
    pub return_code: i32,
    /// Given up.
    pub did_timeout: bool,
    /// Last 64 KiB at most. (The reference system keeps 1 MB: there it is told once. Here every
    /// heartbeat tells it again and every member keeps it, and a node full of talkative scripts
    /// must still be heard.)
    pub stdout: String,
    /// Last 64 KiB at most.
    pub stderr: String,
}

/// Soft figures of a node; never in the log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStats {
    /// 0..1.
    pub cpu_util: f32,
    /// 0..1.
    pub ram_util: f32,
    /// Bytes.
    pub free_disk: u64,
    /// Bytes of images and VMs.
    pub used_by_us: u64,
    /// VMs that run.
    pub vm_count: u32,
}

/// Answer to a report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportResponse {
    /// `false`: the controller does not know this node; register again.
    pub known: bool,
    /// API addresses of all members, as of now.
    pub controllers: Vec<String>,
    /// Registry addresses of all members, as of now.
    pub registries: Vec<String>,
}
