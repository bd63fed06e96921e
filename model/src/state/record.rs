//! The stored forms that differ from the live ones. Positional and versioned by the codec's first
//! byte: a changed field means a new version there, and the golden samples will say so.

use crate::distribution::Distribution;
use crate::ids::{CommandId, DistributionId, GroupId, InstanceId, NodeId, SaveId, TemplateId};
use crate::instance::{
    Instance, InstanceState, PortRule, Rejection, Script, ScriptFailure, StartRequest, VmInfo,
};
use crate::metadata::Metadata;
use crate::outcome::Outcome;
use crate::save::{Save, SaveEnd, SaveRequest, SaveTarget};
use crate::template::Template;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;

#[derive(Serialize, Deserialize)]
pub(super) struct MetaRecord {
    pub(super) clock_ms: u64,
    pub(super) desired_changes: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct RepositoryRecord {
    pub(super) puts: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct RecentBlock<'a>(pub(super) Vec<RecentRecord<'a>>);

#[derive(Serialize, Deserialize)]
pub(super) struct RecentRecord<'a> {
    pub(super) sequence: u64,
    pub(super) id: CommandId,
    pub(super) outcome: Cow<'a, Outcome>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct ScriptRecord<'a> {
    body: Bytes<'a>,
}

#[derive(Serialize, Deserialize)]
struct Bytes<'a>(#[serde(with = "cow_bytes")] Cow<'a, [u8]>);

mod cow_bytes {
    use serde::{Deserializer, Serializer};
    use std::borrow::Cow;

    pub(super) fn serialize<S: Serializer>(b: &[u8], s: S) -> Result<S::Ok, S::Error> {
        crate::codec::bytes::serialize(b, s)
    }
    pub(super) fn deserialize<'de, 'a, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Cow<'a, [u8]>, D::Error> {
        crate::codec::bytes::deserialize(d).map(Cow::Owned)
    }
}

impl<'a> ScriptRecord<'a> {
    pub(super) fn of(script: &'a Script) -> Self {
        Self::of_body(&script.body)
    }
    pub(super) fn of_body(body: &'a [u8]) -> Self {
        Self {
            body: Bytes(Cow::Borrowed(body)),
        }
    }
    pub(super) fn into_body(self) -> Vec<u8> {
        self.body.0.into_owned()
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct TemplateRecord<'a> {
    name: Cow<'a, str>,
    next_number: u32,
    created_ms: u64,
}

impl<'a> TemplateRecord<'a> {
    pub(super) fn of(template: &'a Template) -> Self {
        Self {
            name: Cow::Borrowed(&template.name),
            next_number: template.next_number,
            created_ms: template.created_ms,
        }
    }
    pub(super) fn into_template(self, id: TemplateId) -> Template {
        Template {
            id,
            name: self.name.into_owned(),
            tags: BTreeMap::new(),
            next_number: self.next_number,
            created_ms: self.created_ms,
        }
    }
}

/// A distribution without its nodes.
#[derive(Serialize, Deserialize)]
pub(super) struct DistributionRecord<'a> {
    template: Cow<'a, TemplateId>,
    number: u32,
    tag: Cow<'a, str>,
    requested_ms: u64,
    ended_ms: Option<u64>,
}

impl<'a> DistributionRecord<'a> {
    pub(super) fn of(distribution: &'a Distribution) -> Self {
        Self {
            template: Cow::Borrowed(&distribution.template),
            number: distribution.number,
            tag: Cow::Borrowed(&distribution.tag),
            requested_ms: distribution.requested_ms,
            ended_ms: distribution.ended_ms,
        }
    }
    pub(super) fn into_distribution(self, id: DistributionId) -> Distribution {
        Distribution {
            id,
            template: self.template.into_owned(),
            number: self.number,
            tag: self.tag.into_owned(),
            requested_ms: self.requested_ms,
            ended_ms: self.ended_ms,
            nodes: BTreeMap::new(),
            waiting: 0,
        }
    }
}

/// [`Save`] without the script's body and its output, each stored under its own key.
#[derive(Serialize, Deserialize)]
pub(super) struct SaveRecord<'a> {
    instance: Cow<'a, InstanceId>,
    tag: Cow<'a, str>,
    target: Cow<'a, SaveTarget>,
    description: Cow<'a, str>,
    /// Has one, under a key of its own.
    pub(super) script: bool,
    cancel_on_script_failure: bool,
    revert: bool,
    revert_tag: Cow<'a, Option<String>>,
    suspend: bool,
    sanity_test: bool,
    node: Cow<'a, NodeId>,
    arch: Cow<'a, str>,
    forwards: Cow<'a, [PortRule]>,
    created_ms: u64,
    begun_ms: Option<u64>,
    published: Cow<'a, Option<(TemplateId, u32)>>,
    end: Cow<'a, Option<SaveEnd>>,
}

impl<'a> SaveRecord<'a> {
    pub(super) fn of(save: &'a Save) -> Self {
        let request = &save.request;
        Self {
            instance: Cow::Borrowed(&request.instance),
            tag: Cow::Borrowed(&request.tag),
            target: Cow::Borrowed(&request.target),
            description: Cow::Borrowed(&request.description),
            script: !request.script.is_empty(),
            cancel_on_script_failure: request.cancel_on_script_failure,
            revert: request.revert,
            revert_tag: Cow::Borrowed(&request.revert_tag),
            suspend: request.suspend,
            sanity_test: request.sanity_test,
            node: Cow::Borrowed(&save.node),
            arch: Cow::Borrowed(&save.arch),
            forwards: Cow::Borrowed(&save.forwards),
            created_ms: save.created_ms,
            begun_ms: save.begun_ms,
            published: Cow::Borrowed(&save.published),
            end: Cow::Borrowed(&save.end),
        }
    }

