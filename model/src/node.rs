//! A node: a machine that runs the agent and VMs.

use crate::ids::{GroupId, NodeId, TemplateId};
use crate::instance::{Observation, ObservedPhase};
use crate::limits;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Facts an agent sends when it joins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Shown name (host name by default).
    pub name: String,
    /// Address CI can reach (`--host` overrides).
    pub ip_address: String,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// Physical CPUs.
    pub cpu_count: u32,
    /// Memory in MB.
    pub ram_mb: u64,
    /// Disk in bytes.
    pub disk_bytes: u64,
    /// Most VMs at once, by number.
    pub capacity: u32,
    /// Groups asked for at join.
    pub groups: Vec<GroupId>,
    /// Agent release.
    pub agent_version: String,
    /// `qemu`, `fake`, ...
    pub driver: String,
}

/// How a node's room is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CapacityMode {
    /// By number of VMs.
    #[default]
    Number,
    /// By vCPU and memory.
    Resource,
}

/// An operator's change; only what is `Some` changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeConfig {
    /// Most VMs at once.
    pub capacity: Option<u32>,
    /// Shown name.
    pub name: Option<String>,
    /// Reachable address.
    pub host: Option<String>,
    /// How room is counted.
    pub capacity_mode: Option<CapacityMode>,
    /// vCPU limit in resource mode.
    pub vcpu_override: Option<u32>,
    /// Memory limit in MB in resource mode.
    pub ram_override_mb: Option<u64>,
    /// No new placements.
    pub drain: Option<bool>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Id.
    pub id: NodeId,
    /// What the agent said.
    pub spec: NodeSpec,
    /// What the operator said.
    pub config: NodeConfig,
    /// Heartbeats arrive (as the last leader judged).
    pub reachable: bool,
    /// Unreachable for so long that its lease has run out; nothing is placed here and its
    /// instances have failed. Ends when it is reachable again.
    pub lost: bool,
    /// Groups it is in: those asked for at join, then as the operator says.
    pub groups: BTreeSet<GroupId>,
    /// Cached whole images.
    pub images: BTreeSet<(TemplateId, u32)>,
    /// Goes up (by any amount) whenever the node's desired set changes: an assignment, a
    /// termination, a removal. Also over a removal and a new registration of the node.
    pub desired_generation: u64,
    /// Joined at.
    pub joined_ms: u64,
    /// Last durable change at.
    pub updated_ms: u64,
}

/// What is left of an instance that ended while its node could not be asked: its VM may still run
/// there. The node is told to remove it whenever it comes back, also after a removal and a new
/// registration, and until it says that this is done, the VM takes room. Outlives the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Where the VM was.
    pub node: NodeId,
    /// The instance's generation after its end.
    pub generation: u64,
    /// What the VM takes.
    pub load: Load,
}

impl Left {
    /// Does `seen`, reported by `node`, say that nothing of it is left?
    pub fn removed_by(&self, node: &NodeId, seen: &Observation) -> bool {
        &self.node == node
            && self.generation == seen.generation
            && seen.phase == ObservedPhase::Gone
    }
}

/// What instances take of a node, or one instance wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Load {
    /// VMs.
    pub count: u32,
    /// Virtual CPUs.
    pub vcpu: u64,
    /// Memory in MB.
    pub ram_mb: u64,
}

impl Load {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            count: self.count.saturating_add(other.count),
            vcpu: self.vcpu.saturating_add(other.vcpu),
            ram_mb: self.ram_mb.saturating_add(other.ram_mb),
        }
    }
    /// Without `other`.
    pub fn minus(self, other: Self) -> Self {
        Self {
            count: self.count.saturating_sub(other.count),
            vcpu: self.vcpu.saturating_sub(other.vcpu),
            ram_mb: self.ram_mb.saturating_sub(other.ram_mb),
        }
    }
}

impl Node {
    /// How room is counted.
    pub fn capacity_mode(&self) -> CapacityMode {
        self.config.capacity_mode.unwrap_or_default()
    }
    /// vCPU limit in resource mode: twice the physical ones unless overridden.
    pub fn vcpu_limit(&self) -> u64 {
        let physical = u64::from(self.spec.cpu_count).saturating_mul(2);
        self.config.vcpu_override.map_or(physical, u64::from)
    }
    /// Memory limit in MB in resource mode: all but a reserve unless overridden.
    pub fn ram_limit_mb(&self) -> u64 {
        let all = self
            .spec
            .ram_mb
            .saturating_sub(limits::NODE_RESERVED_RAM_MB);
        self.config.ram_override_mb.unwrap_or(all)
    }
    /// Whether `load` is within its limits.
    pub fn has_room_for(&self, load: Load) -> bool {
        match self.capacity_mode() {
            CapacityMode::Number => load.count <= self.capacity(),
            CapacityMode::Resource => {
                load.vcpu <= self.vcpu_limit() && load.ram_mb <= self.ram_limit_mb()
            }
        }
    }
    /// How full it is under `load`, in thousandths, by the scarcer resource.
    pub fn used_permille(&self, load: Load) -> u64 {
        let part = |used: u64, of: u64| used.saturating_mul(1_000) / of.max(1);
        match self.capacity_mode() {
            CapacityMode::Number => part(u64::from(load.count), u64::from(self.capacity())),
            CapacityMode::Resource => {
                part(load.vcpu, self.vcpu_limit()).max(part(load.ram_mb, self.ram_limit_mb()))
            }
        }
    }
    /// New instances may be placed here, if there is room.
    pub fn accepts(&self) -> bool {
        self.reachable && !self.lost && !self.draining()
    }
    /// Most VMs at once, in number mode.
    pub fn capacity(&self) -> u32 {
        self.config.capacity.unwrap_or(self.spec.capacity)
    }
    /// Shown name.
    pub fn name(&self) -> &str {
        self.config.name.as_deref().unwrap_or(&self.spec.name)
    }
    /// Address CI can reach.
    pub fn host(&self) -> &str {
        self.config.host.as_deref().unwrap_or(&self.spec.ip_address)
    }
    /// No new placements.
    pub fn draining(&self) -> bool {
        self.config.drain.unwrap_or(false)
    }
}
