//! Should this member lead? Others say why not (a full disk, a slow one, a state that differs); here
//! that becomes: no candidacy, and a lead that is handed on. Knows no disk.
//!
//! ```text
//!  fit ───────────── campaigns as usual, is chosen when a lead is handed over
//!  reluctant ─────── leads only while no fit voter can: hands over as soon as one answers, goes on
//!                    leading until then; campaigns once nobody has led for `PATIENCE` timeouts
//!  barred ────────── never campaigns; hands over to any voter that is not barred too
//! ```
//!
//! A group without a leader is worse than one with a reluctant leader, so nothing here ever makes a
//! leader fall silent: consensus stops a leader's heartbeats for good once a transfer has begun, so
//! the target is asked first, and no transfer begins without a target that has said that it is fit.

use super::status::answers;
use super::{Group, Inner};
use crate::codec;
use crate::transport::link::LinkError;
use crate::transport::wire::{Fit, Lane, kind};
use bytes::Bytes;
use futures::future::join_all;
use openraft::Instant as _;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Why a member should not lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Another would do better: it leads only while no fit voter can. A sentence without its end,
    /// such as "the disk is almost full".
    Reluctant(String),
    /// It must not lead, whatever that costs.
    Barred(String),
}

impl Unfit {
    /// The reason in words.
    pub fn why(&self) -> &str {
        match self {
            Self::Reluctant(why) | Self::Barred(why) => why,
        }
    }
}

/// A reluctant member campaigns when nobody has led for this many election timeouts (upper end):
/// fit members have had several elections by then.
const PATIENCE: u32 = 5;
/// How often an unfit member looks whether it may campaign, or must hand over.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Between two attempts to hand over.
const RETRY: Duration = Duration::from_secs(1);
/// A voter that is further behind would keep the group waiting for it.
const LAG_MAX: u64 = 1000;

/// The reasons that stand, by their owners' keys.
pub(super) struct Fitness(watch::Sender<BTreeMap<&'static str, Unfit>>);

impl Fitness {
    pub(super) fn new() -> Self {
        Self(watch::Sender::default())
    }

    pub(super) fn set(&self, key: &'static str, reason: Option<Unfit>) {
        self.0.send_if_modified(|reasons| {
            if reasons.get(key) == reason.as_ref() {
                return false;
            }
            let stood = reasons.contains_key(key);
            match reason {
                Some(reason) => {
                    if !stood {
                        tracing::warn!(key, why = reason.why(), "not fit to lead");
                    }
                    reasons.insert(key, reason);
                }
                None => {
                    tracing::info!(key, "fit to lead again, as far as this reason goes");
                    reasons.remove(key);
                }
            }
            true
        });
    }

    /// All reasons together.
    pub(super) fn verdict(&self) -> Fit {
        let reasons = self.0.borrow();
        if reasons.is_empty() {
            return Fit::Yes;
        }
        let texts: Vec<&str> = reasons.values().map(Unfit::why).collect();
        let why = texts.join("; ");
        let barred = |r: &Unfit| matches!(r, Unfit::Barred(_));
        if reasons.values().any(barred) {
            Fit::Barred(why)
        } else {
            Fit::Reluctant(why)
        }
    }

    /// Each reason in words.
    pub(super) fn reasons(&self) -> Vec<String> {
        let reasons = self.0.borrow();
        reasons.values().map(|r| r.why().to_owned()).collect()
    }

    pub(super) fn watch(&self) -> watch::Receiver<BTreeMap<&'static str, Unfit>> {
        self.0.subscribe()
    }
}

impl Group {
    /// While any reason stands, this member does not campaign, is not chosen when a lead is handed
    /// over, and hands over its own (see [`Unfit`] for how far that goes). `key` names whose reason
    /// it is; `None` takes it back. Hysteresis is the caller's business.
    pub fn unfit(&self, key: &'static str, reason: Option<Unfit>) {
        self.inner.fitness.set(key, reason);
    }
}

/// Follow the reasons until the member ends.
pub(super) fn spawn(inner: &Arc<Inner>) {
    let inner = inner.clone();
    tokio::spawn(async move {
        let cancel = inner.cancel.clone();
        cancel.run_until_cancelled(follow(&inner)).await;
    });
}

