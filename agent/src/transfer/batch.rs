//! Some chunks that a pull lacks, and where to turn next for them. Pure: what was heard and the time come in, the
//! next step goes out.
//!
//! Every node asks the same member for the same part of an image, so that this member alone knows which nodes
//! have it, and takes its batches in an order of its own, so that nodes hold different parts early.
//!
//! ```text
//! member -> chunks: written
//!        -> "ask these nodes" -> node has them: written
//!                             -> not yet: again in a moment, while the node makes headway and not for ever
//!                             -> silent, slow, lying: never again; nobody left: member
//!        -> fails: the next member, after all of them a pause
//! ```

use super::BATCH_CHUNKS;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Pauses between rounds over all members; after the last the pull fails.
const PAUSES_MS: [u64; 5] = [100, 500, 1000, 2000, 4000];
/// First and longest pause before a node is asked again for what it did not have yet.
const WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Without any headway of the nodes that shall have it, the members are asked again after this.
const PATIENCE: Duration = Duration::from_secs(10);
/// And after this in any case.
const PATIENCE_MAX: Duration = Duration::from_secs(60);
/// Longest address of a node.
const URL_MAX: usize = 128;

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask the member with this place in the order. `insist`: nodes were waited for in vain.
    Member { place: usize, insist: bool },
    /// Ask these nodes, one after the other.
    Nodes(Vec<String>),
}

/// Chunks that travel together.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    /// Numbers of those still lacking, ascending.
    pub(super) lacking: Vec<u64>,
    /// Nothing is to be done before.
    pub(super) ready: Option<Instant>,
    home: usize,
    failures: usize,
    nodes: Vec<String>,
    /// Nodes that did not give.
    avoid: BTreeSet<String>,
    insist: bool,
    told: Option<Instant>,
    grown: Option<Instant>,
    held: BTreeMap<String, u64>,
    wait: Duration,
}

/// Everything that is needed, cut into batches of which each has one of `members` as its home, in an order that
/// follows from `seed`; without a seed in that of the file.
pub(super) fn batches(needed: &[u64], members: usize, seed: Option<u64>) -> Vec<Batch> {
    let members = members.max(1);
    let mut open: Vec<Vec<u64>> = vec![Vec::new(); members];
    let mut out = Vec::new();
    for number in needed {
        let part = usize::try_from(number / BATCH_CHUNKS as u64).unwrap_or(0);
        let home = part % members;
        open[home].push(*number);
        if open[home].len() == BATCH_CHUNKS {
            out.push(Batch::new(home, std::mem::take(&mut open[home])));
        }
    }
    let rest = open.into_iter().enumerate().filter(|(_, o)| !o.is_empty());
    out.extend(rest.map(|(home, numbers)| Batch::new(home, numbers)));
    if let Some(seed) = seed {
        shuffle(&mut out, seed);
    }
    out
}

/// Fisher and Yates, with a small generator: the order need not be unpredictable, only each node's own.
fn shuffle(batches: &mut [Batch], seed: u64) {
    let mut state = seed | 1;
    for last in (1..batches.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bound = last as u64 + 1;
        batches.swap(last, usize::try_from(state % bound).unwrap_or(0));
    }
}

impl Batch {
    fn new(home: usize, lacking: Vec<u64>) -> Self {
        Self {
            lacking,
            ready: None,
            home,
            failures: 0,
            nodes: Vec::new(),
            avoid: BTreeSet::new(),
            insist: false,
            told: None,
            grown: None,
            held: BTreeMap::new(),
            wait: WAIT.0,
        }
    }

    /// Where to turn.
    pub(super) fn next(&self) -> Step {
        if !self.nodes.is_empty() {
            return Step::Nodes(self.nodes.clone());
        }
        Step::Member {
            place: self.home + self.failures,
            insist: self.insist,
        }
    }

    /// A member left something out and named these nodes instead.
    pub(super) fn told(&mut self, mut nodes: Vec<String>, now: Instant) {
        nodes.retain(|n| !self.avoid.contains(n));
        self.insist = nodes.is_empty();
        (self.told, self.grown) = (Some(now), Some(now));
        self.wait = WAIT.0;
        self.nodes = nodes;
        self.ready = Some(now);
    }

