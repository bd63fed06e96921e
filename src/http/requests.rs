//! The members of requests, for the OpenAPI document. Only described: handlers read a
//! [`super::envelope::Call`], which takes more than is said here (numbers as strings, members in the query).

#![expect(dead_code, reason = "only described, never made")]

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::{IntoParams, ToSchema};

/// How fresh a read must be.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Everything acknowledged before it is in it.
    Linearizable,
    /// From this member's memory; `X-Mainstay-Age-Ms-Max` says how old it can be.
    Stale,
}

/// A read of one object or of all.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Read {
    /// One object; all of them when absent
    id: Option<String>,
    /// Default: linearizable
    #[param(inline)]
    consistency: Option<Consistency>,
}

/// A read of the whole.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Fresh {
    /// Default: linearizable
    #[param(inline)]
    consistency: Option<Consistency>,
}

/// The object that a change is about, where the body does not say.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct About {
    /// The object; may stand in the body
    id: Option<String>,
}

/// A way into an instance's VM.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Way {
    /// The instance
    id: String,
}

/// A port of the guest.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct GuestPort {
    /// Need not be forwarded
    #[param(minimum = 1, maximum = 65535)]
    port: u16,
}

/// Whether an answer goes on.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Follow {
    /// Go on with what comes, until the VM is gone
    follow: Option<bool>,
}

/// A key that makes all requests with it, this method and this path one request.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Header)]
pub struct Once {
    /// 1 to 256 printable characters
    #[serde(rename = "Idempotency-Key")]
    #[param(max_length = 256, pattern = "^[ -~]*$")]
    idempotency_key: Option<String>,
}

/// A metadata value.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum MetadataValue {
    /// Text.
    Text(String),
    /// A whole number.
    Int(i64),
    /// A truth value.
    Flag(bool),
}

/// One rule of `port_forwarding_override`.
#[derive(Serialize, ToSchema)]
pub struct Forward {
    #[schema(min_length = 1)]
    name: String,
    #[schema(minimum = 1, maximum = 65535)]
    guest_port: u16,
    /// 0 or absent: the node chooses
    host_port: Option<u16>,
}

/// `POST /api/v1/vm`.
#[derive(Serialize, ToSchema)]
pub struct Start {
    /// Template id
    #[schema(min_length = 1)]
    vmid: String,
    /// Tag name; the latest when absent
    tag: Option<String>,
    /// Tag number; ignored with `tag`
    #[schema(minimum = 0, maximum = 4294967295u32)]
    version: Option<u32>,
    /// Instances: all or none
    #[schema(minimum = 1, maximum = 1000)]
    count: Option<u32>,
    name: Option<String>,
    /// Name of the VM: `$template_name`, `$template_id`, `$instance_id`, `$node_id`, `$node_name`, `$ts`
    name_template: Option<String>,
    /// The caller's mark; not unique
    external_id: Option<String>,
    /// Only there
    node_id: Option<String>,
    /// Only on nodes of this group, or of its fallbacks
    group_id: Option<String>,
    /// Lower first; default 1000
    #[schema(minimum = 1, maximum = 10000)]
    priority: Option<u32>,
    /// Standard base64
    startup_script: Option<String>,
    /// 0: when the network is up, 1: at boot
    #[schema(minimum = 0, maximum = 1)]
    startup_script_condition: Option<u8>,
    /// Started means that the script ended with 0
    script_monitoring: Option<bool>,
    /// Seconds; default 90
    #[schema(minimum = 0, maximum = 4294967295u32)]
    script_timeout: Option<u32>,
    /// What a failed script does to the VM; 0: stop, 1: keep, 2: delete
    #[schema(minimum = 0, maximum = 2)]
    script_fail_handler: Option<u8>,
    #[schema(minimum = 0, maximum = 4096)]
    vcpu: Option<u32>,
    /// MB
    #[schema(minimum = 0, maximum = 67108864)]
    vram: Option<u32>,
    metadata: Option<BTreeMap<String, MetadataValue>>,
    /// Replaces the template's rules
    port_forwarding_override: Option<Vec<Forward>>,
}

/// `PUT /api/v1/vm`: what is absent stays; metadata keys merge.
#[derive(Serialize, ToSchema)]
pub struct Change {
    id: Option<String>,
    name: Option<String>,
    external_id: Option<String>,
    metadata: Option<BTreeMap<String, MetadataValue>>,
}

/// Names one object.
#[derive(Serialize, ToSchema)]
pub struct Id {
    #[schema(min_length = 1)]
    id: String,
}

/// `POST /api/v1/image`.
#[derive(Serialize, ToSchema)]
pub struct SaveImage {
    /// Instance id
    #[schema(min_length = 1)]
    id: String,
    /// Name of the new tag
    #[schema(min_length = 1)]
    tag: String,
    /// Template id; this or `new_template_name`
    target_vm_id: Option<String>,
    /// Name of a template that is not there yet
    new_template_name: Option<String>,
    description: Option<String>,
    /// Default: true. Read and shown; the tag is always one that boots
    suspend: Option<bool>,
    /// Standard base64; run in the guest before it is stopped
    script: Option<String>,
    /// Delete a tag, and every later one, at the moment at which the new one is there
    revert_before_push: Option<bool>,
    /// Which tag; the latest when absent
    revert_tag: Option<String>,
    /// Read and shown
    do_suspend_sanity_test: Option<bool>,
    /// A script that does not end with 0 ends the request, and the instance runs on
    cancel_on_script_failure: Option<bool>,
}

