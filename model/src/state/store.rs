//! The state as keys and values: changes for a checkpoint, everything for a snapshot, and back.
//! Knows nothing of where they are written.

use super::index::Index;
use super::instances::{next_version, share_template_id};
use super::key::Key;
use super::recent::{Place, Recent};
use super::record::{
    DistributionRecord, InstanceRecord, MetaRecord, RecentBlock, RecentRecord, RepositoryRecord,
    SaveRecord, ScriptRecord, TemplateRecord,
};
use super::{Change, State};
use crate::artifact::{Artifact, Repository, RepositoryTag};
use crate::codec::{CodecError, decode, encode};
use crate::distribution::Delivery;
use crate::feature::RECENT_BLOCKS;
use crate::ids::{CommandId, DistributionId, InstanceId, NodeId, SaveId, TemplateId};
use crate::instance::ScriptResult;
use crate::outcome::Outcome;
use crate::template::Tag;
use std::borrow::Cow;

impl State {
    /// Keys changed since the last call with their newest values, in key order, for the durable
    /// store. Whoever applies must call this now and then, also where nothing is stored: the
    /// names of changed keys pile up.
    pub fn take_changes(&mut self) -> Vec<Change> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty
            .iter()
            .map(|key| (key.to_bytes(), self.value(key)))
            .collect()
    }

    /// How many keys changed since the last [`State::take_changes`].
    pub fn changed_keys(&self) -> usize {
        self.dirty.len()
    }

    /// The whole state as keys and values, in key order (snapshot).
    pub fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut out = Vec::new();
        self.for_each_entry(|key, value| out.push((key, value)));
        out
    }

    /// Every key and its value, in key order, one at a time.
    pub fn for_each_entry(&self, mut visit: impl FnMut(Vec<u8>, Vec<u8>)) {
        let mut give = |key: Key| {
            if let Some(value) = self.value(&key) {
                visit(key.to_bytes(), value);
            }
        };
        give(Key::Meta);
        let distributions = || self.distributions.values();
        distributions().for_each(|d| give(Key::Distribution(d.id.clone())));
        for distribution in distributions() {
            for node in distribution.nodes.keys() {
                give(Key::Delivery(distribution.id.clone(), node.clone()));
            }
        }
        give(Key::Features);
        self.groups
            .keys()
            .for_each(|id| give(Key::Group(id.clone())));
        let instances = || self.instances.keys().cloned();
        let saves = || self.saves.keys().cloned();
        saves().for_each(|id| give(Key::SaveScript(id)));
        instances().for_each(|id| give(Key::Instance(id)));
        saves().for_each(|id| give(Key::SaveOutput(id)));
        for (node, templates) in &self.evictions {
            let templates = templates.keys();
            templates.for_each(|of| give(Key::Eviction(node.clone(), of.clone())));
        }
        self.left.keys().for_each(|id| give(Key::Left(id.clone())));
        self.retired.keys().for_each(|id| give(Key::Retired(*id)));
        self.nodes.keys().for_each(|id| give(Key::Node(id.clone())));
        instances().for_each(|id| give(Key::Output(id)));
        saves().for_each(|id| give(Key::Save(id)));
        // One of the two: a block that is stored in one way has no value in the other.
        self.recent
            .blocks()
            .for_each(|block| give(Key::RecentBlock(block)));
        self.recent.slots().for_each(|slot| give(Key::Recent(slot)));
        instances().for_each(|id| give(Key::Script(id)));
        self.templates
            .keys()
            .for_each(|id| give(Key::Template(id.clone())));
        let repositories = || self.repositories.iter();
        repositories().for_each(|(name, _)| give(Key::Repository(name.clone())));
        for (id, template) in &self.templates {
            for number in template.tags.keys() {
                give(Key::Tag(id.clone(), *number));
            }
        }
        for (name, repository) in repositories() {
            for digest in repository.artifacts.keys() {
                give(Key::Artifact(name.clone(), *digest));
            }
        }
        for (name, repository) in repositories() {
            for tag in repository.tags.keys() {
                give(Key::RepositoryTag(name.clone(), tag.clone()));
            }
        }
        let quotas = self.quotas.keys();
        quotas.for_each(|name| give(Key::Quota(name.clone())));
        let pulls = self.pulls.keys();
        pulls.for_each(|(id, number)| give(Key::Pulled(id.clone(), *number)));
    }

    fn value(&self, key: &Key) -> Option<Vec<u8>> {
        match key {
            Key::Meta => Some(encode(&MetaRecord {
                clock_ms: self.clock_ms,
                desired_changes: self.desired_changes,
            })),
            Key::Distribution(id) => {
                let distribution = self.distributions.get(id)?;
                Some(encode(&DistributionRecord::of(distribution)))
            }
            Key::Delivery(id, node) => self.distributions.get(id)?.nodes.get(node).map(encode),
            Key::Features => (self.features > 0).then(|| encode(&self.features)),
            Key::Group(id) => self.groups.get(id).map(encode),
            Key::Instance(id) => {
                let instance = self.instances.get(id)?;
                Some(encode(&InstanceRecord::of(instance)))
            }
            Key::Eviction(node, of) => self.evictions.get(node)?.get(of).map(encode),
            Key::SaveScript(id) => {
                let body = &self.saves.get(id)?.request.script;
                (!body.is_empty()).then(|| encode(&ScriptRecord::of_body(body)))
            }
            Key::SaveOutput(id) => self.saves.get(id)?.script_result.as_ref().map(encode),
            Key::Save(id) => Some(encode(&SaveRecord::of(self.saves.get(id)?))),
            Key::Left(id) => self.left.get(id).map(encode),
            Key::Retired(id) => self.retired.get(id).map(encode),
            Key::Node(id) => self.nodes.get(id).map(encode),
            Key::Output(id) => self.instances.get(id)?.script_result.as_ref().map(encode),
            Key::RecentBlock(block) if self.stored_alone(*block) => None,
            Key::RecentBlock(block) => {
                let records: Vec<_> = self.recent.in_block(*block).map(remembered).collect();
                (!records.is_empty()).then(|| encode(&RecentBlock(records)))
            }
            Key::Recent(slot) if !self.stored_alone(Recent::block(*slot)) => None,
            Key::Recent(slot) => Some(encode(&remembered(self.recent.at_slot(*slot)?))),
            Key::Script(id) => {
                let script = self.instances.get(id)?.request.script.as_ref()?;
                Some(encode(&ScriptRecord::of(script)))
            }
            Key::Template(id) => {
                let template = self.templates.get(id)?;
                Some(encode(&TemplateRecord::of(template)))
            }
            Key::Repository(name) => {
                let puts = self.repositories.get(name)?.puts;
                Some(encode(&RepositoryRecord { puts }))
            }
            Key::Tag(id, number) => self.templates.get(id)?.tags.get(number).map(encode),
            Key::Artifact(name, digest) => {
                let repository = self.repositories.get(name)?;
                repository.artifacts.get(digest).map(encode)
            }
            Key::RepositoryTag(name, tag) => self.repositories.get(name)?.tags.get(tag).map(encode),
            Key::Quota(name) => self.quotas.get(name).map(encode),
            Key::Pulled(id, number) => self.pulls.get(&(id.clone(), *number)).map(encode),
        }
    }

    /// Do the remembered commands of this block have keys of their own?
    fn stored_alone(&self, block: u32) -> bool {
        self.features < RECENT_BLOCKS || self.recent.is_alone(block)
    }

    /// The reverse of [`State::export`]; entries may come in any order. Fails on bytes it does
    /// not understand and on entries that do not belong together.
    pub fn import(entries: impl Iterator<Item = (Vec<u8>, Vec<u8>)>) -> Result<Self, CodecError> {
        let mut state = Self::default();
        let mut rest = Rest::default();
        for (key, value) in entries {
            state.import_entry(&mut rest, Key::from_bytes(&key)?, &value)?;
        }
        state.join(rest)?;
        state.index = Index::rebuild(&state);
        Ok(state)
    }

    fn import_entry(&mut self, rest: &mut Rest, key: Key, value: &[u8]) -> Result<(), CodecError> {
        match key {
            Key::Meta => {
                let meta: MetaRecord = decode(value)?;
                self.clock_ms = meta.clock_ms;
                self.desired_changes = meta.desired_changes;
            }
            Key::Distribution(id) => {
                let record: DistributionRecord<'_> = decode(value)?;
                let distribution = record.into_distribution(id.clone());
                self.distributions.insert(id, distribution);
            }
            Key::Delivery(id, node) => rest.deliveries.push((id, node, decode(value)?)),
            Key::Features => self.features = decode(value)?,
            Key::Group(id) => {
                self.groups.insert(id, decode(value)?);
            }
            Key::Instance(id) => {
                let record: InstanceRecord<'_> = decode(value)?;
                self.instances.insert(id.clone(), record.into_instance(id));
            }
            Key::Eviction(node, of) => {
                let of_node = self.evictions.entry(node).or_default();
                of_node.insert(of, decode(value)?);
            }
            Key::SaveScript(id) => {
                let record: ScriptRecord<'_> = decode(value)?;
                rest.save_scripts.push((id, record.into_body()));
            }
            Key::SaveOutput(id) => rest.save_outputs.push((id, decode(value)?)),
            Key::Save(id) => {
                let record: SaveRecord<'_> = decode(value)?;
                rest.due_scripts += usize::from(record.script);
                self.saves.insert(id.clone(), record.into_save(id));
            }
            Key::Left(id) => {
                self.left.insert(id, decode(value)?);
            }
            Key::Retired(id) => {
                self.retired.insert(id, decode(value)?);
            }
            Key::Node(id) => {
                self.nodes.insert(id, decode(value)?);
                self.nodes_version = next_version();
            }
            Key::Output(id) => rest.outputs.push((id, decode(value)?)),
            Key::RecentBlock(block) => {
                let records: RecentBlock<'_> = decode(value)?;
                let records = records.0.into_iter();
                let place = Place::Block(block);
                rest.recent
                    .extend(records.map(|r| (place, r.sequence, r.id, r.outcome.into_owned())));
            }
            Key::Recent(slot) => {
                let r: RecentRecord<'_> = decode(value)?;
                let place = Place::Slot(slot);
                let outcome = r.outcome.into_owned();
                rest.recent.push((place, r.sequence, r.id, outcome));
            }
            Key::Script(id) => {
                let record: ScriptRecord<'_> = decode(value)?;
                rest.scripts.push((id, record.into_body()));
            }
            Key::Template(id) => {
                let record: TemplateRecord<'_> = decode(value)?;
                self.templates.insert(id.clone(), record.into_template(id));
            }
            Key::Repository(name) => {
                let record: RepositoryRecord = decode(value)?;
                let repository = Repository {
                    puts: record.puts,
                    ..Repository::default()
                };
                self.repositories.insert(name, repository);
            }
            Key::Tag(id, _) => rest.tags.push((id, decode(value)?)),
            Key::Artifact(name, _) => rest.artifacts.push((name, decode(value)?)),
            Key::RepositoryTag(name, tag) => {
                rest.repository_tags.push((name, tag, decode(value)?));
            }
            Key::Quota(name) => {
                self.quotas.insert(name, decode(value)?);
            }
            Key::Pulled(id, number) => {
                self.pulls.insert((id, number), decode(value)?);
            }
        }
        Ok(())
    }

    fn join(&mut self, rest: Rest) -> Result<(), CodecError> {
        let orphan = |what: &str, id: &str| CodecError(format!("{what} of unknown owner {id}"));
        for (id, result) in rest.outputs {
            match self.instances.get_mut(&id) {
                Some(i) => i.script_result = Some(Box::new(result)),
                None => return Err(orphan("script output", id.as_str())),
            }
        }
        let scripts = self
            .instances
            .values()
            .filter(|i| i.request.script.is_some());
        if scripts.count() != rest.scripts.len() {
            return Err(CodecError("an instance lacks its script".into()));
        }
        for (id, body) in rest.scripts {
            let owner = self.instances.get_mut(&id);
            match owner.and_then(|i| i.request.script.as_mut()) {
                Some(script) => script.body = body,
                None => return Err(orphan("script", id.as_str())),
            }
        }
        if rest.save_scripts.len() != rest.due_scripts {
            return Err(CodecError("a save lacks its script".into()));
        }
        for (id, body) in rest.save_scripts {
            match self.saves.get_mut(&id) {
                Some(save) if !body.is_empty() => save.request.script = body,
                _ => return Err(orphan("script", id.as_str())),
            }
        }
        for (id, result) in rest.save_outputs {
            match self.saves.get_mut(&id) {
                Some(save) => save.script_result = Some(Box::new(result)),
                None => return Err(orphan("script output", id.as_str())),
            }
        }
        for (id, tag) in rest.tags {
            match self.templates.get_mut(&id) {
                Some(t) => t.tags.insert(tag.number, tag),
                None => return Err(orphan("tag", id.as_str())),
            };
        }
        for (id, node, delivery) in rest.deliveries {
            let Some(distribution) = self.distributions.get_mut(&id) else {
                return Err(orphan("delivery", id.as_str()));
            };
            distribution.waiting += usize::from(delivery == Delivery::Wanted);
            distribution.nodes.insert(node, delivery);
        }
        for (id, number) in self.pulls.keys() {
            let template = self.templates.get(id);
            if template.is_none_or(|t| !t.tags.contains_key(number)) {
                return Err(orphan("time of a pull", id.as_str()));
            }
        }
        for (name, artifact) in rest.artifacts {
            match self.repositories.get_mut(&name) {
                Some(r) => r.artifacts.insert(artifact.content.digest, artifact),
                None => return Err(orphan("artifact", &name)),
            };
        }
        for (name, tag, names) in rest.repository_tags {
            match self.repositories.get_mut(&name) {
                Some(r) => r.tags.insert(tag, names),
                None => return Err(orphan("tag", &name)),
            };
        }
        for instance in self.instances.values_mut() {
            share_template_id(&self.templates, instance);
        }
        let blocks = self.features >= RECENT_BLOCKS;
        self.recent = Recent::rebuild(rest.recent, blocks).map_err(CodecError)?;
        Ok(())
    }
}

/// Entries that belong to others, which may come later.
#[derive(Default)]
struct Rest {
    outputs: Vec<(InstanceId, ScriptResult)>,
    scripts: Vec<(InstanceId, Vec<u8>)>,
    save_outputs: Vec<(SaveId, ScriptResult)>,
    save_scripts: Vec<(SaveId, Vec<u8>)>,
    /// Saves that have a script.
    due_scripts: usize,
    tags: Vec<(TemplateId, Tag)>,
    deliveries: Vec<(DistributionId, NodeId, Delivery)>,
    artifacts: Vec<(String, Artifact)>,
    repository_tags: Vec<(String, String, RepositoryTag)>,
    recent: Vec<(Place, u64, CommandId, Outcome)>,
}

fn remembered((sequence, id, outcome): (u64, CommandId, &Outcome)) -> RecentRecord<'_> {
    RecentRecord {
        sequence,
        id,
        outcome: Cow::Borrowed(outcome),
    }
}
