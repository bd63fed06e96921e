//! Distributions: images that nodes shall have before an instance needs them. A wish, asked once: a node that has
//! fetched the image may drop it again when it needs the room.

use crate::ids::{DistributionId, NodeId, TemplateId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One request, and what became of it on each node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// Id.
    pub id: DistributionId,
    /// Template.
    pub template: TemplateId,
    /// Tag number.
    pub number: u32,
    /// Tag name, for those who look after its deletion.
    pub tag: String,
    /// Accepted at.
    pub requested_ms: u64,
    /// No node is waited for any more since.
    pub ended_ms: Option<u64>,
    /// Every node that was asked for.
    pub nodes: BTreeMap<NodeId, Delivery>,
    /// How many of them are waited for.
    pub(crate) waiting: usize,
}

/// What became of it on one node. Only `Wanted` ever changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Delivery {
    /// The node shall fetch it.
    Wanted,
    /// It has, or had it already.
    Done,
    /// Given up, for this reason.
    Ended(String),
}

impl Distribution {
    /// Is a node still to fetch it?
    pub fn waits(&self) -> bool {
        self.waiting > 0
    }

    /// Is this node still to fetch it?
    pub fn wants(&self, node: &NodeId) -> bool {
        self.nodes.get(node) == Some(&Delivery::Wanted)
    }
}
