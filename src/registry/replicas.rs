//! Who has a tag's bytes, and how far the others are. Progress is soft: in memory, asked of each
//! member when someone wants to see it.

use super::RegistryService;
use super::answer::{self, Params, fail, ok};
use super::publish::Which;
use crate::app::Consistency;
use axum::extract::{Request, State};
use http::StatusCode;
use mainstay_agent::transfer::CHUNK_LEN;
use mainstay_agent::transfer::api::{self, Answer, Replica};
use mainstay_model::ids::{Digest, Sha256};
use mainstay_model::{MemberId, TemplateId};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Longest wait for a peer's word about its own copy.
const PEER_MAX: Duration = Duration::from_secs(3);

/// One copy to make.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub owner: Owner,
    pub manifest: Digest,
}

/// What the copy is of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Tag { template: TemplateId, number: u32 },
    Artifact { repository: String, digest: Sha256 },
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.owner {
            Owner::Tag { template, number } => write!(f, "template {template} tag {number}"),
            Owner::Artifact { repository, digest } => write!(f, "{repository}@{digest}"),
        }
    }
}

/// How far a copy is.
#[derive(Debug, Default)]
pub(super) struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    running: AtomicBool,
    cancelled: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl Progress {
    pub(super) fn set(&self, done: u64, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(done, Ordering::Relaxed);
    }

    /// So many chunks are still to come.
    pub(super) fn left(&self, chunks: u64) {
        let total = self.total.load(Ordering::Relaxed);
        self.done
            .store(total.saturating_sub(chunks * CHUNK_LEN), Ordering::Relaxed);
    }

    pub(super) fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// All copies that are to be made.
#[derive(Debug, Default)]
pub(super) struct ProgressMap(Mutex<BTreeMap<Key, Arc<Progress>>>);

impl ProgressMap {
    /// Forget those that are not wanted any more, and tell their copies.
    pub(super) fn keep<T>(&self, wanted: &BTreeMap<Key, T>) {
        self.0.lock().retain(|key, progress| {
            let keep = wanted.contains_key(key);
            progress.cancelled.store(!keep, Ordering::Relaxed);
            keep || progress.running.load(Ordering::Relaxed)
        });
    }

    /// `None`: it is under way already.
    pub(super) fn begin(&self, key: &Key) -> Option<Arc<Progress>> {
        let mut map = self.0.lock();
        let progress = map.entry(key.clone()).or_default();
        let running = progress.running.swap(true, Ordering::Relaxed);
        (!running).then(|| Arc::clone(progress))
    }

    pub(super) fn end(&self, key: &Key, failure: Option<String>) {
        let mut map = self.0.lock();
        if failure.is_none() {
            map.remove(key);
        } else if let Some(progress) = map.get(key) {
            *progress.failure.lock() = failure;
            progress.running.store(false, Ordering::Relaxed);
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    fn get(&self, key: &Key) -> Option<Arc<Progress>> {
        self.0.lock().get(key).map(Arc::clone)
    }
}

/// `GET replicas`: one entry per member; `local=1`: this member's only.
pub(super) async fn list(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> answer::Answer {
    let params = Params::from_query(request.uri());
    let which = Which::from(&params)?;
    let local = params.get("local").is_some_and(|v| v != "0");
    let consistency = if local {
        Consistency::Stale
    } else {
        Consistency::Linearizable
    };
    let find = |state: &mainstay_model::State| {
        which.find(state).map(|(template, tag)| {
            let key = Key {
                owner: Owner::Tag {
                    template: template.id.clone(),
                    number: tag.number,
                },
                manifest: tag.content.manifest,
            };
            (key, tag.holders.clone())
        })
    };
    let found = service.catalog.take(consistency, find).await?;
    let (key, holders) = found.ok_or_else(|| fail(StatusCode::OK, "Not found"))?;
    let status = service.catalog.watch().borrow().clone();
    let members = status
        .members
        .iter()
        .filter(|(id, _)| !local || **id == service.member.0);
    let rows = members.map(|(id, member)| {
        let member_id = MemberId(*id);
        let row = Replica {
            member: member_id.to_string(),
            name: member.member.name.clone(),
            ..Replica::default()
        };
        let held = holders.contains(&member_id);
        let (service, key) = (Arc::clone(&service), key.clone());
        async move { service.describe(row, member_id, held, &key).await }
    });
    Ok(ok(futures::future::join_all(rows).await))
}

impl RegistryService {
    async fn describe(&self, row: Replica, id: MemberId, held: bool, key: &Key) -> Replica {
        if id == self.member {
            return self.own(row, held, key);
        }
        if held {
            return complete(row);
        }
        match self.ask_peer(id, key).await {
            Ok(Some(theirs)) => Replica {
                member: row.member,
                name: row.name,
                ..theirs
            },
            Ok(None) => Replica {
                state: "unknown".to_owned(),
                message: "it does not know the tag yet".to_owned(),
                ..row
            },
            Err(message) => Replica {
                state: "unknown".to_owned(),
                message,
                ..row
            },
        }
    }

    fn own(&self, row: Replica, held: bool, key: &Key) -> Replica {
        let broken = self.broken.lock().get(key).cloned();
        if held && broken.is_none() {
            return complete(row);
        }
        let progress = self.progress.get(key).unwrap_or_default();
        let running = progress.running.load(Ordering::Relaxed);
        let state = match (&broken, running) {
            (Some(_), _) => "damaged",
            (None, true) => "copying",
            (None, false) => "waiting",
        };
        let failure = progress.failure.lock().clone();
        let said: Vec<String> = broken.into_iter().chain(failure).collect();
        Replica {
            state: state.to_owned(),
            done_bytes: progress.done.load(Ordering::Relaxed),
            total_bytes: progress.total.load(Ordering::Relaxed),
            message: said.join("; "),
            ..row
        }
    }

    async fn ask_peer(&self, id: MemberId, key: &Key) -> Result<Option<Replica>, String> {
        let Owner::Tag { template, number } = &key.owner else {
            return Ok(None);
        };
        let path = format!(
            "{}?local=1&template={template}&number={number}",
            api::REPLICAS
        );
        let request = self.peers.request(reqwest::Method::GET, id, &path);
        let request = request.ok_or("its address is not known")?.timeout(PEER_MAX);
        let response = request.send().await.map_err(|e| answer::chain(&e))?;
        let answer: Answer<Vec<Replica>> = response.json().await.map_err(|e| answer::chain(&e))?;
        Ok(answer.body.and_then(|mut rows| rows.pop()))
    }
}

fn complete(row: Replica) -> Replica {
    Replica {
        state: "complete".to_owned(),
        ..row
    }
}
