//! Since when each learner has been close to the end of the log and answering: what "caught up and
//! stable" means. The leader looks all the time, because one look says nothing about a member that
//! comes and goes. And since when this member leads: a leader that was elected a moment ago has not heard
//! of those that did not vote for it, which says nothing about them. Decides nothing.

use super::Inner;
use super::rounds::repeat;
use super::status::answers;
use crate::types::Types;
use futures::FutureExt;
use openraft::RaftMetrics;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A learner this close to the end of the log may become a voter.
const LAG_MAX: u64 = 1000;
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The beginnings; none unless this member leads.
#[derive(Default)]
pub(super) struct Steady(Mutex<Since>);

#[derive(Default)]
struct Since {
    leads: Option<Instant>,
    /// By learner.
    near: BTreeMap<u64, Instant>,
}

impl Steady {
    /// Has it been steady for so long?
    pub(super) fn since(&self, id: u64, long: Duration) -> bool {
        let since = self.0.lock();
        since.near.get(&id).is_some_and(|at| at.elapsed() >= long)
    }

    /// Has this member led for so long?
    pub(super) fn leads(&self, long: Duration) -> bool {
        self.0.lock().leads.is_some_and(|at| at.elapsed() >= long)
    }

    fn look(&self, metrics: &RaftMetrics<Types>, lease: Duration) {
        let mut since = self.0.lock();
        if metrics.current_leader != Some(metrics.id) {
            *since = Since::default();
            return;
        }
        since.leads.get_or_insert_with(Instant::now);
        let membership = metrics.membership_config.membership();
        let steady = |id: u64| lag(metrics, id).1 && answers(metrics, id, lease);
        let near = &mut since.near;
        near.retain(|id, _| membership.get_node(id).is_some() && steady(*id));
        for id in membership.learner_ids().filter(|id| steady(*id)) {
            near.entry(id).or_insert_with(Instant::now);
        }
    }
}

/// How many entries `id` is known to lack, and whether that is near enough. Leader only.
pub(super) fn lag(metrics: &RaftMetrics<Types>, id: u64) -> (u64, bool) {
    let last = metrics.last_log_index.unwrap_or(0);
    let matched = metrics
        .replication
        .as_ref()
        .and_then(|r| r.get(&id).copied().flatten());
    let lag = last.saturating_sub(matched.map_or(0, |m| m.index));
    (lag, matched.is_some() && lag <= LAG_MAX)
}

pub(super) fn spawn(inner: &Arc<Inner>) {
    repeat(inner, |inner| {
        async move {
            tokio::time::sleep(LOOK_EVERY).await;
            inner.steady.look(&inner.metrics(), inner.config.election.1);
        }
        .boxed()
    });
}
