//! Founding and joining as conversations: asks the peers, feeds what they say to the ledger and to
//! `paxos`, and says what stands in the way. Decides nothing by itself.

use super::{Ballot, Charter, LedgerError, Reply, Request};
use crate::config::Entry;
use crate::founding::paxos::Proposer;
use crate::peer::client::{ASK_TIMEOUT, JOIN_TIMEOUT};
use crate::peer::wire::{FoundingCall, FoundingReply, HelloReply, JoinReply};
use crate::peer::{PeerClient, PeerError, PeerPort};
use futures::future::join_all;
use mainstay_raft::{Group, MemberStatus, Role, Status};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pause between two rounds of greetings.
const ROUND_PAUSE: Duration = Duration::from_millis(300);
/// Rounds that a member later in the list leaves to those before it, per place: fewer duels.
const PATIENCE: u32 = 4;
/// Pause between two looks at a healthy group.
const CALM_PAUSE: Duration = Duration::from_secs(5);

/// What one round of greetings found.
#[derive(Default)]
struct RollCall {
    /// Peers that are part of our cluster and would have us: indexes in the list.
    ours: Vec<usize>,
    /// How many peers are part of each other cluster.
    foreign: BTreeMap<String, usize>,
    /// Peers without a cluster that would have us: indexes in the list.
    fresh: Vec<usize>,
    /// A cluster that would have us.
    cluster: Option<String>,
    /// How it was founded.
    charter: Option<Charter>,
    /// A peer is part of a cluster that would not have us: founding another is out of the question.
    refused_by_cluster: bool,
}

