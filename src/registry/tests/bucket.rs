//! Members whose chunks are in a bucket, and the bucket is away.

use super::oci::{ask, digest, post_blob, put_image};
use super::*;
use bytes::Bytes;
use mainstay_storage::chunks::{Bucket, SharedOptions};
use std::io;
use std::ops::Range;

/// Objects in memory, and whether they can be reached.
#[derive(Debug, Default)]
pub(super) struct MemoryBucket {
    objects: Mutex<BTreeMap<String, Bytes>>,
    away: AtomicBool,
}

impl MemoryBucket {
    fn reach(&self) -> io::Result<parking_lot::MutexGuard<'_, BTreeMap<String, Bytes>>> {
        match self.away.load(Ordering::Relaxed) {
            true => Err(io::Error::other("no way to the bucket")),
            false => Ok(self.objects.lock()),
        }
    }

    /// As member `id`, without a cache: every read asks the bucket.
    pub(super) fn open(self: &Arc<Self>, dir: &Path, id: u64) -> ChunkStore {
        let options = SharedOptions::new(id, "the cluster", 0);
        ChunkStore::open_shared(dir, Arc::clone(self) as Arc<dyn Bucket>, &options).unwrap()
    }
}

impl Bucket for MemoryBucket {
    fn put(&self, key: &str, body: Bytes) -> io::Result<()> {
        self.reach()?.insert(key.to_owned(), body);
        Ok(())
    }
    fn create(&self, key: &str, body: Bytes) -> io::Result<bool> {
        let mut objects = self.reach()?;
        let free = !objects.contains_key(key);
        if free {
            objects.insert(key.to_owned(), body);
        }
        Ok(free)
    }
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Bytes> {
        let body = self.reach()?.get(key).cloned();
        let body = body.ok_or(io::ErrorKind::NotFound)?;
        let at = |to: u64| usize::try_from(to).unwrap().min(body.len());
        Ok(body.slice(at(range.start)..at(range.end)))
    }
    fn size(&self, key: &str) -> io::Result<u64> {
        let objects = self.reach()?;
        let body = objects.get(key).ok_or(io::ErrorKind::NotFound)?;
        Ok(body.len() as u64)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> io::Result<Vec<(String, u64)>> {
        let objects = self.reach()?;
        let found = objects
            .iter()
            .filter(|(key, _)| key.starts_with(prefix) && after.is_none_or(|a| key.as_str() > a));
        let found = found.map(|(key, body)| (key.clone(), body.len() as u64));
        Ok(found.collect())
    }
    fn delete(&self, key: &str) -> io::Result<()> {
        self.reach()?.remove(key);
        Ok(())
    }
}

/// Not now is not never: nothing that was acknowledged is forgotten because it could not be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_is_away_is_answered_with_503_and_forgets_nothing() {
    let bucket = Arc::<MemoryBucket>::default();
    let cluster = Cluster {
        bucket: Some(Arc::clone(&bucket)),
        ..Cluster::of_artifacts(2).await
    };
    let (member, other) = (cluster.serve(1, true).await, cluster.serve(2, true).await);
    let layer = noise(1, 300_000);
    let posted = post_blob(&member, "a", &layer, &digest(&layer)).await;
    assert_eq!(posted, 201);

    bucket.away.store(true, Ordering::Relaxed);
    let blob = format!("/v2/a/blobs/{}", digest(&layer));
    let more = noise(2, 300_000);
    let upload = format!("/v2/a/blobs/uploads/?digest={}", digest(&more));
    for (method, path, body) in [
        ("HEAD", &blob, Vec::new()),
        ("GET", &blob, Vec::new()),
        ("POST", &upload, more.clone()),
    ] {
        for at in [&member, &other] {
            let answer = ask(at, method, path, body.clone().into()).await;
            assert_eq!(answer.status(), 503, "{method} {path}");
            assert!(answer.headers().contains_key("retry-after"), "{method}");
        }
    }

    bucket.away.store(false, Ordering::Relaxed);
    let answer = ask(&member, "HEAD", &blob, Vec::new().into()).await;
    assert_eq!(answer.status(), 200, "it was acknowledged");
    assert_eq!(put_image(&other, "a", &layer).await.0, 201);
    // Bytes that cannot be read are told of before the answer has begun.
    bucket.away.store(true, Ordering::Relaxed);
    let answer = ask(&member, "GET", &blob, Vec::new().into()).await;
    assert_eq!(answer.status(), 503);
}

/// What goes into the bucket needs no room on the member's disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_larger_than_the_disk_goes_into_the_bucket() {
    let cluster = Cluster {
        bucket: Some(Arc::default()),
        ..Cluster::new(2)
    };
    let members = cluster.serve_all().await;
    for id in [1, 2] {
        cluster.shared.left.lock().insert(id, 1000);
    }
    let image = cluster.file("image");
    std::fs::write(&image, noise(3, 3 << 20)).unwrap();
    let spec = spec("t", "v1", Durability::All);
    let published = push(&[&members[0].url], &image, &spec).await.unwrap();
    assert!(published.tag.visible);
}
