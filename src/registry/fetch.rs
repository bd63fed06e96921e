//! Chunks from other members, over the peer port. What arrives is verified and durable before it
//! counts; who sends wrong bytes is passed over.

use super::pace::Pace;
use super::{RegistryService, transfer};
use mainstay_agent::transfer::{Id, WireRecord, api, read_records_into};
use mainstay_model::MemberId;
use mainstay_storage::chunks::ChunkId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Longest wait for a peer's word which chunks it holds, and for how long one that was slower is not
/// asked again: a push must not wait for a member that hangs.
const WORD_MAX: Duration = Duration::from_secs(1);
const SHY: Duration = Duration::from_secs(30);
/// Longest time until a peer's answer begins.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How often it is looked whether an answer is slow.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What came of one question for chunks.
struct Came {
    /// As sent.
    bytes: u64,
    /// `false`: given up, for others are faster.
    ended: Result<bool, String>,
}

/// How a source's turn ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Answered,
    GivenUp,
}

impl RegistryService {
    /// Get these chunks from the first of `sources` that has each; those that nobody had, with
    /// what each source said.
    pub(super) async fn fetch(&self, ids: &[Id], sources: &[MemberId]) -> (Vec<Id>, Vec<String>) {
        self.fetch_at(ids, sources, None).await
    }

    /// The same at a pace.
    pub(super) async fn fetch_at(
        &self,
        ids: &[Id],
        sources: &[MemberId],
        pace: Option<&Pace>,
    ) -> (Vec<Id>, Vec<String>) {
        let mut rest: Vec<Id> = self.lacking(ids);
        let mut said = Vec::new();
        if let Err(why) = (self.room)() {
            said.push(why);
            return (rest, said);
        }
        if self.chunks.shared() && !rest.is_empty() {
            // What any member has stored is there for all: nothing is copied.
            match self.see_shared(rest.clone()).await {
                Ok(lacking) => rest = lacking,
                Err(why) => {
                    said.push(why);
                    return (rest, said);
                }
            }
        }
        // Who was given up for another one that turned out to lack something is asked again, with patience.
        let mut given_up = Vec::new();
        for &source in sources {
            let asked = self.fetch_rest(source, &mut rest, (pace, false), &mut said);
            if asked.await == Asked::GivenUp {
                given_up.push(source);
            }
        }
        for source in given_up {
            self.fetch_rest(source, &mut rest, (pace, true), &mut said)
                .await;
        }
        (rest, said)
    }

    /// One source's turn: what it sent is not among the rest any more.
    async fn fetch_rest(
        &self,
        source: MemberId,
        rest: &mut Vec<Id>,
        (pace, patient): (Option<&Pace>, bool),
        said: &mut Vec<String>,
    ) -> Asked {
        if rest.is_empty() {
            return Asked::Answered;
        }
        let begun = Instant::now();
        let mut asked = Asked::Answered;
        let came = self.fetch_from(source, rest, patient).await;
        let silent = said.len();
        match came.ended {
            Ok(true) => {}
            Ok(false) => {
                let took = begun.elapsed();
                tracing::info!(%source, bytes = came.bytes, ?took, "far slower than other members: what it has not sent is asked of them");
                said.push(format!("{source}: far slower than other members"));
                asked = Asked::GivenUp;
            }
            Err(why) => {
                tracing::warn!(%source, why, "could not fetch chunks from a member");
                said.push(format!("{source}: {why}"));
            }
        }
        if let Some(pace) = pace {
            tokio::time::sleep(pace.spend(came.bytes)).await;
        }
        let before = rest.len();
        *rest = self.lacking(rest);
        if rest.len() == before && said.len() == silent {
            said.push(format!("{source}: lacks {before} chunks"));
        }
        asked
    }

    /// All other members: holders of what is sought first, beginning at `turn`; those that are slow last.
    pub(super) fn sources(&self, holders: &[MemberId], turn: usize) -> Vec<MemberId> {
        let mut first: Vec<MemberId> = holders
            .iter()
            .copied()
            .filter(|m| *m != self.member)
            .collect();
        if !first.is_empty() {
            let by = turn % first.len();
            first.rotate_left(by);
        }
        let status = self.catalog.watch().borrow().clone();
        let others = status.members.keys().map(|id| MemberId(*id));
        let others: Vec<MemberId> = others
            .filter(|m| *m != self.member && !first.contains(m))
            .collect();
        first.extend(others);
        self.speeds.order(&mut first);
        first
    }

    /// Learn what others have put into the bucket that members share; those of these that are not
    /// held then.
    pub(super) async fn see_shared(&self, ids: Vec<Id>) -> Result<Vec<Id>, String> {
        let chunks = self.chunks.clone();
        let adopt = move || {
            let ids: Vec<ChunkId> = ids.into_iter().map(ChunkId).collect();
            chunks.adopt(&ids)
        };
        let lacking = tokio::task::spawn_blocking(adopt).await;
        let lacking = lacking
            .map_err(|e| e.to_string())?
            .map_err(|e| super::answer::chain(&e))?;
        Ok(lacking.into_iter().map(|id| id.0).collect())
    }

