//! Bugs on purpose, which the tests over real processes must find. Not in any release.

use crate::codec::Mark;
use crate::store::log::LogStore;
use std::sync::OnceLock;

/// Entries that a member forgets when it starts.
const LOST: u64 = 12;

/// Does `MAINSTAY_SEEDED_BUG` name this one?
pub(crate) fn bug(name: &str) -> bool {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("MAINSTAY_SEEDED_BUG").ok());
    chosen.as_deref() == Some(name)
}

/// As if the last entries had been acknowledged before they were written. Those that the stored state
/// has are kept: their loss would be noticed.
pub(crate) fn lose_tail(log: &LogStore, mark: &Mark) {
    let applied = mark.applied.map_or(0, |id| id.index);
    let end = log.end().unwrap_or(0);
    let keep = end.saturating_sub(LOST).max(applied);
    if bug("lost-write") && keep < end {
        tracing::warn!(keep, end, "seeded bug: entries are forgotten");
        log.forget_after(keep, mark.applied);
    }
}
