//! What can be derived from the state but must be found fast: names of templates, who is on a
//! node, what they take and which images they wait for, who waits for a node, who has ended. Never stored;
//! rebuilt on import. Decides nothing.

use super::State;
use super::lines::{Kind, Lines, WaitKey};
use crate::ids::{InstanceId, NodeId, SaveId, TemplateId};
use crate::instance::Instance;
use crate::node::{Left, Load};
use crate::save::Save;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Index {
    template_names: BTreeMap<String, TemplateId>,
    nodes: BTreeMap<NodeId, Occupants>,
    /// Who waits for a node, those that ask for the same thing together. No line is empty.
    waiting: BTreeMap<Kind, BTreeSet<WaitKey>>,
    /// Ended instances, and since when.
    ended: BTreeSet<(u64, InstanceId)>,
    /// What all repositories count for.
    repositories: u64,
    /// Open saves by their instances.
    saving: BTreeMap<InstanceId, SaveId>,
    /// Ended saves, and since when.
    ended_saves: BTreeSet<(u64, SaveId)>,
    /// What all saves weigh.
    saves_bytes: usize,
}

/// Who is on a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Occupants {
    ids: BTreeSet<InstanceId>,
    /// Ended instances of which something may be left there.
    left: BTreeSet<InstanceId>,
    load: Load,
    /// Images of the instances that were not seen running there yet, and how many want each.
    coming: BTreeMap<TemplateId, BTreeMap<u32, u32>>,
}

impl Occupants {
    /// What they, and what is left of others, take of the node.
    pub(crate) fn load(&self) -> Load {
        self.load
    }

    /// Whether an instance being started there wants this image.
    pub(crate) fn fetching(&self, template: &TemplateId, number: u32) -> bool {
        let numbers = self.coming.get(template);
        numbers.is_some_and(|n| n.contains_key(&number))
    }

    fn add_coming(&mut self, instance: &Instance) {
        let numbers = self.coming.entry(instance.request.template.clone());
        *numbers.or_default().entry(instance.tag_number).or_default() += 1;
    }

    fn remove_coming(&mut self, instance: &Instance) {
        let template = &instance.request.template;
        let Some(numbers) = self.coming.get_mut(template) else {
            return;
        };
        if let Some(count) = numbers.get_mut(&instance.tag_number) {
            *count -= 1;
            if *count == 0 {
                numbers.remove(&instance.tag_number);
            }
        }
        if numbers.is_empty() {
            self.coming.remove(template);
        }
    }
}

/// What the index knows about one instance; taken before and after a change.
#[derive(PartialEq)]
pub(super) struct Place {
    waits: bool,
    /// A node rejected it: no other instance has the same candidates.
    alone: bool,
    starts: bool,
    on: Option<NodeId>,
    ended_ms: Option<u64>,
}

impl Place {
    pub(super) fn of(instance: &Instance) -> Self {
        Self {
            waits: instance.waits(),
            alone: !instance.rejections.is_empty(),
            starts: instance.starts(),
            on: instance.occupies().cloned(),
            ended_ms: instance.ended_ms,
        }
    }
}

