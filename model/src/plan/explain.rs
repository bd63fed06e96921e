//! Sentences for people: why no node takes a request. Decides nothing.

use super::queue::Room;
use super::score::{Request, Unfit, fit, rejected};
use crate::instance::Rejection;
use crate::node::{Load, Node};
use std::collections::BTreeMap;

/// For example `3 nodes: 2 full, 1 draining`.
pub(super) fn refusal(
    room: &Room<'_>,
    request: &Request<'_>,
    rejections: &[Rejection],
    now_ms: u64,
) -> String {
    let unfit = |(node, load): (&Node, Load)| {
        let turned_down = rejected(node, rejections, now_ms).err();
        fit(node, load, request).err().or(turned_down)
    };
    if let Some(pin) = &request.pin {
        let pinned = room.loads().find(|(n, _)| &n.id == *pin);
        return match pinned.map(|n| (n.0.name(), unfit(n))) {
            None => format!("pinned to node {pin}, which is not known"),
            Some((name, why)) => {
                let why = why.map_or("busy", Unfit::as_str);
                format!("pinned to node {name}: {why}")
            }
        };
    }
    if room.loads().len() == 0 {
        return "no node has joined".to_owned();
    }
    let mut counts: BTreeMap<Unfit, usize> = BTreeMap::new();
    for why in room.loads().filter_map(unfit) {
        *counts.entry(why).or_default() += 1;
    }
    let total = room.loads().len();
    let nodes = if total == 1 { "node" } else { "nodes" };
    let parts: Vec<String> = Unfit::ALL
        .iter()
        .filter_map(|why| Some(format!("{} {}", counts.get(why)?, why.as_str())))
        .collect();
    format!("{total} {nodes}: {}", parts.join(", "))
}
