//! Paths and JSON bodies of the transfer protocol, served by every member on its registry port and,
//! for other members, on its peer port.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `POST /registry/mainstay/v1/missing` | chunk names, 32 bytes each, at most [`IDS_MAX`] | one byte per name: 1 = lacking, 0 = held |
//! | `PUT /registry/mainstay/v1/chunks` | records | [`PutAnswer`], once all are durable; 400 for a bad record |
//! | `POST /registry/mainstay/v1/chunks/get` | chunk names, at most [`IDS_MAX`] | the records in any order, each once; what no member has is absent. `?local=1`: only what this member has |
//! | `POST /registry/mainstay/v1/publish` | [`PublishRequest`] | [`TagInfo`]; 409 if this member lacks something the manifest reaches |
//! | `GET /registry/mainstay/v1/tag?template=ID-OR-NAME` and `tag=NAME` or `number=N`, `wait=SECONDS` | | [`TagInfo`]; with `wait`, once it is visible or the time is over |
//! | `GET /registry/mainstay/v1/replicas?template=ID-OR-NAME` and `tag=NAME` or `number=N` | | list of [`Replica`] |
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
/// Who has a tag's bytes.
pub const REPLICAS: &str = "/registry/mainstay/v1/replicas";
/// Names in one request.
pub const IDS_MAX: usize = 65536;

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
    /// Copies before it is visible.
    pub durability: Durability,
    /// Seconds to wait for it to be visible before the answer, at most 30.
    pub wait: u32,
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
    /// Copies that make it visible.
    pub copies_needed: u32,
}

/// One member's copy of a tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Replica {
    /// Member id, hex.
    pub member: String,
    /// Member name.
    pub name: String,
    /// `complete`, `copying`, `waiting` or `unknown`.
    pub state: String,
    /// Bytes that it has so far (uncompressed, holes not counted).
    pub done_bytes: u64,
    /// Bytes that it needs; 0 while not known.
    pub total_bytes: u64,
    /// Why it waits, or why its state is not known.
    pub message: String,
}
