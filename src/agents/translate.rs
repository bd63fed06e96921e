//! Words of the agents' wire and words of the model, one into the other. Pure.

use super::liveness::Heard;
use mainstay_agent::wire;
use mainstay_model::instance::{Observation, ObservedPhase, PortRule, ScriptResult, VmInfo};
use mainstay_model::limits::{
    DISTRIBUTIONS, NAME_BYTES, PORT_RULES, SAVE_OUTPUT_BYTES, SCRIPT_OUTPUT_BYTES, TEXT_BYTES,
};
use mainstay_model::node::NodeSpec;
use mainstay_model::save::{SaveReport, SaveSaid};
use mainstay_model::{GroupId, InstanceId, SaveId};

pub(super) fn spec(call: &wire::RegisterRequest) -> NodeSpec {
    NodeSpec {
        name: call.name.clone(),
        ip_address: call.ip_address.clone(),
        arch: call.arch.clone(),
        cpu_count: call.cpu_count,
        ram_mb: call.ram_mb,
        disk_bytes: call.disk_bytes,
        capacity: call.capacity,
        groups: call.groups.iter().cloned().map(GroupId::from).collect(),
        agent_version: call.agent_version.clone(),
        driver: call.driver.clone(),
    }
}

pub(super) fn heard(report: &wire::Report) -> Heard {
    let part = |seen: &wire::Observed| match &seen.save {
        Some(save) => Some(save.progress),
        None => (seen.phase == "pulling").then_some(seen.progress),
    };
    let moving = report.observed.iter();
    let moving = moving.filter_map(|seen| Some((seen.id.clone(), part(seen)?)));
    Heard {
        node: report.node_id.clone(),
        stats: report.stats.clone(),
        progress: moving.collect(),
        pulls: report.pulls.as_ref().map(|p| pulls(p)),
        ..Heard::default()
    }
}

/// Every member keeps them, and tells them on with each heartbeat.
fn pulls(said: &[wire::ImagePull]) -> Vec<wire::ImagePull> {
    let short = |pull: &wire::ImagePull| wire::ImagePull {
        error: clip(&pull.error, NAME_BYTES),
        ..pull.clone()
    };
    said.iter().take(DISTRIBUTIONS).map(short).collect()
}

/// `None` for a phase of another release.
pub(super) fn observation(seen: &wire::Observed) -> Option<Observation> {
    let phase = match seen.phase.as_str() {
        "pulling" => ObservedPhase::Pulling,
        "starting" => ObservedPhase::Starting,
        "running" => ObservedPhase::Running,
        "stopped" => ObservedPhase::Stopped,
        "failed" => ObservedPhase::Failed(clip(&seen.message, TEXT_BYTES)),
        "rejected" => ObservedPhase::Rejected(clip(&seen.message, TEXT_BYTES)),
        "gone" => ObservedPhase::Gone,
        _ => return None,
    };
    // A driver that cannot say what a VM was gives blank facts: they say nothing.
    let facts = seen.vm.as_ref().filter(|f| !f.uuid.is_empty());
    Some(Observation {
        id: InstanceId::from(seen.id.clone()),
        generation: seen.generation,
        phase,
        vm: facts.map(vm),
        script: seen.script.as_ref().map(|s| script(s, SCRIPT_OUTPUT_BYTES)),
    })
}

/// What is said of a save; `None` for a phase of another release.
pub(super) fn save_report(seen: &wire::Observed) -> Option<SaveReport> {
    let save = seen.save.as_ref()?;
    let said = match save.phase.as_str() {
        "begun" => SaveSaid::Begun,
        "pushed" => SaveSaid::Pushed,
        "failed" => SaveSaid::Failed {
            why: clip(&save.message, TEXT_BYTES),
            stopped: save.stopped,
        },
        _ => return None,
    };
    let result = save.script.as_ref();
    Some(SaveReport {
        id: SaveId::from(save.id.clone()),
        said,
        script: result.map(|s| script(s, SAVE_OUTPUT_BYTES)),
    })
}

/// With the last so many bytes of its outputs.
fn script(result: &wire::ScriptResult, keep: usize) -> ScriptResult {
    ScriptResult {
        return_code: result.return_code,
        did_timeout: result.did_timeout,
        stdout: clip_front(&result.stdout, keep),
        stderr: clip_front(&result.stderr, keep),
    }
}

/// Cut as the model cuts (also scripts and messages), so that comparing it with the state finds no difference that is none.
fn vm(facts: &wire::VmFacts) -> VmInfo {
    let rules = facts.port_forwarding.iter().take(PORT_RULES);
    let clip = |text: &str| clip(text, NAME_BYTES);
    VmInfo {
        uuid: clip(&facts.uuid),
        name: clip(&facts.name),
        status: clip(&facts.status),
        ip: clip(&facts.ip),
        host_ip: clip(&facts.host_ip),
        cpu_cores: facts.cpu_cores,
        ram_mb: facts.ram_mb,
        port_forwarding: rules
            .map(|r| PortRule {
                name: clip(&r.name),
                guest_port: r.guest_port,
                host_port: r.host_port,
            })
            .collect(),
        vnc_port: facts.vnc_port,
        created_ms: facts.created_ms,
        started_ms: facts.started_ms,
        accelerator: clip(&facts.accelerator),
    }
}

fn clip(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].to_owned()
}

/// The last bytes of a script's output.
fn clip_front(text: &str, keep: usize) -> String {
    let from = text.len().saturating_sub(keep);
    text[text.ceil_char_boundary(from)..].to_owned()
}

pub(super) fn rules(rules: &[PortRule]) -> Vec<wire::PortRule> {
    rules
        .iter()
        .map(|r| wire::PortRule {
            name: r.name.clone(),
            guest_port: r.guest_port,
            host_port: r.host_port,
        })
        .collect()
}
