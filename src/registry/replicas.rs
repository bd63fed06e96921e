//! Who has a tag's bytes, and how far the others are. Progress is soft: in memory, asked of each
//! member when someone wants to see it.

use super::RegistryService;
use super::answer::{self, Params, fail, ok};
use super::publish::Which;
use crate::app::Consistency;
use axum::extract::{Request, State};
use http::StatusCode;
use mainstay_agent::transfer::CHUNK_LEN;
use mainstay_agent::transfer::api::{self, Answer, Replica, TagReplicas};
use mainstay_model::ids::{Digest, Sha256};
use mainstay_model::template::{Tag, Template};
use mainstay_model::{MemberId, TemplateId};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
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

/// A tag, and who says to have it.
struct Held {
    key: Key,
    tag: TagReplicas,
    holders: BTreeSet<MemberId>,
}

fn held(template: &Template, tag: &Tag) -> Held {
    Held {
        key: Key {
            owner: Owner::Tag {
                template: template.id.clone(),
                number: tag.number,
            },
            manifest: tag.content.manifest,
        },
        tag: TagReplicas {
            tag: tag.name.clone(),
            number: tag.number,
            visible: tag.visible,
            copies_needed: tag.copies_needed,
            replicas: Vec::new(),
        },
        holders: tag.holders.clone(),
    }
}

/// `GET replicas`: one entry per member; `all=1`: one per tag with one per member; `local=1`: this
/// member's only.
pub(super) async fn list(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> answer::Answer {
    let params = Params::from_query(request.uri());
    let which = Which::from(&params)?;
    let set = |name: &str| params.get(name).is_some_and(|v| v != "0");
    let (local, all) = (set("local"), set("all"));
    let consistency = if local {
        Consistency::Stale
    } else {
        Consistency::Linearizable
    };
    let find = |state: &mainstay_model::State| {
        let (template, tag) = which.find(state)?;
        Some(match all {
            true => template.tags.values().map(|t| held(template, t)).collect(),
            false => vec![held(template, tag)],
        })
    };
    let found: Option<Vec<Held>> = service.catalog.take(consistency, find).await?;
    let mut tags = found.ok_or_else(|| fail(StatusCode::OK, "Not found"))?;
    let rows = service.rows(&tags, local).await;
    for (tag, rows) in tags.iter_mut().zip(rows) {
        tag.tag.replicas = rows;
    }
    let mut shown: Vec<TagReplicas> = tags.into_iter().map(|t| t.tag).collect();
    Ok(match all {
        true => ok(shown),
        false => ok(shown.pop().map(|tag| tag.replicas)),
    })
}

impl RegistryService {
    /// For each of these tags (of one template) a row for each member.
    async fn rows(&self, tags: &[Held], local: bool) -> Vec<Vec<Replica>> {
        let status = self.catalog.watch().borrow().clone();
        let members = status.members.iter();
        let members = members.filter(|(id, _)| !local || **id == self.member.0);
        let columns = members.map(|(id, member)| {
            let row = Replica {
                member: MemberId(*id).to_string(),
                name: member.member.name.clone(),
                ..Replica::default()
            };
            self.column(row, MemberId(*id), tags)
        });
        let columns = futures::future::join_all(columns).await;
        let row = |n: usize| columns.iter().map(|column| column[n].clone()).collect();
        (0..tags.len()).map(row).collect()
    }

    /// One member's copies of these tags.
    async fn column(&self, row: Replica, id: MemberId, tags: &[Held]) -> Vec<Replica> {
        if id == self.member {
            let own = |held: &Held| self.own(row.clone(), held.holders.contains(&id), &held.key);
            return tags.iter().map(own).collect();
        }
        let known = tags.iter().all(|held| held.holders.contains(&id));
        let said = match known {
            true => Ok(BTreeMap::new()),
            false => self.ask_peer(id, tags).await,
        };
        let of = |held: &Held| {
            if held.holders.contains(&id) {
                return complete(row.clone());
            }
            match &said {
                Ok(theirs) => theirs.get(&held.tag.number).cloned().map_or_else(
                    || missing(row.clone(), "it does not know the tag yet"),
                    |theirs| Replica {
                        member: row.member.clone(),
                        name: row.name.clone(),
                        ..theirs
                    },
                ),
                Err(why) => Replica {
                    state: "unknown".to_owned(),
                    message: format!("it does not answer, and did not have it: {why}"),
                    ..row.clone()
                },
            }
        };
        tags.iter().map(of).collect()
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
            (None, false) => "missing",
        };
        let failure = progress.failure.lock().clone();
        let why = match (&failure, running) {
            (Some(why), false) => Some(format!("it will be tried again: {why}")),
            (Some(why), true) => Some(format!("the last try failed: {why}")),
            (None, false) => Some("it waits for its turn".to_owned()),
            (None, true) => None,
        };
        let said: Vec<String> = broken.into_iter().chain(why).collect();
        Replica {
            state: state.to_owned(),
            done_bytes: progress.done.load(Ordering::Relaxed),
            total_bytes: progress.total.load(Ordering::Relaxed),
            message: said.join("; "),
            ..row
        }
    }

    /// What a member says of its own copies of these tags, by tag number.
    async fn ask_peer(
        &self,
        id: MemberId,
        tags: &[Held],
    ) -> Result<BTreeMap<u32, Replica>, String> {
        let Some(Owner::Tag { template, .. }) = tags.first().map(|held| &held.key.owner) else {
            return Ok(BTreeMap::new());
        };
        let of = match tags {
            [one] => format!("&number={}", one.tag.number),
            _ => "&all=1".to_owned(),
        };
        let path = format!("{}?local=1&template={template}{of}", api::REPLICAS);
        let request = self.peers.request(reqwest::Method::GET, id, &path);
        let request = request.ok_or("its address is not known")?.timeout(PEER_MAX);
        let response = request.send().await.map_err(|e| answer::chain(&e))?;
        let bytes = response.bytes().await.map_err(|e| answer::chain(&e))?;
        if let [one] = tags {
            let rows = read_answer::<Vec<Replica>>(&bytes)?.unwrap_or_default();
            let number = one.tag.number;
            return Ok(rows.into_iter().map(|row| (number, row)).collect());
        }
        let all = read_answer::<Vec<TagReplicas>>(&bytes)?.unwrap_or_default();
        let last = |mut tag: TagReplicas| Some((tag.number, tag.replicas.pop()?));
        Ok(all.into_iter().filter_map(last).collect())
    }
}

fn read_answer<T: DeserializeOwned>(bytes: &[u8]) -> Result<Option<T>, String> {
    let answer: Answer<T> = serde_json::from_slice(bytes).map_err(|e| answer::chain(&e))?;
    Ok(answer.body)
}

fn complete(row: Replica) -> Replica {
    Replica {
        state: "complete".to_owned(),
        ..row
    }
}

fn missing(row: Replica, why: &str) -> Replica {
    Replica {
        state: "missing".to_owned(),
        message: why.to_owned(),
        ..row
    }
}
