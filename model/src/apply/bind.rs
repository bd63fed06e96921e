//! The scheduler's decisions become facts, each only if it still holds. Chooses nothing.

use super::{Applied, check};
use crate::command::Binding;
use crate::feature::GROUPS_KEPT;
use crate::limits;
use crate::outcome::Outcome;
use crate::plan;
#[cfg(feature = "seeded-bugs")]
use crate::seeded;
use crate::state::State;

pub(super) fn bind(state: &mut State, bindings: &[Binding]) -> Applied {
    check::count("bindings", bindings.len(), limits::BATCH)?;
    let mut held = 0;
    for binding in bindings {
        if holds(state, binding) {
            state.edit_instance(&binding.instance, |i| {
                i.node = Some(binding.node.clone());
                i.generation = i.generation.saturating_add(1);
            });
            state.bump_desired(&binding.node);
            held += 1;
        }
    }
    Ok(Outcome::Bound(held))
}

fn holds(state: &State, binding: &Binding) -> bool {
    let Some(instance) = state.instances.get(&binding.instance) else {
        return false;
    };
    let Some(node) = state.nodes.get(&binding.node) else {
        return false;
    };
    #[cfg(feature = "seeded-bugs")]
    if seeded::has(seeded::Bug::Overfull) {
        return instance.waits() && instance.generation == binding.generation && node.accepts();
    }
    instance.waits()
        && instance.generation == binding.generation
        && node.accepts()
        && node.has_room_for(state.load(&node.id).plus(instance.demand()))
        && (state.features < GROUPS_KEPT || plan::allows(state, instance, node))
}
