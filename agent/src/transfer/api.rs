//! Paths and JSON bodies of the transfer protocol, served by every member on its registry port and,
//! for other members, on its peer port.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `POST /registry/mainstay/v1/missing` | chunk names, 32 bytes each, at most [`IDS_MAX`] | one byte per name: 1 = lacking, 0 = held |
//! | `PUT /registry/mainstay/v1/chunks` | records | [`PutAnswer`], once all are durable; 400 for a bad record. `?push=ID`: of this push, see [`AdmitRequest`] |
//! | `POST /registry/mainstay/v1/chunks/get` | chunk names, at most [`IDS_MAX`] | the records in any order, each once; what no member has is absent. `?local=1`: only what this member has; `?manifest=`: see below |
//! | `POST /registry/mainstay/v1/publish` | [`PublishRequest`] | [`TagInfo`]; 409 if this member lacks something the manifest reaches |
//! | `GET /registry/mainstay/v1/tag?template=ID-OR-NAME` and `tag=NAME` or `number=N`, `wait=SECONDS`, `copies=N` | | [`TagInfo`]; with `wait`, once it is visible, and held by N members with a vote, or the time is over |
//! | `DELETE /registry/mainstay/v1/tag?template=ID-OR-NAME` and `tag=NAME` or `number=N` | | this tag goes, and no other |
//! | `GET /registry/mainstay/v1/replicas?template=ID-OR-NAME` and `tag=NAME` or `number=N` | | list of [`Replica`]; with `all=1` list of [`TagReplicas`], one for each tag of the template |
//! | `POST /registry/mainstay/v1/admit` | [`AdmitRequest`] | [`Admission`]: would a push fit? `?local=1`: only what this member's disk says |
//! | `GET /registry/mainstay/v1/usage?template=ID-OR-NAME` | | [`Usage`]; `template` may be absent |
//! | `PUT /registry/mainstay/v1/quota` | [`QuotaRequest`] | [`Usage`] |
//! | `GET /registry/mainstay/v1/gc` | | [`CollectionStatus`] of this member |
//! | `POST /registry/mainstay/v1/gc?dry_run=0-OR-1` | | the same, at once; `done` reaches the `asked` of this answer when the run has ended |
//! | `GET /registry/mainstay/v1/scrub` | | [`ScrubStatus`] of this member |
//! | `POST /registry/mainstay/v1/scrub` | | the same, at once: a round begins now, without a limit of its rate |
//!
//! A node that pulls says so when it gets chunks: `?manifest=DIGEST`, `node=URL` (where other nodes reach it; may be
//! absent), `avoid=URL,URL` (nodes that did not give them), `insist=1` (it has waited long enough). Then chunks that
//! other nodes were given lately may be left out, and the answer's header [`NODES`] names some of these nodes. Nodes
//! answer the same call, with `manifest` and the cluster's key as bearer, with what they have so far; [`HELD`] says how
//! many chunks of the image that is.
//!
//! JSON answers come in the dialect's envelope: `{"status":"OK"|"FAIL","body":...,"message":"..."}`.

use serde::{Deserialize, Serialize};

/// Which of these chunks do you lack?
pub const MISSING: &str = "/registry/mainstay/v1/missing";
/// Here are chunks.
pub const CHUNKS: &str = "/registry/mainstay/v1/chunks";
/// Give me chunks.
pub const CHUNKS_GET: &str = "/registry/mainstay/v1/chunks/get";
/// Make a tag of what you hold.
pub const PUBLISH: &str = "/registry/mainstay/v1/publish";
/// Look at a tag.
pub const TAG: &str = "/registry/mainstay/v1/tag";
/// Would a push fit?
pub const ADMIT: &str = "/registry/mainstay/v1/admit";
/// What tags weigh.
pub const USAGE: &str = "/registry/mainstay/v1/usage";
/// How much may be stored.
pub const QUOTA: &str = "/registry/mainstay/v1/quota";
/// Who has a tag's bytes.
pub const REPLICAS: &str = "/registry/mainstay/v1/replicas";
/// Give back the room of chunks that nothing needs.
pub const GC: &str = "/registry/mainstay/v1/gc";
/// Verify every stored chunk.
pub const SCRUB: &str = "/registry/mainstay/v1/scrub";
/// Names in one request.
pub const IDS_MAX: usize = 65536;

/// Header of an answer to a node: addresses of nodes that have, or will have, what was left out; separated by commas.
pub const NODES: &str = "x-mainstay-nodes";
/// Header of a node's answer: chunks of the image that it has.
pub const HELD: &str = "x-mainstay-held";
/// Names in one request to a node.
pub const NODE_IDS_MAX: usize = 4096;

/// The dialect's envelope.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct Answer<T> {
    /// `OK` or `FAIL`.
    pub status: String,
    /// The result.
    #[serde(default = "none")]
    pub body: Option<T>,
    /// Why not.
    #[serde(default)]
    pub message: String,
}

