//! Every member tells the others how far its disk goes, and hears how far theirs go: see
//! [`witness`](crate::transport::witness), which judges.

use super::Inner;
use super::rounds::repeat;
use crate::codec;
use crate::transport::server::Served;
use crate::transport::wire::{Lane, Position, Verdict, kind};
use futures::FutureExt;
use openraft::async_runtime::watch::WatchReceiver as _;
use std::sync::Arc;
use std::time::Duration;

/// Positions are told this often.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// For one member's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Tell the others until the member ends, at once for the first time.
pub(super) fn spawn(inner: &Arc<Inner>) {
    let metrics = inner.raft.metrics();
    let led = move |id: u64| {
        let metrics = metrics.borrow_watched();
        let matched = metrics.replication.as_ref()?.get(&id).copied().flatten()?;
        let leads = metrics.current_leader == Some(metrics.id);
        leads.then_some(Position {
            term: metrics.current_term,
            index: matched.index,
        })
    };
    inner.witness.lead_by(led);
    repeat(inner, |inner| {
        async move {
            inner.tell_positions().await;
            tokio::time::sleep(TELL_EVERY).await;
        }
        .boxed()
    });
}

impl Inner {
    /// Answer another member's claim.
    pub(super) fn claimed(&self, payload: &[u8]) -> Served {
        let claim = codec::decode(payload).map_err(|e| e.to_string())?;
        let verdict = Verdict {
            against: self.witness.judge(&claim),
            claim: self.witness.claim(),
        };
        Ok(codec::encode(&verdict).into())
    }

    async fn tell_positions(&self) {
        let members = self.members();
        self.witness
            .retain(|id| members.iter().any(|(member, _)| *member == id));
        let others = members.iter().filter(|(id, _)| *id != self.config.id);
        let told = others.map(|(id, member)| async move {
            let link = self.peers.link(*id, member, Lane::Control);
            let claim = codec::encode(&self.witness.claim()).into();
            let answer = link.call(kind::CLAIM, claim, ANSWER_TIMEOUT).await.ok()?;
            // What follows from it, if anything, is done.
            self.witness.heard(&codec::decode(&answer).ok()?).ok()
        });
        futures::future::join_all(told).await;
    }
}
