//! Everything that can change the state. A command is a decision, never a policy; every id and
//! every time in it was made by the proposer.

use crate::artifact::ArtifactContent;
use crate::group::Group;
use crate::ids::{
    CommandId, Digest, DistributionId, GroupId, InstanceId, MemberId, NodeId, SaveId, Sha256,
    TemplateId,
};
use crate::instance::{Observation, StartRequest, Value};
use crate::node::{NodeConfig, NodeSpec};
use crate::save::{SaveReport, SaveRequest, SavedDisk};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// One log entry: the command, who it is, and when its proposer said it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// The same for every retry of one request.
    pub id: CommandId,
    /// Milliseconds since the Unix epoch at the proposer. `apply` uses `max(state clock, stamp)`.
    pub stamp_ms: u64,
    /// What to do.
    pub command: Command,
}

/// A state change. Variants are only ever appended (the encoding is positional).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Accept `ids.len()` instances at once: all or none.
    StartInstances {
        /// One id per instance.
        ids: Vec<InstanceId>,
        /// What each of them shall be.
        request: Box<StartRequest>,
    },
    /// Change name, external id, metadata (keys merge; an empty patch field means "leave").
    UpdateInstance {
        /// Which.
        id: InstanceId,
        /// New name.
        name: Option<String>,
        /// New external id.
        external_id: Option<String>,
        /// Keys to set.
        metadata: BTreeMap<String, Value>,
    },
    /// Ask for the end of an instance. Idempotent; wins over any start that races with it.
    TerminateInstance {
        /// Which.
        id: InstanceId,
    },
    /// The scheduler's decisions; each holds only if its generation still does.
    Bind {
        /// In order; each is checked by itself.
        bindings: Vec<Binding>,
    },
    /// What a node's driver reports, where it differs from what the state says.
    Observe {
        /// Reporter.
        node: NodeId,
        /// Changed instances only.
        changes: Vec<Observation>,
    },
    /// Forget instances whose end is older than the retention (checked again here).
    ExpireInstances {
        /// Candidates.
        ids: Vec<InstanceId>,
        /// How long a finished instance stays visible, in ms (configuration travels with the command).
        retention_ms: u64,
    },
    /// A node joins or comes back with new facts. Idempotent by id.
    RegisterNode {
        /// Made by the agent, kept on its disk.
        id: NodeId,
        /// Facts.
        spec: Box<NodeSpec>,
    },
    /// Operator's change of a node.
    ConfigureNode {
        /// Which.
        id: NodeId,
        /// Only what is `Some` changes.
        config: NodeConfig,
    },
    /// Remove a node that is gone; its live instances become `Error`.
    RemoveNode {
        /// Which.
        id: NodeId,
    },
    /// The leader's liveness verdict. Unreachable long enough: `lost = true` fails its instances.
    SetNodeReachability {
        /// Which.
        id: NodeId,
        /// Heartbeats arrive.
        reachable: bool,
        /// Its lease has run out: its live instances become `Error` ("node lost").
        lost: bool,
    },
    /// The durable facts of a node's image cache changed.
    SetNodeImages {
        /// Which.
        id: NodeId,
        /// Template and tag number of every whole cached image.
        images: Vec<(TemplateId, u32)>,
    },
    /// A pushed tag, durable on `holder`. Invisible until a majority holds it.
    PublishTag {
        /// Used only if no template has this name yet.
        new_template_id: TemplateId,
        /// Template name.
        template: String,
        /// Tag name, unique within the template.
        tag: String,
        /// What it is made of.
        content: TagContent,
        /// The member whose disk has every byte.
        holder: MemberId,
        /// How many verified copies make it visible (already computed from the member list).
        copies_needed: u32,
        /// That member list: only copies of these count.
        voters: BTreeSet<MemberId>,
    },
    /// A member has every byte of a tag, verified and durable (`held`), or no longer has.
    ReportHeld {
        /// Template.
        template: TemplateId,
        /// Tag number.
        number: u32,
        /// The manifest this is about; a report about other bytes is ignored.
        manifest: Digest,
        /// Who.
        member: MemberId,
        /// Gained or lost.
        held: bool,
        /// The voters as the proposer knows them after asking the leader: only copies of these
        /// count, not those of members that were replaced or have no vote yet. Unused for `!held`.
        voters: BTreeSet<MemberId>,
    },
    /// Delete a template with all its tags.
    DeleteTemplate {
        /// Which.
        id: TemplateId,
    },
    /// Delete a tag and every later one (the reference system's `revert`); tag 0 deletes the template.
    RevertTemplate {
        /// Which.
        id: TemplateId,
        /// Which tag; the latest visible one when absent.
        selector: Option<TagSelector>,
    },
    /// Delete one tag and no other.
    DeleteTag {
        /// Which.
        id: TemplateId,
        /// Which tag.
        selector: TagSelector,
    },
    /// A command without effect: commits, so that its proposer knows where the log is.
    Noop,
    /// Create or change a node group.
    PutGroup {
        /// As it shall be.
        group: Group,
    },
    /// Delete a node group: nodes leave it, fallbacks to it end.
    DeleteGroup {
        /// Which.
        id: GroupId,
    },
    /// Put nodes into groups, or take them out.
    ChangeNodeGroups {
        /// Which nodes.
        nodes: Vec<NodeId>,
        /// Which groups.
        groups: Vec<GroupId>,
        /// In or out.
        member: bool,
    },
    /// Every member supports the features up to this level: use them from now on. A level is never
    /// taken back. Idempotent.
    SetFeatures {
        /// See [`crate::feature`].
        level: u32,
    },
    /// An operator takes a controller out for good: its copies count no more, and its identity is
    /// never let in again. The group's membership itself changes beside the state. Idempotent.
    RetireMember {
        /// Which identity.
        id: MemberId,
        /// Its name, for those who look later.
        name: String,
        /// The voters without it: a tag that waits for more copies than these can hold waits no longer.
        voters: BTreeSet<MemberId>,
    },
    /// A pushed OCI artifact, durable on `holder`. Invisible, as its tags are, until a majority holds it.
    PutArtifact {
        /// What and where.
        put: Box<ArtifactPut>,
    },
    /// A member has every byte of an artifact, verified and durable (`held`), or no longer has.
    ReportArtifactHeld {
        /// Repository.
        repository: String,
        /// The OCI manifest.
        digest: Sha256,
        /// The bundle this is about; a report about other bytes is ignored.
        bundle: Digest,
        /// Who.
        member: MemberId,
        /// Gained or lost.
        held: bool,
        /// The voters, as in `ReportHeld`.
        voters: BTreeSet<MemberId>,
    },
    /// Delete an artifact with all its tags.
    DeleteArtifact {
        /// Repository.
        repository: String,
        /// The OCI manifest.
        digest: Sha256,
    },
    /// Delete one tag of a repository; the artifact stays, unless it is the template tag of that name.
    DeleteArtifactTag {
        /// Repository.
        repository: String,
        /// Which.
        tag: String,
    },
    /// Change what is said of a tag; never its bytes.
    DescribeTag {
        /// Template.
        id: TemplateId,
        /// Which tag; the latest visible one when absent.
        selector: Option<TagSelector>,
        /// `amd64`, `arm64` or empty; `None`: as it is.
        arch: Option<String>,
        /// `None`: as it is.
        description: Option<String>,
    },
    /// Tags were pulled. A time older than the one that is known changes nothing, nor does one of a tag
    /// that is gone.
    NotePulls {
        /// Template, tag number, and when, in Unix milliseconds.
        pulls: Vec<(TemplateId, u32, u64)>,
    },
    /// How much the members may store. Idempotent.
    SetQuota {
        /// Of this template (it need not be there yet); of all of them together when absent.
        template: Option<String>,
        /// Stored bytes of one copy; `None`: as much as there is room for.
        bytes: Option<u64>,
    },
    /// The same as `PublishTag` or `PutArtifact`, weighed against the quotas by its proposer: only if
    /// nothing came or went since.
    AddWithin {
        /// [`crate::State::named`] when it was weighed.
        named: u64,
        /// What is added.
        what: Addition,
    },
    /// End the VM of a started or stopped instance at once and start it again on its disk, on its node.
    /// Idempotent while that is under way.
    RestartInstance {
        /// Which.
        id: InstanceId,
    },
    /// Nodes shall fetch an image, each once. Idempotent by id.
    Distribute {
        /// Made by the proposer.
        id: DistributionId,
        /// Template.
        template: TemplateId,
        /// Which tag; the latest visible one when absent.
        selector: Option<TagSelector>,
        /// These nodes.
        nodes: Vec<NodeId>,
        /// And those in this group. Without either: all nodes of the tag's architecture.
        group: Option<GroupId>,
    },
    /// Nodes that have not fetched it need not. Idempotent.
    CancelDistribution {
        /// Which.
        id: DistributionId,
    },
    /// Give up distributions that were not carried out in time, and forget those whose end is older than
    /// the retention (both checked again here; configuration travels with the command).
    ExpireDistributions {
        /// Candidates.
        ids: Vec<DistributionId>,
        /// How long a node has to fetch it, in ms since the request.
        patience_ms: u64,
        /// How long an ended one stays visible, in ms.
        retention_ms: u64,
    },
    /// Nodes shall drop what they have cached of a template, as soon as no VM stands on it, and fetch it no
    /// more because of a distribution. Idempotent.
    EvictImages {
        /// Template; it may have been deleted.
        template: TemplateId,
        /// These nodes; all when empty.
        nodes: Vec<NodeId>,
    },
    /// Save a started instance as a tag. The same request again while it is open is part of it.
    SaveInstance {
        /// Made by the proposer.
        id: SaveId,
        /// What and where to.
        request: Box<SaveRequest>,
    },
    /// What a node says of the saves that it works on, where it is news. About saves that are not open, or
    /// another node's, it changes nothing.
    ReportSaves {
        /// Reporter.
        node: NodeId,
        /// Those with news only.
        reports: Vec<SaveReport>,
    },
    /// Make the tag of an open save from bytes that a member holds. Another try, also through another
    /// member, with the same bytes is the same tag.
    PublishSaved {
        /// Which bytes, and where they are.
        disk: Box<SavedDisk>,
    },
    /// Forget saves that ended long ago, and fail those that no node has begun (both checked again here).
    ExpireSaves {
        /// Candidates.
        ids: Vec<SaveId>,
        /// How long an ended save stays visible, in ms.
        retention_ms: u64,
        /// Within which a node must know of it, in ms.
        begin_ms: u64,
    },
}

