//! What applying a command answers. A refusal is data: it is replayed like success.

use crate::ids::{GroupId, InstanceId, NodeId, SaveId, Sha256, TemplateId};
use serde::{Deserialize, Serialize};

/// The answer to one command; the same on every member and for every retry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, nothing to say.
    Done,
    /// Instances accepted.
    Started(Vec<InstanceId>),
    /// A tag was accepted (or the same content was already there under this name).
    Published {
        /// Template.
        template: TemplateId,
        /// Tag number.
        number: u32,
        /// Already visible.
        visible: bool,
    },
    /// How many of the bindings held.
    Bound(u32),
    /// A node is known now.
    Registered(NodeId),
    /// Nothing changed, for this reason.
    Refused(Refusal),
    /// These nodes were asked.
    Asked(Vec<NodeId>),
    /// An instance is being saved, by this request.
    Saving(SaveId),
}

/// Why a command changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No such template (wire: `VM not in the registry` on start).
    TemplateUnknown(String),
    /// No such visible tag (wire: `No such tag <tag>`).
    TagUnknown(String),
    /// No such instance.
    InstanceUnknown(InstanceId),
    /// No such node.
    NodeUnknown(NodeId),
    /// The tag name is taken by other content.
    TagTaken(String),
    /// A bound was reached; the text names it.
    Limit(String),
    /// Not allowed in the present state; the text says why.
    Conflict(String),
    /// No such group.
    GroupUnknown(GroupId),
    /// No such repository.
    RepositoryUnknown(String),
    /// No such artifact in the repository.
    ArtifactUnknown(Sha256),
    /// Something came or went since the command was made: look again.
    Stale,
    /// No such distribution.
    DistributionUnknown(String),
}
