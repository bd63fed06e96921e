//! Distributions: asked for, carried out by what nodes report, cancelled, given up, forgotten. Each node is asked
//! once: what it drops later is not fetched again. A node that joins later is not asked.

use super::{Applied, check, evict, template};
use crate::command::TagSelector;
use crate::distribution::{Delivery, Distribution};
use crate::ids::{DistributionId, GroupId, NodeId, TemplateId};
use crate::limits::{self, clip};
use crate::node::Node;
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use std::collections::{BTreeMap, BTreeSet};

/// Who shall have it.
pub(super) struct Whom<'a> {
    /// These.
    pub(super) nodes: &'a [NodeId],
    /// And those in this group; without either, every node of the tag's architecture.
    pub(super) group: Option<&'a GroupId>,
}

/// Asked again with the same id, it is the same request.
pub(super) fn distribute(
    state: &mut State,
    id: &DistributionId,
    of: &TemplateId,
    selector: Option<&TagSelector>,
    whom: &Whom<'_>,
) -> Applied {
    check::id("request id", id.as_str())?;
    if state.distributions.contains_key(id) {
        return Ok(Outcome::Done);
    }
    let (number, tag, arch) = {
        let tag = template::visible(state, of, selector)?;
        (tag.number, tag.name.clone(), tag.content.arch.clone())
    };
    let nodes = chosen(state, whom, &arch)?;
    if nodes.is_empty() {
        let text = "no node is asked for: there is none in the group, or of the tag's architecture";
        return Err(Refusal::Conflict(text.to_owned()));
    }
    make_place(state, nodes.len())?;
    let image = (of.clone(), number);
    nodes
        .iter()
        .for_each(|node| evict::wanted_again(state, node, &image));
    let delivery = |node: NodeId| {
        let known = state.nodes.get(&node);
        let delivery = match known.is_some_and(|n| n.images.contains(&image)) {
            true => Delivery::Done,
            false => Delivery::Wanted,
        };
        (node, delivery)
    };
    let nodes: BTreeMap<NodeId, Delivery> = nodes.into_iter().map(delivery).collect();
    state.insert_distribution(Distribution {
        id: id.clone(),
        template: of.clone(),
        number,
        tag,
        requested_ms: state.clock_ms,
        ended_ms: None,
        nodes,
        waiting: 0,
    });
    Ok(Outcome::Done)
}

fn chosen(state: &State, whom: &Whom<'_>, arch: &str) -> Result<BTreeSet<NodeId>, Refusal> {
    check::count("nodes", whom.nodes.len(), limits::NODES)?;
    let mut chosen = BTreeSet::new();
    for id in whom.nodes {
        super::node::known(state, id)?;
        chosen.insert(id.clone());
    }
    if let Some(group) = whom.group
        && !state.groups.contains_key(group)
    {
        let group = clip(group.as_str(), limits::NAME_BYTES);
        return Err(Refusal::GroupUnknown(GroupId::from(group)));
    }
    let runs = |node: &Node| arch.is_empty() || node.spec.arch.is_empty() || node.spec.arch == arch;
    let wanted = |node: &&Node| match whom.group {
        Some(group) => node.groups.contains(group),
        None => whom.nodes.is_empty() && runs(node),
    };
    chosen.extend(state.nodes.values().filter(wanted).map(|n| n.id.clone()));
    Ok(chosen)
}

/// One more, for so many nodes, is within the bounds once enough of those that ended are forgotten: the one that
/// ended first, first. If all of them are not enough, none is.
fn make_place(state: &mut State, nodes: usize) -> Result<(), Refusal> {
    let mut known = state.distributions.len() + 1;
    let of_all = state.distributions.values().map(|d| d.nodes.len());
    let mut deliveries = of_all.sum::<usize>() + nodes;
    let ended = state.distributions.values();
    let ended = ended.filter_map(|d| Some((d.ended_ms?, d.id.clone(), d.nodes.len())));
    let mut ended: Vec<_> = ended.collect();
    ended.sort();
    let mut gone = Vec::new();
    for (_, id, nodes) in ended {
        if known <= limits::DISTRIBUTIONS && deliveries <= limits::DELIVERIES {
            break;
        }
        known -= 1;
        deliveries -= nodes;
        gone.push(id);
    }
    check::count("distributions", known, limits::DISTRIBUTIONS)?;
    check::count("nodes of distributions", deliveries, limits::DELIVERIES)?;
    gone.iter().for_each(|id| state.remove_distribution(id));
    Ok(())
}

