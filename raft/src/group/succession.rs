//! What a follower does when the leader's process has ended: it stops defending that leader and
//! campaigns at once, instead of waiting for the lease of a leader that may only be slow. Knows no
//! election rule: who wins, and that a live leader stays, is the consensus core's pre-vote.
//!
//! ```text
//!  following ──its last stream to us ended──► asking ──its port refuses──► campaigning
//!      ▲                                        │ it answers, or silence       │ another vote, or it is
//!      └────────────────────────────────────────┴──────────────────────────────┘ heard again, or tried enough
//! ```
//!
//! # Why this is safe, and when it disturbs
//!
//! Elections are always safe; only the log and the votes on disk decide them. A lease protects a
//! live leader from candidates that do not hear it, and nothing else: reads never trust one. A
//! member that ends its own protection on wrong evidence (a firewall that answers for the leader)
//! still needs a majority that did so as well: the others hear the leader and refuse, the leader
//! itself refuses while a quorum answers it, and the term does not move. Until the next leader this
//! member protects the present one no longer, that is all.
//!
//! What is no evidence is waited for as before: a leader that is paused, cut off, or whose machine
//! lost power keeps its connections or refuses nothing.

use super::Inner;
use crate::transport::wire::Fit;
use crate::types::Vote;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::raft::TransferLeaderRequest;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// The port of a process that is just ending may still be open: asked again after these.
const ASK_AGAIN: [Duration; 5] = [
    Duration::from_millis(2),
    Duration::from_millis(5),
    Duration::from_millis(15),
    Duration::from_millis(40),
    Duration::from_millis(100),
];
/// An answer that takes longer is none.
const ASK_MAX: Duration = Duration::from_millis(100);
/// Between the campaigns of two members: time for a pre-vote and a vote with its fsyncs. Votes of
/// one term are ordered by member, so two that meet do not split it, they only take longer.
const STAGGER: Duration = Duration::from_millis(40);
/// Campaigns of one member. The first fails where the others have not noticed yet.
const CAMPAIGNS: u32 = 8;
/// Ends of streams that wait to be looked at. One that is lost costs only the wait for the lease.
const ENDS_MAX: usize = 64;

/// Open streams from other members, and the news of their ends.
pub(super) struct Streams {
    open: Mutex<BTreeMap<u64, usize>>,
    ends: mpsc::Sender<u64>,
}

impl Streams {
    pub(super) fn new() -> (Arc<Self>, mpsc::Receiver<u64>) {
        let (ends, ended) = mpsc::channel(ENDS_MAX);
        let open = Mutex::default();
        (Arc::new(Self { open, ends }), ended)
    }

    /// A stream from this member is open for as long as the answer lives.
    pub(super) fn opened(self: &Arc<Self>, from: u64) -> Opened {
        *self.open.lock().entry(from).or_default() += 1;
        Opened(self.clone(), from)
    }

    fn hears(&self, id: u64) -> bool {
        self.open.lock().contains_key(&id)
    }
}

/// See [`Streams::opened`].
pub(super) struct Opened(Arc<Streams>, u64);

impl Drop for Opened {
    fn drop(&mut self) {
        let last = {
            let mut open = self.0.open.lock();
            let left = open.get(&self.1).map_or(0, |n| n - 1);
            if left == 0 {
                open.remove(&self.1);
            } else {
                open.insert(self.1, left);
            }
            left == 0
        };
        if last {
            // Full: see `ENDS_MAX`.
            let _ = self.0.ends.try_send(self.1);
        }
    }
}

pub(super) fn spawn(inner: &Arc<Inner>, mut ended: mpsc::Receiver<u64>) {
    let inner = inner.clone();
    tokio::spawn(async move {
        let cancel = inner.cancel.clone();
        let watch = async {
            while let Some(id) = ended.recv().await {
                if inner.gone(id).await {
                    inner.succeed(id).await;
                }
            }
        };
        cancel.run_until_cancelled(watch).await;
    });
}

impl Inner {
    /// Is `id` a leader that we followed, and has its process ended?
    async fn gone(&self, id: u64) -> bool {
        for pause in ASK_AGAIN {
            let follows = id != self.config.id && *self.leader.borrow() == Some(id);
            if !follows || self.streams.hears(id) {
                return false;
            }
            let Some(member) = self.member(id) else {
                return false;
            };
            let asked = tokio::time::timeout(ASK_MAX, self.peers.gone(id, &member));
            if asked.await.unwrap_or(false) {
                return true;
            }
            tokio::time::sleep(pause).await;
        }
        false
    }

    /// Campaign, in turn with the other voters, until someone may lead.
    async fn succeed(&self, dead: u64) {
        let Some((vote, turn)) = self.vote_and_turn(dead).await else {
            return;
        };
        tracing::info!(leader = dead, "the leader's process has ended");
        // "Someone else shall lead, not you": ends the lease here, and nothing else.
        let yielded = TransferLeaderRequest::new(vote, dead, None);
        // The core's end shows elsewhere, here and below.
        let _ = self.raft.handle_transfer_leader(yielded).await;
        tokio::time::sleep(STAGGER * turn).await;
        for _ in 0..CAMPAIGNS {
            // The others may go ahead. When nobody is fit, `fitness` lets one campaign in the end.
            if self.fitness.verdict() != Fit::Yes {
                return;
            }
            let now = self.vote_and_turn(dead).await;
            if self.streams.hears(dead) || now.is_none_or(|(now, _)| now != vote) {
                return;
            }
            let _ = self.raft.trigger().elect(true).await;
            tokio::time::sleep(STAGGER).await;
        }
    }

    /// The vote that made `dead` the leader, and how many voters campaign before this one; `None`
    /// when it leads no more or we do not vote.
    async fn vote_and_turn(&self, dead: u64) -> Option<(Vote, u32)> {
        let look = |state: &openraft::RaftState<_>| *state.vote_ref();
        let vote: Vote = self.raft.with_raft_state(look).await.ok()?;
        if !vote.committed || vote.leader_id.node_id != dead {
            return None;
        }
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let mut voters = metrics.membership_config.membership().voter_ids();
        let others: Vec<u64> = {
            let mut all: Vec<u64> = voters.by_ref().filter(|id| *id != dead).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        let turn = others.iter().position(|id| *id == self.config.id)?;
        Some((vote, u32::try_from(turn).unwrap_or(u32::MAX).min(CAMPAIGNS)))
    }
}
