//! Templates and their tags: names, digests and who holds the bytes. Never the bytes.

use crate::command::TagContent;
use crate::ids::{MemberId, TemplateId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A named image with a linear history of tags.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Template {
    /// Id.
    pub id: TemplateId,
    /// Unique name.
    pub name: String,
    /// By number, ascending. Numbers are never reused within a template.
    pub tags: BTreeMap<u32, Tag>,
    /// Number of the next tag.
    pub next_number: u32,
    /// Created at.
    pub created_ms: u64,
}

/// One version of a template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tag {
    /// Position in the history.
    pub number: u32,
    /// Name, unique within the template.
    pub name: String,
    /// What it is made of.
    pub content: TagContent,
    /// Members with every byte, verified and durable.
    pub holders: BTreeSet<MemberId>,
    /// Verified copies that make it visible.
    pub copies_needed: u32,
    /// Was once held by `copies_needed` voters of that time; never goes back to false.
    pub visible: bool,
    /// Published (accepted) at.
    pub created_ms: u64,
    /// Became visible at.
    pub visible_ms: Option<u64>,
}

impl Template {
    /// Visible tags in order.
    pub fn visible_tags(&self) -> impl DoubleEndedIterator<Item = &Tag> {
        self.tags.values().filter(|t| t.visible)
    }
    /// The newest visible tag.
    pub fn latest(&self) -> Option<&Tag> {
        self.visible_tags().next_back()
    }
    /// A visible tag by name.
    pub fn tag(&self, name: &str) -> Option<&Tag> {
        self.visible_tags().find(|t| t.name == name)
    }
}