/// A tag or an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Addition {
    /// See [`Command::PublishTag`].
    Tag(Box<TagPush>),
    /// See [`Command::PutArtifact`].
    Artifact(Box<ArtifactPut>),
    /// See [`Command::PublishSaved`].
    Saved(Box<SavedDisk>),
}

impl Addition {
    /// Of the template or repository.
    pub fn name(&self) -> &str {
        match self {
            Self::Tag(push) => &push.template,
            Self::Artifact(put) => &put.repository,
            Self::Saved(disk) => &disk.template,
        }
    }

    /// Whatever came meanwhile.
    pub fn unconditional(self) -> Command {
        match self {
            Self::Tag(push) => Self::publish(*push),
            Self::Artifact(put) => Command::PutArtifact { put },
            Self::Saved(disk) => Command::PublishSaved { disk },
        }
    }

    fn publish(push: TagPush) -> Command {
        Command::PublishTag {
            new_template_id: push.new_template_id,
            template: push.template,
            tag: push.tag,
            content: push.content,
            holder: push.holder,
            copies_needed: push.copies_needed,
            voters: push.voters,
        }
    }
}

/// A pushed tag.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TagPush {
    /// Used only if no template has this name yet.
    pub new_template_id: TemplateId,
    /// Template name.
    pub template: String,
    /// Tag name, unique within the template.
    pub tag: String,
    /// What it is made of.
    pub content: TagContent,
    /// The member whose disk has every byte.
    pub holder: MemberId,
    /// How many verified copies make it visible.
    pub copies_needed: u32,
    /// The member list that this was computed from: only copies of these count.
    pub voters: BTreeSet<MemberId>,
}

