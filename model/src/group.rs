//! A node group: a label that requests aim at.

use crate::ids::GroupId;
use serde::{Deserialize, Serialize};

/// One group of nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Id.
    pub id: GroupId,
    /// Unique name.
    pub name: String,
    /// Free text, may be empty.
    pub description: String,
    /// Where a request goes when no node of this group has room.
    pub fallback: Option<GroupId>,
}
