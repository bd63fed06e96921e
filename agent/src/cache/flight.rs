//! One pull that several wait for. It is in the list while it flies, and given up when the last
//! passenger has left.

use super::{CacheError, Shared};
use crate::wire::ImageRef;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::{Notify, watch};

/// Where a pull stands.
#[derive(Clone, Debug)]
pub(super) enum Flight {
    Flying(f32),
    Landed(Result<(), CacheError>),
}

/// A pull in the list. Passengers subscribe under the list's lock.
pub(super) struct Listed {
    seats: watch::Sender<Flight>,
    /// Bytes that it will still take from the disk.
    pub(super) still_to_write: Arc<AtomicU64>,
}

/// The flight that is in the air for this image, or a new one.
pub(super) fn board(shared: &Arc<Shared>, image: &ImageRef) -> watch::Receiver<Flight> {
    let mut flights = shared.flights.lock();
    if let Some(listed) = flights.get(&image.manifest) {
        return listed.seats.subscribe();
    }
    let (seats, ticket) = watch::channel(Flight::Flying(0.0));
    let still_to_write = Arc::new(AtomicU64::new(0));
    let listed = Listed {
        seats: seats.clone(),
        still_to_write: Arc::clone(&still_to_write),
    };
    flights.insert(image.manifest.clone(), listed);
    let plane = Plane {
        shared: Arc::clone(shared),
        image: image.clone(),
        seats,
        still_to_write,
    };
    tokio::spawn(plane.fly());
    ticket
}

struct Plane {
    shared: Arc<Shared>,
    image: ImageRef,
    seats: watch::Sender<Flight>,
    still_to_write: Arc<AtomicU64>,
}

impl Drop for Plane {
    fn drop(&mut self) {
        // Also after a panic: nobody may board, or wait for, a flight that is no more.
        self.shared.flights.lock().remove(&self.image.manifest);
    }
}

impl Plane {
    async fn fly(self) {
        let pull = self.pull();
        tokio::pin!(pull);
        let landed = loop {
            tokio::select! {
                landed = &mut pull => break landed,
                () = self.seats.closed() => {
                    let mut flights = self.shared.flights.lock();
                    if self.seats.receiver_count() == 0 {
                        flights.remove(&self.image.manifest);
                        tracing::info!(template = %self.image.template, tag = %self.image.tag,
                            "pull given up: nobody waits for it");
                        break Err(CacheError::Unavailable("given up".to_owned()));
                    }
                }
            }
        };
        if landed.is_ok() {
            self.shared.changed.send_modify(|n| *n += 1);
        }
        // Off the list first: who boards from now on starts anew.
        self.shared.flights.lock().remove(&self.image.manifest);
        self.seats.send_replace(Flight::Landed(landed));
    }

    async fn pull(&self) -> Result<(), CacheError> {
        let image = &self.image;
        let part = self.shared.shelf.begin(&image.manifest).map_err(disk)?;
        let refusal = Mutex::new(None);
        let refused = Notify::new();
        let first = AtomicBool::new(true);
        let told = |done: u64, total: u64| {
            if first.swap(false, Ordering::Relaxed) {
                let here = self.shared.shelf.pulled(&image.manifest);
                let needed = total.saturating_sub(here);
                if let Err(why) = self.shared.make_room(&image.manifest, needed) {
                    *refusal.lock() = Some(why);
                    refused.notify_one();
                }
            }
            self.told(done, total);
        };
        let manifest = tokio::select! {
            biased;
            () = refused.notified() => {
                let why = refusal.lock().take().unwrap_or_default();
                return Err(CacheError::NoRoom(why));
            }
            done = self.shared.fetch.fetch(image, &part, &told) => done?,
        };
        let file = manifest.files.first().ok_or_else(|| {
            CacheError::Invalid(format!("{}:{} has no disk", image.template, image.tag))
        })?;
        let (shelf, image, format) = (
            self.shared.shelf.clone(),
            image.clone(),
            file.format.clone(),
        );
        let saved = match manifest.saved()? {
            Some(_) => Some(file.content()?),
            None => None,
        };
        tokio::task::spawn_blocking(move || shelf.finish(&image, &format, saved))
            .await
            .map_err(disk)?
            .map_err(disk)
    }

    fn told(&self, done: u64, total: u64) {
        let left = total.saturating_sub(done);
        let booked = self.still_to_write.load(Ordering::Relaxed);
        self.still_to_write
            .store(booked.min(left), Ordering::Relaxed);
        #[allow(clippy::cast_precision_loss)]
        let part = if total == 0 {
            1.0
        } else {
            done as f32 / total as f32
        };
        self.seats.send_if_modified(|flight| {
            let moved = matches!(flight, Flight::Flying(before) if (part - *before).abs() >= 0.001);
            if moved {
                *flight = Flight::Flying(part.clamp(0.0, 1.0));
            }
            moved
        });
    }
}

fn disk(error: impl std::fmt::Display) -> CacheError {
    CacheError::Disk(error.to_string())
}