/// Returns this member's cluster id, once it has one: remembered, or found or founded now.
pub async fn found(port: &Arc<PeerPort>) -> Result<String, LedgerError> {
    let mut rounds_with_majority = 0;
    loop {
        if let Some(cluster_id) = port.ledger.cluster_id() {
            port.notices.set("founding", None);
            return Ok(cluster_id);
        }
        let seen = roll_call(port).await;
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
        if let Some(cluster_id) = seen.cluster {
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
async fn pause(port: &PeerPort) {
    // Spread, so that members that started together do not stay in step.
    let jitter = u64::from(uuid::Uuid::new_v4().as_bytes()[0]);
    let pause = ROUND_PAUSE + Duration::from_millis(jitter);
    tokio::time::timeout(pause, port.learnt.notified())
        .await
        .ok();
}

async fn on_ledger<T: Send + 'static>(
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

/// Greet every other member of the list; what stands in the way becomes a notice.
async fn roll_call(port: &PeerPort) -> RollCall {
    let hello = port.hello();
    let hello = &hello;
    let calls = others(port).map(|(at, entry)| async move {
        let asked = port
            .http
            .ask::<HelloReply>(&entry.url, "/peer/v1/hello", hello, ASK_TIMEOUT)
            .await;
        (at, entry, asked)
    });
    let mut seen = RollCall::default();
    for (at, entry, asked) in join_all(calls).await {
        let notice = match asked {
            Ok(reply) if reply.refusal.is_some() => {
                seen.refused_by_cluster |= reply.cluster_id.is_some();
                if let Some(theirs) = reply.cluster_id
                    && hello
                        .cluster_id
                        .as_ref()
                        .is_some_and(|ours| *ours != theirs)
                {
                    *seen.foreign.entry(theirs).or_default() += 1;
                }
                reply.refusal
            }
            Ok(reply) if reply.name != entry.name => Some(format!(
                "{} answers as member {}, not {}: correct --initial-cluster or its --name",
                entry.url, reply.name, entry.name
            )),
            Ok(reply) => {
                if reply.cluster_id.is_some() && reply.cluster_id == hello.cluster_id {
                    seen.ours.push(at);
                }
                match (&reply.cluster_id, reply.charter) {
                    (_, Some(charter)) => seen.charter = Some(charter),
                    (Some(id), None) => seen.cluster = Some(id.clone()),
                    (None, None) => seen.fresh.push(at),
                }
                None
            }
            Err(PeerError::Refused(sentence)) => Some(sentence),
            Err(PeerError::Unreachable(why)) => {
                tracing::debug!(peer = %entry.name, "{why}");
                None
            }
        };
        port.notices.set(&entry.name, notice);
    }
    seen
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

/// Keep this member a voter with the addresses it has now: initialise what it founded, join, be
/// promoted; later, say what is wrong while there is no leader. Ends only with the ledger's failure.
pub async fn stay(
    port: Arc<PeerPort>,
    group: Group,
    cluster_id: String,
) -> Result<(), LedgerError> {
    let http = port.http.for_cluster(&cluster_id);
    let mut next_peer = 0;
    loop {
        let status = group.status();
        if status.fault.is_some() {
            return Ok(());
        }
        let settled = settled(&port, &status);
        if settled && !port.ledger.joined() {
            on_ledger(&port, |port| port.ledger.set_joined()).await?;
            tracing::info!(cluster = %cluster_id, "this member is a voter");
        }
        initialise(&port, &group).await;
        let seen = roll_call(&port).await;
        // The smaller part yields: with a foreign data directory we would serve another cloud's state
        // to clients that mean the one around us.
        let outnumbered = seen
            .foreign
            .values()
            .any(|theirs| *theirs > 1 + seen.ours.len());
        port.outnumbered
            .send_if_modified(|now| now.replace(outnumbered) != Some(outnumbered));
        if settled && status.leader.is_some() {
            port.notices.set("group", None);
            tokio::time::sleep(CALM_PAUSE).await;
            continue;
        }
        if !settled && status.is_leader() {
            announce(&port, &group, &status).await;
        } else if !settled && !seen.ours.is_empty() {
            let at = seen.ours[next_peer % seen.ours.len()];
            next_peer += 1;
            ask_to_join(&port, &http, &port.config.list[at]).await;
        }
        pause(&port).await;
    }
}

/// Is this member a voter with the addresses it has now?
fn settled(port: &PeerPort, status: &Status) -> bool {
    status
        .members
        .get(&port.ledger.member_id())
        .is_some_and(|own| own.role == Role::Voter && own.member == port.member)
}

/// Found the group, if the charter names this member and it has not been part of it yet.
async fn initialise(port: &PeerPort, group: &Group) {
    let Some(charter) = port.ledger.charter() else {
        return;
    };
    let started = port.ledger.joined() || !group.status().members.is_empty();
    if started || !charter.names(port.ledger.member_id()) {
        return;
    }
    let founders = charter
        .founders
        .into_iter()
        .map(|f| (f.id, f.member))
        .collect();
    if let Err(e) = group.initialize(founders).await {
        port.notices
            .set("group", Some(format!("cannot start the group: {e}")));
    }
}

/// The leader puts its own addresses right; a member that is alone has nobody else to ask.
async fn announce(port: &PeerPort, group: &Group, status: &Status) {
    let id = port.ledger.member_id();
    let stale = |at: &MemberStatus| at.role == Role::Voter && at.member != port.member;
    if status.members.get(&id).is_some_and(stale)
        && let Err(e) = group.add_learner(id, port.member.clone()).await
    {
        tracing::debug!("cannot announce this member's addresses yet: {e}");
    }
}

/// Ask a peer to take us in, or to announce our new addresses.
async fn ask_to_join(port: &PeerPort, http: &PeerClient, entry: &Entry) {
    let asked = http
        .ask::<JoinReply>(&entry.url, "/peer/v1/join", &port.hello(), JOIN_TIMEOUT)
        .await;
    match asked {
        Ok(JoinReply::Voter | JoinReply::Learner) => {}
        Err(PeerError::Refused(sentence)) => port.notices.set(&entry.name, Some(sentence)),
        Err(PeerError::Unreachable(why)) => tracing::debug!(peer = %entry.name, "{why}"),
    }
}
