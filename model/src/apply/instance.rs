//! Start, update, terminate, forget: what callers and the clean-up do to instances. What nodes
//! say about them is `observe`, where they go is `bind`.

use super::{Applied, check, save};
use crate::ids::{InstanceId, NodeId};
use crate::instance::{Instance, InstanceState, StartRequest, Value};
use crate::limits::{self, clip};
use crate::node::Left;
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use crate::template::Tag;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn start(state: &mut State, ids: &[InstanceId], request: &StartRequest) -> Applied {
    check::start(ids.len(), request)?;
    let tag = resolve_tag(state, request)?;
    let (tag_name, tag_number) = (tag.name.clone(), tag.number);
    let arch = tag.content.arch.clone();
    check_target(state, request)?;
    check_ids(state, ids)?;
    let request = StartRequest {
        tag: Some(tag_name.clone()),
        ..request.clone()
    };
    for id in ids {
        state.insert_instance(Instance {
            id: id.clone(),
            request: request.clone(),
            tag: tag_name.clone(),
            tag_number,
            state: InstanceState::Scheduling,
            message: None,
            node: None,
            generation: 1,
            created_ms: state.clock_ms,
            updated_ms: state.clock_ms,
            ended_ms: None,
            vm: None,
            script_result: None,
            arch: arch.clone(),
            vm_gone: false,
            rejections: Vec::new(),
        });
    }
    Ok(Outcome::Started(ids.to_vec()))
}

/// By name, or by number, or the latest; visible ones only.
fn resolve_tag<'a>(state: &'a State, request: &StartRequest) -> Result<&'a Tag, Refusal> {
    let id = &request.template;
    let unknown = || Refusal::TemplateUnknown(clip(id.as_str(), limits::NAME_BYTES));
    let template = state.templates.get(id).ok_or_else(unknown)?;
    let latest = template.latest().ok_or_else(unknown)?;
    match (&request.tag, request.version) {
        (Some(name), _) => template
            .tag(name)
            .ok_or_else(|| Refusal::TagUnknown(clip(name, limits::NAME_BYTES))),
        (None, Some(number)) => template
            .tags
            .get(&number)
            .filter(|t| t.visible)
            .ok_or_else(|| Refusal::TagUnknown(number.to_string())),
        (None, None) => Ok(latest),
    }
}

/// A pin or a group that nobody knows would wait for ever.
fn check_target(state: &State, request: &StartRequest) -> Result<(), Refusal> {
    if let Some(node) = &request.node
        && !state.nodes.contains_key(node)
    {
        let node = NodeId::from(clip(node.as_str(), limits::NAME_BYTES));
        return Err(Refusal::NodeUnknown(node));
    }
    if let Some(group) = &request.group
        && !state.groups.contains_key(group)
        && !state.nodes.values().any(|n| n.groups.contains(group))
    {
        let group = clip(group.as_str(), limits::NAME_BYTES).into();
        return Err(Refusal::GroupUnknown(group));
    }
    Ok(())
}

fn check_ids(state: &State, ids: &[InstanceId]) -> Result<(), Refusal> {
    let all = state.instances.len() + ids.len();
    check::count("instances at once", all, limits::INSTANCES)?;
    let mut seen = BTreeSet::new();
    for id in ids {
        check::id("instance id", id.as_str())?;
        let taken = state.instances.contains_key(id) || state.left.contains_key(id);
        if !seen.insert(id) || taken {
            return Err(Refusal::Conflict(format!("instance id {id} is taken")));
        }
    }
    Ok(())
}

pub(super) fn update(
    state: &mut State,
    id: &InstanceId,
    name: Option<&String>,
    external_id: Option<&String>,
    metadata: &BTreeMap<String, Value>,
) -> Applied {
    let Some(instance) = state.instances.get(id) else {
        return Err(unknown(id));
    };
    check::caller_marks(name, external_id)?;
    let request = &instance.request;
    let kept = request
        .metadata
        .iter()
        .filter(|(k, _)| !metadata.contains_key(*k));
    check::metadata(kept.chain(metadata))?;
    let same = (name.is_none() || name == request.name.as_ref())
        && (external_id.is_none() || external_id == request.external_id.as_ref())
        && metadata
            .iter()
            .all(|(k, v)| request.metadata.get(k) == Some(v));
    if !same {
        state.edit_instance(id, |i| {
            let request = &mut i.request;
            request.name = name.cloned().or(request.name.take());
            request.external_id = external_id.cloned().or(request.external_id.take());
            for (key, value) in metadata {
                request.metadata.insert(key.clone(), value.clone());
            }
        });
    }
    Ok(Outcome::Done)
}

