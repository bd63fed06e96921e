//! Which nodes are reachable, and which are lost. Verdicts come from ages that only this leader's
//! own, awake and connected time makes older: a new leader begins at zero for everyone, a pause of
//! this process counts as one tick, and time without a quorum counts as nothing at all. Knows no
//! clock: whoever asks says how much time has passed.

use crate::command::Command;
use crate::ids::NodeId;
use crate::state::State;
use std::collections::BTreeMap;
use std::time::Duration;

/// Times of the verdicts.
#[derive(Clone, Copy, Debug)]
pub struct Leases {
    /// A node that was silent for so long is unreachable: nothing new is placed there.
    pub unreachable_after: Duration,
    /// A node that was silent for so long is lost: its instances fail.
    pub lease: Duration,
    /// Between two looks at all nodes. A look that comes later counts as two of them at most.
    pub judge_every: Duration,
}

/// How long a node has been silent, as far as it counts.
#[derive(Debug, Default)]
struct Silence {
    /// The newest heartbeat that was seen.
    seq: Option<u64>,
    age: Duration,
}

/// One leader's view of who is silent. A new one for each time that a member leads, and after each
/// time without a quorum.
#[derive(Debug)]
pub struct Judge {
    leases: Leases,
    nodes: BTreeMap<NodeId, Silence>,
    /// Nothing before the first look counts as a heartbeat.
    begun: bool,
}

impl Judge {
    /// Everybody has a full lease from the first look on.
    pub fn new(leases: Leases) -> Self {
        Self {
            leases,
            nodes: BTreeMap::new(),
            begun: false,
        }
    }

    /// One tick that took `elapsed`: verdicts for all nodes. `seq` changes when a node is heard.
    pub fn look(
        &mut self,
        state: &State,
        elapsed: Duration,
        seq: &dyn Fn(&NodeId) -> Option<u64>,
    ) -> Vec<Command> {
        let counts = elapsed.min(self.leases.judge_every * 2);
        self.nodes.retain(|id, _| state.nodes.contains_key(id));
        let mut verdicts = Vec::new();
        for (id, node) in &state.nodes {
            let silence = self.nodes.entry(id.clone()).or_default();
            let now = seq(id);
            let heard = self.begun && now.is_some() && now != silence.seq;
            let granted = !self.begun;
            #[cfg(feature = "seeded-bugs")]
            if granted && crate::seeded::has(crate::seeded::Bug::NoGrace) {
                silence.age = self.leases.lease;
            }
            #[cfg(feature = "seeded-bugs")]
            let granted = granted && !crate::seeded::has(crate::seeded::Bug::NoGrace);
            if heard || granted {
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
            } else if silence.age >= self.leases.lease && !node.lost {
                verdicts.push(verdict(false, true));
            } else if silence.age >= self.leases.unreachable_after && node.reachable {
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
    use crate::node::NodeSpec;
    use crate::{CommandId, Envelope};

    const TICK: Duration = Duration::from_secs(1);

    struct World {
        state: State,
        judge: Judge,
        seq: Option<u64>,
        ids: u128,
    }

    impl World {
        fn new() -> Self {
            let leases = Leases {
                unreachable_after: TICK * 5,
                lease: TICK * 10,
                judge_every: TICK,
            };
            let mut world = Self {
                state: State::default(),
                judge: Judge::new(leases),
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
        world.judge = Judge::new(world.judge.leases);
        // One look to begin with, then the whole lease.
        assert_eq!(world.ticks(10, TICK, false), []);
        assert_eq!(world.ticks(1, TICK, false), [(1, false, true)]);
        // What an old heartbeat left in memory is no sign of life to the next leader either.
        world.judge = Judge::new(world.judge.leases);
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
