//! What can be derived from the state but must be found fast: names of templates, who is on a
//! node and what they take, who waits, who is being started. Never stored; rebuilt on import. Decides nothing.

use super::State;
use crate::ids::{InstanceId, NodeId, TemplateId};
use crate::instance::Instance;
use crate::node::Load;
use std::collections::{BTreeMap, BTreeSet};

/// Priority, created at, id: the order of placement.
pub(super) type WaitKey = (u32, u64, InstanceId);

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Index {
    template_names: BTreeMap<String, TemplateId>,
    nodes: BTreeMap<NodeId, Occupants>,
    waiting: BTreeSet<WaitKey>,
    starting: BTreeSet<InstanceId>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Occupants {
    ids: BTreeSet<InstanceId>,
    load: Load,
}

/// What the index knows about one instance; taken before and after a change.
#[derive(PartialEq)]
pub(super) struct Place {
    waits: bool,
    starts: bool,
    on: Option<NodeId>,
}

impl Place {
    pub(super) fn of(instance: &Instance) -> Self {
        Self {
            waits: instance.waits(),
            starts: instance.starts(),
            on: instance.occupies().cloned(),
        }
    }
}

impl Index {
    pub(super) fn waiting(&self) -> impl Iterator<Item = &WaitKey> {
        self.waiting.iter()
    }

    pub(super) fn starting(&self) -> impl Iterator<Item = &InstanceId> {
        self.starting.iter()
    }

    pub(super) fn on_node(&self, node: &NodeId) -> impl Iterator<Item = &InstanceId> {
        self.nodes.get(node).into_iter().flat_map(|o| o.ids.iter())
    }

    pub(super) fn load(&self, node: &NodeId) -> Load {
        self.nodes.get(node).map(|o| o.load).unwrap_or_default()
    }

    pub(super) fn template_named(&self, name: &str) -> Option<&TemplateId> {
        self.template_names.get(name)
    }

    pub(super) fn name_template(&mut self, name: &str, id: &TemplateId) {
        self.template_names.insert(name.to_owned(), id.clone());
    }

    pub(super) fn forget_template(&mut self, name: &str) {
        self.template_names.remove(name);
    }

    pub(super) fn enter(&mut self, instance: &Instance) {
        if instance.waits() {
            self.waiting.insert(wait_key(instance));
        }
        if instance.starts() {
            self.starting.insert(instance.id.clone());
        }
        if let Some(node) = instance.occupies() {
            let occupants = self.nodes.entry(node.clone()).or_default();
            if occupants.ids.insert(instance.id.clone()) {
                occupants.load = occupants.load.plus(instance.demand());
            }
        }
    }

    /// `place` is where the instance was when it entered; its demand never changes.
    pub(super) fn leave(&mut self, instance: &Instance, place: &Place) {
        if place.waits {
            self.waiting.remove(&wait_key(instance));
        }
        if place.starts {
            self.starting.remove(&instance.id);
        }
        let Some(node) = &place.on else { return };
        let Some(occupants) = self.nodes.get_mut(node) else {
            return;
        };
        if occupants.ids.remove(&instance.id) {
            occupants.load = occupants.load.minus(instance.demand());
        }
        if occupants.ids.is_empty() {
            self.nodes.remove(node);
        }
    }

    pub(super) fn rebuild(state: &State) -> Self {
        let mut index = Self::default();
        for template in state.templates.values() {
            index.name_template(&template.name, &template.id);
        }
        for instance in state.instances.values() {
            index.enter(instance);
        }
        index
    }

    pub(super) fn check(&self, state: &State) -> Result<(), String> {
        let fresh = Self::rebuild(state);
        if self.template_names != fresh.template_names {
            return Err("index of template names differs from the templates".into());
        }
        if self.nodes != fresh.nodes {
            return Err("index of instances by node differs from the instances".into());
        }
        if self.waiting != fresh.waiting || self.starting != fresh.starting {
            return Err("index of waiting or starting instances differs from the instances".into());
        }
        Ok(())
    }
}

fn wait_key(instance: &Instance) -> WaitKey {
    (
        instance.request.priority,
        instance.created_ms,
        instance.id.clone(),
    )
}
