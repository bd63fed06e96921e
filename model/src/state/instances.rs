//! The instances by id. Each is boxed: a tree keeps room for half as many values again, and an instance is
//! several hundred bytes.

use crate::ids::{InstanceId, TemplateId};
use crate::instance::Instance;
use crate::template::Template;
use std::collections::BTreeMap;
use std::ops::Index;

/// Instances by id, in the order of ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Instances(BTreeMap<InstanceId, Box<Instance>>);

impl Instances {
    /// One of them.
    pub fn get(&self, id: &InstanceId) -> Option<&Instance> {
        self.0.get(id).map(|boxed| &**boxed)
    }

    /// Whether there is one of this id.
    pub fn contains_key(&self, id: &InstanceId) -> bool {
        self.0.contains_key(id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their ids.
    pub fn keys(&self) -> impl Iterator<Item = &InstanceId> {
        self.0.keys()
    }

    /// All of them.
    pub fn values(&self) -> impl Iterator<Item = &Instance> {
        self.0.values().map(|boxed| &**boxed)
    }

    /// All of them with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (&InstanceId, &Instance)> {
        self.0.iter().map(|(id, boxed)| (id, &**boxed))
    }

    pub(super) fn get_mut(&mut self, id: &InstanceId) -> Option<&mut Instance> {
        self.0.get_mut(id).map(|boxed| &mut **boxed)
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Instance> {
        self.0.values_mut().map(|boxed| &mut **boxed)
    }

    pub(super) fn insert(&mut self, id: InstanceId, instance: Instance) {
        self.0.insert(id, Box::new(instance));
    }

    pub(super) fn remove(&mut self, id: &InstanceId) -> Option<Instance> {
        self.0.remove(id).map(|boxed| *boxed)
    }
}

/// Let an instance name its template by the template's own bytes: a hundred thousand may run one template.
pub(super) fn share_template_id(
    templates: &BTreeMap<TemplateId, Template>,
    instance: &mut Instance,
) {
    if let Some((id, _)) = templates.get_key_value(&instance.request.template) {
        instance.request.template = id.clone();
    }
}

impl Index<&InstanceId> for Instances {
    type Output = Instance;
    fn index(&self, id: &InstanceId) -> &Instance {
        &self.0[id]
    }
}
