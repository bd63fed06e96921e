//! What readers, the writer and the collector of one store look at together.

use super::ChunkId;
use super::backend::{Backend, PackSet};
use super::index::{Entry, Index, Location, Tick};
use crate::disk::Disk;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// What readers and the writer share.
pub(super) struct Shared {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) index: Index,
    /// Where the packs live.
    pub(super) backend: Box<dyn Backend>,
    /// Found damaged, until they are put again or nothing needs them any more.
    pub(super) bad: Mutex<BTreeMap<ChunkId, Bad>>,
    /// Fewer bytes than this are not worth the rewriting of a pack.
    pub(super) waste_min: u64,
}

/// A chunk that was found damaged.
pub(super) struct Bad {
    /// When something last needed it.
    pub(super) needed: Tick,
}

impl Shared {
    pub(super) fn packs(&self) -> &PackSet {
        self.backend.packs()
    }

    /// What lies at this place is bad: the chunk is not held any more, unless it lies elsewhere.
    pub(super) fn quarantine(&self, id: &ChunkId, at: &Location) -> bool {
        if !self.index.remove(id, at) {
            return false;
        }
        tracing::error!(chunk = %id, pack = at.pack, offset = at.offset, "a stored chunk is damaged: it is not served any more");
        let needed = self.index.now();
        self.bad.lock().insert(*id, Bad { needed });
        true
    }

    /// These were put again.
    pub(super) fn healed(&self, entries: &[Entry]) {
        let mut bad = self.bad.lock();
        if bad.is_empty() {
            return;
        }
        for (id, _) in entries {
            if bad.remove(id).is_some() {
                tracing::info!(chunk = %id, "a damaged chunk is whole again");
            }
        }
    }
}
