//! Chunks sent ahead: what a client sends goes on to other members while its push still runs, out of memory,
//! so that most of a tag is on their disks when it is published. A help and no promise: nothing waits for it,
//! what finds no room in memory or no answer is copied after the commit like anything else (`replicate`), and
//! what the client abandons is collected there as it is here. Refuses to know tags.
//!
//! ```text
//! batch durable here -> PUT chunks?local=1 to two other voters -> verified and durable there, or not
//! ```

use super::transfer::to_wire;
use super::{PeerHttp, catalog};
use futures::future::join_all;
use mainstay_agent::transfer::{WireRecord, api};
use mainstay_model::MemberId;
use mainstay_raft::Status;
use mainstay_storage::chunks::Record;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Members that a chunk is sent to: with the one that took it they are a majority of five.
const MEMBERS: usize = 2;
/// Bytes under way to one member, in memory until it answers. The next ones are not sent ahead.
const UNDER_WAY_MAX: usize = 32 << 20;
/// A member that has not stored a batch within this, or has refused one, gets none for a while.
const ANSWER_MAX: Duration = Duration::from_secs(30);
const QUIET: Duration = Duration::from_secs(30);

/// What was sent ahead since the start and arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AheadFigures {
    /// Chunks, once for each member that they were sent to.
    pub chunks: u64,
    /// Their bytes as sent.
    pub bytes: u64,
}

/// Sends chunks ahead. Cheap to clone.
#[derive(Clone)]
pub(super) struct Ahead(Arc<Inner>);

struct Inner {
    peers: Arc<dyn PeerHttp>,
    member: MemberId,
    to: Mutex<BTreeMap<MemberId, To>>,
    chunks: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Default)]
struct To {
    under_way: usize,
    quiet_until: Option<Instant>,
}

/// Bytes on their way to a member; over when this goes.
struct Turn {
    ahead: Arc<Inner>,
    member: MemberId,
    bytes: usize,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(to) = self.ahead.to.lock().get_mut(&self.member) {
            to.under_way -= self.bytes;
        }
    }
}

impl Ahead {
    pub(super) fn new(peers: Arc<dyn PeerHttp>, member: MemberId) -> Self {
        Self(Arc::new(Inner {
            peers,
            member,
            to: Mutex::default(),
            chunks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }))
    }

    pub(super) fn figures(&self) -> AheadFigures {
        AheadFigures {
            chunks: self.0.chunks.load(Ordering::Relaxed),
            bytes: self.0.bytes.load(Ordering::Relaxed),
        }
    }

    /// These are durable here, and are new. Does not wait for anything.
    pub(super) fn send(&self, records: Vec<Record>, group: &Status) {
        let records: Vec<WireRecord> = records.into_iter().map(to_wire).collect();
        let bytes = records.iter().map(WireRecord::framed_len).sum();
        let turns = self.turns(group, bytes);
        if bytes == 0 || turns.is_empty() {
            return;
        }
        let chunks = records.len() as u64;
        tokio::spawn(async move {
            let body = WireRecord::frame_all(&records);
            drop(records);
            let each = turns.into_iter().map(|turn| {
                let body = body.clone();
                async move { turn.put(body, chunks).await }
            });
            join_all(each).await;
        });
    }

    /// Whom to send so many bytes now.
    fn turns(&self, group: &Status, bytes: usize) -> Vec<Turn> {
        let now = Instant::now();
        let mut known = self.0.to.lock();
        let mut turns = Vec::new();
        for member in after(self.0.member, catalog::voters(group)).take(MEMBERS) {
            let to = known.entry(member).or_default();
            let quiet = to.quiet_until.is_some_and(|until| until > now);
            if quiet || to.under_way + bytes > UNDER_WAY_MAX {
                continue;
            }
            to.under_way += bytes;
            turns.push(Turn {
                ahead: Arc::clone(&self.0),
                member,
                bytes,
            });
        }
        turns
    }
}

/// The others, beginning with the next one: each member sends to others, and always to the same.
fn after(
    member: MemberId,
    all: impl IntoIterator<Item = MemberId>,
) -> impl Iterator<Item = MemberId> {
    let others = all.into_iter().filter(move |id| *id != member);
    let (later, earlier): (Vec<_>, Vec<_>) = others.partition(|id| *id > member);
    later.into_iter().chain(earlier)
}

impl Turn {
    async fn put(self, body: bytes::Bytes, chunks: u64) {
        let ahead = &self.ahead;
        let Err(why) = self.try_put(body).await else {
            ahead.chunks.fetch_add(chunks, Ordering::Relaxed);
            ahead.bytes.fetch_add(self.bytes as u64, Ordering::Relaxed);
            return;
        };
        let until = Instant::now() + QUIET;
        let mut known = ahead.to.lock();
        let to = known.entry(self.member).or_default();
        let said = to.quiet_until.replace(until);
        drop(known);
        if said.is_none_or(|said| said + QUIET < until) {
            tracing::info!(member = %self.member, why, "chunks could not be sent ahead: it copies them once their tag is committed");
        }
    }

    async fn try_put(&self, body: bytes::Bytes) -> Result<(), String> {
        let path = format!("{}?local=1", api::CHUNKS);
        let request = self
            .ahead
            .peers
            .request(reqwest::Method::PUT, self.member, &path)
            .ok_or("its address is not known")?
            .body(body)
            .timeout(ANSWER_MAX);
        let response = request.send().await.map_err(|e| e.to_string())?;
        let status = response.status();
        // Read to its end, so that the connection serves again.
        let said = response.bytes().await.map_err(|e| e.to_string())?;
        match status.is_success() {
            true => Ok(()),
            false => Err(format!(
                "it answered {status}: {}",
                String::from_utf8_lossy(&said[..said.len().min(200)])
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_member_sends_to_the_next_ones() {
        let all = [1, 3, 5, 7, 9].map(MemberId);
        let first = |member| {
            after(MemberId(member), all)
                .take(MEMBERS)
                .collect::<Vec<_>>()
        };
        assert_eq!(first(1), [3, 5].map(MemberId));
        assert_eq!(first(7), [9, 1].map(MemberId));
        assert_eq!(first(9), [1, 3].map(MemberId));
        assert_eq!(after(MemberId(1), [MemberId(1)]).count(), 0);
    }
}
