//! The few ways in which commands may touch the state: each keeps indexes, time of change, the
//! set of changed keys and, for tags and artifacts, the journal right. Decides nothing.

use super::State;
use super::index::Place;
use super::instances::{next_version, share_template_id};
use super::journal::Owned;
use super::key::Key;
use crate::artifact::{self, Artifact, RepositoryTag};
use crate::distribution::{Delivery, Distribution};
use crate::feature::{RECENT_BLOCKS, RECENT_GRADUALLY};
use crate::group::Group;
use crate::ids::{
    DistributionId, GroupId, InstanceId, MemberId, NodeId, SaveId, Sha256, TemplateId,
};
use crate::instance::{Instance, ScriptResult};
use crate::member::Retired;
use crate::node::{Left, Node};
use crate::save::Save;
use crate::template::{Tag, Template};
use std::collections::BTreeSet;

impl State {
    pub(crate) fn insert_instance(&mut self, mut instance: Instance) {
        share_template_id(&self.templates, &mut instance);
        if instance.request.script.is_some() {
            self.dirty.insert(Key::Script(instance.id.clone()));
        }
        self.dirty.insert(Key::Instance(instance.id.clone()));
        self.index.enter(&instance);
        self.instances.insert(instance.id.clone(), instance);
    }

    /// Change an instance; the caller knows that something does change. Not its script (never
    /// changes), not its script's result (see below), not what it demands.
    pub(crate) fn edit_instance(&mut self, id: &InstanceId, change: impl FnOnce(&mut Instance)) {
        let Some(instance) = self.instances.get_mut(id) else {
            return;
        };
        let before = Place::of(instance);
        change(instance);
        instance.updated_ms = self.clock_ms;
        if before != Place::of(instance) {
            self.index.leave(instance, &before);
            self.index.enter(instance);
        }
        self.dirty.insert(Key::Instance(id.clone()));
    }

    pub(crate) fn set_script_result(&mut self, id: &InstanceId, result: Option<ScriptResult>) {
        self.edit_instance(id, |i| i.script_result = result.map(Box::new));
        self.dirty.insert(Key::Output(id.clone()));
    }

    pub(crate) fn remove_instance(&mut self, id: &InstanceId) {
        let Some(instance) = self.instances.remove(id) else {
            return;
        };
        self.index.leave(&instance, &Place::of(&instance));
        if instance.request.script.is_some() {
            self.dirty.insert(Key::Script(id.clone()));
        }
        if instance.script_result.is_some() {
            self.dirty.insert(Key::Output(id.clone()));
        }
        self.dirty.insert(Key::Instance(id.clone()));
    }

    /// Remember what may be left of an instance on a node that cannot be asked.
    pub(crate) fn leave(&mut self, id: &InstanceId, left: Left) {
        self.forget_left(id);
        self.dirty.insert(Key::Left(id.clone()));
        self.index.enter_left(id, &left);
        self.left.insert(id.clone(), left);
    }

    /// Nothing of it is left.
    pub(crate) fn forget_left(&mut self, id: &InstanceId) {
        if let Some(left) = self.left.remove(id) {
            self.index.leave_left(id, &left);
            self.dirty.insert(Key::Left(id.clone()));
        }
    }

    /// A new save.
    pub(crate) fn insert_save(&mut self, save: Save) {
        if !save.request.script.is_empty() {
            self.dirty.insert(Key::SaveScript(save.id.clone()));
        }
        self.dirty.insert(Key::Save(save.id.clone()));
        self.index.enter_save(&save);
        self.saves.insert(save.id.clone(), save);
    }

    /// Change a save; the caller knows that something does change. Not its instance. Its script can only go.
    pub(crate) fn edit_save(&mut self, id: &SaveId, change: impl FnOnce(&mut Save)) {
        let Some(save) = self.saves.get_mut(id) else {
            return;
        };
        self.index.leave_save(save);
        let (script, told) = (save.request.script.len(), save.script_result.is_some());
        change(save);
        if save.request.script.len() != script {
            self.dirty.insert(Key::SaveScript(id.clone()));
        }
        if save.script_result.is_some() != told {
            self.dirty.insert(Key::SaveOutput(id.clone()));
        }
        self.index.enter_save(save);
        self.dirty.insert(Key::Save(id.clone()));
    }

