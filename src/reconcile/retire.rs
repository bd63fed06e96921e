//! Finishes removals that are recorded, but that nobody carried out: the member that was asked died, or
//! a majority was not there. The group itself refuses what would cost it its majority.

use super::lead;
use crate::app::App;
use mainstay_model::MemberId;
use std::time::Duration;
use tokio::time::sleep;

/// Between two looks. Whoever was asked for the removal needs less, so that this one finds nothing to do.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Ends with the group.
pub(super) async fn run(app: App) {
    while lead(&app).await {
        sleep(LOOK_EVERY).await;
        let status = app.group().status();
        let retired = app.retired();
        let members = status.members.iter();
        let due = members.filter(|(id, _)| retired.contains(&MemberId(**id)));
        let due: Vec<_> = due.map(|(id, at)| (*id, at.member.name.clone())).collect();
        for (id, name) in due {
            match app.group().remove(id).await {
                Ok(()) => tracing::info!(member = %name, "finished a removal"),
                Err(error) => tracing::warn!(member = %name, %error, "a removal waits"),
            }
        }
    }
}
