//! The planner: pure; same input, same bytes out; explains every refusal.

use crate::command::Binding;
use crate::ids::InstanceId;
use crate::state::State;

/// What the scheduler wants to do next, and why the rest waits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// To be proposed as one `Bind`.
    pub bindings: Vec<Binding>,
    /// One sentence for each instance that stays in Scheduling.
    pub waiting: Vec<(InstanceId, String)>,
}

/// Place up to `limit` waiting instances.
pub fn place(state: &State, limit: usize) -> Plan {
    let _ = (state, limit);
    todo!()
}
