//! Founding as a conversation: asks the peers of the list, feeds what they say to the ledger and to
//! `paxos`, and says what stands in the way. Decides nothing by itself.

use super::roll::roll_call;
use super::{Ballot, LedgerError, Reply, Request};
use crate::config::Entry;
use crate::founding::paxos::Proposer;
use crate::peer::PeerPort;
use crate::peer::client::ASK_TIMEOUT;
use crate::peer::wire::{FoundingCall, FoundingReply};
use futures::future::join_all;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pause between two rounds of greetings.
const ROUND_PAUSE: Duration = Duration::from_millis(300);
/// Rounds that a member later in the list leaves to those before it, per place: fewer duels.
const PATIENCE: u32 = 4;

/// Returns this member's cluster id, once it has one: remembered, or found or founded now.
pub async fn found(port: &Arc<PeerPort>) -> Result<String, LedgerError> {
    if !port.config.join.is_empty() {
        return super::join::find(port).await;
    }
    let mut rounds_with_majority = 0;
    loop {
        if let Some(cluster_id) = port.ledger.cluster_id() {
            port.notices.set("founding", None);
            return Ok(cluster_id);
        }
        let seen = roll_call(port, &BTreeMap::new()).await;
        if let Some(charter) = seen.charter {
            tracing::info!(cluster = %charter.cluster_id, "learnt how the cluster was founded");
            on_ledger(port, move |port| {
                port.ledger.handle(Request::Decide {
                    charter: charter.clone(),
                })?;
                port.ledger.join(&charter.cluster_id)
            })
            .await?;
            continue;
        }
        if let Some((cluster_id, _)) = seen.clusters.into_iter().next() {
            tracing::info!(cluster = %cluster_id, "found a cluster to join");
            on_ledger(port, move |port| port.ledger.join(&cluster_id)).await?;
            continue;
        }
        if seen.refused_by_cluster {
            port.notices.set("founding", None);
        } else if 1 + seen.fresh.len() > port.config.list.len() / 2 {
            port.notices.set("founding", None);
            let own = port
                .config
                .list
                .iter()
                .position(|e| e.name == port.config.name);
            let before = seen.fresh.iter().filter(|at| Some(**at) < own).count();
            let before = u32::try_from(before).unwrap_or(u32::MAX);
            if rounds_with_majority >= before.saturating_mul(PATIENCE) {
                propose(port).await?;
                rounds_with_majority = 0;
                continue;
            }
            rounds_with_majority += 1;
        } else {
            waiting(port, seen.fresh.len());
        }
        pause(port).await;
    }
}

fn waiting(port: &PeerPort, fresh: usize) {
    let (all, here) = (port.config.list.len(), fresh + 1);
    port.notices.set(
        "founding",
        Some(format!(
            "waiting for members: {here} of {all} answer and {} are needed to found the cluster; start the others",
            all / 2 + 1
        )),
    );
}

/// Until the next round is due, or a peer has told us something.
pub(super) async fn pause(port: &PeerPort) {
    // Spread, so that members that started together do not stay in step.
    let jitter = u64::from(uuid::Uuid::new_v4().as_bytes()[0]);
    let pause = ROUND_PAUSE + Duration::from_millis(jitter);
    tokio::time::timeout(pause, port.learnt.notified())
        .await
        .ok();
}

pub(super) async fn on_ledger<T: Send + 'static>(
    port: &Arc<PeerPort>,
    act: impl FnOnce(&PeerPort) -> Result<T, LedgerError> + Send + 'static,
) -> Result<T, LedgerError> {
    let port = Arc::clone(port);
    tokio::task::spawn_blocking(move || act(&port))
        .await
        .unwrap_or_else(|e| Err(LedgerError::Unreadable(e.to_string())))
}

fn others(port: &PeerPort) -> impl Iterator<Item = (usize, &Entry)> {
    port.config
        .list
        .iter()
        .enumerate()
        .filter(|(_, entry)| entry.name != port.config.name)
}

/// One attempt to get a charter decided.
async fn propose(port: &Arc<PeerPort>) -> Result<(), LedgerError> {
    let founder = port.founder();
    let ballot = Ballot {
        round: port.ledger.promised().round + 1,
        proposer: founder.id,
    };
    let mut proposer = Proposer::new(
        ballot,
        port.config.list.iter().map(|entry| entry.name.clone()),
    );
    for answer in ask_all(port, Request::Prepare { ballot }).await? {
        match answer.reply {
            Reply::Promise { ballot, accepted } => {
                proposer.promised(ballot, answer.voter, accepted);
            }
            other => return learn(port, other).await,
        }
    }
    let Some(charter) = proposer.charter(&uuid::Uuid::new_v4().to_string()) else {
        return Ok(());
    };
    let mut decided = None;
    for answer in ask_all(port, Request::Accept { ballot, charter }).await? {
        match answer.reply {
            Reply::Accepted { ballot } => {
                decided = decided.or(proposer.accepted(ballot, &answer.voter));
            }
            other => return learn(port, other).await,
        }
    }
    if let Some(charter) = decided {
        let names: Vec<_> = charter
            .founders
            .iter()
            .map(|f| f.member.name.as_str())
            .collect();
        tracing::info!(cluster = %charter.cluster_id, founders = ?names, "cluster founded");
        ask_all(port, Request::Decide { charter }).await?;
    }
    Ok(())
}

/// A rival is ahead: remember how far, or what it got decided.
async fn learn(port: &Arc<PeerPort>, reply: Reply) -> Result<(), LedgerError> {
    match reply {
        Reply::Decided { charter } => {
            on_ledger(port, move |port| {
                port.ledger.handle(Request::Decide { charter })
            })
            .await?;
        }
        Reply::Outbid { promised } => {
            // A promise to the rival's ballot: the next attempt is above it.
            on_ledger(port, move |port| {
                port.ledger.handle(Request::Prepare { ballot: promised })
            })
            .await?;
        }
        Reply::Promise { .. } | Reply::Accepted { .. } => {}
    }
    Ok(())
}

/// Ask this member's own ledger first (it must be durable here too), then everyone else at once.
async fn ask_all(
    port: &Arc<PeerPort>,
    request: Request,
) -> Result<Vec<FoundingReply>, LedgerError> {
    let own = request.clone();
    let reply = on_ledger(port, move |port| port.ledger.handle(own)).await?;
    let mut answers = vec![FoundingReply {
        voter: port.founder(),
        reply,
    }];
    let call = FoundingCall {
        list: port.config.list.clone(),
        request,
    };
    let call = &call;
    let calls = others(port).map(|(_, entry)| async move {
        let asked = port
            .http
            .ask::<FoundingReply>(&entry.url, "/peer/v1/founding", call, ASK_TIMEOUT)
            .await;
        asked
            .ok()
            .filter(|answer| answer.voter.member.name == entry.name)
    });
    answers.extend(join_all(calls).await.into_iter().flatten());
    Ok(answers)
}
