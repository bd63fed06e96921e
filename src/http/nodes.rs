//! Nodes as JSON: the replicated facts, and the soft figures their agents sent. Refuses to judge
//! whether a node is alive: the state says so.

use super::View;
use super::instances::known_arch;
use super::time::Rfc3339;
use mainstay_model::instance::{Instance, InstanceState};
use mainstay_model::node::{CapacityMode, Node};
use mainstay_model::{GroupId, NodeId};
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// What runs on each node, from one pass over the instances.
#[derive(Clone, Debug, Default)]
struct Usage {
    vms: u64,
    vcpu: u64,
    vram_mb: u64,
}

fn usage(view: View<'_>) -> BTreeMap<&NodeId, Usage> {
    let mut nodes: BTreeMap<&NodeId, Usage> = BTreeMap::new();
    for instance in view.state.instances.values().filter(|i| holds_room(i)) {
        let Some(node) = &instance.node else { continue };
        let used = nodes.entry(node).or_default();
        let (vm, request) = (instance.vm.as_ref(), &instance.request);
        let vcpu = vm.map(|v| v.cpu_cores).filter(|&n| n > 0).or(request.vcpu);
        let vram_mb = vm.map(|v| v.ram_mb).filter(|&n| n > 0).or(request.vram_mb);
        used.vms += 1;
        used.vcpu += u64::from(vcpu.unwrap_or(0));
        used.vram_mb += u64::from(vram_mb.unwrap_or(0));
    }
    nodes
}

fn holds_room(instance: &Instance) -> bool {
    instance.ended_ms.is_none() && instance.state != InstanceState::Terminated
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
        let usage = usage(self.view);
        let none = Usage::default();
        let one = |node| NodeView::new(self.view, node, usage.get(&node.id).unwrap_or(&none));
        match self.only {
            Some(node) => serializer.collect_seq([one(node)]),
            None => serializer.collect_seq(self.view.state.nodes.values().map(one)),
        }
    }
}

#[derive(Serialize)]
struct NodeView<'a> {
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
    usb_devices: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_override: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ram_override: Option<u64>,
    anka_version: Release<'a>,
    agent_version: &'a str,
    driver: &'a str,
    last_updated: Rfc3339,
    timestamp: u64,
}

/// A node group. `description` is a string even when there is none.
#[derive(Serialize)]
struct GroupView<'a> {
    id: &'a str,
    name: &'a str,
    description: &'a str,
    fallback_group_id: Option<&'a str>,
}

#[derive(Serialize)]
struct CachedView<'a> {
    uuid: &'a str,
    name: &'a str,
    tag: &'a str,
}

#[derive(Serialize)]
struct Release<'a> {
    product: &'static str,
    version: &'a str,
    build: &'static str,
    license: &'static str,
    expires: &'static str,
}

impl<'a> NodeView<'a> {
    fn new(view: View<'a>, node: &'a Node, usage: &Usage) -> Self {
        let stats = view.soft.node_stats(&node.id).unwrap_or_default();
        let heard_ms = view.soft.last_heard_ms(&node.id).unwrap_or(node.updated_ms);
        Self {
            node_id: node.id.as_str(),
            node_name: node.name(),
            ip_address: node.host(),
            state: state(node),
            capacity: node.capacity(),
            capacity_mode: mode(node.config.capacity_mode.unwrap_or_default()),
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
            groups: node.spec.groups.iter().map(group).collect(),
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

fn group(id: &GroupId) -> GroupView<'_> {
    GroupView {
        id: id.as_str(),
        name: id.as_str(),
        description: "",
        fallback_group_id: None,
    }
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
