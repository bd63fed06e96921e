//! What the collector must leave alone: the roots, and everything they reach. One place that says it all.
//!
//! **Contract.** A chunk is needed if [`read`] names it, or a manifest that reaches it. Whoever adds
//! something to the replicated state, or to this member's disk, by which a later read, pull, publish or
//! copy finds chunks *without asking for them again* adds it to [`Roots::of_state`], or holds a [`Lease`]
//! while it is so. Nothing else has to be told to the collector: every question whether a chunk is held
//! counts as use, in the chunk store itself, and what was used within the grace is never touched.
//!
//! **Order.** Leases are read before the state. A lease on work that makes a tag ends only after the tag
//! is in the state (or never will be), so one of the two shows it. The state is read behind a
//! linearizable barrier: a member that cannot have one does not collect. Names of uploaded blobs are read
//! in between: a blob gets its name while the upload's lease is held, and an artifact is put while the
//! blob has its name or the put its lease.

use super::RegistryService;
use super::walk;
use crate::app::{AppError, Consistency};
use mainstay_agent::transfer::Id;
use mainstay_model::{MemberId, State};
use mainstay_storage::StorageError;
use mainstay_storage::chunks::ChunkId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Leases that outlive their work at once; the oldest go first. Each is a publish without an answer.
const LINGERING_MAX: usize = 65_536;

/// What is needed now.
#[derive(Debug, Default)]
pub(super) struct Roots {
    /// Manifests, with all they reach.
    manifests: BTreeMap<Id, Need>,
    /// Segments of manifests to come, with the chunks they name.
    segments: BTreeSet<Id>,
    /// Single chunks.
    chunks: BTreeSet<Id>,
}

/// Why a manifest is needed.
#[derive(Debug, Default)]
struct Need {
    /// This member is the only one, or one of those, that hold every byte: what the manifest reaches
    /// must be known in full before anything is collected. What another member holds can be fetched.
    in_full: bool,
    /// Someone to name in a message.
    by: String,
}

impl Roots {
    /// Everything that the state names, visible or not: a tag that waits for its copies needs them most.
    fn of_state(&mut self, state: &State, me: MemberId) {
        for template in state.templates.values() {
            for tag in template.tags.values() {
                let elsewhere = tag.holders.iter().any(|holder| *holder != me);
                let in_full = tag.holders.contains(&me) || !elsewhere;
                let by = || format!("{} {}", template.name, tag.name);
                self.manifest(tag.content.manifest.0, in_full, by);
            }
        }
        for (name, repository) in &state.repositories {
            for artifact in repository.artifacts.values() {
                let elsewhere = artifact.holders.iter().any(|holder| *holder != me);
                let in_full = artifact.holders.contains(&me) || !elsewhere;
                let by = || format!("{name}@{}", artifact.content.digest);
                self.manifest(artifact.content.bundle.0, in_full, by);
            }
        }
    }

    fn manifest(&mut self, id: Id, in_full: bool, by: impl FnOnce() -> String) {
        let need = self.manifests.entry(id).or_default();
        if need.by.is_empty() || (in_full && !need.in_full) {
            need.by = by();
        }
        need.in_full |= in_full;
    }
}

/// Everything needed as of now: leases, then the blobs that were uploaded here and are not forgotten yet,
/// then the state behind a barrier.
pub(super) async fn read(service: &RegistryService) -> Result<Roots, AppError> {
    let leased = service.leases.all();
    let named = service.names.all();
    let me = service.member;
    let take = |state: &State| {
        let mut roots = Roots::default();
        roots.of_state(state, me);
        roots
    };
    let mut roots = service
        .catalog
        .take(Consistency::Linearizable, take)
        .await?;
    // A blob whose description is lost is not known any more: nothing can be waited for.
    for (scope, _, entry) in named {
        roots.manifest(entry.chunk.0, false, || format!("a blob of {scope}"));
    }
    for needs in leased {
        for id in needs.manifests {
            roots.manifest(id, false, || "work under way".to_owned());
        }
        roots.segments.extend(needs.segments);
        roots.chunks.extend(needs.chunks);
    }
    Ok(roots)
}

/// What was kept so far in one run, so that nothing is walked twice.
#[derive(Debug, Default)]
pub(super) struct Kept {
    manifests: HashSet<Id>,
    segments: HashSet<Id>,
    /// Roots that are needed in full and are not known in full here.
    pub unknown: BTreeSet<String>,
}

