//! `POST /api/v1/vm`: from the dialect's members to a validated start request. Pure; refuses to
//! look at the state (whether a template or node exists is decided when the command is applied).

use super::envelope::{Call, int, wrong};
use super::error::ApiError;
use mainstay_model::command::Command;
use mainstay_model::instance::{PortRule, Script, ScriptFailure, StartRequest, Value};
use mainstay_model::{InstanceId, limits};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// Priority of a request that names none.
const PRIORITY_DEFAULT: u32 = 1_000;
/// Seconds a script may take when the request does not say.
const SCRIPT_TIMEOUT_S: u32 = 90;
/// Largest vCPU count and largest memory in MB that are taken for meant.
const VCPU_MAX: u64 = 4_096;
const VRAM_MB_MAX: u64 = 64 << 20;

/// Members with a promise that we cannot keep: dropping them would start another VM than was
/// asked for, or one less isolated. Tuning of the reference hypervisor (`video_controller`,
/// `hvapic`, `csr_active_config`) and `group` are dropped: without them the VM is the same.
const UNSUPPORTED: [&str; 9] = [
    "usb_device",
    "mac_address",
    "vlan_tag",
    "network_local",
    "vnc_password",
    "hw_serial",
    "hw_uuid",
    "disk",
    "network_mode",
];

/// The command for a start call, and the ids that its instances will have.
pub fn command(call: &Call) -> Result<(Command, Vec<InstanceId>), ApiError> {
    let request = request(call)?;
    let max = limits::INSTANCES_PER_REQUEST as u64;
    let count = call.int("count", 1..=max)?.unwrap_or(1);
    let ids: Vec<_> = (0..count).map(|n| call.instance_id(n)).collect();
    let command = Command::StartInstances {
        ids: ids.clone(),
        request: Box::new(request),
    };
    Ok((command, ids))
}

fn request(call: &Call) -> Result<StartRequest, ApiError> {
    let template = call.required("vmid")?.into();
    refuse(call, &UNSUPPORTED)?;
    Ok(StartRequest {
        template,
        tag: call.text("tag")?,
        version: small(call, "version", 0..=u64::from(u32::MAX))?,
        name: call.text("name")?,
        name_template: call.text("name_template")?,
        external_id: call.text("external_id")?,
        node: call.text("node_id")?.map(Into::into),
        group: call.text("group_id")?.map(Into::into),
        priority: small(call, "priority", 1..=u64::from(limits::PRIORITY_MAX))?
            .unwrap_or(PRIORITY_DEFAULT),
        script: script(call)?.map(Box::new),
        vcpu: small(call, "vcpu", 0..=VCPU_MAX)?.filter(|&n| n > 0),
        vram_mb: small(call, "vram", 0..=VRAM_MB_MAX)?.filter(|&n| n > 0),
        metadata: metadata(call)?.into(),
        port_forwarding: ports(call)?,
    })
}

/// Refuse a call that sets one of these members to anything.
pub(super) fn refuse(call: &Call, members: &[&str]) -> Result<(), ApiError> {
    let given = |name: &&&str| match call.get(name) {
        None => false,
        Some(Json::String(text)) => {
            // User-mode networking is what the dialect calls `shared`.
            !text.is_empty() && (**name, text.as_str()) != ("network_mode", "shared")
        }
        Some(Json::Object(members)) => !members.is_empty(),
        Some(other) => *other != 0 && *other != false,
    };
    match members.iter().find(given) {
        Some(name) => Err(ApiError::fail(format!(
            "{name} is not supported; leave it out"
        ))),
        None => Ok(()),
    }
}

fn small(
    call: &Call,
    name: &str,
    range: std::ops::RangeInclusive<u64>,
) -> Result<Option<u32>, ApiError> {
    Ok(call.int(name, range)?.and_then(|n| u32::try_from(n).ok()))
}

fn script(call: &Call) -> Result<Option<Script>, ApiError> {
    let at_boot = call.int("startup_script_condition", 0..=1)?.unwrap_or(0) == 1;
    let monitored = call.flag("script_monitoring")?.unwrap_or(false);
    let timeout_s = small(call, "script_timeout", 0..=u64::from(u32::MAX))?;
    let on_failure = match call.int("script_fail_handler", 0..=2)? {
        None | Some(0) => ScriptFailure::Stop,
        Some(1) => ScriptFailure::Keep,
        Some(_) => ScriptFailure::Delete,
    };
    let timeout_s = timeout_s.filter(|&s| s > 0).unwrap_or(SCRIPT_TIMEOUT_S);
    let body = call.base64("startup_script")?;
    Ok(body.map(|body| Script {
        body,
        monitored,
        timeout_s,
        at_boot,
        on_failure,
    }))
}

/// Text, whole numbers and truth values by key; `null` is absent.
pub(super) fn metadata(call: &Call) -> Result<BTreeMap<String, Value>, ApiError> {
    let mut values = BTreeMap::new();
    for (key, value) in call.object("metadata")?.into_iter().flatten() {
        let kept = match value {
            Json::Null => continue,
            Json::String(text) => Some(Value::Text(text.clone())),
            Json::Bool(flag) => Some(Value::Bool(*flag)),
            Json::Number(number) => number.as_i64().map(Value::Int),
            Json::Array(_) | Json::Object(_) => None,
        };
        let kept = kept.ok_or_else(|| {
            wrong(
                &format!("metadata.{key}"),
                "a string, a whole number or a bool",
            )
        })?;
        values.insert(key.clone(), kept);
    }
    Ok(values)
}

fn ports(call: &Call) -> Result<Option<Vec<PortRule>>, ApiError> {
    let Some(items) = call.list("port_forwarding_override")? else {
        return Ok(None);
    };
    items
        .iter()
        .map(port_rule)
        .collect::<Result<Vec<_>, _>>()
        .map(Some)
}

fn port_rule(item: &Json) -> Result<PortRule, ApiError> {
    let of = |name: &str| item.get(name).filter(|v| !v.is_null());
    let name = match of("name") {
        Some(Json::String(name)) if !name.is_empty() => name.clone(),
        _ => {
            return Err(wrong(
                "port_forwarding_override[].name",
                "a string that is not empty",
            ));
        }
    };
    let port = |member: &str, range| match of(member) {
        None => Ok(None),
        Some(value) => int(
            &format!("port_forwarding_override[].{member}"),
            value,
            range,
        ),
    };
    let narrow = |n: u64| u16::try_from(n).unwrap_or(0);
    let guest_port = port("guest_port", 1..=65_535)?
        .ok_or_else(|| ApiError::bad("port_forwarding_override[].guest_port is required"))?;
    let host_port = port("host_port", 0..=65_535)?.unwrap_or(0);
    Ok(PortRule {
        name,
        guest_port: narrow(guest_port),
        host_port: narrow(host_port),
    })
}

#[cfg(test)]
#[path = "start_tests.rs"]
mod tests;
