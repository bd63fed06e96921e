//! The planner: pure; same input, same bytes out; explains every refusal. It proposes, the log
//! records, `apply` checks again: a stale plan does no harm.
//!
//! Waiting instances are taken in their order (priority, age, id). For each, nodes are filtered
//! and the best by `score::Score` is taken; room given away in the same plan is counted.
//! Instances that ask for the same thing share one queue of candidates, so that a plan costs about
//! (different requests x nodes) + (bindings x log nodes), not instances x nodes.

mod explain;
mod queue;
mod score;

use crate::command::Binding;
use crate::ids::InstanceId;
use crate::instance::Instance;
use crate::state::State;
use queue::{Queues, Room};
use score::Request;

/// What the scheduler wants to do next, and why the rest waits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// To be proposed as one `Bind`.
    pub bindings: Vec<Binding>,
    /// One sentence for each instance that was looked at and stays in Scheduling.
    pub waiting: Vec<(InstanceId, String)>,
}

/// Place up to `limit` waiting instances, at the time of the state's clock.
pub fn place(state: &State, limit: usize) -> Plan {
    place_at(state, limit, state.clock_ms)
}

/// Place up to `limit` waiting instances. `now_ms` decides when a node that rejected an instance
/// may be asked again; the state's clock stands still while no commands come.
pub fn place_at(state: &State, limit: usize, now_ms: u64) -> Plan {
    let now_ms = now_ms.max(state.clock_ms);
    let mut room = Room::of(state);
    let mut queues = Queues::default();
    let mut plan = Plan::default();
    for instance in state.waiting() {
        if plan.bindings.len() >= limit {
            break;
        }
        match choose(state, &mut room, &mut queues, instance, now_ms) {
            Ok(node) => plan.bindings.push(Binding {
                instance: instance.id.clone(),
                node: room.node(node).id.clone(),
                generation: instance.generation,
            }),
            Err(why) => plan.waiting.push((instance.id.clone(), why)),
        }
    }
    plan
}

/// Why an instance is where it is: `None` unless it waits for a node. Judges against the rooms
/// that are free now, as if nobody were ahead of it.
pub fn explain(state: &State, id: &InstanceId) -> Option<String> {
    let instance = state.instances.get(id).filter(|i| i.waits())?;
    let mut room = Room::of(state);
    let mut queues = Queues::default();
    Some(
        match choose(state, &mut room, &mut queues, instance, state.clock_ms) {
            Ok(node) => format!("next in turn: {} has room", room.node(node).name()),
            Err(why) => why,
        },
    )
}

/// The best node's index, its room already taken; or the reason why there is none.
fn choose<'a>(
    state: &'a State,
    room: &mut Room<'a>,
    queues: &mut Queues<'a>,
    instance: &'a Instance,
    now_ms: u64,
) -> Result<usize, String> {
    let request = Request::of(state, instance);
    if instance.rejections.is_empty() {
        queues.take(room, request)
    } else {
        queue::take_once(room, &request, &instance.rejections, now_ms)
    }
}