/// Wins over every start that races with it: the generation goes up, so that whatever a node
/// still says about the former one is stale.
pub(super) fn terminate(state: &mut State, id: &InstanceId) -> Applied {
    let Some(instance) = state.instances.get(id) else {
        return Err(unknown(id));
    };
    if matches!(
        instance.state,
        InstanceState::Terminating | InstanceState::Terminated
    ) {
        return Ok(Outcome::Done);
    }
    let vm_gone = instance.vm_gone;
    save::abandon(state, id, "the instance was terminated");
    let node = state.instances.get(id).and_then(|i| i.node.clone());
    match node {
        // Never had a VM: stays Terminating until it is forgotten.
        None => end(state, id, InstanceState::Terminating),
        #[cfg(feature = "seeded-bugs")]
        Some(_) if crate::seeded::has(crate::seeded::Bug::HastyEnd) => {
            end(state, id, InstanceState::Terminated);
        }
        Some(_) if vm_gone => end(state, id, InstanceState::Terminated),
        Some(node) if state.nodes.get(&node).is_none_or(|n| n.lost) => {
            end_unseen(state, id);
            state.bump_desired(&node);
        }
        Some(node) => {
            state.edit_instance(id, |i| {
                i.state = InstanceState::Terminating;
                i.generation = i.generation.saturating_add(1);
            });
            state.bump_desired(&node);
        }
    }
    Ok(Outcome::Done)
}

/// A new generation of the same VM: its node acts on it once, and what it still says of the former one
/// is stale.
pub(super) fn restart(state: &mut State, id: &InstanceId) -> Applied {
    let instance = state.instances.get(id).ok_or_else(|| unknown(id))?;
    let node = match (instance.state, &instance.node) {
        (InstanceState::Stopping, _) => return Ok(Outcome::Done),
        (InstanceState::Started | InstanceState::Stopped, Some(node)) => node.clone(),
        (other, _) => {
            return Err(Refusal::Conflict(format!(
                "the instance is {}: only one that is Started or Stopped can be restarted",
                other.as_str()
            )));
        }
    };
    state.edit_instance(id, |i| {
        i.state = InstanceState::Stopping;
        i.generation = i.generation.saturating_add(1);
    });
    state.bump_desired(&node);
    Ok(Outcome::Done)
}

/// The end of an instance: from now on only the retention keeps it.
pub(super) fn end(state: &mut State, id: &InstanceId, last: InstanceState) {
    let now = state.clock_ms;
    state.edit_instance(id, |i| {
        i.state = last;
        i.generation = i.generation.saturating_add(1);
        i.ended_ms = Some(now);
    });
}

/// The end of an instance whose node cannot be asked: should the node come back, it shall remove
/// the VM. The caller bumps the node's desired set.
pub(super) fn end_unseen(state: &mut State, id: &InstanceId) {
    end(state, id, InstanceState::Terminated);
    #[cfg(feature = "seeded-bugs")]
    if crate::seeded::has(crate::seeded::Bug::NothingLeft) {
        return;
    }
    let Some(instance) = state.instances.get(id) else {
        return;
    };
    let Some(node) = instance.node.clone() else {
        return;
    };
    let left = Left {
        node,
        generation: instance.generation,
        load: instance.demand(),
    };
    state.leave(id, left);
}

/// A live instance fails. It keeps its node and what was known of its VM.
pub(super) fn fail(state: &mut State, id: &InstanceId, message: &str) {
    save::abandon(state, id, &format!("the instance failed: {message}"));
    state.edit_instance(id, |i| {
        i.state = InstanceState::Error;
        i.message = Some(clip(message, limits::TEXT_BYTES));
    });
}

/// A live instance fails by a decision of ours: what its node may still say is stale.
pub(super) fn fail_for_good(state: &mut State, id: &InstanceId, message: &str) {
    fail(state, id, message);
    state.edit_instance(id, |i| i.generation = i.generation.saturating_add(1));
}

pub(super) fn expire(state: &mut State, ids: &[InstanceId], retention_ms: u64) -> Applied {
    check::count("instances to forget", ids.len(), limits::BATCH)?;
    for id in ids {
        let ended = state.instances.get(id).and_then(|i| i.ended_ms);
        if ended.is_some_and(|at| at.saturating_add(retention_ms) <= state.clock_ms) {
            state.remove_instance(id);
        }
    }
    Ok(Outcome::Done)
}

fn unknown(id: &InstanceId) -> Refusal {
    Refusal::InstanceUnknown(InstanceId::from(clip(id.as_str(), limits::NAME_BYTES)))
}
