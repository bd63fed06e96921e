//! How each language's clients read JSON, and where they would crash. A replay that reads through these fails
//! where its client would.
//!
//! * Java (`org.json`): a typed getter throws on what is absent, `null` or of another type; an optional member
//!   is asked for with `has`, which is true for `null`.
//! * Go (`encoding/json`): absent and `null` are the zero value; another type, a fraction or a negative number
//!   for an unsigned one fails the whole document.
//! * JavaScript: a member of what is absent throws.
//! * Python: `.get` of a `None` throws.

use super::wire::Answer;
use serde_json::{Map, Value};

/// Members that are floats; every other number is a whole one.
const FLOATS: [&str; 5] = [
    "cpu_util",
    "ram_util",
    "progress",
    "average_queue_time",
    "tasks_per_second",
];
/// Members of an instance that are left out when they are not set.
const LEFT_OUT: [&str; 4] = ["vminfo", "message", "external_id", "startup_script"];
/// All states that clients know.
pub(crate) const STATES: [&str; 9] = [
    "Scheduling",
    "Pulling",
    "Started",
    "Stopping",
    "Stopped",
    "Pushing",
    "Error",
    "Terminating",
    "Terminated",
];
/// All states of a node that clients know.
pub(crate) const NODE_STATES: [&str; 6] = [
    "Offline",
    "Inactive (Invalid License)",
    "Active",
    "Updating",
    "Unhealthy",
    "Drain Mode",
];

/// What every answer must be, whoever asked.
pub(crate) fn sound(answer: &Answer, asked: &str) -> Value {
    assert!(answer.status < 500, "{asked}: {answer:?}");
    let kind = answer.header("content-type").unwrap_or_default();
    assert!(kind.starts_with("application/json"), "{asked}: {answer:?}");
    let json = answer.json();
    let status = json["status"].as_str().unwrap_or_default();
    assert!(["OK", "FAIL"].contains(&status), "{asked}: {json}");
    assert!(json["message"].is_string(), "{asked}: {json}");
    if status == "FAIL" {
        assert!(json["body"].is_null(), "{asked}: {json}");
        assert_ne!(json["message"], "", "{asked}: {json}");
    }
    numbers(&json, "", asked);
    json
}

fn numbers(value: &Value, name: &str, asked: &str) {
    match value {
        Value::Number(number) if FLOATS.contains(&name) => {
            let share = number.as_f64().is_some_and(|n| n >= 0.0);
            assert!(number.is_f64() && share, "{asked}: {name} is {number}");
        }
        Value::Number(number) => assert!(number.is_u64(), "{asked}: {name} is {number}"),
        Value::Array(items) => items.iter().for_each(|item| numbers(item, name, asked)),
        Value::Object(members) if name != "metadata" => {
            members.iter().for_each(|(key, v)| numbers(v, key, asked));
        }
        _ => {}
    }
}

/// Body of an `OK` answer; the test ends with any other.
pub(crate) fn body(json: &Value) -> &Value {
    assert_eq!(json["status"], "OK", "{json}");
    &json["body"]
}

/// The items of a list, which is never `null` and never absent.
pub(crate) fn items(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("no list: {value}"))
}

fn members(value: &Value) -> &Map<String, Value> {
    value
        .as_object()
        .unwrap_or_else(|| panic!("no object: {value}"))
}

/// Java's `getString`.
pub(crate) fn java_text<'a>(value: &'a Value, name: &str) -> &'a str {
    let text = members(value).get(name).and_then(Value::as_str);
    text.unwrap_or_else(|| panic!("JSONException: {name} of {value}"))
}

/// Java's `has` and then `getString`.
pub(crate) fn java_text_if<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    members(value)
        .contains_key(name)
        .then(|| java_text(value, name))
}

/// Java's `getInt`.
pub(crate) fn java_int(value: &Value, name: &str) -> u64 {
    let number = members(value).get(name).and_then(Value::as_u64);
    number.unwrap_or_else(|| panic!("JSONException: {name} of {value}"))
}

/// A Go `string`.
pub(crate) fn go_text<'a>(value: &'a Value, name: &str) -> &'a str {
    match members(value).get(name) {
        None | Some(Value::Null) => "",
        Some(Value::String(text)) => text,
        Some(_) => panic!("json: cannot unmarshal {name} of {value} into string"),
    }
}

/// A Go `uint`.
pub(crate) fn go_uint(value: &Value, name: &str) -> u64 {
    match members(value).get(name) {
        None | Some(Value::Null) => 0,
        Some(Value::Number(number)) if number.is_u64() => number.as_u64().unwrap(),
        Some(_) => panic!("json: cannot unmarshal {name} of {value} into uint"),
    }
}

