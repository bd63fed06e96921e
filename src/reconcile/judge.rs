//! Looks at the heartbeats and proposes the verdicts of [`Judge`]: only while this member leads, and
//! only with a quorum behind it. Decides nothing itself.

use super::{ReconcileConfig, lead};
use crate::agents::Liveness;
use crate::app::{App, Consistency};
use mainstay_model::plan::{Judge, Leases};
use tokio::time::{Instant, sleep};

/// Ends with the group.
pub(super) async fn run(app: App, liveness: Liveness, config: ReconcileConfig) {
    let leases = Leases {
        unreachable_after: config.unreachable_after,
        lease: config.lease,
        judge_every: config.judge_every,
    };
    let mut judge = Judge::new(leases);
    loop {
        let waited = !app.group().status().is_leader();
        if !lead(&app).await {
            return;
        }
        if waited {
            judge = Judge::new(leases);
        }
        let began = Instant::now();
        sleep(config.judge_every).await;
        let awake = began.elapsed();
        // Only who is heard by a majority may say that somebody else is not heard.
        let quorum = app.group().read_barrier(config.unreachable_after).await;
        if quorum.is_err() {
            judge = Judge::new(leases);
            continue;
        }
        let verdicts = {
            let Ok(state) = app.read(Consistency::Stale).await else {
                continue;
            };
            judge.look(&state, awake, &|node| liveness.seq(node))
        };
        for verdict in verdicts {
            tracing::info!(?verdict, "verdict");
            if let Err(error) = app.submit(verdict).await {
                tracing::warn!(%error, "a verdict was not committed; judging again");
            }
        }
    }
}
