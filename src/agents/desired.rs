//! What a node shall run: a pure function of the state.

use super::translate;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mainstay_agent::wire;
use mainstay_model::instance::{Instance, Script, ScriptFailure, Wanted};
use mainstay_model::node::Node;
use mainstay_model::plan::{self, Shall};
use mainstay_model::save::{Save, SaveTarget};
use mainstay_model::{NodeId, State, TemplateId};
use std::collections::BTreeSet;

/// Clients recognise VMs of the controller by this prefix.
const NAME_PREFIX: &str = "mgmtManaged-";
/// How long the script before a save may take; clients let it sleep for a minute and more.
const SAVE_SCRIPT_S: u32 = 1_800;

/// `None`: no such node.
pub(super) fn desired_set(state: &State, id: &NodeId) -> Option<wire::DesiredSet> {
    let node = state.nodes.get(id)?;
    let wanted = state.wanted_on(id);
    let images = wanted.map(|d| image_ref(state, &d.template, &d.tag, d.number));
    // Asked for twice, it is fetched once.
    let images: BTreeSet<_> = images.collect();
    let evict = state.evicted_on(id).map(|(of, number)| wire::ImageRef {
        template_id: of.to_string(),
        number,
        ..wire::ImageRef::default()
    });
    Some(wire::DesiredSet {
        generation: node.desired_generation,
        instances: plan::desired(state, id)
            .map(|shall| wish(state, node, &shall))
            .collect(),
        images: images.into_iter().collect(),
        evict: evict.collect(),
        ..wire::DesiredSet::default()
    })
}

fn wish(state: &State, node: &Node, shall: &Shall<'_>) -> wire::DesiredInstance {
    let mut wish = wire::DesiredInstance {
        id: shall.id.to_string(),
        generation: shall.generation,
        run: shall.wanted != Wanted::Gone,
        // An agent that knows no restart, or no save, leaves the VM alone: any other word would cost its disk.
        keep: matches!(shall.wanted, Wanted::Keep | Wanted::Restart | Wanted::Save),
        restart: shall.wanted == Wanted::Restart,
        ..wire::DesiredInstance::default()
    };
    if shall.wanted == Wanted::Save {
        wish.save = state.save_of(shall.id).map(|save| order(state, save));
    }
    let named = matches!(shall.wanted, Wanted::Run | Wanted::Restart | Wanted::Save);
    let Some(instance) = shall.instance.filter(|_| named) else {
        return wish;
    };
    let request = &instance.request;
    let template = state.templates.get(&request.template);
    let tag = template.and_then(|t| t.tags.get(&instance.tag_number));
    let template_name = template.map_or("", |t| t.name.as_str());
    let number = instance.tag_number;
    wish.image = image_ref(state, &request.template, &instance.tag, number);
    wish.name = vm_name(node, instance, template_name);
    wish.vcpu = request.vcpu.unwrap_or(0);
    wish.ram_mb = request.vram_mb.unwrap_or(0);
    wish.script = request.script.as_deref().map(script);
    wish.forwards = match (&request.port_forwarding, tag) {
        (Some(own), _) => translate::rules(own),
        (None, Some(tag)) => translate::rules(&tag.content.forwards),
        (None, None) => Vec::new(),
    };
    wish
}

fn image_ref(state: &State, id: &TemplateId, tag: &str, number: u32) -> wire::ImageRef {
    let template = state.templates.get(id);
    let content = template.and_then(|t| Some(&t.tags.get(&number)?.content));
    wire::ImageRef {
        template_id: id.to_string(),
        template: template.map_or_else(String::new, |t| t.name.clone()),
        tag: tag.to_owned(),
        number,
        manifest: content.map_or_else(String::new, |c| c.manifest.to_string()),
    }
}

fn order(state: &State, save: &Save) -> wire::SaveOrder {
    let request = &save.request;
    let template = match &request.target {
        SaveTarget::Template(id) => state.templates.get(id).map(|t| t.name.clone()),
        SaveTarget::New { name, .. } => Some(name.clone()),
    };
    wire::SaveOrder {
        id: save.id.to_string(),
        go: save.begun_ms.is_some(),
        script: (!request.script.is_empty()).then(|| wire::Script {
            body: STANDARD.encode(&request.script),
            monitored: true,
            timeout_s: SAVE_SCRIPT_S,
            ..wire::Script::default()
        }),
        script_known: save.script_result.is_some(),
        cancel_on_script_failure: request.cancel_on_script_failure,
        // Deleted meanwhile: then the push is refused, and says so.
        template: template.unwrap_or_else(|| "deleted".to_owned()),
        tag: request.tag.clone(),
    }
}

fn script(script: &Script) -> wire::Script {
    wire::Script {
        body: STANDARD.encode(&script.body),
        monitored: script.monitored,
        timeout_s: script.timeout_s,
        at_boot: script.at_boot,
        on_failure: match script.on_failure {
            ScriptFailure::Stop => 0,
            ScriptFailure::Keep => 1,
            ScriptFailure::Delete => 2,
        },
    }
}

/// The caller's template with its variables filled in; without one, template and instance id.
fn vm_name(node: &Node, instance: &Instance, template: &str) -> String {
    let request = &instance.request;
    let pattern = request.name_template.as_deref();
    let mut name = pattern.unwrap_or("$template_name-$instance_id").to_owned();
    let ts = (instance.created_ms / 1000).to_string();
    // `$template_name` before `$ts` and the like: none is a prefix of another.
    for (variable, value) in [
        ("$template_name", template),
        ("$template_id", request.template.as_str()),
        ("$instance_id", instance.id.as_str()),
        ("$node_id", node.id.as_str()),
        ("$node_name", node.name()),
        ("$ts", ts.as_str()),
    ] {
        name = name.replace(variable, value);
    }
    format!("{NAME_PREFIX}{name}")
}
