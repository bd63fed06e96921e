//! Nodes join, are configured, are judged and leave. What they report is `observe`.

use super::{Applied, check, distribute, evict, group, instance};
use crate::ids::{InstanceId, NodeId, TemplateId};
use crate::instance::{Instance, InstanceState};
use crate::limits::{self, clip};
use crate::node::{Node, NodeConfig, NodeSpec};
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use std::collections::BTreeSet;

/// A node that comes back keeps what its operator set; groups it newly asks for are added.
pub(super) fn register(state: &mut State, id: &NodeId, spec: &NodeSpec) -> Applied {
    check::id("node id", id.as_str())?;
    check_spec(spec)?;
    let asked = spec.groups.iter().cloned();
    match state.nodes.get(id) {
        None => {
            check::count("nodes", state.nodes.len() + 1, limits::NODES)?;
            state.insert_node(Node {
                id: id.clone(),
                spec: spec.clone(),
                config: NodeConfig::default(),
                reachable: true,
                lost: false,
                groups: asked.collect(),
                images: BTreeSet::new(),
                desired_generation: 0,
                joined_ms: state.clock_ms,
                updated_ms: state.clock_ms,
            });
        }
        Some(node) if &node.spec == spec && node.reachable && !node.lost => {}
        Some(node) => {
            let mut groups = node.groups.clone();
            groups.extend(asked.filter(|g| !node.spec.groups.contains(g)));
            check::count("groups of a node", groups.len(), limits::GROUPS)?;
            state.edit_node(id, |n| {
                n.spec = spec.clone();
                n.groups = groups;
                n.reachable = true;
                n.lost = false;
            });
        }
    }
    Ok(Outcome::Registered(id.clone()))
}

fn check_spec(spec: &NodeSpec) -> Result<(), Refusal> {
    for (what, value) in [
        ("node name", &spec.name),
        ("node address", &spec.ip_address),
        ("node architecture", &spec.arch),
        ("agent version", &spec.agent_version),
        ("driver", &spec.driver),
    ] {
        check::text(what, value, limits::NAME_BYTES)?;
    }
    check::count("groups of a node", spec.groups.len(), limits::GROUPS)?;
    spec.groups
        .iter()
        .try_for_each(|g| check::id("group id", g.as_str()))
}

pub(super) fn configure(state: &mut State, id: &NodeId, config: &NodeConfig) -> Applied {
    let node = known(state, id)?;
    for (what, value) in [("node name", &config.name), ("node host", &config.host)] {
        if let Some(value) = value {
            check::name(what, value)?;
        }
    }
    let old = &node.config;
    let merged = NodeConfig {
        capacity: config.capacity.or(old.capacity),
        name: config.name.clone().or_else(|| old.name.clone()),
        host: config.host.clone().or_else(|| old.host.clone()),
        capacity_mode: config.capacity_mode.or(old.capacity_mode),
        vcpu_override: config.vcpu_override.or(old.vcpu_override),
        ram_override_mb: config.ram_override_mb.or(old.ram_override_mb),
        drain: config.drain.or(old.drain),
    };
    if &merged != old {
        state.edit_node(id, |n| n.config = merged);
    }
    Ok(Outcome::Done)
}

pub(super) fn remove(state: &mut State, id: &NodeId) -> Applied {
    known(state, id)?;
    abandon(state, id, "node removed");
    let pinned = |i: &&Instance| i.request.node.as_ref() == Some(id);
    let pinned = state.waiting().filter(pinned).map(|i| i.id.clone());
    for instance in pinned.collect::<Vec<_>>() {
        instance::fail_for_good(state, &instance, "the node it was pinned to was removed");
    }
    let groups = state.nodes.get(id).map(|n| n.groups.clone());
    state.remove_node(id);
    group::fail_hopeless(state, &groups.unwrap_or_default());
    distribute::node_gone(state, id);
    Ok(Outcome::Done)
}

/// `lost` sticks until the node is reachable again.
pub(super) fn set_reachability(
    state: &mut State,
    id: &NodeId,
    reachable: bool,
    lost: bool,
) -> Applied {
    let node = known(state, id)?;
    if reachable && lost {
        return Err(Refusal::Conflict("a reachable node is not lost".into()));
    }
    let newly_lost = lost && !node.lost;
    let lost = !reachable && (lost || node.lost);
    if node.reachable != reachable || node.lost != lost {
        state.edit_node(id, |n| {
            n.reachable = reachable;
            n.lost = lost;
        });
    }
    if newly_lost {
        abandon(state, id, "node lost");
    }
    Ok(Outcome::Done)
}

/// Nothing more is heard of a node: live instances fail, those that were to end have ended, and
/// what is left of them is remembered. The generation goes up, so that what the node may still say
/// about them is stale.
fn abandon(state: &mut State, node: &NodeId, why: &str) {
    let ids: Vec<InstanceId> = state.on_node(node).map(|i| i.id.clone()).collect();
    for id in &ids {
        let instance = state.instances.get(id);
        if instance.is_some_and(Instance::live) {
            instance::fail_for_good(state, id, why);
        } else if instance.is_some_and(|i| i.state == InstanceState::Terminating) {
            instance::end_unseen(state, id);
        }
    }
    if !ids.is_empty() {
        state.bump_desired(node);
    }
}

pub(super) fn set_images(state: &mut State, id: &NodeId, images: &[(TemplateId, u32)]) -> Applied {
    let node = known(state, id)?;
    check::count("cached images", images.len(), limits::NODE_IMAGES)?;
    for (template, _) in images {
        check::id("template id", template.as_str())?;
    }
    let images: BTreeSet<_> = images.iter().cloned().collect();
    if node.images != images {
        distribute::fetched(state, id, &images);
        evict::dropped(state, id, &images);
        state.edit_node(id, |n| n.images = images);
    }
    Ok(Outcome::Done)
}

pub(super) fn known<'a>(state: &'a State, id: &NodeId) -> Result<&'a Node, Refusal> {
    let unknown = || Refusal::NodeUnknown(NodeId::from(clip(id.as_str(), limits::NAME_BYTES)));
    state.nodes.get(id).ok_or_else(unknown)
}