/// Mark everything that these roots reach as needed. Blocks.
pub(super) fn keep(
    service: &RegistryService,
    roots: &Roots,
    kept: &mut Kept,
) -> Result<(), StorageError> {
    let chunks = &service.chunks;
    let single: Vec<ChunkId> = roots.chunks.iter().copied().map(ChunkId).collect();
    chunks.keep(&single);
    for id in &roots.segments {
        walk::keep_segment(chunks, id, &mut kept.segments)?;
    }
    for (id, need) in &roots.manifests {
        if kept.manifests.contains(id) {
            continue;
        }
        if walk::keep(chunks, id, &mut kept.segments)? {
            kept.manifests.insert(*id);
        } else if need.in_full {
            kept.unknown.insert(need.by.clone());
        }
    }
    Ok(())
}

/// What one piece of work needs.
#[derive(Clone, Debug, Default)]
struct Needs {
    manifests: BTreeSet<Id>,
    segments: BTreeSet<Id>,
    chunks: BTreeSet<Id>,
}

/// What running work needs although the state does not name it yet. In memory: after a restart
/// everything counts as used just now.
#[derive(Clone, Debug, Default)]
pub(super) struct Leases(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    next: u64,
    running: BTreeMap<u64, Needs>,
    /// Work that ended without knowing what became of it, and until when that may still show.
    lingering: BTreeMap<u64, (Instant, Needs)>,
}

impl Leases {
    /// For work that needs nothing yet.
    pub(super) fn begin(&self, grace: Duration) -> Lease {
        let mut held = self.0.lock();
        let key = held.next;
        held.next += 1;
        held.running.insert(key, Needs::default());
        Lease {
            leases: self.clone(),
            key,
            grace,
            lingers: false,
        }
    }

    fn all(&self) -> Vec<Needs> {
        let mut held = self.0.lock();
        let now = Instant::now();
        held.lingering.retain(|_, (until, _)| *until > now);
        let lingering = held.lingering.values().map(|(_, needs)| needs);
        held.running.values().chain(lingering).cloned().collect()
    }
}

/// Held while work goes on that needs chunks.
#[derive(Debug)]
pub(super) struct Lease {
    leases: Leases,
    key: u64,
    grace: Duration,
    lingers: bool,
}

impl Lease {
    /// All that this manifest reaches is needed.
    pub(super) fn manifest(&self, id: Id) {
        self.change(|needs| {
            needs.manifests.insert(id);
        });
    }

    /// Of what was cut into chunks so far: these full segments, and these chunks of the one that is not.
    pub(super) fn so_far(&self, segments: &[Id], chunks: &[Id]) {
        self.change(|needs| {
            needs.segments.extend(segments);
            needs.chunks = chunks.iter().copied().collect();
        });
    }

    fn change(&self, change: impl FnOnce(&mut Needs)) {
        if let Some(needs) = self.leases.0.lock().running.get_mut(&self.key) {
            change(needs);
        }
    }

    /// From here on the state may come to name it without this member being told: if the work is
    /// cut off, what it needs is kept for the grace.
    pub(super) fn linger(&mut self) {
        self.lingers = true;
    }

    /// It is known what became of the work.
    pub(super) fn settled(mut self) {
        self.lingers = false;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = self.leases.0.lock();
        let Some(needs) = held.running.remove(&self.key) else {
            return;
        };
        if self.lingers {
            if held.lingering.len() >= LINGERING_MAX {
                held.lingering.pop_first();
            }
            let until = Instant::now() + self.grace;
            held.lingering.insert(self.key, (until, needs));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_with_its_work_or_lingers_when_nobody_knows_what_became_of_it() {
        let leases = Leases::default();
        let named = |leases: &Leases| -> Vec<Id> {
            leases
                .all()
                .iter()
                .flat_map(|n| n.manifests.clone())
                .collect()
        };
        let lease = leases.begin(Duration::from_secs(60));
        lease.manifest([1; 32]);
        assert_eq!(named(&leases), [[1; 32]]);
        drop(lease);
        assert!(named(&leases).is_empty(), "it had not begun to matter");
        let mut lease = leases.begin(Duration::from_secs(60));
        lease.manifest([2; 32]);
        lease.linger();
        lease.settled();
        assert!(named(&leases).is_empty());
        let mut lease = leases.begin(Duration::from_secs(60));
        lease.manifest([3; 32]);
        lease.linger();
        drop(lease);
        assert_eq!(named(&leases), [[3; 32]]);
        let mut lease = leases.begin(Duration::ZERO);
        lease.manifest([4; 32]);
        lease.linger();
        drop(lease);
        assert_eq!(named(&leases), [[3; 32]], "the grace is over");
    }
}
