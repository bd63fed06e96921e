//! What agents say that is not worth the log: heartbeats, figures, progress of pulls. In memory on
//! every member; refuses to judge (the leader's `reconcile` does).
//!
//! A member hears its own agents first hand. Every [exchange](super::exchange) interval (half a
//! second) a follower hands what it heard to the leader and takes back what the leader heard from
//! everybody else, so any member can show any node's figures, at most about a second old.
//! Each fact has a place in a local sequence; "what is new since N" is then a range.
//!
//! Members tell ages, and an age grows on the way by less than the way takes: a heartbeat that comes
//! back looks younger than it is. So each has an identity, and one that is known is never news.

use crate::stamp;
use mainstay_agent::wire::{ImagePull, NodeStats};
use mainstay_model::{InstanceId, NodeId, TemplateId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A node that was silent this long is forgotten here: its figures say nothing any more.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// One node's newest heartbeat, as members tell it to each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Heard {
    /// Whose.
    pub node: String,
    /// The member that the agent said it to, by the epoch of its sequence.
    pub home: u64,
    /// Its place among everything said to that member: with `home`, the identity of this heartbeat.
    pub beat: u64,
    /// How long ago the agent said it, in ms.
    pub age_ms: u64,
    /// Soft figures.
    pub stats: NodeStats,
    /// Pulls in progress: instance and part done, 0..1.
    pub progress: Vec<(String, f32)>,
    /// Images that are being fetched before an instance needs them. `None`: the agent cannot do that.
    pub pulls: Option<Vec<ImagePull>>,
}

/// What one member's [`Liveness`] tells another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gossip {
    /// Names the sequence: another one means that the member restarted.
    pub epoch: u64,
    /// Place in the sequence up to which this tells everything.
    pub cursor: u64,
    /// The facts.
    pub heard: Vec<Heard>,
}

struct Entry {
    home: u64,
    beat: u64,
    at: Instant,
    seq: u64,
    stats: NodeStats,
    progress: BTreeMap<InstanceId, f32>,
    pulls: Option<Vec<ImagePull>>,
}

struct Inner {
    epoch: u64,
    seq: u64,
    nodes: BTreeMap<NodeId, Entry>,
    by_seq: BTreeMap<u64, NodeId>,
    progress: BTreeMap<InstanceId, f32>,
}

/// Shared by the agents' routes, the REST handlers and the reconcilers; cheap to clone.
#[derive(Clone)]
pub struct Liveness {
    inner: Arc<Mutex<Inner>>,
}

impl Default for Liveness {
    fn default() -> Self {
        Self::new()
    }
}

