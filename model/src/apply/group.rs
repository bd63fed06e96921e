//! Node groups and who is in them.

use super::{Applied, check, instance};
use crate::feature::GROUPS_KEPT;
use crate::group::Group;
use crate::ids::{GroupId, InstanceId, NodeId};
use crate::instance::Instance;
use crate::limits::{self, clip};
use crate::node::Node;
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use std::collections::BTreeSet;

/// Why an instance failed whose group ended before it had a node.
pub(super) const GONE: &str = "its group was deleted before the instance was placed";

pub(super) fn put(state: &mut State, group: &Group) -> Applied {
    check::id("group id", group.id.as_str())?;
    check::name("group name", &group.name)?;
    check::text("group description", &group.description, limits::TEXT_BYTES)?;
    let old = state.groups.get(&group.id);
    if old.is_none() {
        check::count("groups", state.groups.len() + 1, limits::GROUPS)?;
    }
    let namesake = |g: &Group| g.name == group.name && g.id != group.id;
    if state.groups.values().any(namesake) {
        let text = format!("a group named {} exists", group.name);
        return Err(Refusal::Conflict(text));
    }
    if let Some(fallback) = &group.fallback
        && fallback != &group.id
        && !state.groups.contains_key(fallback)
    {
        return Err(unknown(fallback));
    }
    if old != Some(group) {
        state.put_group(group.clone());
    }
    Ok(Outcome::Done)
}

pub(super) fn delete(state: &mut State, id: &GroupId) -> Applied {
    if !state.groups.contains_key(id) {
        return Err(unknown(id));
    }
    state.remove_group(id);
    let mut heirs: Vec<Group> = state.groups.values().cloned().collect();
    heirs.retain(|g| g.fallback.as_ref() == Some(id));
    for group in heirs {
        state.put_group(Group {
            fallback: None,
            ..group
        });
    }
    let members = state.nodes.values().filter(|n| n.groups.contains(id));
    let members: Vec<NodeId> = members.map(|n| n.id.clone()).collect();
    for node in &members {
        state.edit_node(node, |n| {
            n.groups.remove(id);
        });
    }
    fail_hopeless(state, &BTreeSet::from([id.clone()]));
    Ok(Outcome::Done)
}

/// Neither was it made by somebody, nor did a node ask for it when it joined.
pub(super) fn is_gone(state: &State, group: &GroupId) -> bool {
    let joined = |n: &Node| n.groups.contains(group);
    !state.groups.contains_key(group) && !state.nodes.values().any(joined)
}

/// Who waits for one of these groups waits for ever if it is no more.
pub(super) fn fail_hopeless(state: &mut State, groups: &BTreeSet<GroupId>) {
    if state.features < GROUPS_KEPT {
        return;
    }
    let gone = |group: &&GroupId| is_gone(state, group);
    let gone: BTreeSet<&GroupId> = groups.iter().filter(gone).collect();
    if gone.is_empty() {
        return;
    }
    let hopeless = |i: &&Instance| i.request.group.as_ref().is_some_and(|g| gone.contains(g));
    let ids: Vec<InstanceId> = state
        .waiting()
        .filter(hopeless)
        .map(|i| i.id.clone())
        .collect();
    for id in &ids {
        instance::fail_for_good(state, id, GONE);
    }
}

/// All or none: every node and, when joining, every group must be known.
pub(super) fn change_nodes(
    state: &mut State,
    nodes: &[NodeId],
    groups: &[GroupId],
    member: bool,
) -> Applied {
    check::count("nodes", nodes.len(), limits::BATCH)?;
    check::count("groups", groups.len(), limits::GROUPS)?;
    if member && let Some(missing) = groups.iter().find(|g| !state.groups.contains_key(g)) {
        return Err(unknown(missing));
    }
    let mut changed = Vec::new();
    for id in nodes {
        let node = super::node::known(state, id)?;
        let mut after: BTreeSet<GroupId> = node.groups.clone();
        for group in groups {
            if member {
                after.insert(group.clone());
            } else {
                after.remove(group);
            }
        }
        check::count("groups of a node", after.len(), limits::GROUPS)?;
        if after != node.groups {
            changed.push((id, after));
        }
    }
    for (id, after) in changed {
        state.edit_node(id, |n| n.groups = after);
    }
    if !member {
        fail_hopeless(state, &groups.iter().cloned().collect());
    }
    Ok(Outcome::Done)
}

fn unknown(id: &GroupId) -> Refusal {
    Refusal::GroupUnknown(GroupId::from(clip(id.as_str(), limits::NAME_BYTES)))
}