    pub(crate) fn remove_save(&mut self, id: &SaveId) {
        let Some(save) = self.saves.remove(id) else {
            return;
        };
        self.index.leave_save(&save);
        if !save.request.script.is_empty() {
            self.dirty.insert(Key::SaveScript(id.clone()));
        }
        if save.script_result.is_some() {
            self.dirty.insert(Key::SaveOutput(id.clone()));
        }
        self.dirty.insert(Key::Save(id.clone()));
    }

    /// Its desired generation is set here.
    pub(crate) fn insert_node(&mut self, mut node: Node) {
        node.desired_generation = self.next_desired();
        self.nodes_version = next_version();
        self.dirty.insert(Key::Node(node.id.clone()));
        self.nodes.insert(node.id.clone(), node);
    }

    /// Change a node; the caller knows that something does change.
    pub(crate) fn edit_node(&mut self, id: &NodeId, change: impl FnOnce(&mut Node)) {
        let Some(node) = self.nodes.get_mut(id) else {
            return;
        };
        let shown = |n: &Node| {
            (
                n.host().to_owned(),
                n.config.host.is_some(),
                n.spec.arch.clone(),
            )
        };
        let before = shown(node);
        change(node);
        if shown(node) != before {
            self.nodes_version = next_version();
        }
        node.updated_ms = self.clock_ms;
        self.dirty.insert(Key::Node(id.clone()));
    }

    /// Tell a node's agent that its desired set changed.
    pub(crate) fn bump_desired(&mut self, id: &NodeId) {
        let generation = self.next_desired();
        self.edit_node(id, |n| n.desired_generation = generation);
    }

    /// `c` holds it and is written with every command.
    fn next_desired(&mut self) -> u64 {
        self.desired_changes = self.desired_changes.saturating_add(1);
        self.desired_changes
    }

    pub(crate) fn remove_node(&mut self, id: &NodeId) {
        if self.nodes.remove(id).is_some() {
            self.nodes_version = next_version();
            self.dirty.insert(Key::Node(id.clone()));
        }
        for of in self.evictions.remove(id).unwrap_or_default().into_keys() {
            self.dirty.insert(Key::Eviction(id.clone(), of));
        }
    }

    /// A template with its tags, new.
    pub(crate) fn insert_template(&mut self, template: Template) {
        self.dirty.insert(Key::Template(template.id.clone()));
        for number in template.tags.keys() {
            self.dirty.insert(Key::Tag(template.id.clone(), *number));
            self.journal.note(Owned::Tag(template.id.clone(), *number));
        }
        self.index.name_template(&template.name, &template.id);
        self.templates.insert(template.id.clone(), template);
    }

    pub(crate) fn remove_template(&mut self, id: &TemplateId) {
        let Some(template) = self.templates.remove(id) else {
            return;
        };
        self.index.forget_template(&template.name);
        for number in template.tags.keys() {
            self.dirty.insert(Key::Tag(id.clone(), *number));
            self.journal.note(Owned::Tag(id.clone(), *number));
            self.forget_pull(id, *number);
        }
        self.dirty.insert(Key::Template(id.clone()));
    }

    /// Append a tag; its number must be the template's next.
    pub(crate) fn append_tag(&mut self, id: &TemplateId, tag: Tag) {
        let Some(template) = self.templates.get_mut(id) else {
            return;
        };
        template.next_number = tag.number.saturating_add(1);
        self.dirty.insert(Key::Template(id.clone()));
        self.dirty.insert(Key::Tag(id.clone(), tag.number));
        self.journal.note(Owned::Tag(id.clone(), tag.number));
        template.tags.insert(tag.number, tag);
    }

    /// Change a tag; the caller knows that something does change.
    pub(crate) fn edit_tag(&mut self, id: &TemplateId, number: u32, change: impl FnOnce(&mut Tag)) {
        let template = self.templates.get_mut(id);
        let Some(tag) = template.and_then(|t| t.tags.get_mut(&number)) else {
            return;
        };
        change(tag);
        self.dirty.insert(Key::Tag(id.clone(), number));
        self.journal.note(Owned::Tag(id.clone(), number));
    }

    pub(crate) fn remove_tag(&mut self, id: &TemplateId, number: u32) {
        if let Some(template) = self.templates.get_mut(id)
            && template.tags.remove(&number).is_some()
        {
            self.dirty.insert(Key::Tag(id.clone(), number));
            self.journal.note(Owned::Tag(id.clone(), number));
            self.forget_pull(id, number);
        }
    }

