//! Nodes that pull the same chunks at about the same time: who was given them by this member, so that the next
//! one gets them there. Every node asks the same member for the same part of an image, so that what each member
//! remembers by itself is enough: about one copy leaves the members, however many nodes want one. Soft, bounded,
//! and never believed further than this: a node that waits in vain asks again, and is served.
//!
//! ```text
//! nobody was given it      -> given; this node is the first
//! the first asks again     -> given: its answer was lost
//! the first did not give   -> given; this node is the first now
//! else                     -> left out, with the first and a few later ones named
//! ```

use mainstay_agent::transfer::Id;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a node is named for what it was given.
const REMEMBERED: Duration = Duration::from_secs(300);
/// What is older is dropped this often.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// Chunks that are remembered, 32 GiB of them: about 20 MB. Further ones are given to whoever asks.
const CHUNKS_MAX: usize = 1 << 19;
/// Addresses that are remembered; with more, everything is forgotten.
const NODES_MAX: usize = 1 << 16;
/// Nodes named in one answer.
const NAMED_MAX: usize = 6;
/// Nodes remembered for a chunk besides the first.
const LATER: usize = 3;
/// No node.
const NONE: u32 = u32::MAX;

/// What a node says of itself when it asks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked<'a> {
    /// Where other nodes reach it; empty if they cannot.
    pub(super) node: &'a str,
    /// Nodes that did not give.
    pub(super) avoid: &'a [&'a str],
    /// It has waited long enough.
    pub(super) insist: bool,
}

/// What it gets.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// These chunks.
    pub(super) given: Vec<Id>,
    /// For the others, the nodes that have most of them.
    pub(super) nodes: Vec<String>,
}

/// What one member remembers.
#[derive(Debug, Default)]
pub(super) struct Swarm {
    ledger: Mutex<Ledger>,
    sent_chunks: AtomicU64,
    sent_bytes: AtomicU64,
    left_out: AtomicU64,
}

/// What clients and nodes got of one member since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentFigures {
    /// Chunks sent.
    pub chunks: u64,
    /// Their bytes, as sent.
    pub bytes: u64,
    /// Chunks left out because other nodes have them.
    pub left_out: u64,
}

#[derive(Debug, Default)]
struct Ledger {
    nodes: Vec<String>,
    numbers: HashMap<String, u32>,
    given: HashMap<u64, Given>,
    swept: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Given {
    at: Instant,
    first: u32,
    later: [u32; LATER],
}

impl Swarm {
    /// Which of these chunks of an image a node gets here, now.
    pub(super) fn ask(&self, manifest: &Id, ids: &[Id], asked: Asked<'_>, now: Instant) -> Share {
        let mut ledger = self.ledger.lock();
        ledger.sweep(now);
        let me = ledger.number(asked.node);
        let avoid: Vec<u32> = asked.avoid.iter().map(|n| ledger.known(n)).collect();
        let mut named: BTreeMap<u32, usize> = BTreeMap::new();
        let mut share = Share::default();
        for id in ids {
            let key = key(manifest, id);
            let known = ledger.given.get_mut(&key);
            let known = known.filter(|given| now.duration_since(given.at) <= REMEMBERED);
            match known {
                Some(given)
                    if !asked.insist && given.first != me && !avoid.contains(&given.first) =>
                {
                    for (node, weight) in given.named(me) {
                        *named.entry(node).or_default() += weight;
                    }
                    given.join(me);
                }
                _ => {
                    share.given.push(*id);
                    ledger.give(key, me, now);
                }
            }
        }
        let mut named: Vec<(u32, usize)> = named.into_iter().collect();
        named.retain(|(node, _)| !avoid.contains(node));
        named.sort_by_key(|(node, weight)| (std::cmp::Reverse(*weight), *node));
        let named = named.iter().take(NAMED_MAX);
        share.nodes = named
            .filter_map(|(node, _)| ledger.nodes.get(*node as usize).cloned())
            .collect();
        let left_out = ids.len() - share.given.len();
        self.left_out.fetch_add(left_out as u64, Ordering::Relaxed);
        share
    }

