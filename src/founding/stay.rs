//! Life in the group: initialise what this member founded, join, have its addresses known, be promoted;
//! notice that clients must not be served, or that this identity was taken out.
//!
//! ```text
//! not in the group     -> ask a peer to be let in, again and again (a refusal is shown)
//! in, without a vote   -> the same: the leader promotes who is caught up; not with --learner
//! in, other addresses  -> flags that changed since they were last known are announced;
//!                         if they did not, an operator changed the group's record: that holds
//! in                   -> look around every few seconds, or when told to
//! taken out            -> remember it for good, say so, end
//! ```

use super::LedgerError;
use super::roll::{RollCall, roll_call};
use super::run::{on_ledger, pause};
use crate::peer::client::JOIN_TIMEOUT;
use crate::peer::wire::JoinReply;
use crate::peer::{PeerClient, PeerError, PeerPort, Standing};
use mainstay_raft::{Group, Member, MemberStatus, Role, Status};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pause between two looks at a healthy group.
const CALM_PAUSE: Duration = Duration::from_secs(5);

/// Why a member's part in its group is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parted {
    /// The group has stopped; its status says why.
    Stopped,
    /// The cluster let this identity go, with this sentence. Remembered already.
    Removed(String),
}

/// Keep this member in the group with the addresses it has now. Ends when its part is over, or with
/// the ledger's failure.
pub async fn stay(
    port: Arc<PeerPort>,
    group: Group,
    cluster_id: String,
) -> Result<Parted, LedgerError> {
    let http = port.http.for_cluster(&cluster_id);
    let mut next_peer = 0;
    loop {
        if group.status().fault.is_some() {
            return Ok(Parted::Stopped);
        }
        initialise(&port, &group).await;
        remember(&port, &group.status(), &cluster_id).await?;
        let seen = roll_call(&port, &addresses(&group.status())).await;
        if let Some(sentence) = seen.removed {
            return removed(&port, sentence).await;
        }
        let status = group.status();
        port.standing
            .send_if_modified(|now| now.replace(standing(&port, &status, &seen)) != *now);
        let settled = settled(&port, &status);
        if settled && status.leader.is_some() {
            port.notices.set("group", None);
            port.notices.set("joining", None);
            let look = port.look.notified();
            tokio::time::timeout(CALM_PAUSE, look).await.ok();
            continue;
        }
        if !settled && status.is_leader() {
            let announced = group.update(status.id, port.member.clone()).await;
            said(&port, announced.err().map(|e| e.to_string()));
        } else if !settled && !seen.ours.is_empty() {
            let at = &seen.ours[next_peer % seen.ours.len()];
            next_peer += 1;
            ask_to_join(&port, &http, at).await;
        }
        pause(&port).await;
    }
}

async fn removed(port: &Arc<PeerPort>, sentence: String) -> Result<Parted, LedgerError> {
    let kept = sentence.clone();
    on_ledger(port, move |port| port.ledger.set_removed(&kept)).await?;
    port.notices.set("removed", Some(sentence.clone()));
    Ok(Parted::Removed(sentence))
}

fn own<'s>(port: &PeerPort, status: &'s Status) -> Option<&'s MemberStatus> {
    status.members.get(&port.ledger.member_id())
}

fn addresses(status: &Status) -> BTreeMap<u64, Member> {
    let members = status.members.iter();
    members.map(|(id, at)| (*id, at.member.clone())).collect()
}

/// What must not be forgotten: that it has been a voter, and which addresses were its own word.
async fn remember(
    port: &Arc<PeerPort>,
    status: &Status,
    cluster_id: &str,
) -> Result<(), LedgerError> {
    let Some(own) = own(port, status) else {
        return Ok(());
    };
    if own.role == Role::Voter && !port.ledger.joined() {
        on_ledger(port, |port| port.ledger.set_joined()).await?;
        tracing::info!(cluster = %cluster_id, "this member is a voter");
    }
    if own.member == port.member && port.ledger.announced().as_ref() != Some(&port.member) {
        on_ledger(port, |port| port.ledger.set_announced(&port.member)).await?;
    }
    Ok(())
}

/// The smaller part yields: with a foreign data directory we would serve another cloud's state to
/// clients that mean the one around us. And who is not let in yet has nothing to serve.
fn standing(port: &PeerPort, status: &Status, seen: &RollCall) -> Standing {
    if seen
        .foreign
        .values()
        .any(|theirs| *theirs > 1 + seen.ours.len())
    {
        Standing::Outnumbered
    } else if own(port, status).is_some() {
        Standing::Member
    } else {
        Standing::Waiting
    }
}

/// Has this member the part it wants, under addresses that are right?
fn settled(port: &PeerPort, status: &Status) -> bool {
    own(port, status).is_some_and(|own| {
        let part = own.role == Role::Voter || port.config.learner;
        let flags_are_known = port.ledger.announced().as_ref() == Some(&port.member);
        part && (own.member == port.member || flags_are_known)
    })
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

/// Ask a peer to take us in, or to announce our new addresses.
async fn ask_to_join(port: &PeerPort, http: &PeerClient, url: &str) {
    let asked = http
        .ask::<JoinReply>(url, "/peer/v1/join", &port.hello(), JOIN_TIMEOUT)
        .await;
    match asked {
        Ok(JoinReply::Voter | JoinReply::Learner) => said(port, None),
        Err(PeerError::Refused(sentence)) => said(port, Some(sentence)),
        Err(PeerError::WrongPort(why) | PeerError::Unreachable(why)) => {
            tracing::debug!(peer = %url, "{why}");
        }
    }
}

fn said(port: &PeerPort, sentence: Option<String>) {
    port.notices.set("joining", sentence);
}
