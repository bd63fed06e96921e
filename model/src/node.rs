//! A node: a machine that runs the agent and VMs.

use crate::ids::{GroupId, NodeId, TemplateId};
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
    /// Cached whole images.
    pub images: BTreeSet<(TemplateId, u32)>,
    /// Goes up whenever the node's desired set changes (an assignment, a termination, a removal).
    pub desired_generation: u64,
    /// Joined at.
    pub joined_ms: u64,
    /// Last durable change at.
    pub updated_ms: u64,
}

impl Node {
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
