//! The planner again, as its rules read: every instance in its turn, every node for each of them. Slow,
//! without lines, queues or heaps; the real one must come to the same.

use mainstay_model::command::Binding;
use mainstay_model::instance::Instance;
use mainstay_model::limits::{FALLBACK_DEPTH, REJECTION_BACKOFF_MS};
use mainstay_model::node::{Load, Node};
use mainstay_model::{GroupId, NodeId, State, TemplateId};
use std::collections::{BTreeMap, BTreeSet};

type Image<'a> = (NodeId, &'a TemplateId, u32);

/// Whether the node takes it by what never depends on time: group (its place in the chain),
/// architecture, pin.
pub fn tier(state: &State, instance: &Instance, node: &Node) -> Option<usize> {
    let request = &instance.request;
    let pinned_elsewhere = request.node.as_ref().is_some_and(|pin| pin != &node.id);
    let other_arch = !instance.arch.is_empty() && instance.arch != node.spec.arch;
    if pinned_elsewhere || other_arch {
        return None;
    }
    let Some(first) = &request.group else {
        return Some(0);
    };
    let mut chain: Vec<&GroupId> = Vec::new();
    let mut next = Some(first);
    while let Some(group) = next.filter(|g| !chain.contains(g) && chain.len() < FALLBACK_DEPTH) {
        chain.push(group);
        next = state.groups.get(group).and_then(|g| g.fallback.as_ref());
    }
    chain.iter().position(|g| node.groups.contains(*g))
}

/// Whether there is a node for it now, under these loads.
fn candidates<'a>(
    state: &'a State,
    instance: &Instance,
    loads: &BTreeMap<&NodeId, Load>,
    now: u64,
) -> Vec<(&'a Node, usize, bool)> {
    let nodes = state.nodes.values();
    let fits = |node: &'a Node| {
        let tier = tier(state, instance, node)?;
        let rejection = instance.rejections.iter().find(|r| r.node == node.id);
        let kept_away =
            rejection.is_some_and(|r| now.saturating_sub(r.at_ms) < REJECTION_BACKOFF_MS);
        let load = loads[&node.id].plus(instance.demand());
        let takes = node.accepts() && node.has_room_for(load) && !kept_away;
        takes.then_some((node, tier, rejection.is_some()))
    };
    nodes.filter_map(fits).collect()
}

fn loads(state: &State) -> BTreeMap<&NodeId, Load> {
    state.nodes.keys().map(|id| (id, state.load(id))).collect()
}

/// All that can be placed.
pub fn place(state: &State, now: u64) -> Vec<Binding> {
    let now = now.max(state.clock_ms);
    let mut loads = loads(state);
    let mut coming: BTreeSet<Image<'_>> = BTreeSet::new();
    for instance in state.instances.values().filter(|i| i.starts()) {
        let on = instance
            .node
            .clone()
            .filter(|_| instance.occupies().is_some());
        coming.extend(on.map(|n| (n, &instance.request.template, instance.tag_number)));
    }
    let mut waiting: Vec<&Instance> = state.instances.values().filter(|i| i.waits()).collect();
    waiting.sort_by_key(|i| (i.request.priority, i.created_ms, &i.id));
    let mut bindings = Vec::new();
    for instance in waiting {
        let (template, number) = (&instance.request.template, instance.tag_number);
        let best = candidates(state, instance, &loads, now)
            .into_iter()
            .min_by_key(|(node, tier, rejected)| {
                let image = if node.images.contains(&(template.clone(), number)) {
                    0
                } else if coming.contains(&(node.id.clone(), template, number)) {
                    1
                } else {
                    2
                };
                let used = node.used_permille(loads[&node.id]);
                (*tier, *rejected, image, used, &node.id)
            });
        let Some((node, _, _)) = best else { continue };
        if let Some(load) = loads.get_mut(&node.id) {
            *load = load.plus(instance.demand());
        }
        coming.insert((node.id.clone(), template, number));
        bindings.push(Binding {
            instance: instance.id.clone(),
            node: node.id.clone(),
            generation: instance.generation,
        });
    }
    bindings
}

/// Could it be placed, were it alone?
pub fn placeable(state: &State, instance: &Instance, now: u64) -> bool {
    !candidates(state, instance, &loads(state), now).is_empty()
}
