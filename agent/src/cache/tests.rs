//! The cache with a source that can be held back: sharing, giving up, crash, eviction.

use super::*;
use crate::transfer::api::TagInfo;
use crate::transfer::{FileEntry, Manifest, PushSpec};
use async_trait::async_trait;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::AtomicU32;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Writes `size` bytes per permit-holder; counts calls.
struct Held {
    gate: Semaphore,
    calls: AtomicU32,
    size: u64,
}

impl Held {
    fn new(permits: usize, size: u64) -> Arc<Self> {
        Arc::new(Self {
            gate: Semaphore::new(permits),
            calls: AtomicU32::new(0),
            size,
        })
    }
    fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Fetch for Held {
    async fn deliver(
        &self,
        _: &Path,
        _: &PushSpec,
        _: &fetch::Told<'_>,
    ) -> Result<TagInfo, TransferError> {
        Err(TransferError::Refused("it only gives".to_owned()))
    }

    async fn fetch(
        &self,
        image: &ImageRef,
        dest: &Path,
        told: &fetch::Told<'_>,
    ) -> Result<Manifest, TransferError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        told(0, self.size);
        tokio::task::yield_now().await;
        told(self.size / 2, self.size);
        self.gate.acquire().await.unwrap().forget();
        if image.tag == "bad" {
            return Err(TransferError::Invalid("not what was asked for".to_owned()));
        }
        let size = usize::try_from(self.size).unwrap().min(1 << 20);
        fs::write(dest, vec![7_u8; size])?;
        let file = FileEntry {
            name: "disk.qcow2".to_owned(),
            format: "qcow2".to_owned(),
            size: self.size,
            segments: Vec::new(),
        };
        Ok(Manifest {
            version: 1,
            files: vec![file],
        })
    }
}

fn image(n: u8) -> ImageRef {
    ImageRef {
        template_id: format!("t{n}"),
        tag: "v1".to_owned(),
        manifest: format!("{n:02x}").repeat(32),
        ..ImageRef::default()
    }
}

fn open(root: &Path, fetch: &Arc<Held>, users: &[u8]) -> Cache {
    let users: BTreeSet<String> = users.iter().map(|n| image(*n).manifest).collect();
    let users: Users = Arc::new(move || Some(users.clone()));
    let fetch: Arc<dyn Fetch> = Arc::clone(fetch) as _;
    Cache::open(root, fetch, Reserve::Bytes(0), users).unwrap()
}

async fn until(what: &str, mut met: impl FnMut() -> bool) {
    timeout(Duration::from_secs(10), async {
        while !met() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn waiting_instances_share_one_pull_and_see_progress() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Held::new(0, 1000);
    let cache = open(dir.path(), &fetch, &[]);
    let seen = Arc::new(Mutex::new(0.0_f32));
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let (cache, seen) = (cache.clone(), Arc::clone(&seen));
            tokio::spawn(async move {
                let progress = |part: f32| *seen.lock() = part;
                cache.ensure(&image(1), &progress).await
            })
        })
        .collect();
    until("half is there", || (*seen.lock() - 0.5).abs() < 0.01).await;
    assert!(cache.images().is_empty(), "not visible before it is whole");
    fetch.gate.add_permits(1);
    for one in waiting {
        let got = one.await.unwrap().unwrap();
        assert_eq!(got.format, "qcow2");
        let mode = fs::metadata(&got.disk).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o444);
    }
    assert_eq!(fetch.calls(), 1);
    assert_eq!(cache.images(), [image(1)]);
    let again = open(dir.path(), &fetch, &[]);
    assert_eq!(again.images(), [image(1)], "whole after a restart");
    again.ensure(&image(1), &|_| ()).await.unwrap();
    assert_eq!(fetch.calls(), 1);
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_is_given_up_and_can_begin_anew() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Held::new(0, 1000);
    let cache = open(dir.path(), &fetch, &[]);
    for round in 1..=2 {
        let one = {
            let cache = cache.clone();
            tokio::spawn(async move { cache.ensure(&image(1), &|_| ()).await })
        };
        until("pulling", || fetch.calls() == round).await;
        one.abort();
        let _ = one.await;
        until("given up", || cache.shared.flights.lock().is_empty()).await;
    }
    assert!(cache.shared.pins.lock().is_empty());
    fetch.gate.add_permits(1);
    cache.ensure(&image(1), &|_| ()).await.unwrap();
}

#[tokio::test]
async fn a_bad_image_is_an_answer_to_all_and_leaves_nothing_whole() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Held::new(1, 10);
    let cache = open(dir.path(), &fetch, &[]);
    let bad = ImageRef {
        tag: "bad".to_owned(),
        ..image(1)
    };
    let error = cache.ensure(&bad, &|_| ()).await.unwrap_err();
    assert!(matches!(error, CacheError::Invalid(_)), "{error}");
    assert!(open(dir.path(), &fetch, &[]).images().is_empty());
    let nameless = ImageRef::default();
    assert!(matches!(
        cache.ensure(&nameless, &|_| ()).await,
        Err(CacheError::Invalid(_))
    ));
}

