//! Forgets ended instances once their retention is over. Apply checks the time again.

use super::{ReconcileConfig, lead};
use crate::app::{App, Consistency};
use mainstay_model::{Command, plan};
use tokio::time::sleep;

/// Instances in one command.
const EXPIRE_MAX: usize = 5_000;

/// Ends with the group.
pub(super) async fn run(app: App, config: ReconcileConfig) {
    let retention_ms = u64::try_from(config.retention.as_millis()).unwrap_or(u64::MAX);
    while lead(&app).await {
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
        sleep(config.expire_every).await;
    }
}