    /// A tag that is there was pulled at that time.
    pub(crate) fn set_pull(&mut self, id: &TemplateId, number: u32, at_ms: u64) {
        self.dirty.insert(Key::Pulled(id.clone(), number));
        self.pulls.insert((id.clone(), number), at_ms);
    }

    fn forget_pull(&mut self, id: &TemplateId, number: u32) {
        if self.pulls.remove(&(id.clone(), number)).is_some() {
            self.dirty.insert(Key::Pulled(id.clone(), number));
        }
    }

    /// Who is waited for is counted here, and told.
    pub(crate) fn insert_distribution(&mut self, mut distribution: Distribution) {
        let id = distribution.id.clone();
        self.dirty.insert(Key::Distribution(id.clone()));
        distribution.waiting = 0;
        for (node, delivery) in &distribution.nodes {
            self.dirty.insert(Key::Delivery(id.clone(), node.clone()));
            if *delivery == Delivery::Wanted {
                distribution.waiting += 1;
                self.bump_desired(node);
            }
        }
        if distribution.waiting == 0 {
            distribution.ended_ms = Some(self.clock_ms);
        }
        self.distributions.insert(id, distribution);
    }

    /// A node that was waited for is not any more.
    pub(crate) fn settle_delivery(
        &mut self,
        id: &DistributionId,
        node: &NodeId,
        delivery: Delivery,
    ) {
        let Some(distribution) = self.distributions.get_mut(id) else {
            return;
        };
        if !distribution.wants(node) || delivery == Delivery::Wanted {
            return;
        }
        distribution.nodes.insert(node.clone(), delivery);
        distribution.waiting -= 1;
        if distribution.waiting == 0 {
            distribution.ended_ms = Some(self.clock_ms);
            self.dirty.insert(Key::Distribution(id.clone()));
        }
        self.dirty.insert(Key::Delivery(id.clone(), node.clone()));
        self.bump_desired(node);
    }

    pub(crate) fn remove_distribution(&mut self, id: &DistributionId) {
        let Some(distribution) = self.distributions.remove(id) else {
            return;
        };
        self.dirty.insert(Key::Distribution(id.clone()));
        for node in distribution.nodes.keys() {
            self.dirty.insert(Key::Delivery(id.clone(), node.clone()));
        }
    }

    /// A node shall drop these tags of a template.
    pub(crate) fn evict(&mut self, node: &NodeId, of: &TemplateId, numbers: &BTreeSet<u32>) {
        if numbers.is_empty() {
            return;
        }
        let of_node = self.evictions.entry(node.clone()).or_default();
        let evicted = of_node.entry(of.clone()).or_default();
        let before = evicted.len();
        evicted.extend(numbers);
        if evicted.len() > before {
            self.dirty.insert(Key::Eviction(node.clone(), of.clone()));
            self.bump_desired(node);
        }
    }

    /// A node need not drop these tags of a template, or has.
    pub(crate) fn keep(&mut self, node: &NodeId, of: &TemplateId, which: impl Fn(u32) -> bool) {
        let Some(of_node) = self.evictions.get_mut(node) else {
            return;
        };
        let Some(evicted) = of_node.get_mut(of) else {
            return;
        };
        let before = evicted.len();
        evicted.retain(|number| !which(*number));
        if evicted.len() == before {
            return;
        }
        if evicted.is_empty() {
            of_node.remove(of);
        }
        if of_node.is_empty() {
            self.evictions.remove(node);
        }
        self.dirty.insert(Key::Eviction(node.clone(), of.clone()));
        self.bump_desired(node);
    }

    /// How much of a template may be stored; the empty name: of all.
    pub(crate) fn set_quota(&mut self, name: &str, bytes: Option<u64>) {
        let before = self.quotas.get(name).copied();
        if before == bytes {
            return;
        }
        self.dirty.insert(Key::Quota(name.to_owned()));
        match bytes {
            Some(bytes) => self.quotas.insert(name.to_owned(), bytes),
            None => self.quotas.remove(name),
        };
    }

    /// Number of the next put into a repository, which is made if there is none.
    pub(crate) fn next_put(&mut self, repository: &str) -> u64 {
        if !self.repositories.contains_key(repository) {
            let weight = artifact::repository_weight(repository);
            self.index.weigh_repositories(weight, 0);
        }
        let entry = self.repositories.entry(repository.to_owned()).or_default();
        entry.puts = entry.puts.saturating_add(1);
        self.dirty.insert(Key::Repository(repository.to_owned()));
        entry.puts
    }

