//! Makes this member hold every tag and every artifact that the state names. Level-triggered: looks at the whole state
//! again whenever it changed, a copy ended or a pause is over; what it did before does not matter.
//!
//! ```text
//! in the state, not ours -> bring (names, then chunks, from holders first) -> walk again -> ReportHeld(true)
//! said to be ours, but not whole (checked at start and after damage)      -> ReportHeld(false), noted as broken
//! ours and invisible, although enough voters hold it (one got its vote later) -> ReportHeld(true)
//! ```

use super::replicas::{Key, Owner, Progress};
use super::walk::{Reach, WalkError};
use super::{RegistryService, answer, catalog};
use crate::app::{AppError, Consistency};
use crate::stamp;
use futures::StreamExt;
use mainstay_agent::transfer::Id;
use mainstay_model::{Command, MemberId, Refusal, State};
use mainstay_storage::chunks::ChunkId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Tags copied at once.
const TAGS_AT_ONCE: usize = 2;
/// Chunks of one request (8 MiB before compression), and requests at once.
const BATCH: usize = 128;
const REQUESTS: usize = 4;
/// The state may change a thousand times a second; it is looked at no more often than this.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// First and longest pause after a failed copy.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// The state is looked at again after so long even if nothing seems to have changed.
const IDLE_LOOK: Duration = Duration::from_secs(30);

/// What a look at the state says is to be done.
#[derive(Default)]
struct Todo {
    /// Tags to copy, with their holders.
    lacking: BTreeMap<Key, Vec<MemberId>>,
    /// Tags that we said we hold.
    claimed: BTreeSet<Key>,
    /// Those of them that would be visible if copies were counted now.
    ripe: BTreeSet<Key>,
}

/// Who has one of them.
struct Copies<'a> {
    holders: &'a BTreeSet<MemberId>,
    needed: u32,
    visible: bool,
}

impl Todo {
    fn sort(&mut self, key: Key, of: &Copies<'_>, me: MemberId, voters: &BTreeSet<MemberId>) {
        if !of.holders.contains(&me) {
            let holders = of.holders.iter().copied().collect();
            self.lacking.insert(key, holders);
            return;
        }
        let copies = of.holders.intersection(voters).count() as u64;
        if !of.visible && copies >= u64::from(of.needed) {
            self.ripe.insert(key.clone());
        }
        self.claimed.insert(key);
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
    loop {
        changes.borrow_and_update();
        if let Ok(todo) = look(&service).await {
            checked.retain(|key| todo.claimed.contains(key));
            let wanted = |key: &Key| todo.claimed.contains(key) || todo.lacking.contains_key(key);
            service.broken.lock().retain(|key, _| wanted(key));
            check_claims(&service, &todo, &mut checked).await;
            say_again(&service, &todo, &checked).await;
            service.progress.keep(&todo.lacking);
            pauses.retain(|key, _| todo.lacking.contains_key(key));
            start(&service, &todo, &pauses, &mut copies);
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
            () = service.damage.notified() => checked.clear(),
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

async fn look(service: &RegistryService) -> Result<Todo, AppError> {
    let me = service.member;
    let voters = catalog::voters(&service.catalog.watch().borrow());
    let take = |state: &State| {
        let mut todo = Todo::default();
        for template in state.templates.values() {
            for tag in template.tags.values() {
                let key = Key {
                    owner: Owner::Tag {
                        template: template.id.clone(),
                        number: tag.number,
                    },
                    manifest: tag.content.manifest,
                };
                let copies = Copies {
                    holders: &tag.holders,
                    needed: tag.copies_needed,
                    visible: tag.visible,
                };
                todo.sort(key, &copies, me, &voters);
            }
        }
        for (name, repository) in &state.repositories {
            for artifact in repository.artifacts.values() {
                let key = Key {
                    owner: Owner::Artifact {
                        repository: name.clone(),
                        digest: artifact.content.digest,
                    },
                    manifest: artifact.content.bundle,
                };
                let copies = Copies {
                    holders: &artifact.holders,
                    needed: artifact.copies_needed,
                    visible: artifact.visible(),
                };
                todo.sort(key, &copies, me, &voters);
            }
        }
        todo
    };
    service.catalog.take(Consistency::Stale, take).await
}

/// Take back what we said we hold and do not: a lost or damaged disk must not count as a copy.
async fn check_claims(service: &Arc<RegistryService>, todo: &Todo, checked: &mut BTreeSet<Key>) {
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
            Err(WalkError::Storage(_)) => continue,
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
        }
    }
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
async fn say_again(service: &RegistryService, todo: &Todo, checked: &BTreeSet<Key>) {
    for key in todo.ripe.intersection(checked) {
        if let Err(why) = report(service, key, true).await {
            tracing::warn!(why, "could not report a copy again yet");
        }
    }
}

fn start(
    service: &Arc<RegistryService>,
    todo: &Todo,
    pauses: &BTreeMap<Key, Pause>,
    copies: &mut JoinSet<(Key, Result<(), String>)>,
) {
    for (key, holders) in &todo.lacking {
        let waits = pauses.get(key).is_some_and(|p| p.until > Instant::now());
        if waits || copies.len() >= TAGS_AT_ONCE {
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
    let batches: Vec<Vec<Id>> = ids.chunks(BATCH).map(<[Id]>::to_vec).collect();
    let work = batches.into_iter().enumerate().map(|(n, batch)| {
        let service = Arc::clone(service);
        let sources = service.sources(holders, turn + n);
        async move {
            let (rest, said) = service.fetch(&batch, &sources).await;
            (batch.len() as u64, rest.len(), said)
        }
    });
    let mut work = futures::stream::iter(work).buffer_unordered(REQUESTS);
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