    /// A node answered, perhaps with something, and has so many chunks now.
    pub(super) fn heard(&mut self, node: &str, held: u64, now: Instant) {
        let before = self.held.insert(node.to_owned(), held);
        if before.is_none_or(|before| held > before) {
            self.grown = Some(now);
        }
    }

    /// A node is silent, or lies, or has nothing of it.
    pub(super) fn drop_node(&mut self, node: &str) {
        self.nodes.retain(|n| n != node);
        self.avoid.insert(node.to_owned());
    }

    /// All nodes were asked just now; what is lacking they do not have yet. Only here is patience looked at: a
    /// batch that had no turn for long knows nothing of their headway before it has asked them.
    pub(super) fn wait(&mut self, now: Instant) {
        if self.nodes.is_empty() {
            return;
        }
        let over = |since: Option<Instant>, limit| since.is_some_and(|at| now - at >= limit);
        if over(self.grown, PATIENCE) || over(self.told, PATIENCE_MAX) {
            self.nodes.clear();
            self.insist = true;
            return;
        }
        self.ready = Some(now + self.wait);
        self.wait = (self.wait * 2).min(WAIT.1);
    }

    /// Nodes that did not give.
    pub(super) fn avoid(&self) -> impl Iterator<Item = &str> {
        self.avoid.iter().map(String::as_str)
    }

    /// A member failed, or lacks something. `false`: they all did, too often.
    pub(super) fn failed(&mut self, members: usize, now: Instant) -> bool {
        self.failures += 1;
        let members = members.max(1);
        let round = self.failures / members;
        if self.failures.is_multiple_of(members) {
            let Some(pause) = round.checked_sub(1).and_then(|n| PAUSES_MS.get(n)) else {
                return false;
            };
            self.ready = Some(now + Duration::from_millis(*pause));
        }
        true
    }
}

