//! Where packs live, behind one trait. What is held, used, dead or damaged is decided above it, once
//! for all of them; a backend keeps bytes and knows nothing about need.
//!
//! ```text
//! append (durable) -> the caller's index names the places -> settle (the pack is counted, may be sealed)
//! ```
//! Whatever changes packs is called by the one thread that writes; `read`, `read_stored`, `entries` and `room` by any.

use super::Record;
use super::bucket::BucketPacks;
use super::index::{Entry, Location};
use crate::Result;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU32, Ordering};

/// Packs and their lengths in bytes, by number. A pack is in it once the index names what it holds.
#[derive(Debug, Default)]
pub(super) struct PackSet {
    lens: Mutex<BTreeMap<u32, u64>>,
    /// The growing pack; 0: none grows.
    active: AtomicU32,
}

impl PackSet {
    pub(super) fn new(lens: BTreeMap<u32, u64>, active: u32) -> Self {
        Self {
            lens: Mutex::new(lens),
            active: AtomicU32::new(active),
        }
    }

    pub(super) fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    pub(super) fn set_active(&self, number: u32) {
        self.active.store(number, Ordering::Relaxed);
    }

    pub(super) fn note(&self, number: u32, len: u64) {
        self.lens.lock().insert(number, len);
    }

    /// Its length, if it was there.
    pub(super) fn forget(&self, number: u32) -> Option<u64> {
        self.lens.lock().remove(&number)
    }

    pub(super) fn len_of(&self, number: u32) -> Option<u64> {
        self.lens.lock().get(&number).copied()
    }

    /// Bytes of the packs below `number`, and of all.
    pub(super) fn bytes_below(&self, number: u32) -> (u64, u64) {
        let lens = self.lens.lock();
        let below = lens.range(..number).map(|(_, len)| len).sum();
        (below, lens.values().sum())
    }

    /// How many, and their bytes.
    pub(super) fn total(&self) -> (u64, u64) {
        let lens = self.lens.lock();
        (lens.len() as u64, lens.values().sum())
    }

    /// The first one from `number` on.
    pub(super) fn next_from(&self, number: u32) -> Option<u32> {
        self.lens.lock().range(number..).next().map(|(n, _)| *n)
    }

    pub(super) fn all(&self) -> Vec<(u32, u64)> {
        self.lens.lock().iter().map(|(n, len)| (*n, *len)).collect()
    }
}

/// Where packs live.
pub(super) trait Backend: Debug + Send + Sync {
    /// All packs that this store may rely on.
    fn packs(&self) -> &PackSet;

    /// Append these: all durable on return, and where they are, in their order. After an error none
    /// of them is held.
    fn append(&self, records: &[&Record]) -> Result<Vec<Location>>;

    /// The index names what was appended last.
    fn settle(&self);

    /// Nothing more goes into the growing pack, unless nothing is in it; the number of the growing one.
    fn seal(&self) -> Result<u32>;

    /// Up to `len` bytes of a pack from `start` on: fewer where it ends before.
    fn read(&self, number: u32, start: u64, len: usize) -> Result<Bytes>;

    /// What a pack holds. An error for which [`super::read::gone`] holds: there is no such pack.
    fn entries(&self, number: u32) -> Result<Vec<Entry>>;

    /// These records are bad: [`Backend::entries`] may not name them any more, nor after a restart.
    fn strike(&self, bad: &[Entry]) -> Result<()>;

    /// Nothing in this pack is needed here any more; its length.
    fn remove(&self, number: u32) -> Result<u64>;

    /// The same from where it is durable, past whatever is kept of it nearer by; that stays as it is.
    fn read_stored(&self, number: u32, start: u64, len: usize) -> Result<Bytes>;

    /// Free and total bytes for what is stored.
    fn room(&self) -> Result<(u64, u64)>;

    /// May this store copy what is needed of the pack elsewhere, to give its room back? (Of a pack
    /// that several look after, one does.)
    fn rewrites(&self, _number: u32) -> bool {
        true
    }

    /// Bytes that are copied together from as many packs as it takes; 0: each pack for itself.
    fn group_bytes(&self) -> u64 {
        0
    }

    /// Packs shorter than this are copied together once there are enough of them.
    fn small(&self) -> u64 {
        0
    }

    /// The bucket, if others share it.
    fn common(&self) -> Option<&BucketPacks> {
        None
    }
}
