//! Which nodes are reachable, and which are lost. Verdicts come from ages that only this leader's
//! own, awake and connected time makes older: a new leader begins at zero for everyone, a pause of
//! this process counts as one tick, and time without a quorum counts as nothing at all.

use super::{ReconcileConfig, lead};
use crate::agents::Liveness;
use crate::app::{App, Consistency};
use mainstay_model::{Command, NodeId, State};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Ends with the group.
pub(super) async fn run(app: App, liveness: Liveness, config: ReconcileConfig) {
    let mut judge = Judge::new(config);
    loop {
        let waited = !app.group().status().is_leader();
        if !lead(&app).await {
            return;
        }
        if waited {
            judge = Judge::new(config);
        }
        let began = Instant::now();
        sleep(config.judge_every).await;
        let awake = began.elapsed();
        // Only who is heard by a majority may say that somebody else is not heard.
        let quorum = app.group().read_barrier(config.unreachable_after).await;
        if quorum.is_err() {
            judge = Judge::new(config);
            continue;
        }
        let verdicts = {
            let Ok(state) = app.read(Consistency::Stale).await else {
                continue;
            };
            judge.look(&state, awake, &|node| liveness.seq(node))
        };
        for verdict in verdicts {
            tracing::info!(?verdict, "verdict");
            if let Err(error) = app.submit(verdict).await {
                tracing::warn!(%error, "a verdict was not committed; judging again");
            }
        }
    }
}

/// How long a node has been silent, as far as it counts.
#[derive(Default)]
struct Silence {
    /// The newest heartbeat that was seen.
    seq: Option<u64>,
    age: Duration,
}

struct Judge {
    config: ReconcileConfig,
    nodes: BTreeMap<NodeId, Silence>,
    /// Nothing before the first look counts as a heartbeat.
    begun: bool,
}

impl Judge {
    fn new(config: ReconcileConfig) -> Self {
        Self {
            config,
            nodes: BTreeMap::new(),
            begun: false,
        }
    }

    /// One tick that took `elapsed`: verdicts for all nodes. `seq` changes when a node is heard.
    fn look(
        &mut self,
        state: &State,
        elapsed: Duration,
        seq: &dyn Fn(&NodeId) -> Option<u64>,
    ) -> Vec<Command> {
        let counts = elapsed.min(self.config.judge_every * 2);
        self.nodes.retain(|id, _| state.nodes.contains_key(id));
        let mut verdicts = Vec::new();
        for (id, node) in &state.nodes {
            let silence = self.nodes.entry(id.clone()).or_default();
            let now = seq(id);
            let heard = self.begun && now.is_some() && now != silence.seq;
            if heard || !self.begun {
                silence.age = Duration::ZERO;
            } else {
                silence.age = silence.age.saturating_add(counts);
            }
            silence.seq = now;
            let verdict = |reachable, lost| Command::SetNodeReachability {
                id: id.clone(),
                reachable,
                lost,
            };
            if heard && (!node.reachable || node.lost) {
                verdicts.push(verdict(true, false));
            } else if silence.age >= self.config.lease && !node.lost {
                verdicts.push(verdict(false, true));
            } else if silence.age >= self.config.unreachable_after && node.reachable {
                verdicts.push(verdict(false, false));
            }
        }
        self.begun = true;
        verdicts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_model::{CommandId, Envelope, node::NodeSpec};

    const TICK: Duration = Duration::from_secs(1);

    struct World {
        state: State,
        judge: Judge,
        seq: Option<u64>,
        ids: u128,
    }

    impl World {
        fn new() -> Self {
            let config = ReconcileConfig {
                unreachable_after: TICK * 5,
                lease: TICK * 10,
                judge_every: TICK,
                ..ReconcileConfig::default()
            };
            let mut world = Self {
                state: State::default(),
                judge: Judge::new(config),
                seq: Some(1),
                ids: 0,
            };
            world.apply(Command::RegisterNode {
                id: "n".into(),
                spec: Box::new(NodeSpec {
                    arch: "amd64".to_owned(),
                    capacity: 2,
                    ..NodeSpec::default()
                }),
            });
            world
        }

        fn apply(&mut self, command: Command) {
            self.ids += 1;
            self.state.apply(&Envelope {
                id: CommandId(self.ids),
                stamp_ms: 1,
                command,
            });
        }

        /// Ticks and carries verdicts out; the tick (from 1) at which each fell.
        fn ticks(
            &mut self,
            count: usize,
            elapsed: Duration,
            beats: bool,
        ) -> Vec<(usize, bool, bool)> {
            let mut fell = Vec::new();
            for tick in 1..=count {
                if beats {
                    self.seq = self.seq.map(|s| s + 1);
                }
                let seq = self.seq;
                for verdict in self.judge.look(&self.state, elapsed, &|_| seq) {
                    if let Command::SetNodeReachability {
                        reachable, lost, ..
                    } = verdict
                    {
                        fell.push((tick, reachable, lost));
                    }
                    self.apply(verdict);
                }
            }
            fell
        }
    }

    #[test]
    fn silence_makes_unreachable_then_lost_and_a_heartbeat_ends_both() {
        let mut world = World::new();
        assert_eq!(world.ticks(30, TICK, true), []);
        assert_eq!(
            world.ticks(30, TICK, false),
            [(5, false, false), (10, false, true)]
        );
        assert_eq!(world.ticks(3, TICK, true), [(1, true, false)]);
    }

    #[test]
    fn a_pause_of_ours_is_not_held_against_anybody() {
        let mut world = World::new();
        world.ticks(2, TICK, true);
        assert_eq!(world.ticks(1, TICK * 1000, false), []);
        assert_eq!(world.ticks(2, TICK, false), []);
        assert_eq!(world.ticks(1, TICK, false), [(1, false, false)]);
    }

    #[test]
    fn a_new_leader_grants_everybody_a_full_lease() {
        let mut world = World::new();
        world.ticks(9, TICK, false);
        world.judge = Judge::new(world.judge.config);
        // One look to begin with, then the whole lease.
        assert_eq!(world.ticks(10, TICK, false), []);
        assert_eq!(world.ticks(1, TICK, false), [(1, false, true)]);
        // What an old heartbeat left in memory is no sign of life to the next leader either.
        world.judge = Judge::new(world.judge.config);
        assert_eq!(world.ticks(3, TICK, false), []);
        assert_eq!(world.ticks(1, TICK, true), [(1, true, false)]);
    }

    #[test]
    fn a_node_never_heard_by_this_leader_runs_out_too() {
        let mut world = World::new();
        world.seq = None;
        let fell = world.ticks(12, TICK, false);
        assert_eq!(fell, [(6, false, false), (11, false, true)]);
    }
}
