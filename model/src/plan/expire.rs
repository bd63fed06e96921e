//! Who has been kept for long enough after their end, or waited for, and whose beginning is overdue.

use crate::ids::{DistributionId, InstanceId, SaveId};
use crate::state::State;

/// Instances that ended at least `retention_ms` ago, the longest ago first, at most `max`. `now_ms` is
/// the proposer's time; the state's clock stands still while no commands come.
pub fn forgettable(state: &State, retention_ms: u64, now_ms: u64, max: usize) -> Vec<InstanceId> {
    let now = now_ms.max(state.clock_ms);
    let over = |at: &u64| at.saturating_add(retention_ms) <= now;
    let ended = state.ended().take_while(|(at, _)| over(at));
    ended.map(|(_, id)| id.clone()).take(max).collect()
}

/// Distributions that were asked for at least `patience_ms` ago and still wait, and those that ended at least
/// `retention_ms` ago.
pub fn overdue(
    state: &State,
    patience_ms: u64,
    retention_ms: u64,
    now_ms: u64,
) -> Vec<DistributionId> {
    let now = now_ms.max(state.clock_ms);
    let over = |since: u64, ms: u64| since.saturating_add(ms) <= now;
    let all = state.distributions.values();
    let due = all.filter(|d| match d.ended_ms {
        Some(at) => over(at, retention_ms),
        None => over(d.requested_ms, patience_ms),
    });
    due.map(|d| d.id.clone()).collect()
}

/// Saves that ended at least `retention_ms` ago, and open ones that no node has begun within `begin_ms`; at most
/// `max`.
pub fn overdue_saves(
    state: &State,
    retention_ms: u64,
    begin_ms: u64,
    now_ms: u64,
    max: usize,
) -> Vec<SaveId> {
    let now = now_ms.max(state.clock_ms);
    let over = |at: &u64| at.saturating_add(retention_ms) <= now;
    let ended = state.ended_saves().take_while(|(at, _)| over(at));
    let late = state.open_saves().filter(|save| save.late(begin_ms, now));
    let ended = ended.map(|(_, id)| id.clone());
    ended
        .chain(late.map(|save| save.id.clone()))
        .take(max)
        .collect()
}
