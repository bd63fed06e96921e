//! Chunks from other members, over the peer port. What arrives is verified and durable before it
//! counts; who sends wrong bytes is passed over.

use super::{RegistryService, transfer};
use mainstay_agent::transfer::{Id, api, read_records};
use mainstay_model::MemberId;
use mainstay_storage::chunks::ChunkId;
use std::time::Duration;

/// Longest time until a peer's answer begins.
const ANSWER_MAX: Duration = Duration::from_secs(30);

impl RegistryService {
    /// Get these chunks from the first of `sources` that has each; those that nobody had, with
    /// what each source said.
    pub(super) async fn fetch(&self, ids: &[Id], sources: &[MemberId]) -> (Vec<Id>, Vec<String>) {
        let mut rest: Vec<Id> = self.lacking(ids);
        let mut said = Vec::new();
        if let Err(why) = (self.room)() {
            said.push(why);
            return (rest, said);
        }
        for &source in sources {
            if rest.is_empty() {
                break;
            }
            if let Err(why) = self.fetch_from(source, &rest).await {
                tracing::warn!(%source, why, "could not fetch chunks from a member");
                said.push(format!("{source}: {why}"));
            }
            let before = rest.len();
            rest = self.lacking(&rest);
            if rest.len() == before && said.len() < sources.len() {
                said.push(format!("{source}: lacks {before} chunks"));
            }
        }
        (rest, said)
    }

    /// All other members: holders of what is sought first, beginning at `turn`.
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
        first
    }

    fn lacking(&self, ids: &[Id]) -> Vec<Id> {
        ids.iter()
            .filter(|id| !self.chunks.contains(&ChunkId(**id)))
            .copied()
            .collect()
    }

    async fn fetch_from(&self, source: MemberId, ids: &[Id]) -> Result<(), String> {
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
        let records = read_records(response, ids)
            .await
            .map_err(|e| e.to_string())?;
        let records = records
            .into_iter()
            .map(transfer::to_stored)
            .collect::<Result<_, _>>()?;
        let chunks = self.chunks.clone();
        let put = move || chunks.put(records).map_err(|e| e.to_string());
        tokio::task::spawn_blocking(put)
            .await
            .map_err(|e| e.to_string())?
            .map(|_| ())
    }
}
