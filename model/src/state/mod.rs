//! The whole replicated state. [`State::apply`] is the only way it changes; the fields are public
//! to be read. What is derived from them lives in `index`, what is stored in `store`.

mod edit;
pub(crate) mod index;
mod instances;
mod journal;
mod key;
mod lines;
mod recent;
mod record;
mod store;

use crate::apply;
use crate::artifact::Repository;
use crate::command::Envelope;
use crate::distribution::Distribution;
use crate::feature::RECENT_BLOCKS;
use crate::group::Group;
use crate::ids::{
    CommandId, Digest, DistributionId, GroupId, InstanceId, MemberId, NodeId, SaveId, TemplateId,
};
use crate::instance::Instance;
use crate::member::Retired;
use crate::node::{Left, Load, Node};
use crate::outcome::Outcome;
use crate::save::Save;
use crate::template::Template;
use index::{Index, Occupants};
pub use instances::Instances;
use journal::Journal;
pub use journal::Owned;
use key::Key;
use lines::Lines;
use recent::{Place, Recent};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a key, and its new value or `None` for removed: what a checkpoint writes.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Everything the cloud knows.
///
/// Equality compares what is replicated, not which changes still wait to be taken.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// State clock: the greatest stamp applied so far.
    pub clock_ms: u64,
    /// Level of the commands in use, see [`crate::feature`].
    pub features: u32,
    /// Instances by id.
    pub instances: Instances,
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, Node>,
    /// What may be left on nodes of instances that have ended.
    pub left: BTreeMap<InstanceId, Left>,
    /// Templates by id.
    pub templates: BTreeMap<TemplateId, Template>,
    /// Repositories of OCI artifacts by name.
    pub repositories: BTreeMap<String, Repository>,
    /// Node groups by id.
    pub groups: BTreeMap<GroupId, Group>,
    /// Members that an operator took out: their identities never come back.
    pub retired: BTreeMap<MemberId, Retired>,
    /// How many bytes of a template may be stored, by its name; under the empty name: of all of them.
    pub quotas: BTreeMap<String, u64>,
    /// Images that nodes shall fetch, or fetched lately.
    pub distributions: BTreeMap<DistributionId, Distribution>,
    /// Tags of templates that nodes shall drop from their caches.
    pub evictions: BTreeMap<NodeId, BTreeMap<TemplateId, BTreeSet<u32>>>,
    /// When a tag was last pulled, in Unix milliseconds.
    pub pulls: BTreeMap<(TemplateId, u32), u64>,
    /// Saves by id, open and ended.
    pub saves: BTreeMap<SaveId, Save>,
    /// Counts changes of desired sets over all nodes, so that a node which was removed and joins
    /// again never sees a generation that its agent has passed already.
    desired_changes: u64,
    /// Another number whenever what lists show of nodes changed: never replicated.
    nodes_version: u64,
    index: Index,
    recent: Recent,
    dirty: BTreeSet<Key>,
    journal: Journal,
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.clock_ms == other.clock_ms
            && self.features == other.features
            && self.desired_changes == other.desired_changes
            && self.instances == other.instances
            && self.nodes == other.nodes
            && self.left == other.left
            && self.templates == other.templates
            && self.repositories == other.repositories
            && self.groups == other.groups
            && self.retired == other.retired
            && self.quotas == other.quotas
            && self.pulls == other.pulls
            && self.distributions == other.distributions
            && self.evictions == other.evictions
            && self.saves == other.saves
            && self.recent == other.recent
    }
}

impl State {
    /// Apply one command. Total: every command has an outcome. A command id seen before (within
    /// the bound) answers its first outcome again and changes nothing, not even the clock.
    pub fn apply(&mut self, envelope: &Envelope) -> Outcome {
        #[cfg(feature = "seeded-bugs")]
        if crate::seeded::forgets() && self.recent.get(envelope.id).is_some() {
            return apply::run(self, &envelope.command);
        }
        if let Some(outcome) = self.recent.get(envelope.id) {
            return outcome.clone();
        }
        self.clock_ms = self.clock_ms.max(envelope.stamp_ms);
        self.dirty.insert(Key::Meta);
        let outcome = apply::run(self, &envelope.command);
        let blocks = self.features >= RECENT_BLOCKS;
        let changed = |place| {
            self.dirty.insert(match place {
                Place::Slot(slot) => Key::Recent(slot),
                Place::Block(block) => Key::RecentBlock(block),
            });
        };
        self.recent
            .remember(envelope.id, outcome.clone(), blocks, changed);
        outcome
    }

    /// Outcome of a recent command, if it was applied.
    pub fn outcome_of(&self, id: CommandId) -> Option<&Outcome> {
        self.recent.get(id)
    }

    /// Instances without a node, in the order in which they shall be placed: by priority, then
    /// by age, then by id.
    pub fn waiting(&self) -> impl Iterator<Item = &Instance> {
        let mut lines = self.lines();
        std::iter::from_fn(move || {
            let (id, line) = lines.pop()?;
            lines.go_on(line);
            Some(id)
        })
        .filter_map(|id| self.instances.get(id))
    }

