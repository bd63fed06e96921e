//! The scheduler: asks the planner and proposes its plan. Decides nothing itself.

use super::{ReconcileConfig, lead};
use crate::app::{App, Consistency};
use mainstay_model::command::Binding;
use mainstay_model::{Command, Outcome, plan};
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Planning in vain takes at most this part of a core.
const PLAN_SHARE: u32 = 5;
/// After a proposal without an answer.
const TROUBLE_PAUSE: Duration = Duration::from_millis(100);

/// Ends with the group.
pub(super) async fn run(app: App, config: ReconcileConfig) {
    let mut status = app.group().watch();
    while lead(&app).await {
        // What is applied from here on wakes us, also while we plan.
        status.mark_unchanged();
        let began = Instant::now();
        let Ok(bindings) = look(&app, config.bind_max).await else {
            return;
        };
        let thought = began.elapsed();
        match bind(&app, bindings).await {
            Bound::Some => continue,
            Bound::Trouble => sleep(TROUBLE_PAUSE).await,
            Bound::None => sleep(thought * PLAN_SHARE).await,
        }
        let news = timeout(config.schedule_every, status.changed());
        if let Ok(Err(_)) = news.await {
            return;
        }
        // A burst of requests is one plan.
        sleep_until(Instant::now() + Duration::from_millis(1)).await;
    }
}

async fn look(app: &App, limit: usize) -> Result<Vec<Binding>, ()> {
    let state = app.read(Consistency::Stale).await.map_err(|_| ())?;
    if !state.any_waits() {
        return Ok(Vec::new());
    }
    Ok(plan::place_at(&state, limit, app.now_ms(&state)).bindings)
}

enum Bound {
    Some,
    None,
    Trouble,
}

async fn bind(app: &App, bindings: Vec<Binding>) -> Bound {
    if bindings.is_empty() {
        return Bound::None;
    }
    let wanted = bindings.len();
    match app.submit(Command::Bind { bindings }).await {
        Ok(Outcome::Bound(held)) => {
            tracing::debug!(wanted, held, "bound");
            if held > 0 { Bound::Some } else { Bound::None }
        }
        Ok(_) => Bound::None,
        Err(error) => {
            tracing::warn!(%error, "placements were not committed; planning again");
            Bound::Trouble
        }
    }
}
