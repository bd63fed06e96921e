//! What a node's agent is told, and which of its answers the log must hear. Any member decides this from
//! its own state, which may be old: apply looks at both again.

use crate::apply::save::settles;
use crate::ids::{InstanceId, NodeId};
use crate::instance::{Instance, InstanceState, Observation, ObservedPhase, Wanted};
use crate::save::{SaveReport, SaveSaid};
use crate::state::State;

/// What a node shall do about one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Shall<'a> {
    /// Which.
    pub id: &'a InstanceId,
    /// Fence; the agent echoes it in what it observes.
    pub generation: u64,
    /// What.
    pub wanted: Wanted,
    /// `None`: it has ended while the node was away.
    pub instance: Option<&'a Instance>,
}

/// Everything that a node shall do: who takes room there, then what is left there of those that
/// ended while it was away. Whatever is not named here is left alone.
pub fn desired<'a>(state: &'a State, node: &NodeId) -> impl Iterator<Item = Shall<'a>> {
    let there = state.on_node(node).map(|instance| Shall {
        id: &instance.id,
        generation: instance.generation,
        wanted: instance.wanted(),
        instance: Some(instance),
    });
    let left = state.left_on(node).map(|(id, left)| Shall {
        id,
        generation: left.generation,
        wanted: Wanted::Gone,
        instance: None,
    });
    there.chain(left)
}

/// Would apply do anything with what `node` has seen? Errs on the side of saying it once more.
pub fn is_news(state: &State, node: &NodeId, seen: &Observation) -> bool {
    let instance = state.instances.get(&seen.id);
    let left = state.left.get(&seen.id);
    instance.is_some_and(|i| i.node.as_ref() == Some(node) && tells_news(i, seen))
        || left.is_some_and(|l| l.removed_by(node, seen))
}

/// Would apply do anything with what `node` says of a save? Errs on the side of saying it once more.
pub fn is_save_news(state: &State, node: &NodeId, report: &SaveReport) -> bool {
    let save = state.saves.get(&report.id);
    let Some(save) = save.filter(|save| save.open() && &save.node == node) else {
        return false;
    };
    let facts = save.begun_ms.is_none() || report.script.is_some() && save.script_result.is_none();
    facts
        || match &report.said {
            SaveSaid::Begun => false,
            SaveSaid::Pushed => settles(state, save),
            SaveSaid::Failed { .. } => true,
        }
}

fn tells_news(instance: &Instance, seen: &Observation) -> bool {
    use InstanceState as S;
    use ObservedPhase as P;
    if instance.generation != seen.generation || instance.ended_ms.is_some() {
        return false;
    }
    let facts = seen.vm.is_some() && seen.vm.as_ref() != instance.vm.as_deref();
    let script = seen.script.is_some() && instance.script_result.is_none();
    let step = match (instance.state, &seen.phase) {
        (S::Terminated, _) => return false,
        (S::Terminating, P::Gone) => true,
        (S::Error, P::Gone) => return !instance.vm_gone,
        (S::Error | S::Terminating, _) => false,
        (_, P::Failed(_) | P::Rejected(_) | P::Gone) => true,
        (S::Scheduling, P::Pulling) => true,
        (S::Scheduling | S::Pulling | S::Stopping | S::Stopped, P::Running) => true,
        (S::Scheduling | S::Pulling | S::Started | S::Stopping, P::Stopped) => true,
        (_, P::Pulling | P::Starting | P::Running | P::Stopped) => false,
    };
    step || facts || script
}
