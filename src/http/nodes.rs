//! Nodes as JSON: the replicated facts, and the soft figures their agents sent. Refuses to judge
//! whether a node is alive: the state says so.

use super::View;
use super::instances::known_arch;
use super::time::Rfc3339;
use mainstay_model::group::Group;
use mainstay_model::node::{CapacityMode, Node};
use mainstay_model::{GroupId, NodeId};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// What runs on a node.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    vms: u64,
    vcpu: u64,
    vram_mb: u64,
}

/// As its driver says, and for what has no VM yet, or what may be left of one, as it was requested.
fn usage(view: View<'_>, node: &NodeId) -> Usage {
    let left = view.state.left_on(node);
    let left = left.fold(Usage::default(), |sum, (_, left)| Usage {
        vms: sum.vms + 1,
        vcpu: sum.vcpu + left.load.vcpu,
        vram_mb: sum.vram_mb + left.load.ram_mb,
    });
    view.state.on_node(node).fold(left, |sum, instance| {
        let (vm, wants) = (
            instance.vm.as_deref().cloned().unwrap_or_default(),
            instance.demand(),
        );
        let given = |seen: u32, wanted: u64| if seen > 0 { u64::from(seen) } else { wanted };
        Usage {
            vms: sum.vms + 1,
            vcpu: sum.vcpu + given(vm.cpu_cores, wants.vcpu),
            vram_mb: sum.vram_mb + given(vm.ram_mb, wants.ram_mb),
        }
    })
}

/// `GET /api/v1/node`: an array; with an id, of that one node.
#[derive(Clone, Copy)]
pub struct NodeList<'a> {
    /// What to look at.
    pub view: View<'a>,
    /// Only this node.
    pub only: Option<&'a Node>,
}

impl Serialize for NodeList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let one = |node| NodeView::new(self.view, node);
        match self.only {
            Some(node) => serializer.collect_seq([one(node)]),
            None => serializer.collect_seq(self.view.state.nodes.values().map(one)),
        }
    }
}

/// A node.
#[derive(Serialize, ToSchema)]
#[schema(as = Node)]
pub struct NodeView<'a> {
    node_id: &'a str,
    node_name: &'a str,
    ip_address: &'a str,
    state: &'static str,
    capacity: u32,
    capacity_mode: &'static str,
    vm_count: u64,
    vcpu_count: u64,
    vram: u64,
    cpu_count: u32,
    cpu_util: f32,
    ram: u64,
    ram_util: f32,
    disk_size: u64,
    free_disk_space: u64,
    anka_disk_usage: u64,
    host_arch: &'static str,
    groups: Vec<GroupView<'a>>,
    templates: Vec<CachedView<'a>>,
    #[schema(value_type = Option<Vec<String>>)]
    usb_devices: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_override: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ram_override: Option<u64>,
    anka_version: Release<'a>,
    agent_version: &'a str,
    driver: &'a str,
    #[schema(value_type = String, format = DateTime)]
    last_updated: Rfc3339,
    timestamp: u64,
}

/// A node group. `description` is a string even when there is none.
#[derive(Serialize, ToSchema)]
#[schema(as = Group)]
pub struct GroupView<'a> {
    id: &'a str,
    name: &'a str,
    description: &'a str,
    fallback_group_id: Option<&'a str>,
}

impl<'a> GroupView<'a> {
    /// As the dialect shows it.
    pub fn new(group: &'a Group) -> Self {
        Self {
            id: group.id.as_str(),
            name: &group.name,
            description: &group.description,
            fallback_group_id: group.fallback.as_ref().map(GroupId::as_str),
        }
    }
    /// A group that a node asked for at join and that nobody has described.
    fn bare(id: &'a GroupId) -> Self {
        let id = id.as_str();
        Self {
            id,
            name: id,
            description: "",
            fallback_group_id: None,
        }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = CachedTag)]
struct CachedView<'a> {
    uuid: &'a str,
    name: &'a str,
    tag: &'a str,
}

#[derive(Serialize, ToSchema)]
#[schema(as = AgentRelease)]
struct Release<'a> {
    product: &'static str,
    version: &'a str,
    build: &'static str,
    license: &'static str,
    expires: &'static str,
}

impl<'a> NodeView<'a> {
    fn new(view: View<'a>, node: &'a Node) -> Self {
        let usage = usage(view, &node.id);
        let stats = view.soft.node_stats(&node.id).unwrap_or_default();
        let heard_ms = view.soft.last_heard_ms(&node.id).unwrap_or(node.updated_ms);
        Self {
            node_id: node.id.as_str(),
            node_name: node.name(),
            ip_address: node.host(),
            state: state(node),
            capacity: node.capacity(),
            capacity_mode: mode(node.capacity_mode()),
            vm_count: usage.vms,
            vcpu_count: usage.vcpu,
            vram: usage.vram_mb,
            cpu_count: node.spec.cpu_count,
            cpu_util: part(stats.cpu_util),
            ram: node.spec.ram_mb / 1024,
            ram_util: part(stats.ram_util),
            disk_size: node.spec.disk_bytes,
            free_disk_space: stats.free_disk,
            anka_disk_usage: stats.used_by_us,
            host_arch: known_arch(&node.spec.arch).unwrap_or("amd64"),
            groups: groups(view, node),
            templates: cached(view, node),
            usb_devices: None,
            vcpu_override: node.config.vcpu_override,
            ram_override: node.config.ram_override_mb.map(|mb| mb / 1024),
            anka_version: release(&node.spec.agent_version),
            agent_version: &node.spec.agent_version,
            driver: &node.spec.driver,
            last_updated: Rfc3339(heard_ms),
            timestamp: heard_ms / 1000,
        }
    }
}

/// A draining node must not say `Active`: one client counts its capacity by that word.
fn state(node: &Node) -> &'static str {
    match (node.reachable, node.draining()) {
        (false, _) => "Offline",
        (true, true) => "Drain Mode",
        (true, false) => "Active",
    }
}

fn mode(mode: CapacityMode) -> &'static str {
    match mode {
        CapacityMode::Number => "number",
        CapacityMode::Resource => "resource",
    }
}

/// A share as clients take it: finite, 0..1.
fn part(share: f32) -> f32 {
    if share.is_finite() {
        share.clamp(0.0, 1.0)
    } else {
        0.0
    }
}

fn groups<'a>(view: View<'a>, node: &'a Node) -> Vec<GroupView<'a>> {
    let known = |id| view.state.groups.get(id);
    let one = |id| known(id).map_or_else(|| GroupView::bare(id), GroupView::new);
    node.groups.iter().map(one).collect()
}

fn release(version: &str) -> Release<'_> {
    Release {
        product: "Mainstay",
        version,
        build: "",
        license: "enterprise plus",
        expires: "",
    }
}

fn cached<'a>(view: View<'a>, node: &'a Node) -> Vec<CachedView<'a>> {
    let images = node.images.iter().filter_map(|(id, number)| {
        let template = view.state.templates.get(id)?;
        let tag = template.tags.get(number)?;
        Some(CachedView {
            uuid: id.as_str(),
            name: &template.name,
            tag: &tag.name,
        })
    });
    images.collect()
}
