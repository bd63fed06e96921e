//! The node's images: each fetched once however many instances wait for it, whole before anybody
//! sees it, kept while something stands on it, dropped least recently used first. Knows no VM and
//! no controller.
//!
//! * [`fetch`]: where bytes come from; `flight`: one shared pull; `shelf`: the files; `room`: what
//!   must go (pure).

pub mod fetch;
mod flight;
mod room;
mod shelf;
#[cfg(test)]
mod tests;

pub use fetch::{Fetch, Party, RegistryFetch, Sources};
pub(crate) use shelf::is_digest;

use crate::driver::Saved;
use crate::transfer::TransferError;
use crate::wire::ImageRef;
use flight::{Flight, Listed};
use parking_lot::Mutex;
use shelf::{DISK, MACHINE, MEMORY, Shelf};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::watch;

/// How much of the file system stays free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// Part of the disk.
    Percent(u8),
    /// Bytes.
    Bytes(u64),
}

/// Why an image could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CacheError {
    /// No room even after dropping everything that may go.
    #[error("rejecting due to lack of disk space: {0}")]
    NoRoom(String),
    /// No registry could serve it now; later may be better.
    #[error("{0}")]
    Unavailable(String),
    /// The bytes are not a disk that can be used, anywhere.
    #[error("{0}")]
    Invalid(String),
    /// The local disk failed.
    #[error("image cache: {0}")]
    Disk(String),
}

impl From<TransferError> for CacheError {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Unavailable(_) | TransferError::Refused(_) => {
                Self::Unavailable(error.to_string())
            }
            TransferError::Invalid(_) => Self::Invalid(error.to_string()),
            TransferError::Io(_) => Self::Disk(error.to_string()),
        }
    }
}

/// A whole image; it cannot be dropped from the disk while this lives.
#[derive(Debug)]
pub struct Image {
    /// Read-only disk.
    pub disk: PathBuf,
    /// `qcow2` or `raw`.
    pub format: String,
    /// What a VM on this disk was in the middle of.
    pub saved: Option<Saved>,
    _pin: Pin,
}

/// Manifests (hex) that VMs stand on. `None`: not known now, so nothing may be dropped.
pub type Users = Arc<dyn Fn() -> Option<BTreeSet<String>> + Send + Sync>;

struct Shared {
    shelf: Shelf,
    fetch: Arc<dyn Fetch>,
    reserve: Reserve,
    users: Users,
    flights: Mutex<BTreeMap<String, Listed>>,
    pins: Mutex<BTreeMap<String, usize>>,
    changed: watch::Sender<u64>,
}

/// The cache; cheap to clone.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").finish_non_exhaustive()
    }
}

