//! What nodes report. Only a report about the present generation from the assigned node counts;
//! a report that says nothing new changes nothing.
//!
//! ```text
//! Scheduling -> Pulling -> Started <-> Stopped        Rejected: back to Scheduling, unbound,
//!      \            \      Stopping -> Started          only before the first Started
//!      \____________\_________\__________\___ Error
//! Terminating -- Gone --> Terminated                  Gone elsewhere: Error "VM disappeared"
//! ```
//! Of an ended instance only one thing still counts: that what was left of it is gone.

use super::{Applied, check, group, instance};
use crate::feature::{GROUPS_KEPT, TOLD_TO_KEEP};
use crate::ids::NodeId;
use crate::instance::{
    Instance, InstanceState, Observation, ObservedPhase, Rejection, ScriptResult, VmInfo,
};
use crate::limits::{self, clip, clip_front};
use crate::outcome::{Outcome, Refusal};
#[cfg(feature = "seeded-bugs")]
use crate::seeded;
use crate::state::State;

pub(super) fn observe(state: &mut State, node: &NodeId, changes: &[Observation]) -> Applied {
    check::count("observations", changes.len(), limits::BATCH)?;
    if !state.nodes.contains_key(node) {
        return Err(Refusal::NodeUnknown(NodeId::from(clip(
            node.as_str(),
            limits::NAME_BYTES,
        ))));
    }
    for seen in changes {
        if let Some(left) = state.left.get(&seen.id)
            && left.removed_by(node, seen)
        {
            state.forget_left(&seen.id);
            state.bump_desired(node);
            continue;
        }
        let Some(instance) = state.instances.get(&seen.id) else {
            continue;
        };
        let fits = instance.generation == seen.generation;
        #[cfg(feature = "seeded-bugs")]
        let fits = fits || seeded::has(seeded::Bug::StaleReport);
        if instance.node.as_ref() != Some(node) || !fits || instance.ended_ms.is_some() {
            continue;
        }
        let step = step(instance, &seen.phase);
        if !matches!(step, Step::Unbind(_) | Step::End) {
            record_facts(state, seen);
        }
        let before = state.instances.get(&seen.id).map(Instance::wanted);
        let told = state.nodes.get(node).map(|n| n.desired_generation);
        take(state, node, seen, step);
        let after = state.instances.get(&seen.id).map(Instance::wanted);
        let same = told == state.nodes.get(node).map(|n| n.desired_generation);
        if state.features >= TOLD_TO_KEEP && before != after && same {
            state.bump_desired(node);
        }
    }
    Ok(Outcome::Done)
}

/// What a report means for one instance.
enum Step<'a> {
    Nothing,
    To(InstanceState),
    Fail(&'a str),
    VmGone,
    Unbind(&'a str),
    End,
}

fn step<'a>(instance: &Instance, phase: &'a ObservedPhase) -> Step<'a> {
    use InstanceState::{
        Error, Pulling, Pushing, Scheduling, Started, Stopped, Stopping, Terminated, Terminating,
    };
    use ObservedPhase as Seen;
    match (instance.state, phase) {
        (Terminated, _) => Step::Nothing,
        (Terminating, Seen::Gone) => Step::End,
        (Terminating, _) => Step::Nothing,
        (Error, Seen::Gone) if !instance.vm_gone => Step::VmGone,
        (Error, _) => Step::Nothing,

        (_, Seen::Gone) => Step::VmGone,
        (_, Seen::Failed(why)) => Step::Fail(why),
        (Scheduling | Pulling, Seen::Rejected(why)) => Step::Unbind(why),
        // Once started it is not started again elsewhere behind its user's back.
        (_, Seen::Rejected(why)) => Step::Fail(why),

        (Scheduling, Seen::Pulling) => Step::To(Pulling),
        (Scheduling | Pulling | Stopping | Stopped, Seen::Running) => Step::To(Started),
        (Scheduling | Pulling | Started | Stopping, Seen::Stopped) => Step::To(Stopped),
        (
            Scheduling | Pulling | Started | Stopping | Stopped | Pushing,
            Seen::Pulling | Seen::Starting | Seen::Running | Seen::Stopped,
        ) => Step::Nothing,
    }
}