    /// The same, those that ask for the same thing in one line.
    pub(crate) fn lines(&self) -> Lines<'_> {
        self.index.lines()
    }

    /// Another number whenever the address or the architecture of any node changed; for comparing within this
    /// process only, together with [`Instances::version`].
    pub fn nodes_version(&self) -> u64 {
        self.nodes_version
    }

    /// Whether any instance is without a node and wants one.
    pub fn any_waits(&self) -> bool {
        self.index.any_waits()
    }

    /// Instances that have ended, the longest ago first, and since when in Unix milliseconds.
    pub fn ended(&self) -> impl Iterator<Item = (u64, &InstanceId)> {
        self.index.ended().map(|(at, id)| (*at, id))
    }

    /// Instances that take room on a node, by id: what its agent is told about.
    pub fn on_node(&self, node: &NodeId) -> impl Iterator<Item = &Instance> {
        self.index
            .on_node(node)
            .filter_map(|id| self.instances.get(id))
    }

    /// What a node shall remove of instances that have ended, by instance id: its agent is told
    /// about it as well.
    pub fn left_on(&self, node: &NodeId) -> impl Iterator<Item = (&InstanceId, &Left)> {
        self.index
            .left_on(node)
            .filter_map(|id| self.left.get_key_value(id))
    }

    /// What this node shall drop: template and tag number.
    pub fn evicted_on(&self, node: &NodeId) -> impl Iterator<Item = (&TemplateId, u32)> {
        let of_node = self.evictions.get(node).into_iter().flatten();
        of_node.flat_map(|(of, numbers)| numbers.iter().map(move |n| (of, *n)))
    }

    /// Distributions that wait for this node.
    pub fn wanted_on(&self, node: &NodeId) -> impl Iterator<Item = &Distribution> {
        let all = self.distributions.values().filter(|d| d.waits());
        all.filter(move |d| d.wants(node))
    }

    /// What the instances on a node, and what is left there of former ones, take of it.
    pub fn load(&self, node: &NodeId) -> Load {
        let occupants = self.occupants(node);
        occupants.map(Occupants::load).unwrap_or_default()
    }

    /// The open save of an instance.
    pub fn save_of(&self, instance: &InstanceId) -> Option<&Save> {
        self.saves.get(self.index.save_of(instance)?)
    }

    /// Saves that have ended, the longest ago first, and since when in Unix milliseconds.
    pub fn ended_saves(&self) -> impl Iterator<Item = (u64, &SaveId)> {
        self.index.ended_saves().map(|(at, id)| (*at, id))
    }

    /// Saves that are open.
    pub fn open_saves(&self) -> impl Iterator<Item = &Save> {
        self.index.open_saves().filter_map(|id| self.saves.get(id))
    }

    /// What all saves add to a snapshot; see [`crate::limits::SAVES_BYTES`].
    pub(crate) fn saves_bytes(&self) -> usize {
        self.index.saves_bytes()
    }

    pub(crate) fn occupants(&self, node: &NodeId) -> Option<&Occupants> {
        self.index.occupants(node)
    }

    /// A template by name.
    pub fn template_named(&self, name: &str) -> Option<&Template> {
        self.templates.get(self.index.template_named(name)?)
    }

    /// Which tags and artifacts changed, came or went since `seen`, a position told before by this
    /// process (0: none yet), and the position now. `None`: too many, or another state was
    /// installed since; look at all of them.
    pub fn owned_since(&self, seen: u64) -> (u64, Option<Vec<Owned>>) {
        self.journal.since(seen)
    }

    /// This state takes the place of `former` in a process that told positions of that one.
    pub fn succeed(&mut self, former: &Self) {
        self.journal.succeed(&former.journal);
    }

    /// What all repositories count for together; see [`crate::limits::REPOSITORY_BYTES`].
    pub fn repository_bytes(&self) -> u64 {
        self.index.repositories()
    }

    /// A number for all that counts against the quotas that `name` is under, and for the quotas: another one
    /// whenever a tag or an artifact of that came or went, or a quota was changed. Looks at all of it: at
    /// everything, if all together have a quota.
    pub fn named(&self, name: &str) -> u64 {
        let of = |owner: &[u8], content: &Digest| {
            let mut hash = Fnv::default();
            hash.write(owner);
            hash.write(&content.0);
            hash.0 as u64
        };
        let all = self.quotas.contains_key("");
        let templates = self.templates.values();
        let templates = templates.filter(|template| all || template.name == name);
        let tags = templates.flat_map(|template| {
            let tags = template.tags.values();
            tags.map(|tag| of(template.id.as_str().as_bytes(), &tag.content.manifest))
        });
        let repositories = self.repositories.iter();
        let repositories = repositories.filter(|(repository, _)| all || *repository == name);
        let artifacts = repositories.flat_map(|(repository, found)| {
            let artifacts = found.artifacts.values();
            artifacts.map(|artifact| of(repository.as_bytes(), &artifact.content.bundle))
        });
        let quotas = self.quotas.iter().map(|(name, bytes)| {
            let mut hash = Fnv::default();
            hash.write(name.as_bytes());
            hash.write(&bytes.to_le_bytes());
            hash.0 as u64
        });
        let all = tags.chain(artifacts).chain(quotas);
        all.fold(0, u64::wrapping_add)
    }

    /// A hash of everything replicated. Two members at the same applied index must agree; it
    /// finds accidents and bugs, it is no defence against forgery. Reads the whole state.
    pub fn digest(&self) -> u128 {
        let mut hash = Fnv::default();
        self.for_each_entry(|key, value| {
            hash.write(&(key.len() as u64).to_le_bytes());
            hash.write(&key);
            hash.write(&(value.len() as u64).to_le_bytes());
            hash.write(&value);
        });
        hash.0
    }

    /// Compare the indexes with what they are derived from.
    pub(crate) fn check_index(&self) -> Result<(), String> {
        self.index.check(self)?;
        self.recent.check()
    }
}

/// FNV-1a over 128 bits.
struct Fnv(u128);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 ^= u128::from(*b);
            self.0 = self
                .0
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_matches_its_published_vectors() {
        let mut hash = Fnv::default();
        hash.write(b"a");
        assert_eq!(hash.0, 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
        let mut hash = Fnv::default();
        hash.write(b"foobar");
        assert_eq!(hash.0, 0x343e_1662_793c_64bf_6f0d_3597_ba44_6f18);
    }
}