async fn follow(inner: &Inner) {
    let mut reasons = inner.fitness.watch();
    let mut next_try = Instant::now();
    let mut complained = false;
    loop {
        let fit = inner.fitness.verdict();
        let campaigns = inner.may_campaign(&fit).await;
        inner.raft.runtime_config().elect(campaigns);
        if fit == Fit::Yes || !inner.leads() {
            complained = false;
        } else if Instant::now() >= next_try {
            inner.relinquish(&fit, &mut complained).await;
            next_try = Instant::now() + RETRY;
        }
        let pause = async {
            match fit {
                Fit::Yes => std::future::pending().await,
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        };
        tokio::select! {
            () = pause => {}
            // A closed channel: the member has ended.
            changed = reasons.changed() => if changed.is_err() { return },
        }
    }
}

impl Inner {
    async fn may_campaign(&self, fit: &Fit) -> bool {
        let membership = self.metrics().membership_config.membership().clone();
        let mut voters = membership.voter_ids();
        let alone = voters.next() == Some(self.config.id) && voters.next().is_none();
        match fit {
            Fit::Yes => true,
            _ if alone => true,
            Fit::Barred(_) => false,
            Fit::Reluctant(_) => {
                !self.leads() && self.leaderless().await >= self.config.election.1 * PATIENCE
            }
        }
    }

    /// For how long this member has heard of no leader.
    async fn leaderless(&self) -> Duration {
        let heard = self
            .raft
            .with_raft_state(|state| state.vote_last_modified())
            .await;
        match heard.ok().flatten() {
            Some(at) => at.elapsed(),
            None => self.started.elapsed(),
        }
    }

    /// Hand the lead to a better one, if there is one.
    async fn relinquish(&self, fit: &Fit, complained: &mut bool) {
        let (why, settle) = match fit {
            Fit::Yes => return,
            Fit::Reluctant(why) => (why, false),
            Fit::Barred(why) => (why, true),
        };
        match self.successor(settle).await {
            Ok(to) => {
                tracing::warn!(to, why, "handing over the lead");
                let reply = self.transfer_to(to).await;
                tracing::info!(to, ?reply, "handed over the lead");
            }
            Err(none) if !*complained => {
                *complained = true;
                tracing::warn!(
                    why,
                    none,
                    "should not lead, and goes on until a fit voter answers"
                );
            }
            Err(none) => tracing::debug!(why, none, "still leads"),
        }
    }

    /// The voter that should lead next: of those that answer, are close behind and say that they are
    /// fit, the furthest. `settle`: a reluctant one will do when there is no other. `Err`: why none.
    pub(super) async fn successor(&self, settle: bool) -> Result<u64, String> {
        let metrics = self.metrics();
        let last = metrics.last_log_index.unwrap_or(0);
        let matched = |id: u64| {
            let all = metrics.replication.as_ref();
            all.and_then(|r| r.get(&id).copied().flatten())
                .map_or(0, |m| m.index)
        };
        let membership = metrics.membership_config.membership();
        let near: Vec<u64> = membership
            .voter_ids()
            .filter(|id| *id != self.config.id)
            .filter(|id| answers(&metrics, *id, self.config.election.1))
            .filter(|id| last.saturating_sub(matched(*id)) <= LAG_MAX)
            .collect();
        if near.is_empty() {
            return Err("there is no other voter that answers and has caught up".into());
        }
        let asked = near
            .iter()
            .map(|id| async move { (*id, self.ask_fitness(*id).await) });
        let mut reasons = Vec::new();
        let mut best = None;
        for (id, fit) in join_all(asked).await {
            let rank = match fit {
                Fit::Yes => (1, matched(id), id),
                Fit::Reluctant(_) if settle => (0, matched(id), id),
                Fit::Reluctant(why) | Fit::Barred(why) => {
                    reasons.push(format!("member {id} is not fit to lead: {why}"));
                    continue;
                }
            };
            best = best.max(Some(rank));
        }
        best.map(|(_, _, id)| id).ok_or_else(|| reasons.join("; "))
    }

    /// What a voter says of itself; no answer is a no.
    pub(super) async fn ask_fitness(&self, id: u64) -> Fit {
        let Some(link) = self.leader_link(id, Lane::Control) else {
            return Fit::Barred("it is no member".into());
        };
        let wait = self.config.election.0;
        match link.call(kind::FITNESS, Bytes::new(), wait).await {
            Ok(bytes) => codec::decode(&bytes)
                .unwrap_or_else(|e| Fit::Barred(format!("its answer cannot be read: {e}"))),
            // A member of an earlier release has no opinion of itself.
            Err(LinkError::Failed(why)) if why.contains("unknown request") => Fit::Yes,
            Err(e) => Fit::Barred(e.to_string()),
        }
    }
}
