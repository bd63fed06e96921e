//! Switches on features of a new release once every member supports them, and has for a while: until
//! then the operator may go back to the previous release. Knows levels, not what they allow.

use super::{ReconcileConfig, lead};
use crate::app::{App, Consistency};
use crate::peer::{MemberHttp, release};
use mainstay_model::Command;
use mainstay_model::feature::SUPPORTED;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Between two looks while a level waits to be switched on.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Ends with the group.
pub(super) async fn run(app: App, members: MemberHttp, config: ReconcileConfig) {
    // The level that all members support, and since when this leader has seen that.
    let mut common: Option<(u32, Instant)> = None;
    loop {
        if !app.group().status().is_leader() {
            common = None;
        }
        if !lead(&app).await {
            return;
        }
        if let Some((now, pristine)) = level(&app).await.filter(|(now, _)| *now < SUPPORTED) {
            let seen = release::common(&app, &members).await.filter(|l| *l > now);
            common = seen.map(|level| match common {
                Some((same, since)) if same == level => (same, since),
                _ => (level, Instant::now()),
            });
            if let Some((level, since)) = common
                && (pristine || since.elapsed() >= config.feature_grace)
            {
                switch(&app, level).await;
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// The level in use, and whether there is nothing yet that a way back could be wanted for.
async fn level(app: &App) -> Option<(u32, bool)> {
    let state = app.read(Consistency::Stale).await.ok()?;
    Some((state.features, state.templates.is_empty()))
}

async fn switch(app: &App, level: u32) {
    match app.submit(Command::SetFeatures { level }).await {
        Ok(_) => tracing::info!(level, "features switched on: every member supports them"),
        Err(error) => tracing::warn!(%error, level, "features were not switched on; trying again"),
    }
}
