//! Makes this member hold every tag and every artifact that the state names. Driven by what is committed: of
//! the state only those are looked at that changed since the last look (all of them at the start, after a
//! snapshot, and when voters came or went). Level-triggered nevertheless: what is to be done follows from
//! the state alone, what was tried before does not matter.
//!
//! ```text
//! in the state, not ours -> bring (names, then chunks, from holders first) -> walk again -> ReportHeld(true)
//! said to be ours, but not whole (checked at start and after damage)      -> ReportHeld(false), noted as broken
//! ours and invisible, although enough voters hold it (one got its vote later) -> ReportHeld(true)
//! ```

use super::pulls::Pulls;
use super::replicas::{Key, Owner, Progress};
use super::walk::{Reach, WalkError};
use super::{RegistryService, ReplicationFigures, answer, catalog};
use crate::app::{AppError, Consistency};
use crate::stamp;
use futures::StreamExt;
use mainstay_agent::transfer::Id;
use mainstay_model::artifact::Artifact;
use mainstay_model::ids::Digest;
use mainstay_model::state::Owned;
use mainstay_model::template::Tag;
use mainstay_model::{Command, MemberId, Refusal, State, TemplateId};
use mainstay_storage::chunks::ChunkId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Tags copied at once; and more of those that are not visible yet, for somebody waits for them: the
/// copies of a member that was away for long do not hold up new pushes.
const TAGS_AT_ONCE: usize = 2;
const URGENT_AT_ONCE: usize = 2;
/// Chunks of one request, what they take before compression, and requests at once.
const BATCH: usize = 128;
const BATCH_MIB: u32 = 8;
const REQUESTS: usize = 4;
/// The same of a copy. All copies together hold no more than [`COPIED_MIB_MAX`] in memory: one alone then
/// keeps the network, the cores and the disk busy at the same time.
const COPY_REQUESTS: usize = 8;
pub(super) const COPIED_MIB_MAX: usize = 128;
/// The state may change a thousand times a second; what changed is asked for no more often than this.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// First and longest pause after a failed copy.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// What could not be reported or looked at is tried again after so long even if nothing changed.
const IDLE_LOOK: Duration = Duration::from_secs(30);

/// What the state says is to be done; kept from look to look.
#[derive(Default)]
struct Todo {
    /// Tags to copy.
    lacking: BTreeMap<Key, Lacking>,
    /// Tags that we said we hold.
    claimed: BTreeSet<Key>,
    /// Those of them that would be visible if copies were counted now.
    ripe: BTreeSet<Key>,
    /// Position of the state's journal up to which this is true; `None`: it is not known at all.
    seen: Option<u64>,
    /// The voters by whom copies were counted.
    voters: BTreeSet<MemberId>,
}

/// A tag that this member does not hold.
struct Lacking {
    holders: Vec<MemberId>,
    /// Too few members hold it: it is not visible.
    urgent: bool,
}

/// What a look found of one tag or artifact.
struct Entry {
    key: Key,
    holders: BTreeSet<MemberId>,
    needed: u32,
    visible: bool,
}

impl Todo {
    /// Forget what was known of it.
    fn forget(&mut self, owner: &Owner, pulls: &Pulls) {
        let key = |byte| Key {
            owner: owner.clone(),
            manifest: Digest([byte; 32]),
        };
        let all = key(0)..=key(u8::MAX);
        let lacking = self.lacking.range(all.clone()).map(|(key, _)| key);
        let known: Vec<Key> = lacking.chain(self.claimed.range(all)).cloned().collect();
        for key in known {
            if let Owner::Tag { template, number } = owner {
                pulls.forget(&key.manifest.0, template, *number);
            }
            self.lacking.remove(&key);
            self.claimed.remove(&key);
            self.ripe.remove(&key);
        }
    }