impl Liveness {
    /// Nothing heard yet.
    pub fn new() -> Self {
        let inner = Inner {
            epoch: stamp::member_id(),
            seq: 0,
            nodes: BTreeMap::new(),
            by_seq: BTreeMap::new(),
            progress: BTreeMap::new(),
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// A node's newest figures, if any member that we heard of has heard it.
    pub fn node_stats(&self, node: &NodeId) -> Option<NodeStats> {
        let inner = self.inner.lock();
        inner.nodes.get(node).map(|e| e.stats.clone())
    }

    /// How much of an instance's image its node has fetched, 0..1, while it is being fetched.
    pub fn progress(&self, instance: &InstanceId) -> Option<f32> {
        self.inner.lock().progress.get(instance).copied()
    }

    /// How far a node is with an image that it fetches before an instance needs it; nothing while it
    /// waits its turn.
    pub fn pull(&self, node: &NodeId, template: &TemplateId, number: u32) -> Option<ImagePull> {
        let inner = self.inner.lock();
        let mut pulls = inner.nodes.get(node)?.pulls.iter().flatten();
        let found = pulls.find(|p| p.number == number && p.template_id == template.as_str());
        found.cloned()
    }

    /// All that a node said of such images; `None` if it was not heard, or if its agent cannot do that.
    pub fn pulls(&self, node: &NodeId) -> Option<Vec<ImagePull>> {
        self.inner.lock().nodes.get(node)?.pulls.clone()
    }

    /// When the node was last heard, in ms since the Unix epoch.
    pub fn last_heard_ms(&self, node: &NodeId) -> Option<u64> {
        let age = self.age(node)?;
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        Some(stamp::now_ms().saturating_sub(age_ms))
    }

    /// How long ago the node was last heard.
    pub fn age(&self, node: &NodeId) -> Option<Duration> {
        let inner = self.inner.lock();
        inner.nodes.get(node).map(|e| e.at.elapsed())
    }

    /// Place of the node's newest heartbeat in the local sequence: it changes when the node is heard.
    pub fn seq(&self, node: &NodeId) -> Option<u64> {
        self.inner.lock().nodes.get(node).map(|e| e.seq)
    }

    /// An agent said this to us, now: a new heartbeat, whatever identity and age stand in it.
    pub fn hear(&self, said: &Heard) {
        let now = Instant::now();
        let mut inner = self.inner.lock();
        let first_hand = Heard {
            home: inner.epoch,
            beat: inner.seq + 1,
            ..said.clone()
        };
        inner.replace(now, &first_hand);
        inner.forget_silent(now);
    }

    /// Another member told this. A heartbeat that is known, or older than the known one, changes
    /// nothing: members can repeat each other without end, and a silent node stays silent.
    pub fn learn(&self, told: &Heard) {
        let now = Instant::now();
        let Some(at) = now.checked_sub(Duration::from_millis(told.age_ms)) else {
            return;
        };
        let node = NodeId::from(told.node.clone());
        let mut inner = self.inner.lock();
        if inner.nodes.get(&node).is_some_and(|e| e.covers(told, at)) {
            return;
        }
        inner.replace(at, told);
        inner.forget_silent(now);
    }

    /// The node is no more.
    pub fn forget(&self, node: &NodeId) {
        self.inner.lock().remove(node);
    }

    /// Everything heard after `cursor` of sequence `epoch` (everything, if that is not ours).
    pub fn since(&self, epoch: u64, cursor: u64) -> Gossip {
        let inner = self.inner.lock();
        let cursor = if epoch == inner.epoch { cursor } else { 0 };
        inner.tell(cursor, |_| true)
    }

    /// The same of what agents said to this member itself.
    pub fn own_since(&self, epoch: u64, cursor: u64) -> Gossip {
        let inner = self.inner.lock();
        let cursor = if epoch == inner.epoch { cursor } else { 0 };
        inner.tell(cursor, |entry| entry.home == inner.epoch)
    }
}

impl Entry {
    /// Is what was told, said at `at` as far as can be seen, no news? One home's heartbeats have an
    /// exact order; those of two homes (the agent moved) have only their times.
    fn covers(&self, told: &Heard, at: Instant) -> bool {
        if self.home == told.home {
            self.beat >= told.beat
        } else {
            self.at >= at
        }
    }

    fn tell(&self, node: &NodeId) -> Heard {
        Heard {
            node: node.to_string(),
            home: self.home,
            beat: self.beat,
            age_ms: u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX),
            stats: self.stats.clone(),
            progress: self
                .progress
                .iter()
                .map(|(id, part)| (id.to_string(), *part))
                .collect(),
            pulls: self.pulls.clone(),
        }
    }
}

impl Inner {
    fn remove(&mut self, node: &NodeId) {
        if let Some(old) = self.nodes.remove(node) {
            self.by_seq.remove(&old.seq);
            for id in old.progress.keys() {
                self.progress.remove(id);
            }
        }
    }

    fn tell(&self, cursor: u64, which: impl Fn(&Entry) -> bool) -> Gossip {
        let new = self.by_seq.range(cursor.saturating_add(1)..);
        let heard = new
            .filter_map(|(_, node)| Some((node, self.nodes.get(node)?)))
            .filter(|(_, entry)| which(entry))
            .map(|(node, entry)| entry.tell(node))
            .collect();
        Gossip {
            epoch: self.epoch,
            cursor: self.seq,
            heard,
        }
    }

    fn replace(&mut self, at: Instant, heard: &Heard) {
        let node = NodeId::from(heard.node.clone());
        self.remove(&node);
        self.seq += 1;
        let progress: BTreeMap<InstanceId, f32> = heard
            .progress
            .iter()
            .map(|(id, part)| (InstanceId::from(id.clone()), part.clamp(0.0, 1.0)))
            .collect();
        self.progress
            .extend(progress.iter().map(|(id, part)| (id.clone(), *part)));
        self.by_seq.insert(self.seq, node.clone());
        let seq = self.seq;
        let stats = heard.stats.clone();
        self.nodes.insert(
            node,
            Entry {
                home: heard.home,
                beat: heard.beat,
                at,
                seq,
                stats,
                progress,
                pulls: heard.pulls.clone(),
            },
        );
    }

