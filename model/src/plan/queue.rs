//! Candidates for equal requests, best first, kept right while a plan gives room away.

use super::explain::refusal;
use super::score::{Image, Request, Score, fit, rejected};
use crate::ids::TemplateId;
use crate::instance::Rejection;
use crate::node::{Load, Node};
use crate::state::State;
use crate::state::index::Occupants;
use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// Nodes with what is taken of them, this plan's bindings included.
pub(super) struct Room<'a> {
    nodes: Vec<Seat<'a>>,
    /// Images that a node must fetch for what this plan places on it.
    coming: BTreeSet<(usize, &'a TemplateId, u32)>,
}

struct Seat<'a> {
    node: &'a Node,
    load: Load,
    occupants: Option<&'a Occupants>,
}

impl<'a> Room<'a> {
    pub(super) fn of(state: &'a State) -> Self {
        let seat = |node: &'a Node| {
            let occupants = state.occupants(&node.id);
            Seat {
                node,
                load: occupants.map(Occupants::load).unwrap_or_default(),
                occupants,
            }
        };
        Self {
            nodes: state.nodes.values().map(seat).collect(),
            coming: BTreeSet::new(),
        }
    }

    pub(super) fn node(&self, at: usize) -> &'a Node {
        self.nodes[at].node
    }

    pub(super) fn loads(&self) -> impl ExactSizeIterator<Item = (&'a Node, Load)> {
        self.nodes.iter().map(|s| (s.node, s.load))
    }

    /// Nodes that a request may look at: all, or the one it is pinned to.
    fn candidates(&self, request: &Request<'_>) -> std::ops::Range<usize> {
        match request.pin {
            None => 0..self.nodes.len(),
            Some(id) => match self.nodes.binary_search_by(|s| s.node.id.cmp(id)) {
                Ok(at) => at..at + 1,
                Err(_) => 0..0,
            },
        }
    }

    fn score(&self, at: usize, request: &Request<'a>, image: &ImageKey) -> Option<Score> {
        let seat = &self.nodes[at];
        let fallback = fit(seat.node, seat.load, request).ok()?;
        let (template, number) = (request.template, request.tag_number);
        let coming = || {
            let fetching = |o: &Occupants| o.fetching(template, number);
            seat.occupants.is_some_and(fetching) || self.coming.contains(&(at, template, number))
        };
        let image = if seat.node.images.contains(image) {
            Image::Cached
        } else if coming() {
            Image::Coming
        } else {
            Image::Absent
        };
        Some(Score {
            fallback,
            rejected: false,
            image,
            used_permille: seat.node.used_permille(seat.load),
            node: at,
        })
    }

    /// Whether the node has to fetch an image for this that it needed for nobody before.
    fn take(&mut self, at: usize, request: &Request<'a>) -> bool {
        let load = &mut self.nodes[at].load;
        *load = load.plus(request.demand);
        self.coming
            .insert((at, request.template, request.tag_number))
    }
}

/// As nodes name their images.
type ImageKey = (TemplateId, u32);

fn image_key(request: &Request<'_>) -> ImageKey {
    (request.template.clone(), request.tag_number)
}

/// One queue per different request.
#[derive(Default)]
pub(super) struct Queues<'a> {
    queues: BTreeMap<Request<'a>, Queue>,
}

enum Queue {
    /// Scores may be out of date; they are checked when they come to the top.
    Open(ImageKey, BinaryHeap<Reverse<Score>>),
    /// Room is only ever given away within a plan, so what failed once fails again.
    Exhausted(String),
}

impl Queue {
    fn new<'a>(room: &Room<'a>, request: &Request<'a>) -> Self {
        let image = image_key(request);
        let candidates = room.candidates(request);
        let scores = candidates.filter_map(|at| room.score(at, request, &image));
        let heap = scores.map(Reverse).collect();
        Self::Open(image, heap)
    }
}

impl<'a> Queues<'a> {
    pub(super) fn take(
        &mut self,
        room: &mut Room<'a>,
        request: Request<'a>,
    ) -> Result<usize, String> {
        let (at, fetches) = self.next(room, &request)?;
        if fetches {
            self.image_comes(room, at, &request);
        }
        Ok(at)
    }

    /// A node fetches the image of `request` from now on: for others who want the same image it has become
    /// better, wherever it stands in their queues. (That it becomes worse is found at their tops.)
    fn image_comes(&mut self, room: &Room<'a>, at: usize, request: &Request<'a>) {
        let image = |r: &Request<'a>| (r.template, r.tag_number);
        for (other, queue) in &mut self.queues {
            if let Queue::Open(key, heap) = queue
                && image(other) == image(request)
            {
                heap.extend(room.score(at, other, key).map(Reverse));
            }
        }
    }

    fn next(
        &mut self,
        room: &mut Room<'a>,
        request: &Request<'a>,
    ) -> Result<(usize, bool), String> {
        let queue = match self.queues.entry(request.clone()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Queue::new(room, request)),
        };
        let (image, heap) = match queue {
            Queue::Open(image, heap) => (image, heap),
            Queue::Exhausted(why) => return Err(why.clone()),
        };
        match best(heap, room, request, image) {
            Some(at) => {
                let fetches = room.take(at, request);
                heap.extend(room.score(at, request, image).map(Reverse));
                Ok((at, fetches))
            }
            None => {
                let why = refusal(room, request, &[], 0);
                *queue = Queue::Exhausted(why.clone());
                Err(why)
            }
        }
    }
}

/// Pop until the top's score is still true.
fn best<'a>(
    heap: &mut BinaryHeap<Reverse<Score>>,
    room: &Room<'a>,
    request: &Request<'a>,
    image: &ImageKey,
) -> Option<usize> {
    while let Some(Reverse(old)) = heap.pop() {
        match room.score(old.node, request, image) {
            // Better than remembered is fine too: nothing behind it can beat it.
            Some(score) if score <= old => return Some(score.node),
            Some(score) => heap.push(Reverse(score)),
            None => {}
        }
    }
    None
}

/// For an instance with a history of its own: look at each node once.
pub(super) fn take_once<'a>(
    room: &mut Room<'a>,
    queues: &mut Queues<'a>,
    request: &Request<'a>,
    rejections: &[Rejection],
    now_ms: u64,
) -> Result<usize, String> {
    let image = image_key(request);
    let scored = |at: usize| {
        let rejected = rejected(room.node(at), rejections, now_ms).ok()?;
        let score = room.score(at, request, &image)?;
        Some(Score { rejected, ..score })
    };
    match room.candidates(request).filter_map(scored).min() {
        Some(score) => {
            if room.take(score.node, request) {
                queues.image_comes(room, score.node, request);
            }
            Ok(score.node)
        }
        None => Err(refusal(room, request, rejections, now_ms)),
    }
}
