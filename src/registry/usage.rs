//! What tags and OCI artifacts weigh: the stored (compressed) bytes that one copy of them takes on this member's
//! disk, and how many of them nothing else needs. Counted anew when tags came or went; never guessed.
//! `quota` says what follows from them.
//!
//! A chunk that a member does not hold yet weighs nothing there: then the answer says that it is not
//! whole.

use super::answer::{self, Answer, Params, Refused, fail, ok};
use super::walk::{self, WalkError};
use super::{RegistryService, Service};
use crate::app::Consistency;
use crate::stamp;
use axum::extract::{Request, State};
use http::StatusCode;
use mainstay_agent::transfer::api::{
    QuotaRequest, RepositoryUsage, TagUsage, TemplateUsage, Usage,
};
use mainstay_agent::transfer::{Id, Manifest, ZERO_CHUNK, segment_ids};
use mainstay_model::{self as model, Command};
use mainstay_storage::chunks::{ChunkId, ChunkStore};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// `GET usage`: stored bytes of all templates with their tags, and of all repositories; `template=ID-OR-NAME`: of this one only
/// (the sums are of all).
pub(super) async fn show(State(service): Service, request: Request) -> Answer {
    let params = Params::from_query(request.uri());
    let mut usage = (*service.usage().await?).clone();
    if let Some(wanted) = params.get("template") {
        usage
            .templates
            .retain(|t| t.id == wanted || t.name == wanted);
        usage.repositories.retain(|r| r.name == wanted);
        if usage.templates.is_empty() && usage.repositories.is_empty() {
            return Err(fail(StatusCode::OK, "Not found"));
        }
    }
    Ok(ok(usage))
}

/// `PUT quota`.
pub(super) async fn set_quota(State(service): Service, request: Request) -> Answer {
    let asked: QuotaRequest = answer::read_object(request.into_body(), "a quota").await?;
    let template = (!asked.template.is_empty()).then_some(asked.template);
    let bytes = asked.bytes;
    let command = Command::SetQuota { template, bytes };
    service.catalog.submit(stamp::command_id(), command).await?;
    service.usage().await.map(|usage| ok((*usage).clone()))
}

/// What is weighed: all that the state names, those of one template side by side.
#[derive(Clone, Default)]
pub(super) struct Named {
    /// Position of the state's journal.
    position: u64,
    pub quotas: BTreeMap<String, u64>,
    groups: Vec<Group>,
}

impl Named {
    /// With this manifest or bundle, under this name.
    pub(super) fn add(&mut self, name: &str, manifest: Id) {
        let new = (None, manifest);
        match self.groups.iter_mut().find(|g| g.name == name) {
            Some(group) => group.tags.push(new),
            None => self.groups.push(Group {
                id: String::new(),
                name: name.to_owned(),
                tags: vec![new],
            }),
        }
    }
}

/// A template with the artifacts in the repository of its name, or such a repository alone.
#[derive(Clone)]
struct Group {
    /// Empty for a repository.
    id: String,
    name: String,
    /// Manifests and bundles; what is known of those that are a template's tags.
    tags: Vec<(Option<TagUsage>, Id)>,
}

pub(super) fn named(state: &model::State) -> Named {
    let templates = state.templates.values().map(|template| Group {
        id: template.id.to_string(),
        name: template.name.clone(),
        tags: template
            .tags
            .values()
            .map(|tag| {
                let usage = TagUsage {
                    number: tag.number,
                    tag: tag.name.clone(),
                    logical_bytes: tag.content.size,
                    ..TagUsage::default()
                };
                (Some(usage), tag.content.manifest.0)
            })
            .collect(),
    });
    let mut groups: Vec<Group> = templates.collect();
    let at: HashMap<String, usize> = (0..)
        .zip(&groups)
        .map(|(n, g)| (g.name.clone(), n))
        .collect();
    for (name, repository) in &state.repositories {
        let artifacts = repository.artifacts.values();
        let artifacts = artifacts.map(|artifact| (None, artifact.content.bundle.0));
        match at.get(name) {
            Some(template) => groups[*template].tags.extend(artifacts),
            None => groups.push(Group {
                id: String::new(),
                name: name.clone(),
                tags: artifacts.collect(),
            }),
        }
    }
    Named {
        position: state.owned_since(u64::MAX).0,
        quotas: state.quotas.clone(),
        groups,
    }
}

/// Where a chunk was counted so far. Positions are numbers of tags and of groups.
struct Seen {
    stored: u32,
    first: u32,
    last: u32,
    group: u32,
    last_group: u32,
    only_tag: bool,
    only_group: bool,
}

/// The weights as they are counted.
struct Scales<'a> {
    chunks: &'a ChunkStore,
    /// By the first half of a half of the name: this counts bytes, it does not find them.
    seen: HashMap<u64, Seen>,
    total: u64,
    whole: bool,
    /// Stored bytes and those that nothing else needs, by tag and by group.
    tags: Vec<(u64, u64)>,
    groups: Vec<(u64, u64)>,
}