    /// Set an artifact of a repository that is there.
    pub(crate) fn set_artifact(&mut self, repository: &str, artifact: Artifact) {
        let Some(entry) = self.repositories.get_mut(repository) else {
            return;
        };
        let (digest, gained) = (artifact.content.digest, artifact.weight());
        self.dirty
            .insert(Key::Artifact(repository.to_owned(), digest));
        self.journal
            .note(Owned::Artifact(repository.to_owned(), digest));
        let former = entry.artifacts.insert(digest, artifact);
        let lost = former.map_or(0, |former| former.weight());
        self.index.weigh_repositories(gained, lost);
    }

    /// Look at every artifact, and change in place those that `change` says it changed: nothing is copied.
    /// Not what it weighs.
    pub(crate) fn edit_artifacts(&mut self, mut change: impl FnMut(&str, &mut Artifact) -> bool) {
        for (name, repository) in &mut self.repositories {
            for (digest, artifact) in &mut repository.artifacts {
                if change(name, artifact) {
                    self.dirty.insert(Key::Artifact(name.clone(), *digest));
                    self.journal.note(Owned::Artifact(name.clone(), *digest));
                }
            }
        }
    }

    pub(crate) fn remove_artifact(&mut self, repository: &str, digest: &Sha256) {
        let entry = self.repositories.get_mut(repository);
        if let Some(former) = entry.and_then(|r| r.artifacts.remove(digest)) {
            self.index.weigh_repositories(0, former.weight());
            self.dirty
                .insert(Key::Artifact(repository.to_owned(), *digest));
            self.journal
                .note(Owned::Artifact(repository.to_owned(), *digest));
        }
    }

    /// Let a tag name an artifact, or nothing.
    pub(crate) fn set_repository_tag(
        &mut self,
        repository: &str,
        tag: &str,
        names: Option<RepositoryTag>,
    ) {
        let Some(entry) = self.repositories.get_mut(repository) else {
            return;
        };
        let key = Key::RepositoryTag(repository.to_owned(), tag.to_owned());
        self.dirty.insert(key);
        let gained = names.as_ref().map_or(0, |_| artifact::tag_weight(tag));
        let former = match names {
            Some(names) => entry.tags.insert(tag.to_owned(), names),
            None => entry.tags.remove(tag),
        };
        let lost = former.map_or(0, |_| artifact::tag_weight(tag));
        self.index.weigh_repositories(gained, lost);
    }

    /// A repository without an artifact has no tag either.
    pub(crate) fn remove_empty_repository(&mut self, repository: &str) {
        let entry = self.repositories.get(repository);
        if entry.is_some_and(|r| r.artifacts.is_empty()) {
            if let Some(former) = self.repositories.remove(repository) {
                let weight = former.weight(repository);
                self.index.weigh_repositories(0, weight);
            }
            self.dirty.insert(Key::Repository(repository.to_owned()));
        }
    }

    pub(crate) fn raise_features(&mut self, level: u32) {
        if level <= self.features {
            return;
        }
        if self.features < RECENT_BLOCKS && level >= RECENT_GRADUALLY {
            self.recent.move_gradually();
        } else if self.features < RECENT_BLOCKS && level >= RECENT_BLOCKS {
            // Every remembered command moves at once: members that know no higher level do that.
            self.dirty.extend(self.recent.slots().map(Key::Recent));
            let blocks = self.recent.blocks().map(Key::RecentBlock);
            self.dirty.extend(blocks);
        }
        self.features = level;
        self.dirty.insert(Key::Features);
    }

    pub(crate) fn retire(&mut self, id: MemberId, retired: Retired) {
        self.dirty.insert(Key::Retired(id));
        self.retired.insert(id, retired);
    }

    pub(crate) fn forget_retired(&mut self, id: MemberId) {
        if self.retired.remove(&id).is_some() {
            self.dirty.insert(Key::Retired(id));
        }
    }

    pub(crate) fn put_group(&mut self, group: Group) {
        self.dirty.insert(Key::Group(group.id.clone()));
        self.groups.insert(group.id.clone(), group);
    }

    pub(crate) fn remove_group(&mut self, id: &GroupId) {
        if self.groups.remove(id).is_some() {
            self.dirty.insert(Key::Group(id.clone()));
        }
    }
}
