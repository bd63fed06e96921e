//! Open uploads. Soft: they live in the memory of the member that began them, end with it, and expire.
//! What they stored is nobody's then, and is collected like any other chunk that nothing names.

use super::ingest::Ingest;
use mainstay_model::MemberId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use uuid::Uuid;

/// Open at once: each may hold a chunk of 64 KiB that is not full. Beyond, the one that was idle for
/// longest ends: a client that was only slow begins again, and its chunks are there already.
const OPEN_MAX: usize = 1024;
/// An upload without any request for so long has been abandoned.
const IDLE_MAX: Duration = Duration::from_hours(1);
/// Bodies that are read at once: each may hold a batch of 4 MiB, and one that is being stored.
const BODIES_MAX: usize = 48;
/// KiB of manifests that are being read and looked through: sixteen of the longest.
const MANIFESTS_KIB: usize = 64 << 10;

/// What a client calls an upload: where it is, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UploadId {
    pub id: Uuid,
    pub member: MemberId,
}

impl std::fmt::Display for UploadId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.id, self.member)
    }
}

impl UploadId {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (id, member) = text.rsplit_once('-')?;
        if member.len() != 16 || id.len() != 36 {
            return None;
        }
        Some(Self {
            id: Uuid::parse_str(id).ok()?,
            member: MemberId(u64::from_str_radix(member, 16).ok()?),
        })
    }
}

/// One upload.
pub(super) struct Upload {
    pub repository: String,
    /// Bytes taken in, for those who ask while a request is under way.
    pub taken: AtomicU64,
    /// One request at a time; `None`: it has ended.
    pub ingest: tokio::sync::Mutex<Option<Ingest>>,
    used: Mutex<Instant>,
}

impl Upload {
    /// Not abandoned.
    pub(super) fn touch(&self) {
        *self.used.lock() = Instant::now();
    }

    fn idle(&self) -> Option<Duration> {
        // A request is under way.
        let _free = self.ingest.try_lock().ok()?;
        Some(self.used.lock().elapsed())
    }

    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

/// All that are open here.
pub(in crate::registry) struct Uploads {
    open: Mutex<HashMap<Uuid, Arc<Upload>>>,
    /// One permit a body.
    pub(super) bodies: Arc<Semaphore>,
    /// One permit a KiB.
    pub(super) manifests: Arc<Semaphore>,
}

impl Default for Uploads {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            bodies: Arc::new(Semaphore::new(BODIES_MAX)),
            manifests: Arc::new(Semaphore::new(MANIFESTS_KIB)),
        }
    }
}

impl Uploads {
    pub(super) fn begin(&self, repository: String) -> Uuid {
        let id = Uuid::new_v4();
        let upload = Upload {
            repository,
            taken: AtomicU64::new(0),
            ingest: tokio::sync::Mutex::new(Some(Ingest::default())),
            used: Mutex::new(Instant::now()),
        };
        let mut open = self.open.lock();
        if open.len() >= OPEN_MAX {
            let idle = open.iter().filter_map(|(id, u)| Some((u.idle()?, *id)));
            if let Some((_, longest)) = idle.max() {
                open.remove(&longest);
            }
        }
        open.insert(id, Arc::new(upload));
        id
    }

    pub(super) fn find(&self, repository: &str, id: &Uuid) -> Option<Arc<Upload>> {
        let found = self.open.lock().get(id).map(Arc::clone);
        let found = found.filter(|upload| upload.repository == repository)?;
        found.touch();
        Some(found)
    }

    pub(super) fn end(&self, id: &Uuid) {
        self.open.lock().remove(id);
    }

    pub(super) fn expire(&self) {
        let abandoned = |upload: &Upload| upload.idle().is_some_and(|idle| idle > IDLE_MAX);
        self.open.lock().retain(|_, upload| !abandoned(upload));
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.open.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_name_the_member() {
        let id = UploadId {
            id: Uuid::new_v4(),
            member: MemberId(0xfeed),
        };
        assert_eq!(UploadId::parse(&id.to_string()), Some(id));
        for bad in ["", "x", "../../etc/passwd", &id.id.to_string()] {
            assert_eq!(UploadId::parse(bad), None, "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn abandoned_uploads_end_and_the_busy_one_stays() {
        let uploads = Uploads::default();
        let first = uploads.begin("a".to_owned());
        let busy = uploads.find("a", &first).unwrap();
        let _request = busy.ingest.lock().await;
        assert!(uploads.find("b", &first).is_none());
        for _ in 0..10_000 {
            uploads.begin("a".to_owned());
        }
        assert_eq!(uploads.count(), OPEN_MAX);
        tokio::time::advance(IDLE_MAX + Duration::from_secs(1)).await;
        uploads.expire();
        assert_eq!(uploads.count(), 1);
        assert!(uploads.find("a", &first).is_some());
    }
}