fn none<T>() -> Option<T> {
    None
}

/// What became of chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutAnswer {
    /// Written.
    pub stored: u64,
    /// Were there already.
    pub known: u64,
}

/// How many verified copies make a tag visible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// More than half of the voters.
    #[default]
    Majority,
    /// Every voter.
    All,
    /// The member it was pushed to.
    One,
}

/// A port forward that every instance of a tag gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Forward {
    /// Free name, e.g. `ssh`.
    pub name: String,
    /// Port in the guest.
    pub guest_port: u16,
    /// Port on the node; 0 = choose one.
    pub host_port: u16,
}

/// Make a tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PublishRequest {
    /// UUID: the same for every retry of one push.
    pub request_id: String,
    /// Template name; made if there is none.
    pub template: String,
    /// Tag name.
    pub tag: String,
    /// Free text.
    pub description: String,
    /// `amd64`, `arm64` or empty.
    pub arch: String,
    /// Digest (hex) of the manifest.
    pub manifest: String,
    /// Ports.
    pub forwards: Vec<Forward>,
    /// Copies before it is visible. A tag that is visible already is waited for until so many have it.
    pub durability: Durability,
    /// Seconds to wait for that before the answer, at most 30.
    pub wait: u32,
    /// Id of an open save: its template, tag, description, architecture and ports count, not those above. Empty: none.
    pub save: String,
}

/// A tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TagInfo {
    /// Template id.
    pub template_id: String,
    /// Template name.
    pub template: String,
    /// Tag name.
    pub tag: String,
    /// Tag number.
    pub number: u32,
    /// Digest (hex) of the manifest.
    pub manifest: String,
    /// Logical bytes.
    pub size: u64,
    /// Enough members hold it.
    pub visible: bool,
    /// Members (hex ids) that hold every byte.
    pub holders: Vec<String>,
    /// Copies that make it visible; of one that is visible: copies that were asked for.
    pub copies_needed: u32,
    /// Copies that count: those of members with a vote. A release that does not say leaves it out.
    pub copies: Option<u32>,
}

impl TagInfo {
    /// Visible, and as many members hold it as were asked for, as far as the registry says.
    pub fn is_held(&self) -> bool {
        self.visible
            && self
                .copies
                .is_none_or(|copies| copies >= self.copies_needed)
    }
}

/// One member's copy of a tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Replica {
    /// Member id, hex.
    pub member: String,
    /// Member name.
    pub name: String,
    /// `complete`, `copying`, `missing` (the message says why), `damaged`, or `unknown`: the member does
    /// not answer, and was not known to have it.
    pub state: String,
    /// Bytes that it has so far (uncompressed, holes not counted).
    pub done_bytes: u64,
    /// Bytes that it needs; 0 while not known.
    pub total_bytes: u64,
    /// Why it is not complete, or why its state is not known.
    pub message: String,
}

/// All members' copies of one tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TagReplicas {
    /// Tag name.
    pub tag: String,
    /// Tag number.
    pub number: u32,
    /// Enough members hold it, or did once.
    pub visible: bool,
    /// Copies that make it visible.
    pub copies_needed: u32,
    /// One row a member.
    pub replicas: Vec<Replica>,
}

/// A push that is about to begin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdmitRequest {
    /// Template name.
    pub template: String,
    /// Most bytes that would be sent and stored.
    pub bytes: u64,
    /// Copies that are asked for.
    pub durability: Durability,
    /// The push's `request_id`: room is kept for it until it publishes, or falls silent.
    pub push: String,
}

/// Whether there is room for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Admission {
    /// As things are, yes.
    pub fits: bool,
    /// Why not, and what to do.
    pub why: String,
    /// No member would say otherwise.
    pub anywhere: bool,
}

/// How much of a template may be stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaRequest {
    /// Name of a template or OCI repository; empty: all of them together.
    pub template: String,
    /// Stored bytes of one copy; `null`: as much as there is room for.
    pub bytes: Option<u64>,
}

/// What one copy of everything takes on the disk of the member that was asked, in bytes as stored
/// (compressed, each chunk once).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// All templates and OCI artifacts together.
    pub stored_bytes: u64,
    /// The member holds everything; if not, what it lacks is not counted.
    pub whole: bool,
    /// Most that may be stored of all templates.
    pub quota: Option<u64>,
    /// All quotas by template name, those of templates to come included; empty name: of all together.
    pub quotas: std::collections::BTreeMap<String, u64>,
    /// Each template; OCI artifacts in a repository of its name count as its own.
    pub templates: Vec<TemplateUsage>,
    /// Each repository of OCI artifacts without a template of its name.
    pub repositories: Vec<RepositoryUsage>,
}

