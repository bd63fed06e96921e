//! The instances by id. Each is boxed: a tree keeps room for half as many values again, and an instance is
//! several hundred bytes.

use crate::ids::{InstanceId, TemplateId};
use crate::instance::Instance;
use crate::template::Template;
use std::collections::BTreeMap;
use std::ops::Index;
use std::sync::atomic::{AtomicU64, Ordering};

/// Instances by id, in the order of ids.
#[derive(Clone, Debug, Default)]
pub struct Instances {
    map: BTreeMap<InstanceId, Box<Slot>>,
    version: u64,
}

#[derive(Clone, Debug)]
struct Slot {
    version: u64,
    instance: Instance,
}

/// A number that this process has not given before: also two states of one process, of which one takes the
/// place of the other, never have the same for different things.
pub(super) fn next_version() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// Versions are this process's own.
impl PartialEq for Instances {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Instances {
    /// One of them.
    pub fn get(&self, id: &InstanceId) -> Option<&Instance> {
        self.map.get(id).map(|slot| &slot.instance)
    }

    /// Another number whenever any of them changed, came or went; for comparing within this process only.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// All of them, each with a number that is another one whenever it changed.
    pub fn versioned(&self) -> impl Iterator<Item = (&Instance, u64)> {
        self.map.values().map(|slot| (&slot.instance, slot.version))
    }

    /// Whether there is one of this id.
    pub fn contains_key(&self, id: &InstanceId) -> bool {
        self.map.contains_key(id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Their ids.
    pub fn keys(&self) -> impl Iterator<Item = &InstanceId> {
        self.map.keys()
    }

    /// All of them.
    pub fn values(&self) -> impl Iterator<Item = &Instance> {
        self.map.values().map(|slot| &slot.instance)
    }

    /// All of them with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (&InstanceId, &Instance)> {
        self.map.iter().map(|(id, slot)| (id, &slot.instance))
    }

    pub(super) fn get_mut(&mut self, id: &InstanceId) -> Option<&mut Instance> {
        let slot = self.map.get_mut(id)?;
        self.version = next_version();
        slot.version = self.version;
        Some(&mut slot.instance)
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Instance> {
        self.version = next_version();
        let version = self.version;
        self.map.values_mut().map(move |slot| {
            slot.version = version;
            &mut slot.instance
        })
    }

    pub(super) fn insert(&mut self, id: InstanceId, instance: Instance) {
        self.version = next_version();
        let version = self.version;
        self.map.insert(id, Box::new(Slot { version, instance }));
    }

    pub(super) fn remove(&mut self, id: &InstanceId) -> Option<Instance> {
        let slot = self.map.remove(id)?;
        self.version = next_version();
        Some(slot.instance)
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
        &self.map[id].instance
    }
}
