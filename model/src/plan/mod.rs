//! The planner: pure; same input, same bytes out; explains every refusal. It proposes, the log
//! records, `apply` checks again: a stale plan does no harm.
//!
//! Waiting instances are taken in their order (priority, age, id). For each, nodes are filtered
//! and the best by `score::Score` is taken; room given away in the same plan is counted.
//! Instances that ask for the same thing wait in one line and share one queue of candidates, and a line ends
//! with the first that no node can take: a plan costs about (different requests x nodes)
//! + (bindings x log nodes), however many wait.
//!
//! What else a leader decides is here as well: who is reachable (`leases`), who is forgotten
//! (`expire`), what an agent is told and what of its answers counts (`report`). The server carries
//! it out with real time and real members, the simulation with others.

mod expire;
mod explain;
mod leases;
mod queue;
mod report;
mod score;

pub use expire::{forgettable, overdue, overdue_saves};
pub use leases::{Judge, Leases};
pub use report::{Shall, desired, is_news, is_save_news};

use crate::command::Binding;
use crate::ids::InstanceId;
use crate::instance::Instance;
use crate::node::{Load, Node};
use crate::state::State;
use queue::{Queues, Room};
use score::Request;

/// What the scheduler wants to do next, and why the rest waits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// To be proposed as one `Bind`.
    pub bindings: Vec<Binding>,
    /// Why the rest waits, for each kind of request of which one was looked at and stays in Scheduling.
    pub waiting: Vec<Refused>,
}

/// Instances that ask for the same thing, and that no node can take now.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// The next in turn.
    pub first: InstanceId,
    /// How many wait behind it.
    pub behind: usize,
    /// One sentence.
    pub why: String,
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
    let mut lines = state.lines();
    while plan.bindings.len() < limit {
        let Some((id, line)) = lines.pop() else {
            break;
        };
        let Some(instance) = state.instances.get(id) else {
            lines.go_on(line);
            continue;
        };
        match choose(state, &mut room, &mut queues, instance, now_ms) {
            Ok(node) => {
                plan.bindings.push(Binding {
                    instance: id.clone(),
                    node: room.node(node).id.clone(),
                    generation: instance.generation,
                });
                lines.go_on(line);
            }
            // Room is only ever given away within a plan: who stands behind it fails as well.
            Err(why) => plan.waiting.push(Refused {
                first: id.clone(),
                behind: lines.behind(line),
                why,
            }),
        }
    }
    plan
}

/// Whether a node is one that an instance may be on at all, were it empty: its group or a fallback, its
/// architecture, its pin. What a plan was made of may have changed before it is applied.
pub(crate) fn allows(state: &State, instance: &Instance, node: &Node) -> bool {
    let request = Request::of(state, instance);
    let pinned_here = request.pin.is_none_or(|pin| pin == &node.id);
    pinned_here && score::fit(node, Load::default(), &request).is_ok()
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
        queue::take_once(room, queues, &request, &instance.rejections, now_ms)
    }
}
