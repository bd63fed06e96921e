//! Which nodes can take a request, and which of them is best. Looks at one node at a time; knows
//! nothing of queues or order.

use crate::ids::{GroupId, NodeId, TemplateId};
use crate::instance::{Instance, Rejection};
use crate::limits::{FALLBACK_DEPTH, REJECTION_BACKOFF_MS};
use crate::node::{Load, Node};
use crate::state::State;

/// What matters of an instance for placing it. Equal requests have equal candidates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Request<'a> {
    pub(super) template: &'a TemplateId,
    pub(super) tag_number: u32,
    pub(super) arch: &'a str,
    pub(super) pin: Option<&'a NodeId>,
    /// The group asked for, then its fallbacks in order; empty for no group.
    pub(super) groups: Vec<&'a GroupId>,
    pub(super) demand: Load,
}

impl<'a> Request<'a> {
    pub(super) fn of(state: &'a State, instance: &'a Instance) -> Self {
        Self {
            template: &instance.request.template,
            tag_number: instance.tag_number,
            arch: &instance.arch,
            pin: instance.request.node.as_ref(),
            groups: group_chain(state, instance.request.group.as_ref()),
            demand: instance.demand(),
        }
    }
}

fn group_chain<'a>(state: &'a State, first: Option<&'a GroupId>) -> Vec<&'a GroupId> {
    let mut chain = Vec::new();
    let mut next = first;
    while let Some(id) = next {
        if chain.contains(&id) || chain.len() >= FALLBACK_DEPTH {
            break;
        }
        chain.push(id);
        next = state.groups.get(id).and_then(|g| g.fallback.as_ref());
    }
    chain
}

/// Why a node cannot take a request; the first that holds is the one that is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Unfit {
    OtherGroup,
    OtherArch,
    Lost,
    Unreachable,
    Draining,
    Rejected,
    TooSmall,
    Full,
}

impl Unfit {
    pub(super) const ALL: [Self; 8] = [
        Self::Full,
        Self::Draining,
        Self::Unreachable,
        Self::Lost,
        Self::Rejected,
        Self::TooSmall,
        Self::OtherArch,
        Self::OtherGroup,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::OtherGroup => "not in the group",
            Self::OtherArch => "of another architecture",
            Self::Lost => "lost",
            Self::Unreachable => "unreachable",
            Self::Draining => "draining",
            Self::Rejected => "rejected it lately",
            Self::TooSmall => "too small",
            Self::Full => "full",
        }
    }
}

/// Lexicographic: the smallest wins. Deterministic because nodes are numbered by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// 0 = in the group asked for, then one more per fallback.
    pub(super) fallback: usize,
    /// It rejected this instance once: others first.
    pub(super) rejected: bool,
    /// Whether the image must be fetched.
    pub(super) image: Image,
    /// Spread: the emptiest first, in thousandths.
    pub(super) used_permille: u64,
    /// Position of the node in id order.
    pub(super) node: usize,
}

/// How far the image is; fewer transfers are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Image {
    /// On the node's disk.
    Cached,
    /// Another instance there makes the node fetch it anyway.
    Coming,
    /// To be fetched for this instance.
    Absent,
}

/// Whether `node` under `load` can take `request`, whatever its image cache holds.
pub(super) fn fit(node: &Node, load: Load, request: &Request<'_>) -> Result<usize, Unfit> {
    let fallback = match request.groups.as_slice() {
        [] => 0,
        chain => {
            let tier = chain.iter().position(|g| node.groups.contains(*g));
            tier.ok_or(Unfit::OtherGroup)?
        }
    };
    if !request.arch.is_empty() && request.arch != node.spec.arch {
        return Err(Unfit::OtherArch);
    }
    if node.lost {
        return Err(Unfit::Lost);
    }
    if !node.reachable {
        return Err(Unfit::Unreachable);
    }
    if node.draining() {
        return Err(Unfit::Draining);
    }
    if !node.has_room_for(request.demand) {
        return Err(Unfit::TooSmall);
    }
    if !node.has_room_for(load.plus(request.demand)) {
        return Err(Unfit::Full);
    }
    Ok(fallback)
}

/// Whether a node's rejection still keeps it away, and whether there was one.
pub(super) fn rejected(node: &Node, rejections: &[Rejection], now_ms: u64) -> Result<bool, Unfit> {
    match rejections.iter().find(|r| r.node == node.id) {
        None => Ok(false),
        Some(r) if now_ms.saturating_sub(r.at_ms) < REJECTION_BACKOFF_MS => Err(Unfit::Rejected),
        Some(_) => Ok(true),
    }
}
