//! Evictions: nodes are asked to drop what they have cached of a template. They last until the node reports that it
//! has done so, or until the image is wanted there again.

use super::{Applied, check, distribute, node};
use crate::ids::{NodeId, TemplateId};
use crate::limits::{self, clip};
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use std::collections::BTreeSet;

/// Answers the nodes that have something of it, or were to fetch it.
pub(super) fn evict(state: &mut State, of: &TemplateId, nodes: &[NodeId]) -> Applied {
    check::count("nodes", nodes.len(), limits::NODES)?;
    for id in nodes {
        node::known(state, id)?;
    }
    let named: BTreeSet<&NodeId> = nodes.iter().collect();
    let meant = |id: &&NodeId| named.is_empty() || named.contains(id);
    let mut asked = Vec::new();
    for id in state
        .nodes
        .keys()
        .filter(meant)
        .cloned()
        .collect::<Vec<_>>()
    {
        let waited_for = distribute::not_here(state, &id, of);
        let numbers = cached(state, &id, of);
        if waited_for || !numbers.is_empty() {
            state.evict(&id, of, &numbers);
            asked.push(id);
        }
    }
    if asked.is_empty() && !state.templates.contains_key(of) {
        let of = clip(of.as_str(), limits::NAME_BYTES);
        return Err(Refusal::TemplateUnknown(of));
    }
    Ok(Outcome::Asked(asked))
}

/// Tags of a template that a node has.
fn cached(state: &State, id: &NodeId, of: &TemplateId) -> BTreeSet<u32> {
    let images = state.nodes.get(id).map(|n| &n.images);
    let all = (of.clone(), 0)..=(of.clone(), u32::MAX);
    let of_template = images.into_iter().flat_map(|i| i.range(all.clone()));
    of_template.map(|(_, number)| *number).collect()
}

/// A node has these images now: what is not among them, was dropped.
pub(super) fn dropped(state: &mut State, id: &NodeId, images: &BTreeSet<(TemplateId, u32)>) {
    let of_node = state.evictions.get(id).into_iter();
    let templates: Vec<TemplateId> = of_node.flat_map(|e| e.keys().cloned()).collect();
    for of in templates {
        state.keep(id, &of, |number| !images.contains(&(of.clone(), number)));
    }
}

/// A node shall have this image after all. Whether it still has it is not known until it says so.
pub(super) fn wanted_again(state: &mut State, id: &NodeId, image: &(TemplateId, u32)) {
    let (of, number) = image;
    let evicted = state.evicted_on(id).any(|(t, n)| (t, &n) == (of, number));
    if evicted {
        state.keep(id, of, |n| n == *number);
        state.edit_node(id, |n| {
            n.images.remove(image);
        });
    }
}