/// What a repository of OCI artifacts takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RepositoryUsage {
    /// Its name.
    pub name: String,
    /// Manifests in it.
    pub artifacts: u64,
    /// Stored bytes that some artifact of it needs.
    pub stored_bytes: u64,
    /// Those of them that nothing else needs: what its deletion gives back.
    pub unique_bytes: u64,
    /// Most that may be stored of it.
    pub quota: Option<u64>,
}

/// What a template takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TemplateUsage {
    /// Template id.
    pub id: String,
    /// Template name.
    pub name: String,
    /// Sum of its tags' logical bytes.
    pub logical_bytes: u64,
    /// Stored bytes that some tag of it needs.
    pub stored_bytes: u64,
    /// Those of them that no other template needs: what its deletion gives back.
    pub unique_bytes: u64,
    /// Most that may be stored of it.
    pub quota: Option<u64>,
    /// Each tag, by number.
    pub tags: Vec<TagUsage>,
}

/// What a tag takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TagUsage {
    /// Tag number.
    pub number: u32,
    /// Tag name.
    pub tag: String,
    /// Length of its files.
    pub logical_bytes: u64,
    /// Stored bytes that it needs.
    pub stored_bytes: u64,
    /// Those of them that no other tag needs: what its deletion gives back.
    pub unique_bytes: u64,
}

/// One run of a member's collector. Bytes of chunks are stored ones, those of packs are bytes on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Collection {
    /// When it began, in ms since the Unix epoch.
    pub began_ms: u64,
    /// How long it took.
    pub took_ms: u64,
    /// It was only to say what it would do.
    pub dry_run: bool,
    /// Why nothing was removed; empty if all went well.
    pub refused: String,
    /// Applied index of the state whose tags were kept.
    pub applied: u64,
    /// Chunks stay for so long after nothing needs them.
    pub grace_s: u64,
    /// Chunks that something needs, or that were used during the run.
    pub live_chunks: u64,
    /// Their bytes.
    pub live_bytes: u64,
    /// Chunks that nothing needs, not yet for so long.
    pub waiting_chunks: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// Chunks that nothing has needed for so long, before the sweep.
    pub dead_chunks: u64,
    /// Their bytes.
    pub dead_bytes: u64,
    /// Bytes of packs that the sweep gives, or would give, back.
    pub reclaimable_bytes: u64,
    /// Chunks removed.
    pub removed_chunks: u64,
    /// Their bytes.
    pub removed_bytes: u64,
    /// Chunks copied out of packs that were removed.
    pub moved_chunks: u64,
    /// Their bytes.
    pub moved_bytes: u64,
    /// Packs removed.
    pub removed_packs: u64,
    /// Packs left because the disk has no room for the copies.
    pub postponed_packs: u64,
    /// Bytes by which the packs are smaller now.
    pub freed_bytes: u64,
    /// Packs, after the run.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
}

/// A member's collector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CollectionStatus {
    /// Runs asked for since the member's start.
    pub asked: u64,
    /// The newest of them that has ended.
    pub done: u64,
    /// Runs since the member's start, those that nobody asked for included.
    pub runs: u64,
    /// Those of them that removed nothing because they could not be sure.
    pub refusals: u64,
    /// Chunks removed by all of them.
    pub removed_chunks: u64,
    /// Bytes given back by all of them.
    pub freed_bytes: u64,
    /// The last one.
    pub last: Option<Collection>,
}

/// A member's scrubber. Counts are since the member's start, but those of the round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScrubStatus {
    /// Rounds asked for.
    pub asked: u64,
    /// The newest of them that has ended.
    pub done: u64,
    /// A round is under way.
    pub running: bool,
    /// Whole rounds.
    pub rounds: u64,
    /// Chunks verified.
    pub chunks: u64,
    /// Their bytes on disk.
    pub bytes: u64,
    /// Chunks found damaged.
    pub damaged: u64,
    /// Chunks verified in the present or last round, since the member's start.
    pub round_chunks: u64,
    /// Their bytes on disk.
    pub round_bytes: u64,
    /// Those of them that were damaged.
    pub round_damaged: u64,
    /// What the last whole round found: chunks verified.
    pub last_chunks: u64,
    /// Those of them that were damaged.
    pub last_damaged: u64,
    /// Bytes of packs that the round has passed.
    pub seen_bytes: u64,
    /// Bytes of all packs.
    pub total_bytes: u64,
    /// When the present or last round began, in ms since the Unix epoch; it may be before the start.
    pub begun_ms: u64,
    /// When the last whole round ended.
    pub ended_ms: u64,
    /// Why it does not go on.
    pub failure: String,
    /// Chunks that are damaged now: not held, and not fetched again yet.
    pub damaged_now: u64,
    /// Tags that this member held and that are not whole any more, names of uploads that it cannot read,
    /// and what is known of each.
    pub broken: Vec<String>,
}
