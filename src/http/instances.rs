//! Instances as JSON: which members are there when, and what type they have. Built straight from
//! the state, without copies. Refuses to read the state itself: it is handed to it.
//!
//! Three rules break whole clients when broken: `vminfo`, `message`, `external_id` and
//! `startup_script` are left out when unset, never `null`; counts and ports are integers;
//! `progress` is always a float.

use super::View;
use super::requests::MetadataValue;
use super::time::{MaybeRfc3339, Rfc3339};
use mainstay_model::instance::{Instance, InstanceState, PortRule, ScriptResult, Value, VmInfo};
use mainstay_model::{metadata, plan};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// The port whose forwarding makes a `vnc_connection_string`.
const VNC_GUEST_PORT: u16 = 5900;

/// What `GET /api/v1/vm` shows.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Instances<'a> {
    /// Without an id.
    All(Vec<Wrapper<'a>>),
    /// With an id.
    One(Box<InstanceView<'a>>),
}

/// One item of the list.
#[derive(Serialize, ToSchema)]
#[schema(as = ListedInstance)]
pub struct Wrapper<'a> {
    instance_id: &'a str,
    external_id: Option<&'a str>,
    name: Option<&'a str>,
    vm: InstanceView<'a>,
}

impl<'a> Wrapper<'a> {
    /// The instance as `view` has it.
    pub fn new(view: View<'a>, instance: &'a Instance) -> Self {
        Self {
            instance_id: instance.id.as_str(),
            external_id: instance.request.external_id.as_deref(),
            name: instance.request.name.as_deref(),
            vm: InstanceView::new(view, instance),
        }
    }
}

/// `GET /api/v1/vm?id=`: the instance itself, also inside the list's wrapper.
#[derive(Serialize, ToSchema)]
#[schema(as = Instance)]
pub struct InstanceView<'a> {
    instance_id: &'a str,
    instance_state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    anka_registry: &'a str,
    vmid: &'a str,
    tag: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vminfo: Option<VmView<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<&'a str>,
    #[schema(value_type = String, format = DateTime)]
    ts: Rfc3339,
    #[schema(value_type = String, format = DateTime)]
    cr_time: Rfc3339,
    progress: f32,
    group_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    external_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<std::collections::BTreeMap<String, MetadataValue>>)]
    metadata: Option<Metadata<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arch: Option<&'static str>,
    vlan: &'static str,
    usb_device: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    startup_script: Option<ScriptView<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
}

impl<'a> InstanceView<'a> {
    /// The instance as `view` has it.
    pub fn new(view: View<'a>, instance: &'a Instance) -> Self {
        let request = &instance.request;
        let metadata = &request.metadata;
        Self {
            instance_id: instance.id.as_str(),
            instance_state: instance.state.as_str(),
            message: instance.message.as_deref(),
            anka_registry: view.registry_address,
            vmid: request.template.as_str(),
            tag: &instance.tag,
            version: request.version.map(|_| instance.tag_number),
            vminfo: vm_view(view, instance),
            node_id: instance.node.as_ref().map(|id| id.as_str()),
            ts: Rfc3339(instance.updated_ms),
            cr_time: Rfc3339(instance.created_ms),
            progress: progress(view, instance),
            group_id: request.group.as_ref().map_or("", |id| id.as_str()),
            name: request.name.as_deref(),
            external_id: request.external_id.as_deref(),
            metadata: (!metadata.is_empty()).then_some(Metadata(metadata)),
            arch: arch(view, instance),
            vlan: "",
            usb_device: "",
            startup_script: script_view(instance),
            waiting_for: None,
        }
    }

    /// With the reason why it still waits for a node, if it does (ours; too costly for a list).
    #[must_use]
    pub fn explained(mut self, view: View<'a>, instance: &Instance) -> Self {
        self.waiting_for = plan::explain(view.state, &instance.id);
        self
    }
}

/// Does what is shown of it also change without the state?
pub(super) fn moves(instance: &Instance) -> bool {
    matches!(
        instance.state,
        InstanceState::Pulling | InstanceState::Pushing
    )
}

/// Part of the image fetched, or of the saved disk pushed; soft, so only where it moves.
pub(super) fn progress(view: View<'_>, instance: &Instance) -> f32 {
    if !moves(instance) {
        return 0.0;
    }
    let part = view.soft.progress(&instance.id).unwrap_or(0.0);
    if part.is_finite() {
        part.clamp(0.0, 1.0)
    } else {
        0.0
    }
}

/// The tag's architecture, or its node's when the tag does not say.
fn arch(view: View<'_>, instance: &Instance) -> Option<&'static str> {
    let of_node = || {
        Some(
            view.state
                .nodes
                .get(instance.node.as_ref()?)?
                .spec
                .arch
                .as_str(),
        )
    };
    known_arch(&instance.arch).or_else(|| known_arch(of_node()?))
}

/// One of the two names that clients know; another text crashes one of them.
pub(super) fn known_arch(text: &str) -> Option<&'static str> {
    match text {
        "amd64" | "x86_64" => Some("amd64"),
        "arm64" | "aarch64" => Some("arm64"),
        _ => None,
    }
}