    fn sort(&mut self, entry: Entry, me: MemberId, pulls: &Pulls) {
        let Entry {
            key,
            holders,
            needed,
            visible,
        } = entry;
        if let Owner::Tag { template, number } = &key.owner {
            pulls.know(key.manifest.0, template.clone(), *number);
        }
        if !holders.contains(&me) {
            let lacking = Lacking {
                holders: holders.into_iter().collect(),
                urgent: !visible,
            };
            self.lacking.insert(key, lacking);
            return;
        }
        let copies = holders.intersection(&self.voters).count() as u64;
        if !visible && copies >= u64::from(needed) {
            self.ripe.insert(key.clone());
        }
        self.claimed.insert(key);
    }
}

/// What replication did since the start.
#[derive(Debug, Default)]
pub(super) struct Counts {
    lacking: AtomicU64,
    looks: AtomicU64,
    whole_looks: AtomicU64,
    looked_at: AtomicU64,
    fetched_chunks: AtomicU64,
    fetched_bytes: AtomicU64,
}

impl Counts {
    pub(super) fn fetched(&self, chunks: u64, bytes: u64) {
        self.fetched_chunks.fetch_add(chunks, Ordering::Relaxed);
        self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn figures(&self) -> ReplicationFigures {
        ReplicationFigures {
            lacking: self.lacking.load(Ordering::Relaxed),
            fetched_chunks: self.fetched_chunks.load(Ordering::Relaxed),
            fetched_bytes: self.fetched_bytes.load(Ordering::Relaxed),
            looks: self.looks.load(Ordering::Relaxed),
            whole_looks: self.whole_looks.load(Ordering::Relaxed),
            looked_at: self.looked_at.load(Ordering::Relaxed),
        }
    }
}

/// After a failure.
struct Pause {
    until: Instant,
    next: Duration,
}

/// Serve until dropped.
pub(super) async fn run(service: Arc<RegistryService>) {
    let mut changes = service.catalog.watch();
    let mut copies: JoinSet<(Key, Result<(), String>)> = JoinSet::new();
    let mut pauses: BTreeMap<Key, Pause> = BTreeMap::new();
    let mut checked: BTreeSet<Key> = BTreeSet::new();
    let mut todo = Todo::default();
    // Everything that follows from the state was done, or begun.
    let mut settled = false;
    loop {
        changes.borrow_and_update();
        if let Ok(changed) = look(&service, &mut todo).await {
            if changed {
                tidy(&service, &todo, &mut checked);
                pauses.retain(|key, _| todo.lacking.contains_key(key));
            }
            if changed || !settled {
                let said = check_claims(&service, &todo, &mut checked).await;
                settled = say_again(&service, &todo, &checked).await && said;
            }
            start(&service, &todo, &pauses, &mut copies);
            service.counts.looks.fetch_add(1, Ordering::Relaxed);
        }
        let wake = pauses
            .values()
            .map(|p| p.until)
            .filter(|u| *u > Instant::now())
            .min();
        let wake = wake.unwrap_or_else(|| Instant::now() + IDLE_LOOK);
        tokio::select! {
            changed = changes.changed() => match changed {
                Ok(()) => tokio::time::sleep(LOOK_PAUSE).await,
                // The group has ended, and this member with it.
                Err(_) => return,
            },
            Some(ended) = copies.join_next() => ended_copy(&service, ended, &mut pauses),
            () = service.damage.notified() => {
                checked.clear();
                settled = false;
            }
            () = tokio::time::sleep_until(wake) => settled = false,
        }
    }
}

/// What is not wanted any more is forgotten, and its copies are told.
fn tidy(service: &RegistryService, todo: &Todo, checked: &mut BTreeSet<Key>) {
    checked.retain(|key| todo.claimed.contains(key));
    let wanted = |key: &Key| todo.claimed.contains(key) || todo.lacking.contains_key(key);
    service.broken.lock().retain(|key, _| wanted(key));
    service.progress.keep(&todo.lacking);
    let lacking = todo.lacking.len() as u64;
    service.counts.lacking.store(lacking, Ordering::Relaxed);
}

/// What of the state changed since the last look; `false`: nothing.
async fn look(service: &RegistryService, todo: &mut Todo) -> Result<bool, AppError> {
    let voters = catalog::voters(&service.catalog.watch().borrow());
    let same = voters == todo.voters;
    let seen = todo.seen.filter(|_| same);
    let take = |state: &State| {
        let (now, changed) = state.owned_since(seen.unwrap_or(0));
        match changed.filter(|_| seen.is_some()) {
            Some(changed) => {
                let entries = changed.iter().filter_map(|owned| entry_of(state, owned));
                let entries: Vec<Entry> = entries.collect();
                (now, entries, Some(changed))
            }
            None => (now, all_entries(state), None),
        }
    };
    let found = service.catalog.take(Consistency::Stale, take).await?;
    let (now, entries, changed): (u64, Vec<Entry>, Option<Vec<Owned>>) = found;
    todo.seen = Some(now);
    todo.voters = voters;
    let counts = &service.counts;
    let looked = entries.len() as u64;
    counts.looked_at.fetch_add(looked, Ordering::Relaxed);
    let any = changed.as_ref().is_none_or(|changed| !changed.is_empty());
    match changed {
        Some(changed) => {
            for owned in changed {
                todo.forget(&owner(owned), &service.pulls);
            }
        }
        None => {
            counts.whole_looks.fetch_add(1, Ordering::Relaxed);
            todo.lacking.clear();
            todo.claimed.clear();
            todo.ripe.clear();
            service.pulls.forget_all();
        }
    }
    for entry in entries {
        todo.sort(entry, service.member, &service.pulls);
    }
    Ok(any)
}

fn owner(owned: Owned) -> Owner {
    match owned {
        Owned::Tag(template, number) => Owner::Tag { template, number },
        Owned::Artifact(repository, digest) => Owner::Artifact { repository, digest },
    }
}

fn entry_of(state: &State, owned: &Owned) -> Option<Entry> {
    match owned {
        Owned::Tag(id, number) => Some(tag_entry(id, state.templates.get(id)?.tags.get(number)?)),
        Owned::Artifact(name, digest) => {
            let repository = state.repositories.get(name)?;
            Some(artifact_entry(name, repository.artifacts.get(digest)?))
        }
    }
}

fn all_entries(state: &State) -> Vec<Entry> {
    let templates = state.templates.values();
    let tags = templates.flat_map(|t| t.tags.values().map(|tag| tag_entry(&t.id, tag)));
    let repositories = state.repositories.iter();
    let artifacts = repositories.flat_map(|(name, repository)| {
        let artifacts = repository.artifacts.values();
        artifacts.map(|artifact| artifact_entry(name, artifact))
    });
    tags.chain(artifacts).collect()
}

fn tag_entry(id: &TemplateId, tag: &Tag) -> Entry {
    Entry {
        key: Key {
            owner: Owner::Tag {
                template: id.clone(),
                number: tag.number,
            },
            manifest: tag.content.manifest,
        },
        holders: tag.holders.clone(),
        needed: tag.copies_needed,
        visible: tag.visible,
    }
}

fn artifact_entry(name: &str, artifact: &Artifact) -> Entry {
    Entry {
        key: Key {
            owner: Owner::Artifact {
                repository: name.to_owned(),
                digest: artifact.content.digest,
            },
            manifest: artifact.content.bundle,
        },
        holders: artifact.holders.clone(),
        needed: artifact.copies_needed,
        visible: artifact.visible(),
    }
}

/// Take back what we said we hold and do not: a lost or damaged disk must not count as a copy. `false`:
/// some could not be looked at, or not be reported, yet.
async fn check_claims(
    service: &Arc<RegistryService>,
    todo: &Todo,
    checked: &mut BTreeSet<Key>,
) -> bool {
    let mut all = true;
    for key in &todo.claimed {
        if checked.contains(key) {
            continue;
        }
        let reached = service.walk(key.manifest.0).await;
        let why = match reached {
            Ok(Reach::Known(known)) => service.why_broken(&known.lacking),
            Ok(Reach::Names(names)) => service.why_broken(&names),
            Err(WalkError::Invalid(e)) => Some(e.to_string()),
            // The disk cannot say: ask it again later.
            Err(WalkError::Storage(_)) => {
                all = false;
                continue;
            }
        };
        let Some(why) = why else {
            service.broken.lock().remove(key);
            checked.insert(key.clone());
            continue;
        };
        tracing::warn!(of = %key, why, "what this member held is not whole any more");
        service.broken.lock().insert(key.clone(), why);
        if let Err(why) = report(service, key, false).await {
            tracing::warn!(why, "could not report a lost copy yet");
            all = false;
        }
    }
    all
}

impl RegistryService {
    /// What to say of a tag that this member held and that lacks these now; `None` if it lacks nothing.
    fn why_broken(&self, lacking: &[Id]) -> Option<String> {
        let ids: Vec<ChunkId> = lacking.iter().copied().map(ChunkId).collect();
        match (self.chunks.damaged(&ids).len(), lacking.len()) {
            (_, 0) => None,
            (0, missing) => Some(format!("{missing} chunks are not on its disk any more")),
            (damaged, all) if damaged == all => {
                Some(format!("{damaged} chunks are damaged on its disk"))
            }
            (damaged, all) => Some(format!(
                "{damaged} chunks are damaged on its disk, {} are missing",
                all - damaged
            )),
        }
    }
}

/// Copies are counted when one is reported: who got a vote after its report needs to be counted anew.
/// `false`: some could not be reported yet.
async fn say_again(service: &RegistryService, todo: &Todo, checked: &BTreeSet<Key>) -> bool {
    let mut all = true;
    for key in todo.ripe.intersection(checked) {
        if let Err(why) = report(service, key, true).await {
            tracing::warn!(why, "could not report a copy again yet");
            all = false;
        }
    }
    all
}

fn start(
    service: &Arc<RegistryService>,
    todo: &Todo,
    pauses: &BTreeMap<Key, Pause>,
    copies: &mut JoinSet<(Key, Result<(), String>)>,
) {
    for (urgent, places) in [(true, TAGS_AT_ONCE + URGENT_AT_ONCE), (false, TAGS_AT_ONCE)] {
        let wanted = todo.lacking.iter().filter(|(_, l)| l.urgent == urgent);
        for (key, Lacking { holders, .. }) in wanted {
            if copies.len() >= places {
                break;
            }
            if pauses.get(key).is_some_and(|p| p.until > Instant::now()) {
                continue;
            }
            let Some(progress) = service.progress.begin(key) else {
                continue;
            };
            let (service, key, holders) = (Arc::clone(service), key.clone(), holders.clone());
            copies.spawn(async move {
                let result = copy(&service, &key, &holders, &progress).await;
                (key, result)
            });
        }
    }
}

fn ended_copy(
    service: &RegistryService,
    ended: Result<(Key, Result<(), String>), tokio::task::JoinError>,
    pauses: &mut BTreeMap<Key, Pause>,
) {
    let (key, result) = match ended {
        Ok(ended) => ended,
        Err(e) => {
            tracing::error!(error = %e, "a copy ended by itself");
            return;
        }
    };
    service.progress.end(&key, result.as_ref().err().cloned());
    match result {
        Ok(()) => {
            match service.broken.lock().remove(&key) {
                None => tracing::info!(of = %key, "copied"),
                Some(why) => tracing::info!(of = %key, why, "what was broken is whole again"),
            }
            pauses.remove(&key);
        }
        Err(why) => {
            let pause = pauses.get(&key).map_or(RETRY_MIN, |p| p.next);
            if let Some(broken) = service.broken.lock().get(&key) {
                tracing::error!(of = %key, broken, why, ?pause, "what is broken cannot be made whole yet: no member could send what is lacking");
            } else {
                tracing::warn!(of = %key, why, ?pause, "copying failed; it will be tried again");
            }
            let next = (pause * 2).min(RETRY_MAX);
            pauses.insert(
                key,
                Pause {
                    until: Instant::now() + pause,
                    next,
                },
            );
        }
    }
}

/// Copy one tag or artifact.
async fn copy(
    service: &Arc<RegistryService>,
    key: &Key,
    holders: &[MemberId],
    progress: &Arc<Progress>,
) -> Result<(), String> {
    bring(service, key.manifest.0, holders, Some(progress)).await?;
    report(service, key, true).await
}

/// Everything that a manifest reaches, on this disk: resumes by itself, for only what is lacking is
/// fetched.
pub(super) async fn bring(
    service: &Arc<RegistryService>,
    manifest: Id,
    holders: &[MemberId],
    progress: Option<&Arc<Progress>>,
) -> Result<(), String> {
    // Manifest, segments, chunks, and once more if a chunk turned out damaged.
    for turn in 0..5 {
        let walked = service.walk(manifest).await;
        let known = match walked.map_err(|e| answer::chain(&e))? {
            Reach::Names(names) => {
                // Few bytes: not worth a word about progress.
                fetch_all(service, names, holders, turn, None).await?;
                continue;
            }
            Reach::Known(known) => known,
        };
        if let Some(progress) = progress {
            progress.set(known.held_bytes, known.total_bytes);
        }
        if known.lacking.is_empty() {
            return Ok(());
        }
        fetch_all(service, known.lacking, holders, turn, progress).await?;
    }
    Err("its chunks do not stay: see the log for damage on this disk".to_owned())
}

/// Fetch these in parallel, each batch beginning at another holder.
async fn fetch_all(
    service: &Arc<RegistryService>,
    ids: Vec<Id>,
    holders: &[MemberId],
    turn: usize,
    progress: Option<&Arc<Progress>>,
) -> Result<(), String> {
    let count = AtomicU64::new(ids.len() as u64);
    // Who waits for something else than a copy of its own does not wait for the pace.
    let paced = progress.is_some();
    let batches: Vec<Vec<Id>> = ids.chunks(BATCH).map(<[Id]>::to_vec).collect();
    let work = batches.into_iter().enumerate().map(|(n, batch)| {
        let service = Arc::clone(service);
        let sources = service.sources(holders, turn + n);
        async move {
            // Gone only when the service is.
            let _memory = match paced {
                true => service.copied.acquire_many(BATCH_MIB).await.ok(),
                false => None,
            };
            let pace = paced.then_some(&service.pace);
            let (rest, said) = service.fetch_at(&batch, &sources, pace).await;
            (batch.len() as u64, rest.len(), said)
        }
    });
    let requests = if paced { COPY_REQUESTS } else { REQUESTS };
    let mut work = futures::stream::iter(work).buffer_unordered(requests);
    while let Some((asked, lacking, said)) = work.next().await {
        if lacking > 0 {
            return Err(format!(
                "no member could send {lacking} chunks: {}",
                said.join("; ")
            ));
        }
        let left = count.fetch_sub(asked, Ordering::Relaxed) - asked;
        if let Some(progress) = progress {
            progress.left(left);
            if progress.cancelled() {
                return Err("it was deleted".to_owned());
            }
        }
    }
    Ok(())
}

async fn report(service: &RegistryService, key: &Key, held: bool) -> Result<(), String> {
    let voters = if held {
        let members = service.catalog.members().await;
        catalog::voters(&members.map_err(|e| answer::chain(&e))?)
    } else {
        BTreeSet::new()
    };
    let (manifest, member) = (key.manifest, service.member);
    let command = match key.owner.clone() {
        Owner::Tag { template, number } => Command::ReportHeld {
            template,
            number,
            manifest,
            member,
            held,
            voters,
        },
        Owner::Artifact { repository, digest } => Command::ReportArtifactHeld {
            repository,
            digest,
            bundle: manifest,
            member,
            held,
            voters,
        },
    };
    match service.catalog.submit(stamp::command_id(), command).await {
        // Deleted meanwhile: nothing to report.
        Ok(_) | Err(AppError::Refused(Refusal::TemplateUnknown(_) | Refusal::TagUnknown(_))) => {
            Ok(())
        }
        Err(e) => Err(answer::chain(&e)),
    }
}
