//! The collector: finds what nothing needs any more, and has the chunk store give its room back. Runs by
//! itself from time to time, and when asked to.
//!
//! ```text
//! begin -> roots (leases, state behind a barrier) -> keep all they reach -> condemn the rest
//!       -> roots again, newer -> keep what is new -> sweep what was dead for the grace before `begin`
//! ```
//!
//! Why that is safe beside pushes, pulls, copies, reverts and snapshots is written in
//! docs/invariants.md. A run that cannot have a barrier, or does not know all names that only this
//! member may hold, removes nothing.

use super::answer::{self, Answer, Params, ok};
use super::pace::Pace;
use super::roots::{self, Kept, Roots};
use super::{RegistryService, Service};
use crate::app::Consistency;
use crate::stamp;
use axum::extract::{Request, State};
use mainstay_agent::transfer::api::{Collection, CollectionStatus};
use mainstay_model::feature::TAG_NOTES;
use mainstay_storage::chunks::{Members, Survey};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::Instant;

/// A pause of the pace is looked at this often.
const PAUSE_STEP: Duration = Duration::from_millis(50);

/// When to collect, and what.
#[derive(Clone, Copy, Debug)]
pub struct CollectConfig {
    /// How long a chunk stays that nothing needs: longer than any client pauses in a push or a pull.
    pub grace: Duration,
    /// Pause between two runs; `None`: only when asked to.
    pub every: Option<Duration>,
    /// Bytes a second at which chunks are copied out of packs that go; 0: no limit.
    pub rate: u64,
}

/// What the collector tells.
#[derive(Debug, Default)]
pub(super) struct Collector {
    /// One run at a time.
    turn: tokio::sync::Mutex<()>,
    status: Mutex<CollectionStatus>,
}

impl Collector {
    pub(super) fn status(&self) -> CollectionStatus {
        self.status.lock().clone()
    }
}

/// Collect from time to time. Runs until dropped.
pub(super) async fn run(service: Arc<RegistryService>) {
    let Some(every) = service.collect.every else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(every).await;
        collect(&service, false).await;
    }
}

/// `GET gc`: how it stands.
pub(super) async fn status(State(service): Service) -> Answer {
    Ok(ok(service.collector.status()))
}

/// `POST gc`: begin a run, after the one under way; `dry_run=1`: remove nothing. Answers at once.
pub(super) async fn start(State(service): Service, request: Request) -> Answer {
    let params = Params::from_query(request.uri());
    let dry_run = params.get("dry_run").is_some_and(|v| v != "0");
    let asked = {
        let mut status = service.collector.status.lock();
        status.asked += 1;
        status.clone()
    };
    let number = asked.asked;
    tokio::spawn(async move {
        collect(&service, dry_run).await;
        let mut status = service.collector.status.lock();
        status.done = status.done.max(number);
    });
    Ok(ok(asked))
}

/// One run, and what is told of it.
async fn collect(service: &Arc<RegistryService>, dry_run: bool) {
    let _turn = service.collector.turn.lock().await;
    let begun = Instant::now();
    let mut report = Collection {
        began_ms: stamp::now_ms(),
        dry_run,
        grace_s: service.collect.grace.as_secs(),
        ..Collection::default()
    };
    let done = run_once(service, dry_run, &mut report).await;
    report.took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    if let Err(why) = done {
        report.refused = why;
    }
    if !report.refused.is_empty() {
        tracing::warn!(why = report.refused, "nothing was collected");
    } else if report.removed_chunks > 0 || report.freed_bytes > 0 {
        tracing::info!(
            chunks = report.removed_chunks,
            bytes = report.freed_bytes,
            packs = report.removed_packs,
            took_ms = report.took_ms,
            "room of chunks that nothing needs was given back"
        );
    }
    let mut status = service.collector.status.lock();
    status.runs += 1;
    status.refusals += u64::from(!report.refused.is_empty());
    status.removed_chunks += report.removed_chunks;
    status.freed_bytes += report.freed_bytes;
    status.last = Some(report);
}