struct Metadata<'a>(&'a metadata::Metadata);

impl Serialize for Metadata<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, Plain(value))))
    }
}

struct Plain<'a>(&'a Value);

impl Serialize for Plain<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Text(text) => serializer.serialize_str(text),
            Value::Int(n) => serializer.serialize_i64(*n),
            Value::Bool(flag) => serializer.serialize_bool(*flag),
        }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = VmInfo)]
struct VmView<'a> {
    uuid: &'a str,
    name: &'a str,
    status: &'a str,
    ip: &'a str,
    host_ip: &'a str,
    node_id: &'a str,
    cpu_cores: u32,
    /// `4G`, or `1536M`
    #[schema(value_type = String)]
    ram: Ram,
    port_forwarding: Vec<PortView<'a>>,
    vnc_port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    vnc_connection_string: Option<String>,
    version: u32,
    #[schema(value_type = String, format = DateTime)]
    creation_date: MaybeRfc3339,
    #[schema(value_type = String, format = DateTime)]
    access_date: MaybeRfc3339,
    #[schema(value_type = String, format = DateTime)]
    start_date: MaybeRfc3339,
    #[schema(value_type = String, format = DateTime)]
    stop_date: MaybeRfc3339,
    #[schema(value_type = String, format = DateTime)]
    timestamp: Rfc3339,
    #[serde(skip_serializing_if = "str::is_empty")]
    accelerator: &'a str,
}

/// A forwarded port. Clients find SSH by guest port 22 and protocol `tcp`.
#[derive(Serialize, ToSchema)]
#[schema(as = Port)]
struct PortView<'a> {
    name: &'a str,
    guest_port: u16,
    host_port: u16,
    host_ip: &'a str,
    protocol: &'static str,
}

/// `"4G"`, or `"1536M"` where that is not exact.
struct Ram(u32);

impl Serialize for Ram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            mb if mb % 1024 == 0 => serializer.collect_str(&format_args!("{}G", mb / 1024)),
            mb => serializer.collect_str(&format_args!("{mb}M")),
        }
    }
}

fn vm_view<'a>(view: View<'a>, instance: &'a Instance) -> Option<VmView<'a>> {
    let vm = instance.vm.as_ref().filter(|vm| !vm.uuid.is_empty())?;
    let host_ip = host_ip(view, instance, vm);
    let vnc = vm
        .port_forwarding
        .iter()
        .find(|rule| rule.guest_port == VNC_GUEST_PORT);
    Some(VmView {
        uuid: &vm.uuid,
        name: &vm.name,
        status: &vm.status,
        ip: &vm.ip,
        host_ip,
        node_id: instance.node.as_ref().map_or("", |id| id.as_str()),
        cpu_cores: vm.cpu_cores,
        ram: Ram(vm.ram_mb),
        port_forwarding: vm
            .port_forwarding
            .iter()
            .map(|rule| port_view(rule, host_ip))
            .collect(),
        vnc_port: vm.vnc_port,
        vnc_connection_string: vnc.map(|rule| format!("vnc://{host_ip}:{}", rule.host_port)),
        version: instance.tag_number,
        creation_date: MaybeRfc3339(vm.created_ms),
        access_date: MaybeRfc3339(vm.started_ms),
        start_date: MaybeRfc3339(vm.started_ms),
        stop_date: MaybeRfc3339(0),
        timestamp: Rfc3339(instance.updated_ms),
        accelerator: &vm.accelerator,
    })
}

fn port_view<'a>(rule: &'a PortRule, host_ip: &'a str) -> PortView<'a> {
    PortView {
        name: &rule.name,
        guest_port: rule.guest_port,
        host_port: rule.host_port,
        host_ip,
        protocol: "tcp",
    }
}

/// The address CI can reach: the operator's word, else the driver's, else the agent's.
fn host_ip<'a>(view: View<'a>, instance: &'a Instance, vm: &'a VmInfo) -> &'a str {
    let node = instance
        .node
        .as_ref()
        .and_then(|id| view.state.nodes.get(id));
    match node.and_then(|n| n.config.host.as_deref()) {
        Some(host) => host,
        None if vm.host_ip.is_empty() => node.map_or("", |n| n.host()),
        None => &vm.host_ip,
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = ScriptResult)]
struct ScriptView<'a> {
    return_code: i32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<&'static str>,
    did_timeout: bool,
    stdout: &'a str,
    stderr: &'a str,
}

fn script_view(instance: &Instance) -> Option<ScriptView<'_>> {
    instance
        .request
        .script
        .as_ref()
        .filter(|script| script.monitored)?;
    let ScriptResult {
        return_code,
        did_timeout,
        stdout,
        stderr,
    } = instance.script_result.as_deref()?;
    let errors = if *did_timeout {
        vec!["the script did not end in time"]
    } else {
        Vec::new()
    };
    Some(ScriptView {
        return_code: *return_code,
        errors,
        did_timeout: *did_timeout,
        stdout,
        stderr,
    })
}