    fn lacking(&self, ids: &[Id]) -> Vec<Id> {
        ids.iter()
            .filter(|id| !self.chunks.contains(&ChunkId(**id)))
            .copied()
            .collect()
    }

    /// Ask one member for these, and store what comes; unless patient, only until it turns out to be far
    /// slower than another one is.
    async fn fetch_from(&self, source: MemberId, ids: &[Id], patient: bool) -> Came {
        let (sent, mut records) = (AtomicU64::new(0), Vec::new());
        let begun = Instant::now();
        let mut ended = {
            let mut take = |record: WireRecord| {
                sent.fetch_add(record.framed_len() as u64, Ordering::Relaxed);
                records.push(record);
            };
            let reading = self.read_from(source, ids, &mut take);
            tokio::pin!(reading);
            let slow = async {
                loop {
                    tokio::time::sleep(LOOK_EVERY).await;
                    let sent = sent.load(Ordering::Relaxed);
                    if !patient && self.speeds.is_slow(source, sent, begun.elapsed()) {
                        return;
                    }
                }
            };
            tokio::select! {
                read = &mut reading => read.map(|()| true),
                () = slow => Ok(false),
            }
        };
        let bytes = sent.load(Ordering::Relaxed);
        self.speeds.note(source, bytes, begun.elapsed());
        self.counts.fetched(records.len() as u64, bytes);
        if let Err(why) = self.store_fetched(records).await {
            ended = Err(why);
        }
        Came { bytes, ended }
    }

    async fn read_from(
        &self,
        source: MemberId,
        ids: &[Id],
        take: &mut (dyn FnMut(WireRecord) + Send),
    ) -> Result<(), String> {
        let path = format!("{}?local=1", api::CHUNKS_GET);
        let request = self
            .peers
            .request(reqwest::Method::POST, source, &path)
            .ok_or("its address is not known")?
            .body(ids.concat());
        let response = tokio::time::timeout(ANSWER_MAX, request.send())
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|e| e.to_string())?;
        if !response.status().is_success() {
            return Err(format!("it answered {}", response.status()));
        }
        let read = read_records_into(response, ids, take).await;
        read.map_err(|e| e.to_string())
    }

    async fn store_fetched(&self, records: Vec<WireRecord>) -> Result<(), String> {
        if records.is_empty() {
            return Ok(());
        }
        let bytes = records.iter().map(|r| r.data.len() as u64).sum();
        let _room = self.room_for(bytes).await?;
        let records = records
            .into_iter()
            .map(transfer::to_stored)
            .collect::<Result<_, _>>()?;
        let chunks = self.chunks.clone();
        let put = move || chunks.put(records).map_err(|e| e.to_string());
        let stored = tokio::task::spawn_blocking(put).await;
        stored.map_err(|e| e.to_string())?.map(drop)
    }

    /// Those of these chunks that this member lacks although it looked for them at the others: what a
    /// client would send is fetched from who has it already.
    pub(super) async fn bring_what_others_have(&self, ids: &[Id]) {
        let Ok(_turn) = self.read_through.try_acquire() else {
            return;
        };
        let asked = self.sources(&[], 0).into_iter().map(|member| async move {
            let held = self.held_by(member, ids).await;
            (member, held)
        });
        for (member, held) in futures::future::join_all(asked).await {
            let held = self.lacking(&held);
            if !held.is_empty() {
                self.fetch(&held, &[member]).await;
            }
        }
    }

    /// Those of these chunks that a member says it holds; none of one that is slow to say so.
    async fn held_by(&self, member: MemberId, ids: &[Id]) -> Vec<Id> {
        let now = Instant::now();
        if self.shy.lock().get(&member).is_some_and(|at| *at > now) {
            return Vec::new();
        }
        let path = format!("{}?local=1", api::MISSING);
        let Some(request) = self.peers.request(reqwest::Method::POST, member, &path) else {
            return Vec::new();
        };
        let answered = async {
            let response = request.body(ids.concat()).send().await.ok()?;
            let answered = response.status().is_success();
            let flags = response.bytes().await.ok()?;
            (answered && flags.len() == ids.len()).then_some(flags)
        };
        let Ok(Some(flags)) = tokio::time::timeout(WORD_MAX, answered).await else {
            self.shy.lock().insert(member, Instant::now() + SHY);
            return Vec::new();
        };
        let held = ids.iter().zip(flags).filter(|(_, lacking)| *lacking == 0);
        held.map(|(id, _)| *id).collect()
    }
}