async fn run_once(
    service: &Arc<RegistryService>,
    dry_run: bool,
    report: &mut Collection,
) -> Result<(), String> {
    let shared = service.chunks.shared();
    if shared {
        // What others wrote, also again in a better place.
        service.see_shared(Vec::new()).await?;
    }
    let mark = service.chunks.begin_mark();
    let known_bad = service.chunks.stats().damaged;
    let kept = keep(service, Kept::default()).await?;
    if !kept.unknown.is_empty() {
        let unknown: Vec<String> = kept.unknown.into_iter().take(8).collect();
        service.damage.notify_one();
        return Err(format!(
            "this member may be the only one to hold {}, and does not know all names in it: see `mainstay template replicas`; \
             delete what cannot be made whole",
            unknown.join(", ")
        ));
    }
    service.chunks.condemn(&mark);
    // What came meanwhile: read as late as can be, for nothing is looked up behind the sweep.
    let kept = keep(service, kept).await?;
    if !kept.unknown.is_empty() {
        return Err("a tag appeared whose names are not known here yet: run again".to_owned());
    }
    if service.chunks.stats().damaged > known_bad {
        service.damage.notify_one();
    }
    report.applied = service.catalog.watch().borrow().applied;
    let features = |state: &mainstay_model::State| state.features;
    let features = service.catalog.take(Consistency::Stale, features).await;
    if features.is_ok_and(|level| level >= TAG_NOTES) {
        // Older releases, which would not take the list away, do not start any more.
        service.chunks.keep_ages();
    }
    let members = match shared && !dry_run {
        true => Some(members(service).await?),
        false => None,
    };
    let grace = service.collect.grace;
    let chunks = service.chunks.clone();
    let pace = Pace::new(service.collect.rate);
    // Gone when this run is: a member that stops does not wait for the pace.
    let running = Arc::new(());
    let wanted = Arc::downgrade(&running);
    let swept = tokio::task::spawn_blocking(move || -> mainstay_storage::Result<_> {
        let survey = chunks.survey(&mark, grace);
        let before = chunks.stats().pack_bytes;
        let swept = match dry_run {
            true => None,
            false => Some(chunks.sweep_paced(&mark, grace, &|bytes| {
                wait_while(&wanted, pace.spend(bytes))
            })?),
        };
        if let Some(members) = members {
            chunks.tidy(&members)?;
        }
        let after = chunks.stats();
        Ok((survey, swept, before, after))
    });
    let (survey, swept, before, after) = swept
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| answer::chain(&e))?;
    drop(running);
    describe(report, &survey);
    if let Some(swept) = swept {
        report.removed_chunks = swept.removed.chunks;
        report.removed_bytes = swept.removed.bytes;
        report.moved_chunks = swept.moved.chunks;
        report.moved_bytes = swept.moved.bytes;
        report.removed_packs = swept.packs;
        report.postponed_packs = swept.postponed;
        report.freed_bytes = before.saturating_sub(after.pack_bytes);
        report.packs = after.packs;
        report.pack_bytes = after.pack_bytes;
    }
    Ok(())
}

/// So long, in small steps, as long as someone wants the result. Blocks.
fn wait_while(wanted: &Weak<()>, pause: Duration) -> bool {
    let until = std::time::Instant::now() + pause;
    loop {
        if wanted.strong_count() == 0 {
            return false;
        }
        let left = until.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(PAUSE_STEP));
    }
}

/// Who may have claims on what members share, as of now.
async fn members(service: &RegistryService) -> Result<Members, String> {
    let gone = |state: &mainstay_model::State| -> BTreeSet<u64> {
        state.retired.keys().map(|id| id.0).collect()
    };
    let gone = service.catalog.take(Consistency::Linearizable, gone).await;
    let gone = gone.map_err(|e| answer::chain(&e))?;
    let status = service.catalog.members().await;
    let status = status.map_err(|e| answer::chain(&e))?;
    Ok(Members {
        present: status.members.keys().copied().collect(),
        gone,
    })
}

fn describe(report: &mut Collection, survey: &Survey) {
    report.live_chunks = survey.live.chunks;
    report.live_bytes = survey.live.bytes;
    report.waiting_chunks = survey.waiting.chunks;
    report.waiting_bytes = survey.waiting.bytes;
    report.dead_chunks = survey.dead.chunks;
    report.dead_bytes = survey.dead.bytes;
    report.packs = survey.packs;
    report.pack_bytes = survey.pack_bytes;
    report.reclaimable_bytes = survey.reclaimable;
}

/// Read the roots, and keep all they reach that was not kept yet.
async fn keep(service: &Arc<RegistryService>, kept: Kept) -> Result<Kept, String> {
    let roots: Roots = roots::read(service).await.map_err(|e| {
        format!(
            "this member cannot say that it is up to date: {}",
            answer::chain(&e)
        )
    })?;
    let service = Arc::clone(service);
    let mut kept = kept;
    let walk = tokio::task::spawn_blocking(move || {
        roots::keep(&service, &roots, &mut kept)?;
        Ok::<_, mainstay_storage::StorageError>(kept)
    });
    walk.await
        .map_err(|e| e.to_string())?
        .map_err(|e| answer::chain(&e))
}
