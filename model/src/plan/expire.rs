//! Who has been kept for long enough after their end.

use crate::ids::InstanceId;
use crate::state::State;

/// Instances that ended at least `retention_ms` ago, the longest ago first, at most `max`. `now_ms` is
/// the proposer's time; the state's clock stands still while no commands come.
pub fn forgettable(state: &State, retention_ms: u64, now_ms: u64, max: usize) -> Vec<InstanceId> {
    let now = now_ms.max(state.clock_ms);
    let over = |at: &u64| at.saturating_add(retention_ms) <= now;
    let ended = state.ended().take_while(|(at, _)| over(at));
    ended.map(|(_, id)| id.clone()).take(max).collect()
}
