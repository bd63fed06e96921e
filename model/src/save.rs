//! A save: the disk of a running instance becomes a new tag, of a template that is there or of a new one.
//! One node does it, by an order that it is given with its desired set; what it says of it is `apply::save`.
//!
//! ```text
//! asked for -> begun -> (script ended) -> published -> done: the tag is visible, the instance ends
//!      \_________\____________\______________\______ failed: the instance runs on
//! ```
//! While a save is open its instance is `Pushing`, and no other instance or save has anything to do with it.

use crate::ids::{Digest, InstanceId, MemberId, NodeId, SaveId, TemplateId};
use crate::instance::{PortRule, ScriptResult};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Where the new tag goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaveTarget {
    /// Into this template, and into no other of its name.
    Template(TemplateId),
    /// Into a new template.
    New {
        /// Its name.
        name: String,
        /// Its id, made by the proposer.
        id: TemplateId,
    },
}

/// A save request after validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// Whose disk.
    pub instance: InstanceId,
    /// Name of the new tag.
    pub tag: String,
    /// Of which template.
    pub target: SaveTarget,
    /// Free text of the new tag.
    pub description: String,
    /// Given to `/bin/sh` in the guest before it is stopped; empty: none. Dropped when the save ends.
    #[serde(with = "crate::codec::bytes")]
    pub script: Vec<u8>,
    /// A script that does not end with 0 ends the save.
    pub cancel_on_script_failure: bool,
    /// Delete a tag, and every later one, at the moment at which the new one is there.
    pub revert: bool,
    /// With `revert`: which tag; the latest visible one when absent.
    pub revert_tag: Option<String>,
    /// What the caller said of it; it is shown and changes nothing.
    pub suspend: bool,
    /// Likewise.
    pub sanity_test: bool,
}

impl SaveRequest {
    /// Do both ask for the same thing? The id of a new template is not asked for.
    pub fn same_as(&self, other: &Self) -> bool {
        let target = match (&self.target, &other.target) {
            (SaveTarget::New { name, .. }, SaveTarget::New { name: other, .. }) => name == other,
            (ours, theirs) => ours == theirs,
        };
        target
            && Self {
                target: other.target.clone(),
                ..self.clone()
            } == *other
    }
}

/// How a save ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveEnd {
    /// When, by the state clock.
    pub at_ms: u64,
    /// Why there is no new tag; `None`: it is there.
    pub error: Option<String>,
}

/// One save, open or ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Save {
    /// Id.
    pub id: SaveId,
    /// As asked for; without the script once it has ended.
    pub request: SaveRequest,
    /// Who does it.
    pub node: NodeId,
    /// Architecture of the new tag.
    pub arch: String,
    /// Ports of the new tag: those of the tag that the instance was started from.
    pub forwards: Vec<PortRule>,
    /// Asked for at.
    pub created_ms: u64,
    /// The node said that it knows of it. It does nothing before it was told that this is known.
    pub begun_ms: Option<u64>,
    /// The tag, once it was accepted.
    pub published: Option<(TemplateId, u32)>,
    /// `None`: open.
    pub end: Option<SaveEnd>,
    /// How the script ended.
    pub script_result: Option<Box<ScriptResult>>,
}

impl Save {
    /// Not ended.
    pub fn open(&self) -> bool {
        self.end.is_none()
    }
    /// No node has begun it within so many ms.
    pub fn late(&self, begin_ms: u64, now_ms: u64) -> bool {
        self.open() && self.begun_ms.is_none() && self.created_ms.saturating_add(begin_ms) <= now_ms
    }
    /// Bytes of its script and of the script's output: what it adds to every snapshot.
    pub fn weight(&self) -> usize {
        let output = self.script_result.as_ref();
        let output = output.map_or(0, |r| r.stdout.len() + r.stderr.len());
        self.request.script.len() + output
    }
}

/// What a node says of a save. Said again with every heartbeat until it is taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Which.
    pub id: SaveId,
    /// How far it is.
    pub said: SaveSaid,
    /// How the script ended.
    pub script: Option<ScriptResult>,
}

/// How far a node is with a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaveSaid {
    /// It knows of it.
    Begun,
    /// The tag was published, and seen visible.
    Pushed,
    /// It comes to nothing.
    Failed {
        /// In a sentence.
        why: String,
        /// The VM was stopped for it, and has to be started again.
        stopped: bool,
    },
}

/// The disk of a save, durable on `holder`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// Which save.
    pub save: SaveId,
    /// Name of the template: what it was weighed as.
    pub template: String,
    /// BLAKE3 of the manifest's bytes.
    pub manifest: Digest,
    /// Logical bytes of all its files.
    pub size: u64,
    /// Name of the disk file inside the manifest.
    pub disk: String,
    /// `qcow2` or `raw`.
    pub format: String,
    /// The member whose disk has every byte.
    pub holder: MemberId,
    /// How many verified copies make it visible.
    pub copies_needed: u32,
    /// The member list that this was computed from: only copies of these count.
    pub voters: BTreeSet<MemberId>,
}
