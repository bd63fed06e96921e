//! Proposals that wait, bounded in number and in bytes: beyond that the answer is "overloaded" at once,
//! not memory that grows. Knows no command.

use super::GroupError;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Waiting proposals of one kind (our clients', other members').
pub(super) struct Queue {
    places: Semaphore,
    kib: Semaphore,
    /// Whose they are, for the refusal.
    whose: &'static str,
}

/// A place in it, until dropped.
pub(super) struct Place<'a> {
    _place: SemaphorePermit<'a>,
    _kib: SemaphorePermit<'a>,
}

impl Queue {
    pub(super) fn new(whose: &'static str, places: usize, bytes: usize) -> Self {
        Self {
            places: Semaphore::new(places),
            kib: Semaphore::new(bytes >> 10),
            whose,
        }
    }

    /// A place for a command of so many bytes, or a refusal at once.
    pub(super) fn enter(&self, bytes: usize) -> Result<Place<'_>, GroupError> {
        let full = |_| GroupError::Overloaded(format!("too many {} are waiting", self.whose));
        let kib = u32::try_from(bytes.div_ceil(1024).max(1)).unwrap_or(u32::MAX);
        Ok(Place {
            _place: self.places.try_acquire().map_err(full)?,
            _kib: self.kib.try_acquire_many(kib).map_err(full)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_and_bytes_are_bounded_and_come_back() {
        let queue = Queue::new("proposals", 3, 8 << 10);
        let one = queue.enter(1).unwrap();
        let big = queue.enter(6 << 10).unwrap();
        let error = queue.enter(2 << 10).err().unwrap();
        assert!(matches!(&error, GroupError::Overloaded(why) if why.contains("proposals")));
        let last = queue.enter(1000).unwrap();
        assert!(queue.enter(0).is_err(), "three places");
        drop((one, big));
        queue.enter(7 << 10).unwrap();
        drop(last);
    }
}