#[tokio::test]
async fn a_crash_before_the_marker_leaves_an_image_that_is_pulled_again() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Held::new(2, 10);
    let cache = open(dir.path(), &fetch, &[]);
    let got = cache.ensure(&image(1), &|_| ()).await.unwrap();
    let folder = got.disk.parent().unwrap().to_owned();
    fs::remove_file(folder.join("whole")).unwrap();
    fs::rename(folder.join("disk"), folder.join("disk.part")).unwrap();
    let cache = open(dir.path(), &fetch, &[]);
    assert!(cache.images().is_empty());
    cache.ensure(&image(1), &|_| ()).await.unwrap();
    assert_eq!(cache.images(), [image(1)]);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_nothing_in_use_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Held::new(9, 1 << 20);
    let cache = open(dir.path(), &fetch, &[1]);
    for n in 1..=3 {
        cache.ensure(&image(n), &|_| ()).await.unwrap();
    }
    let held = cache.ensure(&image(2), &|_| ()).await.unwrap();
    let huge = Held::new(9, 1 << 60);
    let cache = Cache::open(
        dir.path(),
        Arc::clone(&huge) as _,
        Reserve::Percent(20),
        Arc::clone(&cache.shared.users),
    )
    .unwrap();
    let error = cache.ensure(&image(9), &|_| ()).await.unwrap_err();
    assert!(matches!(error, CacheError::NoRoom(_)), "{error}");
    assert_eq!(cache.images().len(), 3, "nothing is dropped in vain");
    drop(held);
    // Room for one is short by a few bytes: the oldest image that nothing stands on must go.
    let free = cache.shared.shelf.space().unwrap().free;
    let reserve = Reserve::Bytes(free.saturating_sub(64 << 10));
    let small = Held::new(9, 1 << 20);
    let cache = Cache::open(
        dir.path(),
        Arc::clone(&small) as _,
        reserve,
        Arc::clone(&cache.shared.users),
    )
    .unwrap();
    match cache.ensure(&image(4), &|_| ()).await {
        Ok(_) => {
            let left: Vec<String> = cache.images().into_iter().map(|i| i.template_id).collect();
            assert!(
                left.contains(&"t1".to_owned()),
                "a VM stands on it: {left:?}"
            );
            assert!(!left.contains(&"t2".to_owned()) || !left.contains(&"t3".to_owned()));
        }
        // Another process filled the disk meanwhile: then the refusal is right.
        Err(error) => assert!(matches!(error, CacheError::NoRoom(_)), "{error}"),
    }
}

#[tokio::test]
async fn what_shall_go_goes_unless_it_is_needed_and_a_name_is_not_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Held::new(9, 1000);
    let cache = open(dir.path(), &fetch, &[2]);
    let twin = ImageRef {
        template_id: "twin".to_owned(),
        ..image(1)
    };
    let held = cache.ensure(&image(1), &|_| ()).await.unwrap();
    cache.ensure(&twin, &|_| ()).await.unwrap();
    cache.ensure(&image(2), &|_| ()).await.unwrap();
    let names = |cache: &Cache| {
        let images = cache.images().into_iter();
        images.map(|i| i.template_id).collect::<BTreeSet<_>>()
    };
    let all = ["t1", "t2", "twin"].map(str::to_owned);
    for (name, number) in [("t1", 0), ("t2", 0)] {
        let gone = cache.evict(name, number).unwrap();
        assert!(!gone, "{name}: pinned, or a VM stands on it");
    }
    assert!(cache.evict("t1", 7).unwrap() && cache.evict("t9", 0).unwrap());
    assert_eq!(names(&cache), all.clone().into());
    let disk = held.disk.clone();
    drop(held);
    assert!(cache.evict("t1", 0).unwrap());
    assert!(disk.exists(), "the other name needs it");
    assert_eq!(names(&cache), all[1..].iter().cloned().collect());
    let again = open(dir.path(), &fetch, &[2]);
    assert_eq!(names(&again), names(&cache), "after a restart as well");
    let news = cache.changed();
    assert!(cache.evict("twin", 0).unwrap());
    assert!(news.has_changed().unwrap());
    assert!(!disk.parent().unwrap().exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // Whoever wants it then fetches it anew.
    let before = fetch.calls();
    cache.ensure(&image(1), &|_| ()).await.unwrap();
    assert_eq!(fetch.calls(), before + 1);
    // Nobody knows what VMs stand on: nothing goes.
    let blind: Users = Arc::new(|| None);
    let cache = Cache::open(dir.path(), fetch, Reserve::Bytes(0), blind).unwrap();
    assert!(!cache.evict("t1", 0).unwrap());
    assert_eq!(cache.images().len(), 2);
}