/// A pushed OCI artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArtifactPut {
    /// Made if there is none.
    pub repository: String,
    /// Tags that shall name it.
    pub tags: Vec<String>,
    /// What it is made of.
    pub content: ArtifactContent,
    /// It is a template tag as well, under the repository's name.
    pub template: Option<ArtifactTemplate>,
    /// The member whose disk has every byte.
    pub holder: MemberId,
    /// How many verified copies make it visible.
    pub copies_needed: u32,
    /// The member list that this was computed from: only copies of these count.
    pub voters: BTreeSet<MemberId>,
}

/// The template side of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArtifactTemplate {
    /// Used only if no template has this name yet.
    pub new_template_id: TemplateId,
    /// Tag name, unique within the template.
    pub tag: String,
    /// What the tag is made of.
    pub content: TagContent,
}

/// One placement decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Binding {
    /// Which instance.
    pub instance: InstanceId,
    /// On which node.
    pub node: NodeId,
    /// Only if the instance is still at this generation.
    pub generation: u64,
}

/// How a caller names a tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TagSelector {
    /// By name.
    Name(String),
    /// By number.
    Number(u32),
}

/// What a tag is made of, and what is worth showing of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TagContent {
    /// BLAKE3 of the manifest's bytes.
    pub manifest: Digest,
    /// Logical bytes of all its files.
    pub size: u64,
    /// `amd64`, `arm64` or empty.
    pub arch: String,
    /// Free text.
    pub description: String,
    /// Name of the disk file inside the manifest, e.g. `disk.qcow2`; from level 13 on, of a suspended VM, a space
    /// and the name of its memory follow. No file's name has a space.
    pub disk: String,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Port forwards that every instance of this tag gets: guest port and name.
    pub forwards: Vec<crate::instance::PortRule>,
}

impl TagContent {
    /// What [`TagContent::disk`] says of these files.
    pub fn file_names(disk: &str, memory: Option<&str>) -> String {
        match memory {
            Some(memory) => format!("{disk} {memory}"),
            None => disk.to_owned(),
        }
    }

    /// Name of the disk's file.
    pub fn disk(&self) -> &str {
        self.disk.split(' ').next().unwrap_or_default()
    }

    /// Name of the file with the memory of a suspended VM.
    pub fn memory(&self) -> Option<&str> {
        Some(self.disk.split_once(' ')?.1)
    }
}