/// A node has these images now.
pub(super) fn fetched(state: &mut State, node: &NodeId, images: &BTreeSet<(TemplateId, u32)>) {
    settle_node(state, node, |d| {
        let has = images.contains(&(d.template.clone(), d.number));
        has.then_some(Delivery::Done)
    });
}

/// A node has gone: it is not waited for.
pub(super) fn node_gone(state: &mut State, node: &NodeId) {
    settle_node(state, node, |_| {
        Some(Delivery::Ended("the node was removed".to_owned()))
    });
}

/// A node need not have any of a template. Was it to fetch something?
pub(super) fn not_here(state: &mut State, node: &NodeId, of: &TemplateId) -> bool {
    settle_node(state, node, |d| {
        let why = "the template was removed from the node";
        (&d.template == of).then(|| Delivery::Ended(why.to_owned()))
    })
}

/// Tags have gone: nobody can fetch them.
pub(super) fn tags_gone(state: &mut State, of: &TemplateId, gone: impl Fn(u32) -> bool) {
    let all = state.distributions.values();
    let hit = all.filter(|d| d.waits() && &d.template == of && gone(d.number));
    for id in hit.map(|d| d.id.clone()).collect::<Vec<_>>() {
        give_up(state, &id, "the tag was deleted");
    }
}

/// Whoever has not fetched it need not.
pub(super) fn cancel(state: &mut State, id: &DistributionId) -> Applied {
    if !state.distributions.contains_key(id) {
        let id = clip(id.as_str(), limits::NAME_BYTES);
        return Err(Refusal::DistributionUnknown(id));
    }
    give_up(state, id, "cancelled");
    Ok(Outcome::Done)
}

/// Those that nodes had long enough for are given up, and those that ended long enough ago forgotten.
pub(super) fn expire(
    state: &mut State,
    ids: &[DistributionId],
    patience_ms: u64,
    retention_ms: u64,
) -> Applied {
    check::count("distributions", ids.len(), limits::DISTRIBUTIONS)?;
    let now = state.clock_ms;
    for id in ids {
        let Some(distribution) = state.distributions.get(id) else {
            continue;
        };
        let over = |since: u64, ms: u64| since.saturating_add(ms) <= now;
        match distribution.ended_ms {
            Some(at) if over(at, retention_ms) => state.remove_distribution(id),
            None if over(distribution.requested_ms, patience_ms) => {
                let hours = patience_ms / 3_600_000;
                give_up(state, id, &format!("given up after {hours} hours"));
            }
            _ => {}
        }
    }
    Ok(Outcome::Done)
}

/// All nodes that it waits for.
fn give_up(state: &mut State, id: &DistributionId, why: &str) {
    let Some(distribution) = state.distributions.get(id) else {
        return;
    };
    let nodes = distribution.nodes.iter();
    let waiting = nodes.filter(|(_, d)| **d == Delivery::Wanted);
    for node in waiting.map(|(node, _)| node.clone()).collect::<Vec<_>>() {
        state.settle_delivery(id, &node, Delivery::Ended(why.to_owned()));
    }
}

/// Whatever waits for this node and has an answer now; whether anything had.
fn settle_node(
    state: &mut State,
    node: &NodeId,
    answer: impl Fn(&Distribution) -> Option<Delivery>,
) -> bool {
    let wanted = state.wanted_on(node);
    let settled = wanted.filter_map(|d| Some((d.id.clone(), answer(d)?)));
    let settled: Vec<_> = settled.collect();
    let any = !settled.is_empty();
    for (id, delivery) in settled {
        state.settle_delivery(&id, node, delivery);
    }
    any
}
