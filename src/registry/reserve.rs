//! Room on this member's disk that was promised to pushes under way: several at once are not told that
//! each of them fits when all of them do not. Soft: in memory, and forgotten when a push falls silent.

use super::RegistryService;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A push that was not heard of for so long has no promise any more: it is still taken as far as there is
/// room, batch by batch.
const KEPT: Duration = Duration::from_secs(300);
/// Promises at once; more pushes than that are looked at alone.
const MOST: usize = 1024;
/// Longest wait of a batch for others that are being stored, and how often it looks.
const WAIT_MAX: Duration = Duration::from_secs(10);
const WAIT_STEP: Duration = Duration::from_millis(20);
/// Longest name of a push.
const NAME_MAX: usize = 64;

/// By push: bytes that are still to come, and until when they are waited for.
#[derive(Debug, Default)]
pub(super) struct Reserved(Mutex<BTreeMap<String, (u64, Instant)>>);

impl Reserved {
    /// Promise `bytes` of the `left` ones to a push, in place of what it was promised before; an error:
    /// how many are promised to others. Without a name it is only looked at.
    pub(super) fn take(&self, push: &str, bytes: u64, left: u64) -> Result<(), u64> {
        let now = Instant::now();
        let mut all = self.0.lock();
        all.retain(|_, (_, until)| *until > now);
        let others = all.iter().filter(|(name, _)| *name != push);
        let promised: u64 = others.map(|(_, (bytes, _))| *bytes).sum();
        if left.saturating_sub(promised) < bytes {
            return Err(promised);
        }
        if !push.is_empty() && push.len() <= NAME_MAX && all.len() < MOST {
            all.insert(push.to_owned(), (bytes, now + KEPT));
        }
        Ok(())
    }

    /// So much of it has come, and is on the disk now.
    pub(super) fn came(&self, push: &str, bytes: u64) {
        if let Some((left, until)) = self.0.lock().get_mut(push) {
            *left = left.saturating_sub(bytes);
            *until = Instant::now() + KEPT;
        }
    }

    /// Nothing more comes.
    pub(super) fn end(&self, push: &str) {
        self.0.lock().remove(push);
    }
}

/// Bytes that were found to fit and are not on the disk yet.
#[derive(Debug, Default)]
pub(super) struct UnderWay(Arc<Mutex<u64>>);

/// Some of them: on the disk, or given up, when this goes.
#[derive(Debug)]
pub(super) struct Fits {
    all: Arc<Mutex<u64>>,
    bytes: u64,
}

impl Drop for Fits {
    fn drop(&mut self) {
        *self.all.lock() -= self.bytes;
    }
}

impl UnderWay {
    /// Do so many bytes fit into the `left` ones beside those under way?
    fn take(&self, bytes: u64, left: u64) -> Option<Fits> {
        let mut all = self.0.lock();
        if all.saturating_add(bytes) > left {
            return None;
        }
        *all += bytes;
        Some(Fits {
            all: Arc::clone(&self.0),
            bytes,
        })
    }
}

impl RegistryService {
    /// May so many bytes be stored now? Asked before each batch: many at once would each find the same
    /// room, and together go below the mark. Who has to waits for the others.
    pub(super) async fn room_for(&self, bytes: u64) -> Result<Fits, String> {
        let until = Instant::now() + WAIT_MAX;
        loop {
            (self.room)()?;
            let left = match self.chunks.shared() {
                // What goes into a bucket takes nothing of this disk.
                true => u64::MAX,
                false => (self.left)().unwrap_or(u64::MAX),
            };
            if let Some(fits) = self.under_way.take(bytes, left) {
                return Ok(fits);
            }
            if left < bytes || Instant::now() >= until {
                return Err(format!(
                    "the disk is almost full, {} MiB can be stored before the mark (--low-disk): push through another member, or make room in {}",
                    left >> 20,
                    self.chunks.dir().display()
                ));
            }
            tokio::time::sleep(WAIT_STEP).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_promised_is_not_promised_again() {
        let reserved = Reserved::default();
        assert_eq!(reserved.take("a", 60, 100), Ok(()));
        assert_eq!(reserved.take("b", 60, 100), Err(60));
        assert_eq!(reserved.take("", 60, 100), Err(60));
        assert_eq!(reserved.take("a", 90, 100), Ok(()), "its own");
        assert_eq!(reserved.take("b", 10, 100), Ok(()));
        // Forty bytes are on the disk: they are no longer left, nor to come.
        reserved.came("a", 40);
        assert_eq!(reserved.take("c", 1, 60), Err(60));
        reserved.came("a", 1000);
        assert_eq!(reserved.take("c", 1, 60), Ok(()));
        reserved.end("b");
        reserved.end("c");
        assert_eq!(reserved.take("d", 60, 60), Ok(()));
        tokio::time::advance(KEPT).await;
        assert_eq!(reserved.take("e", 60, 60), Ok(()), "d is silent");
    }
    #[test]
    fn what_is_under_way_is_not_left() {
        let under_way = UnderWay::default();
        let first = under_way.take(60, 100);
        assert!(first.is_some() && under_way.take(41, 100).is_none());
        let second = under_way.take(40, 100);
        assert!(second.is_some() && under_way.take(1, 100).is_none());
        drop(first);
        assert!(under_way.take(60, 100).is_some());
    }
}