/// The address of a node, if it may be one: of HTTP, with a host and a port and nothing more.
pub fn node_url(text: &str) -> Option<&str> {
    let at = text.strip_prefix("http://")?;
    let (host, port) = at.rsplit_once(':')?;
    let plain =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    let good = text.len() <= URL_MAX && !host.is_empty() && host.bytes().all(plain);
    (good && port.parse::<u16>().is_ok_and(|p| p > 0)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn all_nodes_turn_to_the_same_member_for_the_same_part() {
        let all: Vec<u64> = (0..10 * BATCH_CHUNKS as u64 + 5).collect();
        let plan = |seed| {
            let mut plan = batches(&all, 3, seed);
            let order: Vec<u64> = plan.iter().map(|b| b.lacking[0]).collect();
            plan.sort_by_key(|b| b.lacking[0]);
            let parts: Vec<_> = plan.into_iter().map(|b| (b.home, b.lacking)).collect();
            (order, parts)
        };
        let (by_file, parts) = plan(None);
        assert!(by_file.is_sorted());
        assert_eq!(parts.len(), 11);
        let together: Vec<u64> = parts.iter().flat_map(|(_, p)| p).copied().collect();
        assert_eq!(together, all);
        let (one, of_one) = plan(Some(1));
        let (other, of_other) = plan(Some(12_345));
        assert!(one != other && one != by_file, "each in its own order");
        assert!(of_one == parts && of_other == parts);
        // A few chunks all over the file travel together nevertheless.
        let few: Vec<u64> = (0..300).map(|n| n * 1000).collect();
        assert_eq!(batches(&few, 3, None).len(), 3);
        assert!(batches(&[], 3, Some(1)).is_empty());
        assert_eq!(batches(&few, 0, None).len(), 3);
    }

    #[test]
    fn nodes_are_waited_for_while_they_make_headway_and_not_for_ever() {
        let mut now = Instant::now();
        let mut batch = Batch::new(2, vec![1]);
        let member = |place, insist| Step::Member { place, insist };
        assert_eq!(batch.next(), member(2, false));
        batch.told(names(&["a", "b"]), now);
        assert_eq!(batch.next(), Step::Nodes(names(&["a", "b"])));
        for held in 1..=6 {
            now += PATIENCE - MS;
            batch.heard("a", held, now);
            batch.wait(now);
            assert_eq!(batch.next(), Step::Nodes(names(&["a", "b"])), "{held} held");
        }
        assert_eq!(batch.ready, Some(now + WAIT.1));
        now += PATIENCE;
        batch.heard("a", 6, now);
        batch.ready = None;
        batch.wait(now);
        assert_eq!(batch.next(), member(2, true), "no headway");
        assert_eq!(batch.ready, None, "at once");
        batch.told(names(&["a"]), now);
        for held in 7.. {
            now += PATIENCE / 2;
            batch.heard("a", held, now);
            batch.wait(now);
            if batch.next() == member(2, true) {
                break;
            }
            assert!(held < 100, "for ever");
        }
    }

    #[test]
    fn a_batch_that_had_no_turn_for_long_asks_the_nodes_before_it_gives_them_up() {
        let mut now = Instant::now();
        let nodes = Step::Nodes(names(&["a"]));
        let mut batch = Batch::new(0, vec![1]);
        batch.told(names(&["a"]), now);
        batch.heard("a", 1, now);
        batch.wait(now);
        // A busy machine: the next turn comes late, and not for want of headway.
        now += PATIENCE * 3;
        assert_eq!(batch.next(), nodes);
        batch.heard("a", 2, now);
        batch.wait(now);
        assert_eq!(batch.next(), nodes, "it has made headway meanwhile");
        now += PATIENCE * 2;
        assert_eq!(batch.next(), nodes);
        batch.heard("a", 2, now);
        batch.wait(now);
        let insist = true;
        assert_eq!(
            batch.next(),
            Step::Member { place: 0, insist },
            "it has not"
        );
    }

    #[test]
    fn a_node_that_does_not_give_is_never_asked_again() {
        let now = Instant::now();
        let mut batch = Batch::new(0, vec![1]);
        batch.told(names(&["a", "b"]), now);
        batch.drop_node("a");
        assert_eq!(batch.next(), Step::Nodes(names(&["b"])));
        batch.drop_node("b");
        batch.ready = None;
        batch.wait(now);
        assert_eq!(batch.ready, None, "nobody is left to wait for");
        let back = batch.next();
        assert_eq!(
            back,
            Step::Member {
                place: 0,
                insist: false
            }
        );
        assert_eq!(batch.avoid().collect::<Vec<_>>(), ["a", "b"]);
        // A member that knows only these is asked for the bytes themselves.
        batch.told(names(&["b", "a"]), now);
        let back = batch.next();
        assert_eq!(
            back,
            Step::Member {
                place: 0,
                insist: true
            }
        );
    }

    #[test]
    fn every_member_is_tried_in_rounds_with_pauses_and_then_no_more() {
        let now = Instant::now();
        let mut batch = Batch::new(1, vec![1]);
        let mut pauses = Vec::new();
        let mut tries = 1;
        while batch.failed(3, now) {
            tries += 1;
            let pause = batch.ready.take().map(|at| (at - now).as_millis());
            pauses.extend(pause);
        }
        assert_eq!(tries, 3 * (PAUSES_MS.len() + 1));
        assert_eq!(pauses, PAUSES_MS.map(u128::from));
    }

    #[test]
    fn addresses_of_nodes() {
        for good in [
            "http://10.0.0.1:8092",
            "http://[fe80::1]:1",
            "http://n-1.x:9",
        ] {
            assert_eq!(node_url(good), Some(good));
        }
        let long = format!("http://{}:1", "x".repeat(URL_MAX));
        for bad in [
            "",
            "https://a:1",
            "http://a",
            "http://:1",
            "http://a:0",
            "http://a:99999",
            "http://a:1/x",
            "http://u@a:1",
            "http://a b:1",
            "http://a,b:1",
            &long,
        ] {
            assert_eq!(node_url(bad), None, "{bad}");
        }
    }
}