    /// So much was sent to a node or a client.
    pub(super) fn sent(&self, chunks: usize, bytes: usize) {
        self.sent_chunks.fetch_add(chunks as u64, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn figures(&self) -> SentFigures {
        SentFigures {
            chunks: self.sent_chunks.load(Ordering::Relaxed),
            bytes: self.sent_bytes.load(Ordering::Relaxed),
            left_out: self.left_out.load(Ordering::Relaxed),
        }
    }
}

impl Given {
    /// Whoever may have it but `me`; the first counts most, for the others may still wait for it.
    fn named(&self, me: u32) -> impl Iterator<Item = (u32, usize)> + use<> {
        let later = self.later.into_iter().map(|node| (node, 1));
        std::iter::once((self.first, 4))
            .chain(later)
            .filter(move |(node, _)| *node != NONE && *node != me)
    }

    /// It will have it soon.
    fn join(&mut self, me: u32) {
        if me != NONE && !self.later.contains(&me) {
            self.later.rotate_right(1);
            self.later[0] = me;
        }
    }
}

impl Ledger {
    fn number(&mut self, node: &str) -> u32 {
        if node.is_empty() {
            return NONE;
        }
        if let Some(number) = self.numbers.get(node) {
            return *number;
        }
        if self.nodes.len() >= NODES_MAX {
            *self = Self {
                swept: self.swept,
                ..Self::default()
            };
        }
        let number = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        self.nodes.push(node.to_owned());
        self.numbers.insert(node.to_owned(), number);
        number
    }

    /// Nobody, if it was never heard of.
    fn known(&self, node: &str) -> u32 {
        self.numbers.get(node).copied().unwrap_or(NONE)
    }

    /// One that cannot be asked by others takes nobody's place.
    fn give(&mut self, key: u64, first: u32, now: Instant) {
        let room = self.given.len() < CHUNKS_MAX || self.given.contains_key(&key);
        if first == NONE || !room {
            return;
        }
        let given = Given {
            at: now,
            first,
            later: [NONE; LATER],
        };
        self.given.insert(key, given);
    }

    fn sweep(&mut self, now: Instant) {
        let since = *self.swept.get_or_insert(now);
        if now.duration_since(since) < SWEEP_EVERY {
            return;
        }
        self.swept = Some(now);
        self.given
            .retain(|_, given| now.duration_since(given.at) <= REMEMBERED);
        if self.given.is_empty() {
            *self = Self {
                swept: self.swept,
                ..Self::default()
            };
        }
    }
}

/// Two that fall together cost their nodes a question in vain.
fn key(manifest: &Id, id: &Id) -> u64 {
    let half = |id: &Id| {
        let (first, _) = id.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        u64::from_le_bytes(*first)
    };
    half(manifest).rotate_left(32) ^ half(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: Id = [7; 32];
    const IDS: [Id; 3] = [[1; 32], [2; 32], [3; 32]];

    /// A member's memory and a clock.
    struct World {
        swarm: Swarm,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            let (swarm, now) = (Swarm::default(), Instant::now());
            Self { swarm, now }
        }

        fn ask(
            &self,
            node: &str,
            ids: &[Id],
            avoid: &[&str],
            insist: bool,
        ) -> (usize, Vec<String>) {
            let asked = Asked {
                node,
                avoid,
                insist,
            };
            let share = self.swarm.ask(&IMAGE, ids, asked, self.now);
            (share.given.len(), share.nodes)
        }
    }

    fn given() -> (usize, Vec<String>) {
        (3, Vec::new())
    }

    #[test]
    fn the_first_is_given_everything_and_the_others_are_sent_there() {
        let world = World::new();
        assert_eq!(world.ask("a", &IDS, &[], false), given());
        assert_eq!(
            world.ask("a", &IDS, &[], false),
            given(),
            "its answer was lost"
        );
        assert_eq!(world.ask("b", &IDS, &[], false), (0, vec!["a".to_owned()]));
        let (none, nodes) = world.ask("c", &IDS, &[], false);
        assert_eq!((none, nodes), (0, vec!["a".to_owned(), "b".to_owned()]));
        // One that serves nobody is sent there too, and nobody is sent to it.
        assert_eq!(world.ask("", &IDS, &[], false).0, 0);
        assert!(!world.ask("d", &IDS, &[], false).1.contains(&String::new()));
        // Of another image, nothing is known.
        let other = world.swarm.ask(&[8; 32], &IDS, Asked::default(), world.now);
        assert_eq!(other.given.len(), 3);
        let figures = world.swarm.figures();
        assert_eq!(figures.left_out, 4 * 3);
    }

    #[test]
    fn who_does_not_give_is_replaced_by_the_first_who_says_so() {
        let world = World::new();
        world.ask("a", &IDS, &[], false);
        for node in ["b", "c", "d"] {
            world.ask(node, &IDS, &[], false);
        }
        assert_eq!(world.ask("b", &IDS, &["a"], false), given());
        for node in ["c", "d"] {
            let (none, nodes) = world.ask(node, &IDS, &["a"], false);
            assert_eq!((none, nodes[0].as_str()), (0, "b"));
        }
        assert_eq!(world.ask("c", &IDS, &["a"], true), given());
        assert_eq!(world.ask("d", &IDS, &["a", "b", "c"], false), given());
    }

    #[test]
    fn ten_nodes_in_any_order_take_one_copy() {
        let world = World::new();
        let ids: Vec<Id> = (0..200_u8).map(|n| [n; 32]).collect();
        // Each in an order of its own.
        let steps = [1, 3, 7, 9, 11, 13, 17, 19, 21, 23];
        let mut sent = 0;
        for turn in 0..200 {
            for (node, step) in steps.iter().enumerate() {
                let at = (turn * step + 20 * node) % 200;
                let name = format!("n{node}");
                sent += world.ask(&name, &ids[at..=at], &[], false).0;
            }
        }
        assert_eq!(sent, 200);
    }

    #[test]
    fn what_is_old_is_forgotten_and_memory_given_back() {
        let mut world = World::new();
        world.ask("a", &IDS, &[], false);
        world.now += REMEMBERED + Duration::from_secs(1);
        assert_eq!(world.ask("b", &IDS[..1], &[], false), (1, Vec::new()));
        assert_eq!(world.swarm.ledger.lock().given.len(), 1);
        world.now += REMEMBERED * 2;
        world.ask("", &[], &[], false);
        assert!(world.swarm.ledger.lock().nodes.is_empty());
    }
}