fn take(state: &mut State, node: &NodeId, seen: &Observation, step: Step<'_>) {
    let id = &seen.id;
    match step {
        Step::Nothing => {}
        Step::To(next) => state.edit_instance(id, |i| {
            i.state = next;
            if next == InstanceState::Started {
                i.message = None;
                i.rejections.clear();
            }
        }),
        Step::Fail(why) => instance::fail(state, id, why),
        Step::VmGone => {
            if state.instances.get(id).is_some_and(Instance::live) {
                instance::fail(state, id, "VM disappeared");
            }
            state.edit_instance(id, |i| i.vm_gone = true);
            state.bump_desired(node);
        }
        Step::Unbind(why) => {
            unbind(state, node, seen, why);
            state.bump_desired(node);
        }
        Step::End => {
            instance::end(state, id, InstanceState::Terminated);
            state.bump_desired(node);
        }
    }
}

/// Back to the scheduler, which will not offer it to this node again for a while.
fn unbind(state: &mut State, node: &NodeId, seen: &Observation, why: &str) {
    let now = state.clock_ms;
    let instance = state.instances.get(&seen.id);
    if instance.is_some_and(|i| i.script_result.is_some()) {
        state.set_script_result(&seen.id, None);
    }
    state.edit_instance(&seen.id, |i| {
        i.state = InstanceState::Scheduling;
        i.node = None;
        i.generation = i.generation.saturating_add(1);
        i.message = Some(clip(why, limits::TEXT_BYTES));
        i.vm = None;
        i.rejections.retain(|r| &r.node != node);
        if i.rejections.len() >= limits::REJECTIONS {
            i.rejections.remove(0);
        }
        i.rejections.push(Rejection {
            node: node.clone(),
            at_ms: now,
        });
    });
    if let Some(why) = state.instances.get(&seen.id).and_then(|i| orphan(state, i)) {
        instance::fail(state, &seen.id, why);
    }
}

/// What it needs may be gone meanwhile: then nobody can start it any more.
fn orphan(state: &State, instance: &Instance) -> Option<&'static str> {
    let request = &instance.request;
    let template = state.templates.get(&request.template);
    if template.is_none_or(|t| !t.tags.contains_key(&instance.tag_number)) {
        return Some(super::template::DELETED);
    }
    let gone = |g| state.features >= GROUPS_KEPT && group::is_gone(state, g);
    request
        .group
        .as_ref()
        .filter(|g| gone(g))
        .map(|_| group::GONE)
}

/// Facts about the VM and its script are kept whatever the step: also after an error.
fn record_facts(state: &mut State, seen: &Observation) {
    let Some(instance) = state.instances.get(&seen.id) else {
        return;
    };
    let new_script = seen
        .script
        .as_ref()
        .map(clip_script)
        .filter(|s| instance.script_result.as_deref() != Some(s));
    // A driver that can no longer say what the VM was: what was known of it stays.
    let facts = seen.vm.as_ref().filter(|vm| !vm.uuid.is_empty());
    let new_vm = facts
        .map(clip_vm)
        .filter(|vm| instance.vm.as_deref() != Some(vm));
    if let Some(vm) = new_vm {
        state.edit_instance(&seen.id, |i| i.vm = Some(Box::new(vm)));
    }
    if new_script.is_some() {
        state.set_script_result(&seen.id, new_script);
    }
}

fn clip_script(script: &ScriptResult) -> ScriptResult {
    ScriptResult {
        return_code: script.return_code,
        did_timeout: script.did_timeout,
        stdout: clip_front(&script.stdout, limits::SCRIPT_OUTPUT_BYTES),
        stderr: clip_front(&script.stderr, limits::SCRIPT_OUTPUT_BYTES),
    }
}

fn clip_vm(vm: &VmInfo) -> VmInfo {
    let short = |s: &str| clip(s, limits::NAME_BYTES);
    let mut port_forwarding = vm.port_forwarding.clone();
    port_forwarding.truncate(limits::PORT_RULES);
    for rule in &mut port_forwarding {
        rule.name = short(&rule.name);
    }
    VmInfo {
        uuid: short(&vm.uuid),
        name: short(&vm.name),
        status: short(&vm.status),
        ip: short(&vm.ip),
        host_ip: short(&vm.host_ip),
        accelerator: clip(&vm.accelerator, limits::NAME_BYTES),
        port_forwarding,
        ..*vm
    }
}