    /// Without its script and the result: they come from their own keys.
    pub(super) fn into_save(self, id: SaveId) -> Save {
        Save {
            id,
            request: SaveRequest {
                instance: self.instance.into_owned(),
                tag: self.tag.into_owned(),
                target: self.target.into_owned(),
                description: self.description.into_owned(),
                script: Vec::new(),
                cancel_on_script_failure: self.cancel_on_script_failure,
                revert: self.revert,
                revert_tag: self.revert_tag.into_owned(),
                suspend: self.suspend,
                sanity_test: self.sanity_test,
            },
            node: self.node.into_owned(),
            arch: self.arch.into_owned(),
            forwards: self.forwards.into_owned(),
            created_ms: self.created_ms,
            begun_ms: self.begun_ms,
            published: self.published.into_owned(),
            end: self.end.into_owned(),
            script_result: None,
        }
    }
}

/// A script without its body.
#[derive(Clone, Serialize, Deserialize)]
struct ScriptHead {
    monitored: bool,
    timeout_s: u32,
    at_boot: bool,
    on_failure: ScriptFailure,
}

/// [`Instance`] without its script's body and output, each stored under its own key.
#[derive(Serialize, Deserialize)]
pub(super) struct InstanceRecord<'a> {
    template: Cow<'a, TemplateId>,
    requested_tag: Cow<'a, Option<String>>,
    requested_version: Option<u32>,
    name: Cow<'a, Option<String>>,
    name_template: Cow<'a, Option<String>>,
    external_id: Cow<'a, Option<String>>,
    pinned_node: Cow<'a, Option<NodeId>>,
    group: Cow<'a, Option<GroupId>>,
    priority: u32,
    script: Option<ScriptHead>,
    vcpu: Option<u32>,
    vram_mb: Option<u32>,
    metadata: Cow<'a, Metadata>,
    port_forwarding: Cow<'a, Option<Vec<PortRule>>>,
    tag: Cow<'a, str>,
    tag_number: u32,
    state: InstanceState,
    message: Cow<'a, Option<String>>,
    node: Cow<'a, Option<NodeId>>,
    generation: u64,
    created_ms: u64,
    updated_ms: u64,
    ended_ms: Option<u64>,
    vm: Cow<'a, Option<Box<VmInfo>>>,
    arch: Cow<'a, str>,
    vm_gone: bool,
    rejections: Cow<'a, [Rejection]>,
}

impl<'a> InstanceRecord<'a> {
    pub(super) fn of(instance: &'a Instance) -> Self {
        let request = &instance.request;
        Self {
            template: Cow::Borrowed(&request.template),
            requested_tag: Cow::Borrowed(&request.tag),
            requested_version: request.version,
            name: Cow::Borrowed(&request.name),
            name_template: Cow::Borrowed(&request.name_template),
            external_id: Cow::Borrowed(&request.external_id),
            pinned_node: Cow::Borrowed(&request.node),
            group: Cow::Borrowed(&request.group),
            priority: request.priority,
            script: request.script.as_ref().map(|s| ScriptHead {
                monitored: s.monitored,
                timeout_s: s.timeout_s,
                at_boot: s.at_boot,
                on_failure: s.on_failure,
            }),
            vcpu: request.vcpu,
            vram_mb: request.vram_mb,
            metadata: Cow::Borrowed(&request.metadata),
            port_forwarding: Cow::Borrowed(&request.port_forwarding),
            tag: Cow::Borrowed(&instance.tag),
            tag_number: instance.tag_number,
            state: instance.state,
            message: Cow::Borrowed(&instance.message),
            node: Cow::Borrowed(&instance.node),
            generation: instance.generation,
            created_ms: instance.created_ms,
            updated_ms: instance.updated_ms,
            ended_ms: instance.ended_ms,
            vm: Cow::Borrowed(&instance.vm),
            arch: Cow::Borrowed(&instance.arch),
            vm_gone: instance.vm_gone,
            rejections: Cow::Borrowed(&instance.rejections),
        }
    }

    /// With an empty script body and no script result: they come from their own keys.
    pub(super) fn into_instance(self, id: InstanceId) -> Instance {
        Instance {
            id,
            request: StartRequest {
                template: self.template.into_owned(),
                tag: self.requested_tag.into_owned(),
                version: self.requested_version,
                name: self.name.into_owned(),
                name_template: self.name_template.into_owned(),
                external_id: self.external_id.into_owned(),
                node: self.pinned_node.into_owned(),
                group: self.group.into_owned(),
                priority: self.priority,
                script: self.script.map(|s| {
                    Box::new(Script {
                        body: Vec::new(),
                        monitored: s.monitored,
                        timeout_s: s.timeout_s,
                        at_boot: s.at_boot,
                        on_failure: s.on_failure,
                    })
                }),
                vcpu: self.vcpu,
                vram_mb: self.vram_mb,
                metadata: self.metadata.into_owned(),
                port_forwarding: self.port_forwarding.into_owned(),
            },
            tag: self.tag.into_owned(),
            tag_number: self.tag_number,
            state: self.state,
            message: self.message.into_owned(),
            node: self.node.into_owned(),
            generation: self.generation,
            created_ms: self.created_ms,
            updated_ms: self.updated_ms,
            ended_ms: self.ended_ms,
            vm: self.vm.into_owned(),
            script_result: None,
            arch: self.arch.into_owned(),
            vm_gone: self.vm_gone,
            rejections: self.rejections.into_owned(),
        }
    }
}
