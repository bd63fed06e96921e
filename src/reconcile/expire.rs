//! Forgets ended instances, distributions and saves once their retention is over, and gives up distributions that
//! nodes had long enough for and saves that no node begins. Apply checks the times again.

use super::{ReconcileConfig, lead};
use crate::app::{App, Consistency};
use mainstay_model::{Command, plan};
use std::time::Duration;
use tokio::time::sleep;

/// Instances in one command.
const EXPIRE_MAX: usize = 5_000;

const HOUR_MS: u64 = 3_600_000;
/// How long nodes have to fetch what is distributed: also those that are away over a night.
const DISTRIBUTION_PATIENCE_MS: u64 = 24 * HOUR_MS;
/// How long an ended distribution can be looked at: as long as a finished save-image request.
const DISTRIBUTION_RETENTION_MS: u64 = 2 * HOUR_MS;
/// Saves in one command.
const SAVES_MAX: usize = 100;
/// A node says within a heartbeat that it knows of a save; clients give one up that was not begun for so long.
const SAVE_BEGIN: Duration = Duration::from_secs(600);

/// Ends with the group.
pub(super) async fn run(app: App, config: ReconcileConfig) {
    let retention_ms = u64::try_from(config.retention.as_millis()).unwrap_or(u64::MAX);
    while lead(&app).await {
        expire_saves(&app, config.save_retention).await;
        let Ok(ids) = app
            .read(Consistency::Stale)
            .await
            .map(|state| plan::forgettable(&state, retention_ms, app.now_ms(&state), EXPIRE_MAX))
        else {
            sleep(config.expire_every).await;
            continue;
        };
        let full = ids.len() == EXPIRE_MAX;
        if !ids.is_empty() {
            let command = Command::ExpireInstances { ids, retention_ms };
            if let Err(error) = app.submit(command).await {
                tracing::debug!(%error, "ended instances were not forgotten; trying again");
            } else if full {
                continue;
            }
        }
        expire_distributions(&app).await;
        sleep(config.expire_every).await;
    }
}

async fn expire_distributions(app: &App) {
    let (patience_ms, retention_ms) = (DISTRIBUTION_PATIENCE_MS, DISTRIBUTION_RETENTION_MS);
    let read = app.read(Consistency::Stale).await;
    let due = read.map(|s| plan::overdue(&s, patience_ms, retention_ms, app.now_ms(&s)));
    let Ok(ids) = due else {
        return;
    };
    if ids.is_empty() {
        return;
    }
    let command = Command::ExpireDistributions {
        ids,
        patience_ms,
        retention_ms,
    };
    if let Err(error) = app.submit(command).await {
        tracing::debug!(%error, "distributions that are over were not ended; trying again");
    }
}

async fn expire_saves(app: &App, retention: Duration) {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let (retention_ms, begin_ms) = (millis(retention), millis(SAVE_BEGIN));
    let ids = {
        let Ok(state) = app.read(Consistency::Stale).await else {
            return;
        };
        plan::overdue_saves(
            &state,
            retention_ms,
            begin_ms,
            app.now_ms(&state),
            SAVES_MAX,
        )
    };
    if ids.is_empty() {
        return;
    }
    let command = Command::ExpireSaves {
        ids,
        retention_ms,
        begin_ms,
    };
    if let Err(error) = app.submit(command).await {
        tracing::debug!(%error, "ended saves were not forgotten; trying again");
    }
}