impl Cache {
    /// Open the folder and see what is whole.
    pub fn open(
        root: &Path,
        fetch: Arc<dyn Fetch>,
        reserve: Reserve,
        users: Users,
    ) -> io::Result<Self> {
        let shared = Shared {
            shelf: Shelf::open(root)?,
            fetch,
            reserve,
            users,
            flights: Mutex::new(BTreeMap::new()),
            pins: Mutex::new(BTreeMap::new()),
            changed: watch::Sender::new(0),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Whole images, under every name that they were asked for.
    pub fn images(&self) -> Vec<ImageRef> {
        self.shared.shelf.images()
    }

    /// Bytes on disk of everything in the cache.
    pub fn used_bytes(&self) -> u64 {
        self.shared.shelf.used_bytes()
    }

    /// Told when the list of whole images changes.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Drop the image with this name, unless somebody needs it. `true`: it is not here any more. Blocks.
    pub fn evict(&self, template_id: &str, number: u32) -> io::Result<bool> {
        self.shared.evict(template_id, number)
    }

    /// See that so many bytes can be written beside the cache with the reserve still free; drops images that nobody
    /// needs for it.
    pub async fn make_room(&self, bytes: u64) -> Result<(), CacheError> {
        let shared = Arc::clone(&self.shared);
        let made = tokio::task::spawn_blocking(move || shared.make_room("", bytes)).await;
        let made = made.map_err(|e| CacheError::Disk(e.to_string()))?;
        made.map_err(CacheError::NoRoom)
    }

    /// The image, fetched if it is not here. Callers that want the same one share one pull; it is
    /// given up when the last of them stops waiting. `progress` gets the part done, 0..1; it is not
    /// called when the image is here.
    pub async fn ensure(
        &self,
        image: &ImageRef,
        progress: &(dyn Fn(f32) + Send + Sync),
    ) -> Result<Image, CacheError> {
        if !shelf::is_digest(&image.manifest) {
            let what = &image.manifest;
            return Err(CacheError::Invalid(format!(
                "{what:?} is no manifest digest"
            )));
        }
        let pin = Pin::new(&self.shared, &image.manifest);
        loop {
            if let Some((format, saved)) = self.shared.shelf.touch(image) {
                let shelf = &self.shared.shelf;
                return Ok(Image {
                    disk: shelf.file(&image.manifest, DISK),
                    format,
                    saved: saved.map(|disk| Saved {
                        memory: shelf.file(&image.manifest, MEMORY),
                        machine: shelf.file(&image.manifest, MACHINE),
                        disk,
                    }),
                    _pin: pin,
                });
            }
            let mut ticket = flight::board(&self.shared, image);
            loop {
                let seen = ticket.borrow_and_update().clone();
                match seen {
                    Flight::Flying(part) => progress(part),
                    Flight::Landed(Ok(())) => break,
                    Flight::Landed(Err(error)) => return Err(error),
                }
                if ticket.changed().await.is_err() {
                    let why = "the pull broke off".to_owned();
                    return Err(CacheError::Unavailable(why));
                }
            }
        }
    }
}

impl Shared {
    /// Make sure that the pull of `digest` (empty: something else) can write `needed` bytes and the reserve stays free.
    fn make_room(&self, digest: &str, needed: u64) -> Result<(), String> {
        let flights = self.flights.lock();
        let booked: u64 = flights
            .iter()
            .filter(|(other, _)| *other != digest)
            .map(|(_, listed)| listed.still_to_write.load(Ordering::Relaxed))
            .sum();
        // Held until the victims are off the shelf: who pins one later finds none and pulls it anew.
        let pins = self.pins.lock();
        let mut keep: BTreeSet<String> = pins.keys().cloned().collect();
        keep.extend(flights.keys().cloned());
        keep.insert(digest.to_owned());
        let shelved = match (self.users)() {
            Some(users) => {
                keep.extend(users);
                self.shelf.by_age()
            }
            None => Vec::new(),
        };
        let disk = self.shelf.space().map_err(|e| e.to_string())?;
        let reserve = match self.reserve {
            Reserve::Bytes(bytes) => bytes,
            Reserve::Percent(percent) => disk.total / 100 * u64::from(percent.min(100)),
        };
        let free = disk.free.saturating_sub(booked);
        let victims = room::victims(free, needed, reserve, &shelved, &keep)?;
        if let Some(listed) = flights.get(digest) {
            listed.still_to_write.store(needed, Ordering::Relaxed);
        }
        let mut dropped = Ok(());
        for victim in &victims {
            tracing::info!(manifest = %victim, "image dropped from the cache to make room");
            dropped = dropped.and_then(|()| self.shelf.drop_image(victim));
        }
        drop(pins);
        victims.iter().for_each(|victim| self.fetch.dropped(victim));
        if !victims.is_empty() {
            self.changed.send_modify(|n| *n += 1);
        }
        // Their bytes after that, for a large file takes its time; still under the list of flights,
        // so that no other pull counts them as taken.
        for victim in &victims {
            dropped = dropped.and_then(|()| self.shelf.clear(victim));
        }
        dropped.map_err(|e| e.to_string())
    }
}

impl Shared {
    /// The same bytes may have other names: then only this name goes.
    fn evict(&self, template_id: &str, number: u32) -> io::Result<bool> {
        let named = self.shelf.named(template_id, number);
        if named.is_empty() {
            return Ok(true);
        }
        let flights = self.flights.lock();
        // Held until it is off the shelf: who pins it later finds none and pulls it anew.
        let pins = self.pins.lock();
        let Some(mut keep) = (self.users)() else {
            return Ok(false);
        };
        keep.extend(pins.keys().chain(flights.keys()).cloned());
        let mut gone = true;
        let mut bare = Vec::new();
        for digest in named {
            if keep.contains(&digest) {
                gone = false;
            } else if self.shelf.unname(&digest, template_id, number)? {
                tracing::info!(manifest = %digest, "image dropped from the cache, as it was asked for");
                bare.push(digest);
            }
        }
        drop((pins, flights));
        self.changed.send_modify(|n| *n += 1);
        for digest in &bare {
            self.fetch.dropped(digest);
            self.shelf.clear(digest)?;
        }
        Ok(gone)
    }
}

/// Counts as a user of an image while it lives.
struct Pin {
    shared: Arc<Shared>,
    digest: String,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pin({})", self.digest)
    }
}

impl Pin {
    fn new(shared: &Arc<Shared>, digest: &str) -> Self {
        *shared.pins.lock().entry(digest.to_owned()).or_default() += 1;
        Self {
            shared: Arc::clone(shared),
            digest: digest.to_owned(),
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.shared.pins.lock();
        if let Some(count) = pins.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.digest);
            }
        }
    }
}