/// A Go `float32`.
pub(crate) fn go_float(value: &Value, name: &str) -> f64 {
    match members(value).get(name) {
        None | Some(Value::Null) => 0.0,
        Some(Value::Number(number)) => number.as_f64().unwrap(),
        Some(_) => panic!("json: cannot unmarshal {name} of {value} into float32"),
    }
}

/// A Go slice.
pub(crate) fn go_list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    match members(value).get(name) {
        None | Some(Value::Null) => &[],
        Some(Value::Array(items)) => items,
        Some(_) => panic!("json: cannot unmarshal {name} of {value} into a slice"),
    }
}

/// A Go `time.Time`: date, `T`, time, fraction of up to nine digits, `Z` or an offset.
pub(crate) fn go_time(value: &Value, name: &str) {
    let text = java_text(value, name);
    let (date, time) = text.split_once('T').unwrap_or_else(|| panic!("{text}"));
    let digits =
        |part: &str, len: usize| part.len() == len && part.bytes().all(|b| b.is_ascii_digit());
    let date: Vec<&str> = date.split('-').collect();
    assert!(
        date.len() == 3 && digits(date[0], 4) && digits(date[1], 2) && digits(date[2], 2),
        "{text}"
    );
    let clock = time.get(..8).unwrap_or_else(|| panic!("{text}"));
    assert!(clock.split(':').all(|part| digits(part, 2)), "{text}");
    let zone = time[8..].trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
    let offset = zone.len() == 6 && (zone.starts_with('+') || zone.starts_with('-'));
    assert!(zone == "Z" || offset, "{text}");
}

/// An instance, inside a list's wrapper or alone: what breaks whole clients when it is otherwise.
pub(crate) fn instance(vm: &Value) {
    for name in [
        "instance_id",
        "instance_state",
        "vmid",
        "anka_registry",
        "tag",
    ] {
        java_text(vm, name);
    }
    assert!(STATES.contains(&java_text(vm, "instance_state")), "{vm}");
    go_time(vm, "ts");
    go_time(vm, "cr_time");
    for name in LEFT_OUT {
        assert_ne!(members(vm).get(name), Some(&Value::Null), "{name}: {vm}");
    }
    let arch = go_text(vm, "arch");
    assert!(["", "amd64", "arm64"].contains(&arch), "{vm}");
    let part = go_float(vm, "progress");
    assert!((0.0..=1.0).contains(&part), "{vm}");
    let Some(info) = members(vm).get("vminfo") else {
        return;
    };
    java_text(info, "uuid");
    let status = java_text(info, "status");
    let known = ["running", "stopped", "suspended", "failed", "deleted"];
    assert!(known.contains(&status), "{vm}");
    for rule in go_list(info, "port_forwarding") {
        java_int(rule, "guest_port");
        java_int(rule, "host_port");
        assert_eq!(java_text(rule, "protocol"), "tcp", "{vm}");
    }
}

/// The list of instances, as wrappers.
pub(crate) fn instances(list: &Value) -> &[Value] {
    for wrapper in items(list) {
        let id = java_text(wrapper, "instance_id");
        let vm = &wrapper["vm"];
        instance(vm);
        assert_eq!(java_text(vm, "instance_id"), id, "{wrapper}");
        for name in ["external_id", "name"] {
            let outside = members(wrapper).get(name).expect("a wrapper's members");
            assert!(outside.is_null() || outside.is_string(), "{wrapper}");
            let inside = members(vm).get(name).unwrap_or(&Value::Null);
            assert_eq!(outside, inside, "{wrapper}");
        }
    }
    items(list)
}

/// A node.
pub(crate) fn node(node: &Value) {
    for name in [
        "node_id",
        "node_name",
        "ip_address",
        "state",
        "capacity_mode",
    ] {
        java_text(node, name);
    }
    assert!(NODE_STATES.contains(&java_text(node, "state")), "{node}");
    let arch = java_text(node, "host_arch");
    assert!(["amd64", "arm64"].contains(&arch), "{node}");
    for name in ["groups", "templates"] {
        items(&node[name]).iter().for_each(|item| {
            members(item);
        });
    }
    java_int(node, "capacity");
    go_time(node, "last_updated");
}

/// A node group.
pub(crate) fn group(group: &Value) {
    for name in ["id", "name", "description"] {
        java_text(group, name);
    }
    go_text(group, "fallback_group_id");
}