    /// Bounded work: looks at the oldest only.
    fn forget_silent(&mut self, now: Instant) {
        while let Some((_, node)) = self.by_seq.first_key_value() {
            let silent = self
                .nodes
                .get(node)
                .is_none_or(|e| now.duration_since(e.at) > FORGET_AFTER);
            if !silent {
                return;
            }
            let node = node.clone();
            self.remove(&node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(node: &str, vms: u32) -> Heard {
        Heard {
            node: node.to_owned(),
            stats: NodeStats {
                vm_count: vms,
                ..NodeStats::default()
            },
            progress: vec![(format!("i-{node}"), 0.5)],
            ..Heard::default()
        }
    }

    fn told(beat: (u64, u64), age_ms: u64, vms: u32) -> Heard {
        Heard {
            home: beat.0,
            beat: beat.1,
            age_ms,
            ..heard("a", vms)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn older_news_change_nothing() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let liveness = Liveness::new();
        liveness.learn(&told((7, 5), 100, 2));
        let seq = liveness.seq(&"a".into());
        // The same again and an older one of the same home, both looking younger; an older one of another.
        liveness.learn(&told((7, 5), 0, 1));
        liveness.learn(&told((7, 4), 0, 1));
        liveness.learn(&told((8, 9), 500, 1));
        assert_eq!(liveness.node_stats(&"a".into()).unwrap().vm_count, 2);
        assert_eq!(liveness.seq(&"a".into()), seq);
        assert_eq!(liveness.progress(&"i-a".into()), Some(0.5));
        // A newer one of the same home counts even if it looks older; one of another home by its time.
        liveness.learn(&told((7, 6), 200, 3));
        assert_eq!(liveness.node_stats(&"a".into()).unwrap().vm_count, 3);
        liveness.learn(&told((8, 9), 50, 4));
        assert_eq!(liveness.node_stats(&"a".into()).unwrap().vm_count, 4);
    }

    /// Hands everything over, as late as the way takes; the ages were told before it.
    async fn travel(from: &Liveness, to: &Liveness, place: &mut (u64, u64)) {
        let gossip = from.since(place.0, place.1);
        *place = (gossip.epoch, gossip.cursor);
        tokio::time::advance(Duration::from_millis(3)).await;
        for told in &gossip.heard {
            to.learn(told);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn members_that_repeat_each_other_do_not_keep_a_silent_node_alive() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let (leader, follower) = (Liveness::new(), Liveness::new());
        let (mut up, mut down) = ((0, 0), (0, 0));
        let node = NodeId::from("a");
        for _ in 0..3 {
            follower.hear(&heard("a", 1));
            travel(&follower, &leader, &mut up).await;
            travel(&leader, &follower, &mut down).await;
        }
        let (begun, seq) = (Instant::now(), leader.seq(&node));
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(500)).await;
            travel(&follower, &leader, &mut up).await;
            travel(&leader, &follower, &mut down).await;
        }
        assert_eq!(
            leader.seq(&node),
            seq,
            "nothing that looks like a heartbeat"
        );
        for member in [&leader, &follower] {
            assert!(member.age(&node).unwrap() >= begun.elapsed());
        }
        follower.hear(&heard("a", 1));
        travel(&follower, &leader, &mut up).await;
        assert!(leader.age(&node).unwrap() < Duration::from_millis(10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_tells_what_it_heard_itself() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let follower = Liveness::new();
        follower.hear(&heard("b", 1));
        follower.learn(&told((7, 5), 0, 2));
        let gossip = follower.own_since(0, 0);
        let names: Vec<_> = gossip.heard.iter().map(|h| h.node.as_str()).collect();
        assert_eq!(names, ["b"]);
        assert_eq!(follower.since(0, 0).heard.len(), 2);
        assert!(
            follower
                .own_since(gossip.epoch, gossip.cursor)
                .heard
                .is_empty()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn two_members_tell_each_other_everything_once() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let (leader, follower) = (Liveness::new(), Liveness::new());
        leader.learn(&told((7, 5), 100, 1));
        leader.hear(&heard("b", 2));
        let first = leader.since(0, 0);
        assert_eq!(first.heard.len(), 2);
        for h in &first.heard {
            follower.learn(h);
        }
        assert_eq!(follower.age(&"a".into()), Some(Duration::from_millis(100)));
        assert!(leader.since(first.epoch, first.cursor).heard.is_empty());
        tokio::time::advance(Duration::from_millis(10)).await;
        leader.hear(&heard("a", 3));
        let second = leader.since(first.epoch, first.cursor);
        assert_eq!(second.heard.len(), 1);
        assert_eq!(second.heard[0].stats.vm_count, 3);
        let other_sequence = leader.since(first.epoch ^ 1, second.cursor);
        assert_eq!(
            other_sequence.heard.len(),
            2,
            "another sequence starts anew"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_long_silent_are_forgotten_and_finished_pulls_vanish() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let liveness = Liveness::new();
        liveness.hear(&heard("a", 1));
        tokio::time::advance(FORGET_AFTER + Duration::from_secs(1)).await;
        liveness.hear(&heard("b", 1));
        assert_eq!(liveness.node_stats(&"a".into()), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        liveness.hear(&Heard {
            progress: Vec::new(),
            ..heard("b", 1)
        });
        assert_eq!(liveness.progress(&"i-b".into()), None);
    }
}
