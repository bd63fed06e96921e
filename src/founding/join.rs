//! Finding a running cluster by the addresses of `--join`. From then on this member is part of it: its
//! identity file says so before it asks to be let in, and the addresses are needed no more once it is.

use super::LedgerError;
use super::roll::{RollCall, roll_call};
use super::run::{on_ledger, pause};
use crate::peer::PeerPort;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Ask until exactly one cluster would have us; its id, remembered.
pub(super) async fn find(port: &Arc<PeerPort>) -> Result<String, LedgerError> {
    loop {
        if let Some(cluster_id) = port.ledger.cluster_id() {
            port.notices.set("joining", None);
            return Ok(cluster_id);
        }
        let seen = roll_call(port, &BTreeMap::new()).await;
        if let (1, Some((id, at))) = (seen.clusters.len(), seen.clusters.first_key_value()) {
            tracing::info!(cluster = %id, %at, "found the cluster to join");
            let id = id.clone();
            on_ledger(port, move |port| port.ledger.join(&id)).await?;
            continue;
        }
        port.notices.set("joining", waiting(port, &seen));
        pause(port).await;
    }
}

fn waiting(port: &PeerPort, seen: &RollCall) -> Option<String> {
    let urls = port.config.join.join(", ");
    if seen.clusters.len() > 1 {
        let each = seen.clusters.iter().map(|(id, at)| format!("{at} to {id}"));
        let each = each.collect::<Vec<_>>().join(", ");
        return Some(format!(
            "the addresses of --join belong to different clusters ({each}): name members of one cluster only"
        ));
    }
    match seen.answered {
        0 => Some(format!(
            "nobody answers at {urls}: --join takes the peer addresses of members that run (see `mainstay member list`); asking again until one answers"
        )),
        // Whoever answered and would not have us has said why.
        _ if seen.refused_by_cluster => None,
        _ => Some(format!(
            "no member at {urls} is part of a cluster yet: waiting until it is"
        )),
    }
}