impl Scales<'_> {
    fn put(&mut self, id: &Id, tag: usize, group: usize) {
        if *id == ZERO_CHUNK {
            return;
        }
        let (t, g) = (tag as u32, group as u32);
        let key = u64::from_le_bytes(std::array::from_fn(|n| id[n]));
        if let Some(seen) = self.seen.get_mut(&key) {
            let bytes = u64::from(seen.stored);
            if seen.last == t {
                return;
            }
            seen.last = t;
            self.tags[tag].0 += bytes;
            if std::mem::take(&mut seen.only_tag) {
                self.tags[seen.first as usize].1 -= bytes;
            }
            if seen.last_group == g {
                return;
            }
            seen.last_group = g;
            self.groups[group].0 += bytes;
            if std::mem::take(&mut seen.only_group) {
                self.groups[seen.group as usize].1 -= bytes;
            }
            return;
        }
        let Some((stored, _)) = self.chunks.lens(&ChunkId(*id)) else {
            self.whole = false;
            return;
        };
        let bytes = u64::from(stored);
        self.total += bytes;
        for sums in [&mut self.tags[tag], &mut self.groups[group]] {
            sums.0 += bytes;
            sums.1 += bytes;
        }
        let seen = Seen {
            stored,
            first: t,
            last: t,
            group: g,
            last_group: g,
            only_tag: true,
            only_group: true,
        };
        self.seen.insert(key, seen);
    }

    /// A manifest with everything it reaches.
    fn put_all(&mut self, manifest: &Id, tag: usize, group: usize) -> Result<(), WalkError> {
        self.put(manifest, tag, group);
        let Some(bytes) = walk::get(self.chunks, manifest)? else {
            self.whole = false;
            return Ok(());
        };
        let manifest = Manifest::parse(&bytes)?;
        let mut segments = HashSet::new();
        for file in &manifest.files {
            for segment in file.segment_digests()? {
                if !segments.insert(segment) {
                    continue;
                }
                self.put(&segment, tag, group);
                let Some(bytes) = walk::get(self.chunks, &segment)? else {
                    self.whole = false;
                    continue;
                };
                for id in segment_ids(&bytes) {
                    self.put(&id, tag, group);
                }
            }
        }
        Ok(())
    }
}

/// Weigh everything. Blocks; about 50 bytes of memory a chunk meanwhile.
fn weigh(chunks: &ChunkStore, named: Named) -> Result<Usage, WalkError> {
    let tags = named.groups.iter().map(|g| g.tags.len()).sum();
    let mut scales = Scales {
        chunks,
        seen: HashMap::new(),
        total: 0,
        whole: true,
        tags: vec![(0, 0); tags],
        groups: vec![(0, 0); named.groups.len()],
    };
    let mut at = 0;
    for (group, of) in named.groups.iter().enumerate() {
        for (_, manifest) in &of.tags {
            scales.put_all(manifest, at, group)?;
            at += 1;
        }
    }
    let mut weights = scales.tags.into_iter();
    let (mut templates, mut repositories) = (Vec::new(), Vec::new());
    for (group, (stored_bytes, unique_bytes)) in named.groups.into_iter().zip(scales.groups) {
        let quota = named.quotas.get(&group.name).copied();
        let artifacts = group.tags.iter().filter(|(tag, _)| tag.is_none()).count();
        let weighed = group.tags.into_iter().zip(&mut weights);
        let tags: Vec<TagUsage> = weighed
            .filter_map(|((tag, _), (stored_bytes, unique_bytes))| {
                Some(TagUsage {
                    stored_bytes,
                    unique_bytes,
                    ..tag?
                })
            })
            .collect();
        if group.id.is_empty() {
            repositories.push(RepositoryUsage {
                name: group.name,
                artifacts: artifacts as u64,
                stored_bytes,
                unique_bytes,
                quota,
            });
            continue;
        }
        templates.push(TemplateUsage {
            quota,
            id: group.id,
            name: group.name,
            logical_bytes: tags.iter().map(|t| t.logical_bytes).sum(),
            stored_bytes,
            unique_bytes,
            tags,
        });
    }
    Ok(Usage {
        stored_bytes: scales.total,
        whole: scales.whole,
        quota: named.quotas.get("").copied(),
        quotas: named.quotas,
        templates,
        repositories,
    })
}

/// Stored bytes of what has this name.
pub(super) fn own(usage: &Usage, name: &str) -> u64 {
    let template = usage.templates.iter().find(|t| t.name == name);
    let repository = usage.repositories.iter().find(|r| r.name == name);
    let stored = template.map(|t| t.stored_bytes);
    stored.or(repository.map(|r| r.stored_bytes)).unwrap_or(0)
}

impl RegistryService {
    /// The weights as of everything acknowledged before the call.
    pub(super) async fn usage(&self) -> Result<Arc<Usage>, Refused> {
        let named = self.catalog.take(Consistency::Linearizable, named).await?;
        self.usage_of(&named).await
    }

    /// The weights of this; remembered.
    pub(super) async fn usage_of(&self, named: &Named) -> Result<Arc<Usage>, Refused> {
        let position = named.position;
        {
            let known = self.weights.lock();
            if let Some((at, usage)) = known.as_ref()
                && *at == position
                && usage.whole
                && usage.quotas == named.quotas
            {
                return Ok(Arc::clone(usage));
            }
        }
        let usage = Arc::new(self.weigh(named.clone()).await?);
        *self.weights.lock() = Some((position, Arc::clone(&usage)));
        Ok(usage)
    }

    pub(super) async fn weigh(&self, named: Named) -> Result<Usage, Refused> {
        let unable = |e: String| fail(StatusCode::SERVICE_UNAVAILABLE, e);
        let _turn = self
            .walks
            .acquire()
            .await
            .map_err(|e| unable(e.to_string()))?;
        let chunks = self.chunks.clone();
        tokio::task::spawn_blocking(move || weigh(&chunks, named))
            .await
            .map_err(|e| unable(e.to_string()))?
            .map_err(|e| unable(answer::chain(&e)))
    }
}
