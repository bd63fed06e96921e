//! Bounds on what commands carry, as refusals that name the bound. Looks at no state.

use crate::instance::{PortRule, StartRequest, Value};
use crate::limits;
use crate::outcome::Refusal;

type Checked = Result<(), Refusal>;

pub(super) fn limit(text: impl Into<String>) -> Refusal {
    Refusal::Limit(text.into())
}

/// At most `max` bytes.
pub(super) fn text(what: &str, value: &str, max: usize) -> Checked {
    if value.len() <= max {
        Ok(())
    } else {
        Err(limit(format!(
            "{what} has {} bytes, at most {max} are allowed",
            value.len()
        )))
    }
}

/// One to `limits::NAME_BYTES` bytes.
pub(super) fn name(what: &str, value: &str) -> Checked {
    if value.is_empty() {
        return Err(limit(format!("{what} is empty")));
    }
    text(what, value, limits::NAME_BYTES)
}

pub(super) fn id(what: &str, value: &str) -> Checked {
    if limits::id_ok(value) {
        Ok(())
    } else {
        Err(limit(format!(
            "{what} must be 1 to {} printable ASCII characters without spaces",
            limits::ID_BYTES
        )))
    }
}

pub(super) fn count(what: &str, n: usize, max: usize) -> Checked {
    if n <= max {
        Ok(())
    } else {
        Err(limit(format!("{n} {what}, at most {max} are allowed")))
    }
}

fn optional(what: &str, value: Option<&String>, max: usize) -> Checked {
    value.map_or(Ok(()), |v| text(what, v, max))
}

pub(super) fn caller_marks(name: Option<&String>, external_id: Option<&String>) -> Checked {
    optional("name", name, limits::NAME_BYTES)?;
    optional("external id", external_id, limits::EXTERNAL_ID_BYTES)
}

/// `entries` are all that the instance would have.
pub(super) fn metadata<'a>(entries: impl Iterator<Item = (&'a String, &'a Value)>) -> Checked {
    let (mut keys, mut bytes) = (0_usize, 0_usize);
    for (key, value) in entries {
        keys += 1;
        let size = match value {
            Value::Text(t) => t.len(),
            Value::Int(_) | Value::Bool(_) => 8,
        };
        bytes = bytes.saturating_add(key.len()).saturating_add(size);
    }
    count("metadata keys", keys, limits::METADATA_KEYS)?;
    count("bytes of metadata", bytes, limits::METADATA_BYTES)
}

pub(super) fn port_rules(rules: &[PortRule]) -> Checked {
    count("port rules", rules.len(), limits::PORT_RULES)?;
    rules
        .iter()
        .try_for_each(|r| text("name of a port rule", &r.name, limits::NAME_BYTES))
}

/// Everything in a start request that can be judged without the state.
pub(super) fn start(instances: usize, request: &StartRequest) -> Checked {
    if instances == 0 {
        return Err(limit("count must be at least 1"));
    }
    count("instances", instances, limits::INSTANCES_PER_REQUEST)?;
    if !(1..=limits::PRIORITY_MAX).contains(&request.priority) {
        return Err(limit(format!(
            "priority must be 1 to {}",
            limits::PRIORITY_MAX
        )));
    }
    caller_marks(request.name.as_ref(), request.external_id.as_ref())?;
    let name_template = request.name_template.as_ref();
    optional("name template", name_template, limits::NAME_BYTES)?;
    metadata(request.metadata.iter())?;
    port_rules(request.port_forwarding.as_deref().unwrap_or_default())?;
    let script = request.script.as_ref().map_or(0, |s| s.body.len());
    count("bytes of startup script", script, limits::SCRIPT_BYTES)?;
    count(
        "bytes of startup scripts in one request",
        script.saturating_mul(instances),
        limits::SCRIPT_BYTES_PER_REQUEST,
    )
}
