//! Candidates for equal requests, best first, kept right while a plan gives room away.

use super::explain::refusal;
use super::score::{Image, Request, Score, fit, rejected};
use crate::ids::TemplateId;
use crate::instance::Rejection;
use crate::node::{Load, Node};
use crate::state::State;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// Nodes with what is taken of them, this plan's bindings included.
pub(super) struct Room<'a> {
    nodes: Vec<(&'a Node, Load)>,
    /// Images that a node does not hold but will fetch for an instance placed on it.
    coming: BTreeSet<(usize, TemplateId, u32)>,
}

impl<'a> Room<'a> {
    pub(super) fn of(state: &'a State) -> Self {
        let nodes: Vec<_> = state
            .nodes
            .values()
            .map(|n| (n, state.load(&n.id)))
            .collect();
        let mut coming = BTreeSet::new();
        for instance in state.starting() {
            let at = |id| nodes.binary_search_by(|(n, _)| n.id.cmp(id)).ok();
            if let Some(at) = instance.node.as_ref().and_then(at) {
                let template = instance.request.template.clone();
                coming.insert((at, template, instance.tag_number));
            }
        }
        Self { nodes, coming }
    }

    pub(super) fn node(&self, at: usize) -> &'a Node {
        self.nodes[at].0
    }

    pub(super) fn nodes(&self) -> &[(&'a Node, Load)] {
        &self.nodes
    }

    /// Nodes that a request may look at: all, or the one it is pinned to.
    fn candidates(&self, request: &Request) -> std::ops::Range<usize> {
        match &request.pin {
            None => 0..self.nodes.len(),
            Some(id) => match self.nodes.binary_search_by(|(n, _)| n.id.cmp(id)) {
                Ok(at) => at..at + 1,
                Err(_) => 0..0,
            },
        }
    }

    fn score(&self, at: usize, request: &Request) -> Option<Score> {
        let (node, load) = self.nodes[at];
        let fallback = fit(node, load, request).ok()?;
        let image = (request.template.clone(), request.tag_number);
        let image = if node.images.contains(&image) {
            Image::Cached
        } else if self.coming.contains(&(at, image.0, image.1)) {
            Image::Coming
        } else {
            Image::Absent
        };
        Some(Score {
            fallback,
            rejected: false,
            image,
            used_permille: node.used_permille(load),
            node: at,
        })
    }

    fn take(&mut self, at: usize, request: &Request) {
        let load = &mut self.nodes[at].1;
        *load = load.plus(request.demand);
        self.coming
            .insert((at, request.template.clone(), request.tag_number));
    }
}

/// One queue per different request.
#[derive(Default)]
pub(super) struct Queues {
    queues: BTreeMap<Request, Queue>,
}

enum Queue {
    /// Scores may be out of date; they are checked when they come to the top.
    Open(BinaryHeap<Reverse<Score>>),
    /// Room is only ever given away within a plan, so what failed once fails again.
    Exhausted(String),
}

impl Queues {
    pub(super) fn take(&mut self, room: &mut Room<'_>, request: Request) -> Result<usize, String> {
        if !self.queues.contains_key(&request) {
            let scores = room
                .candidates(&request)
                .filter_map(|at| room.score(at, &request));
            let heap = scores.map(Reverse).collect();
            self.queues.insert(request.clone(), Queue::Open(heap));
        }
        let queue = self
            .queues
            .get_mut(&request)
            .ok_or("no queue for a request that was just given one")?;
        let heap = match queue {
            Queue::Open(heap) => heap,
            Queue::Exhausted(why) => return Err(why.clone()),
        };
        match best(heap, room, &request) {
            Some(at) => {
                room.take(at, &request);
                heap.extend(room.score(at, &request).map(Reverse));
                Ok(at)
            }
            None => {
                let why = refusal(room, &request, &[], 0);
                *queue = Queue::Exhausted(why.clone());
                Err(why)
            }
        }
    }
}

/// Pop until the top's score is still true.
fn best(
    heap: &mut BinaryHeap<Reverse<Score>>,
    room: &Room<'_>,
    request: &Request,
) -> Option<usize> {
    while let Some(Reverse(old)) = heap.pop() {
        match room.score(old.node, request) {
            // Better than remembered is fine too: nothing behind it can beat it.
            Some(score) if score <= old => return Some(score.node),
            Some(score) => heap.push(Reverse(score)),
            None => {}
        }
    }
    None
}

/// For an instance with a history of its own: look at each node once.
pub(super) fn take_once(
    room: &mut Room<'_>,
    request: &Request,
    rejections: &[Rejection],
    now_ms: u64,
) -> Result<usize, String> {
    let scored = |at: usize| {
        let rejected = rejected(room.node(at), rejections, now_ms).ok()?;
        let score = room.score(at, request)?;
        Some(Score { rejected, ..score })
    };
    match room.candidates(request).filter_map(scored).min() {
        Some(score) => {
            room.take(score.node, request);
            Ok(score.node)
        }
        None => Err(refusal(room, request, rejections, now_ms)),
    }
}
