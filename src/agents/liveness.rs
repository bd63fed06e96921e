//! What agents say that is not worth the log: heartbeats, figures, progress of pulls. In memory on
//! every member; refuses to judge (the leader's `reconcile` does).
//!
//! A member hears its own agents first hand. Every [exchange](super::exchange) interval (half a
//! second) a follower hands what it heard to the leader and takes back what the leader heard from
//! everybody else, so any member can show any node's figures, at most about a second old.
//! Each fact has a place in a local sequence; "what is new since N" is then a range.

use crate::stamp;
use mainstay_agent::wire::NodeStats;
use mainstay_model::{InstanceId, NodeId};
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
    /// How long ago the agent said it, in ms.
    pub age_ms: u64,
    /// Soft figures.
    pub stats: NodeStats,
    /// Pulls in progress: instance and part done, 0..1.
    pub progress: Vec<(String, f32)>,
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
    at: Instant,
    seq: u64,
    stats: NodeStats,
    progress: BTreeMap<InstanceId, f32>,
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

    /// A node was heard, here or (with an age) by another member. What is older than what is known
    /// changes nothing, so members can repeat each other without end.
    pub fn hear(&self, heard: &Heard) {
        let now = Instant::now();
        let Some(at) = now.checked_sub(Duration::from_millis(heard.age_ms)) else {
            return;
        };
        let node = NodeId(heard.node.clone());
        let mut inner = self.inner.lock();
        if inner.nodes.get(&node).is_some_and(|known| known.at >= at) {
            return;
        }
        inner.remove(&node);
        inner.insert(node, at, heard);
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
        let heard = inner
            .by_seq
            .range(cursor.saturating_add(1)..)
            .filter_map(|(_, node)| Some((node, inner.nodes.get(node)?)))
            .map(|(node, entry)| entry.tell(node))
            .collect();
        Gossip {
            epoch: inner.epoch,
            cursor: inner.seq,
            heard,
        }
    }
}

impl Entry {
    fn tell(&self, node: &NodeId) -> Heard {
        Heard {
            node: node.0.clone(),
            age_ms: u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX),
            stats: self.stats.clone(),
            progress: self
                .progress
                .iter()
                .map(|(id, part)| (id.0.clone(), *part))
                .collect(),
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

    fn insert(&mut self, node: NodeId, at: Instant, heard: &Heard) {
        self.seq += 1;
        let progress: BTreeMap<InstanceId, f32> = heard
            .progress
            .iter()
            .map(|(id, part)| (InstanceId(id.clone()), part.clamp(0.0, 1.0)))
            .collect();
        self.progress
            .extend(progress.iter().map(|(id, part)| (id.clone(), *part)));
        self.by_seq.insert(self.seq, node.clone());
        let seq = self.seq;
        let stats = heard.stats.clone();
        self.nodes.insert(
            node,
            Entry {
                at,
                seq,
                stats,
                progress,
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

    fn heard(node: &str, age_ms: u64, vms: u32) -> Heard {
        Heard {
            node: node.to_owned(),
            age_ms,
            stats: NodeStats {
                vm_count: vms,
                ..NodeStats::default()
            },
            progress: vec![(format!("i-{node}"), 0.5)],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn older_news_change_nothing() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let liveness = Liveness::new();
        liveness.hear(&heard("a", 0, 2));
        let seq = liveness.seq(&"a".into());
        liveness.hear(&heard("a", 500, 1));
        assert_eq!(liveness.node_stats(&"a".into()).unwrap().vm_count, 2);
        assert_eq!(liveness.seq(&"a".into()), seq);
        assert_eq!(liveness.progress(&"i-a".into()), Some(0.5));
    }

    #[tokio::test(start_paused = true)]
    async fn two_members_tell_each_other_everything_once() {
        tokio::time::advance(Duration::from_secs(60)).await;
        let (leader, follower) = (Liveness::new(), Liveness::new());
        leader.hear(&heard("a", 100, 1));
        leader.hear(&heard("b", 0, 2));
        let first = leader.since(0, 0);
        assert_eq!(first.heard.len(), 2);
        for h in &first.heard {
            follower.hear(h);
        }
        assert_eq!(follower.age(&"a".into()), Some(Duration::from_millis(100)));
        assert!(leader.since(first.epoch, first.cursor).heard.is_empty());
        tokio::time::advance(Duration::from_millis(10)).await;
        leader.hear(&heard("a", 0, 3));
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
        liveness.hear(&heard("a", 0, 1));
        tokio::time::advance(FORGET_AFTER + Duration::from_secs(1)).await;
        liveness.hear(&heard("b", 0, 1));
        assert_eq!(liveness.node_stats(&"a".into()), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        liveness.hear(&Heard {
            progress: Vec::new(),
            ..heard("b", 0, 1)
        });
        assert_eq!(liveness.progress(&"i-b".into()), None);
    }
}