/// `POST /api/v1/rpc/vm/restart`.
#[derive(Serialize, ToSchema)]
pub struct Restart {
    #[schema(min_length = 1)]
    instance_id: String,
}

/// Names one node.
#[derive(Serialize, ToSchema)]
pub struct NodeId {
    #[schema(min_length = 1)]
    node_id: String,
}

/// `POST /api/v1/node/config`: what is absent stays.
#[derive(Serialize, ToSchema)]
pub struct NodeConfig {
    #[schema(min_length = 1)]
    node_id: String,
    /// Most VMs at once
    #[schema(minimum = 0, maximum = 1048576)]
    max_vm_count: Option<u32>,
    name: Option<String>,
    /// Address that CI can reach
    host: Option<String>,
    capacity_mode: Option<CapacityMode>,
    #[schema(minimum = 0, maximum = 1048576)]
    vcpu_override: Option<u32>,
    /// GB
    #[schema(minimum = 0, maximum = 1048576)]
    ram_override: Option<u64>,
    /// No new instances
    drain_mode: Option<bool>,
    /// Read and ignored: agents send nothing to the central log
    disable_central_logging: Option<bool>,
}

/// How a node's room is counted.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CapacityMode {
    /// By VMs.
    Number,
    /// By vCPUs and memory.
    Resource,
}

/// Which nodes, and which groups.
#[derive(Serialize, ToSchema)]
pub struct NodeGroups {
    node_ids: Vec<String>,
    group_ids: Vec<String>,
}

/// A new node group.
#[derive(Serialize, ToSchema)]
pub struct NewGroup {
    #[schema(min_length = 1)]
    name: String,
    description: Option<String>,
    /// Where its requests go when it is full
    fallback_group_id: Option<String>,
}

/// A change of a node group: what is absent stays.
#[derive(Serialize, ToSchema)]
pub struct GroupChange {
    id: Option<String>,
    name: Option<String>,
    description: Option<String>,
    /// Empty: none
    fallback_group_id: Option<String>,
}

/// Names a tag: by `tag`, else by `version` or `number`.
#[derive(Deserialize, Serialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Tag {
    /// Template id
    id: Option<String>,
    tag: Option<String>,
    #[schema(minimum = 0, maximum = 4294967295u32)]
    #[param(minimum = 0, maximum = 4294967295u32)]
    version: Option<u32>,
    #[schema(minimum = 0, maximum = 4294967295u32)]
    #[param(minimum = 0, maximum = 4294967295u32)]
    number: Option<u32>,
}

/// What is said of a tag; what is absent stays.
#[derive(Serialize, ToSchema)]
pub struct Words {
    /// Template id
    #[schema(min_length = 1)]
    id: String,
    /// The latest when none is named
    tag: Option<String>,
    #[schema(minimum = 0, maximum = 4294967295u32)]
    number: Option<u32>,
    arch: Option<Arch>,
    description: Option<String>,
}

/// An architecture.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

/// Templates: which, and in which version of the list.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ReadTemplates {
    /// One template; all of them when absent
    id: Option<String>,
    /// `v1`: without size and architecture
    #[serde(rename = "apiVer")]
    api_ver: Option<String>,
    /// Default: linearizable
    #[param(inline)]
    consistency: Option<Consistency>,
}

/// A tag, and the nodes that shall fetch it.
#[derive(Serialize, ToSchema)]
pub struct Distribute {
    #[schema(min_length = 1)]
    template_id: String,
    /// The latest when none is named
    tag: Option<String>,
    #[schema(minimum = 0, maximum = 4294967295u32)]
    version: Option<u32>,
    #[schema(minimum = 0, maximum = 4294967295u32)]
    number: Option<u32>,
    /// These; with neither this nor a group: all of the tag's architecture
    node_ids: Option<Vec<String>>,
    /// And those in this node group
    group_id: Option<String>,
    /// Ignored
    group: Option<String>,
}

/// A template, and the nodes that shall drop it.
#[derive(Serialize, ToSchema)]
pub struct Evict {
    /// Template id; may stand in the query
    id: Option<String>,
    /// These nodes; all when absent
    node_ids: Option<Vec<String>>,
}

/// `POST /api/v1/member/add`.
#[derive(Serialize, ToSchema)]
pub struct AddMember {
    #[schema(min_length = 1)]
    name: String,
    /// Without a vote
    learner: Option<bool>,
}

/// `POST /api/v1/member/promote`, `transfer-leader`.
#[derive(Serialize, ToSchema)]
pub struct MemberName {
    name: Option<String>,
}

/// `POST /api/v1/member/update`.
#[derive(Serialize, ToSchema)]
pub struct MemberAddress {
    #[schema(min_length = 1)]
    name: String,
    peer_url: Option<String>,
    api_url: Option<String>,
    registry_url: Option<String>,
    /// Also where it does not answer there
    force: Option<bool>,
}

/// `POST /api/v1/member/replace`, `remove`.
#[derive(Serialize, ToSchema)]
pub struct LeavingMember {
    #[schema(min_length = 1)]
    name: String,
    /// Which identity, for a repetition that comes late
    id: Option<String>,
    force: Option<bool>,
}