impl Index {
    pub(super) fn lines(&self) -> Lines<'_> {
        Lines::new(self.waiting.values())
    }

    pub(super) fn any_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Who has ended, the longest ago first, and since when.
    pub(super) fn ended(&self) -> impl Iterator<Item = &(u64, InstanceId)> {
        self.ended.iter()
    }

    pub(super) fn on_node(&self, node: &NodeId) -> impl Iterator<Item = &InstanceId> {
        self.nodes.get(node).into_iter().flat_map(|o| o.ids.iter())
    }

    pub(super) fn left_on(&self, node: &NodeId) -> impl Iterator<Item = &InstanceId> {
        self.nodes.get(node).into_iter().flat_map(|o| o.left.iter())
    }

    pub(super) fn occupants(&self, node: &NodeId) -> Option<&Occupants> {
        self.nodes.get(node)
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

    pub(super) fn repositories(&self) -> u64 {
        self.repositories
    }

    pub(super) fn weigh_repositories(&mut self, gained: u64, lost: u64) {
        self.repositories = self
            .repositories
            .saturating_add(gained)
            .saturating_sub(lost);
    }

    pub(super) fn save_of(&self, instance: &InstanceId) -> Option<&SaveId> {
        self.saving.get(instance)
    }

    pub(super) fn open_saves(&self) -> impl Iterator<Item = &SaveId> {
        self.saving.values()
    }

    pub(super) fn ended_saves(&self) -> impl Iterator<Item = &(u64, SaveId)> {
        self.ended_saves.iter()
    }

    pub(super) fn saves_bytes(&self) -> usize {
        self.saves_bytes
    }

    pub(super) fn enter_save(&mut self, save: &Save) {
        self.saves_bytes += save.weight();
        match &save.end {
            Some(end) => {
                self.ended_saves.insert((end.at_ms, save.id.clone()));
            }
            None => {
                let instance = save.request.instance.clone();
                self.saving.insert(instance, save.id.clone());
            }
        }
    }

    /// As it was when it entered.
    pub(super) fn leave_save(&mut self, save: &Save) {
        self.saves_bytes -= save.weight();
        match &save.end {
            Some(end) => {
                self.ended_saves.remove(&(end.at_ms, save.id.clone()));
            }
            None => {
                self.saving.remove(&save.request.instance);
            }
        }
    }

    pub(super) fn enter(&mut self, instance: &Instance) {
        if instance.waits() {
            let kind = Kind::of(instance, !instance.rejections.is_empty());
            let line = self.waiting.entry(kind).or_default();
            line.insert(Kind::turn(instance));
        }
        if let Some(at) = instance.ended_ms {
            self.ended.insert((at, instance.id.clone()));
        }
        if let Some(node) = instance.occupies() {
            let occupants = self.nodes.entry(node.clone()).or_default();
            if occupants.ids.insert(instance.id.clone()) {
                occupants.load = occupants.load.plus(instance.demand());
                if instance.starts() {
                    occupants.add_coming(instance);
                }
            }
        }
    }

    /// `place` is where the instance was when it entered; its demand never changes.
    pub(super) fn leave(&mut self, instance: &Instance, place: &Place) {
        if place.waits {
            let kind = Kind::of(instance, place.alone);
            if let Some(line) = self.waiting.get_mut(&kind) {
                line.remove(&Kind::turn(instance));
                if line.is_empty() {
                    self.waiting.remove(&kind);
                }
            }
        }
        if let Some(at) = place.ended_ms {
            self.ended.remove(&(at, instance.id.clone()));
        }
        let Some(node) = &place.on else { return };
        let Some(occupants) = self.nodes.get_mut(node) else {
            return;
        };
        if occupants.ids.remove(&instance.id) {
            occupants.load = occupants.load.minus(instance.demand());
            if place.starts {
                occupants.remove_coming(instance);
            }
        }
        self.drop_if_empty(node);
    }

    pub(super) fn enter_left(&mut self, id: &InstanceId, left: &Left) {
        let occupants = self.nodes.entry(left.node.clone()).or_default();
        if occupants.left.insert(id.clone()) {
            occupants.load = occupants.load.plus(left.load);
        }
    }

    pub(super) fn leave_left(&mut self, id: &InstanceId, left: &Left) {
        let Some(occupants) = self.nodes.get_mut(&left.node) else {
            return;
        };
        if occupants.left.remove(id) {
            occupants.load = occupants.load.minus(left.load);
        }
        self.drop_if_empty(&left.node);
    }

    fn drop_if_empty(&mut self, node: &NodeId) {
        let empty = |o: &Occupants| o.ids.is_empty() && o.left.is_empty();
        if self.nodes.get(node).is_some_and(empty) {
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
        for (id, left) in &state.left {
            index.enter_left(id, left);
        }
        for save in state.saves.values() {
            index.enter_save(save);
        }
        let repositories = state.repositories.iter();
        index.repositories = repositories.map(|(name, r)| r.weight(name)).sum();
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
        if self.waiting != fresh.waiting {
            return Err("index of waiting instances differs from the instances".into());
        }
        if self.ended != fresh.ended {
            return Err("index of ended instances differs from the instances".into());
        }
        let saves = (&self.saving, &self.ended_saves, self.saves_bytes);
        if saves != (&fresh.saving, &fresh.ended_saves, fresh.saves_bytes) {
            return Err("index of saves differs from the saves".into());
        }
        if self.repositories != fresh.repositories {
            return Err("the weight of all repositories differs from theirs".into());
        }
        Ok(())
    }
}
