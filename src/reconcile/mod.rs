//! Reconcilers: what the leader does by itself. Each looks at the whole applied state again whenever
//! something changed or its timer rings, and proposes what is missing; none keeps a list of its own
//! of what is to be done. A deposed leader's proposals do no harm: apply checks each again.
//!
//! * `schedule`: waiting instances get a node.
//! * `judge`: nodes that are not heard become unreachable, then lost; the verdicts are pure.
//! * `expire`: ended instances, and saves, are forgotten.
//! * `features`: what a new release brings is switched on once every member supports it.
//! * `retire`: removals of members that are recorded are carried out.

mod expire;
mod features;
mod judge;
mod retire;
mod schedule;

use crate::agents::Liveness;
use crate::app::App;
use crate::peer::MemberHttp;
use std::time::Duration;
use tokio::task::{JoinHandle, JoinSet};

/// Times and bounds of the reconcilers.
#[derive(Clone, Copy, Debug)]
pub struct ReconcileConfig {
    /// A node that was silent for so long is unreachable: nothing new is placed there.
    pub unreachable_after: Duration,
    /// A node that was silent for so long is lost: its instances fail.
    pub lease: Duration,
    /// Between two looks at all nodes.
    pub judge_every: Duration,
    /// How long an ended instance stays visible.
    pub retention: Duration,
    /// How long an ended save stays visible.
    pub save_retention: Duration,
    /// Between two looks for instances to forget.
    pub expire_every: Duration,
    /// Most decisions in one `Bind`.
    pub bind_max: usize,
    /// Every member has supported a feature for so long before it is switched on.
    pub feature_grace: Duration,
    /// The scheduler looks again after this time even if nothing changed.
    pub schedule_every: Duration,
}

impl ReconcileConfig {
    /// The defaults with these times for silent nodes.
    pub fn new(unreachable_after: Duration, lease: Duration) -> Self {
        Self {
            unreachable_after,
            lease,
            judge_every: (unreachable_after / 10).min(Duration::from_secs(1)),
            ..Self::default()
        }
    }
}

impl Default for ReconcileConfig {
    fn default() -> Self {
        Self {
            unreachable_after: Duration::from_secs(20),
            lease: Duration::from_secs(120),
            judge_every: Duration::from_secs(1),
            retention: Duration::from_secs(60),
            save_retention: Duration::from_secs(7_200),
            expire_every: Duration::from_secs(2),
            bind_max: 512,
            feature_grace: Duration::from_secs(3600),
            schedule_every: Duration::from_secs(1),
        }
    }
}

/// Start all reconcilers of this member; they act while it leads. Aborting the handle ends them.
pub fn spawn(
    app: App,
    liveness: Liveness,
    members: MemberHttp,
    config: ReconcileConfig,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut all = JoinSet::new();
        all.spawn(schedule::run(app.clone(), config));
        all.spawn(judge::run(app.clone(), liveness, config));
        all.spawn(features::run(app.clone(), members, config));
        all.spawn(expire::run(app.clone(), config));
        all.spawn(retire::run(app));
        while let Some(ended) = all.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a reconciler ended");
            }
        }
    })
}

/// Waits until this member leads; `false`: the group has ended.
async fn lead(app: &App) -> bool {
    let mut status = app.group().watch();
    let leads = status.wait_for(mainstay_raft::Status::is_leader).await;
    leads.is_ok()
}
