//! A snapshot file made on a thread of its own, from the engine as it was at one checkpoint, while later
//! checkpoints go on. Takes its time: nobody waits for it who could notice, and whoever writes and
//! reads meanwhile could.

use super::checkpoint::Reply;
use super::fault::chain;
use crate::codec::Mark;
use crate::types::SnapshotMeta;
use mainstay_storage::StorageError;
use mainstay_storage::engine::Engine;
use mainstay_storage::snapshot::SnapshotDir;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes between two rests.
const PIECE: usize = 256 << 10;
/// It rests as long as it has worked, at most so long.
const REST_MAX: Duration = Duration::from_millis(20);

/// One that is being made.
pub(super) struct Export {
    mark: Mark,
    askers: Vec<Reply<SnapshotMeta>>,
    cancel: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

impl Export {
    /// Begin with what the engine holds now, which must be `mark`; `tell` is called on its thread.
    pub(super) fn begin(
        mark: Mark,
        engine: &Arc<dyn Engine>,
        snapshots: &Arc<SnapshotDir>,
        askers: Vec<Reply<SnapshotMeta>>,
        tell: impl FnOnce() + Send + 'static,
    ) -> Result<Self, String> {
        let encoded = mark.encode();
        let (held, entries) = engine.clone().view().map_err(|e| failed(&e))?;
        if held.as_deref() != Some(&encoded[..]) && mark != Mark::default() {
            return Err("snapshot: the engine does not hold the mark just written".into());
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(AtomicBool::new(false));
        let (snapshots, cancelled, over) = (snapshots.clone(), cancel.clone(), ended.clone());
        let name = super::snapshot::name(mark.applied);
        let work = move || {
            let write = || write(&snapshots, &name, &encoded, entries, &cancelled);
            let outcome = catch_unwind(AssertUnwindSafe(write));
            over.store(true, Ordering::Release);
            tell();
            let panicked = |_| Err("the thread that makes snapshots panicked".to_owned());
            outcome.map_or_else(panicked, |written| written.map_err(|e| failed(&e)))
        };
        let thread = std::thread::Builder::new()
            .name("snapshot".into())
            .spawn(work)
            .map_err(|e| failed(&e))?;
        Ok(Self {
            mark,
            askers,
            cancel,
            ended,
            thread,
        })
    }

    /// Nothing is left to be waited for.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Wait for its end, and tell those who asked.
    pub(super) fn finish(self) -> Result<(), String> {
        let outcome = join(self.thread);
        for asker in self.askers {
            let told = outcome.clone().map(|()| meta(&self.mark));
            // The asker may have gone; the work is done all the same.
            let _ = asker.send(told.map_err(std::io::Error::other));
        }
        outcome
    }

    /// Break it off, leaving nothing, and wait for its end; those who still wait for one.
    pub(super) fn cancel(self) -> Result<Vec<Reply<SnapshotMeta>>, String> {
        self.cancel.store(true, Ordering::Relaxed);
        join(self.thread).map(|()| self.askers)
    }
}

/// What the core is told of a snapshot.
pub(super) fn meta(mark: &Mark) -> SnapshotMeta {
    SnapshotMeta {
        last_log_id: mark.applied,
        last_membership: mark.membership.clone(),
    }
}

fn failed(error: &dyn std::error::Error) -> String {
    format!("snapshot: {}", chain(error))
}

fn join(thread: JoinHandle<Result<(), String>>) -> Result<(), String> {
    let panicked = |_| Err("the thread that makes snapshots panicked at its end".to_owned());
    thread.join().unwrap_or_else(panicked)
}

fn write(
    snapshots: &SnapshotDir,
    name: &str,
    mark: &[u8],
    entries: impl Iterator<Item = mainstay_storage::Result<(Vec<u8>, Vec<u8>)>>,
    cancelled: &AtomicBool,
) -> Result<(), StorageError> {
    let mut writer = snapshots.begin(name, mark)?;
    let (mut began, mut bytes) = (Instant::now(), 0);
    for entry in entries {
        let (key, value) = entry?;
        writer.put(&key, &value)?;
        bytes += key.len() + value.len();
        if bytes >= PIECE {
            if cancelled.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(began.elapsed().min(REST_MAX));
            (began, bytes) = (Instant::now(), 0);
        }
    }
    if !cancelled.load(Ordering::Relaxed) {
        writer.finish()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::LogIdV1;
    use crate::machine::{Change, Entries, Fault, Machine};
    use crate::store::checkpoint::{Checkpointer, Parts};
    use crate::store::fault::FaultCell;
    use crate::store::log::LogStore;
    use crate::types::LogId;
    use bytes::Bytes;
    use mainstay_storage::disk::{Disk, DiskFile, RealDisk};
    use mainstay_storage::engine::MemoryEngine;
    use mainstay_storage::log::MemoryLog;
    use parking_lot::{Condvar, Mutex};
    use std::io;
    use std::path::Path;

    const BOUND: Duration = Duration::from_secs(20);

    struct Nothing;

    impl Machine for Nothing {
        fn apply(&self, commands: Vec<Bytes>) -> Result<Vec<Bytes>, Fault> {
            Ok(commands)
        }
        fn take_changes(&self) -> Vec<Change> {
            Vec::new()
        }
        fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
            Vec::new()
        }
        fn import(&self, _: &mut Entries<'_>) -> Result<(), Fault> {
            Ok(())
        }
    }

    /// Creates no more files than it may; the next one waits.
    #[derive(Clone, Debug, Default)]
    struct Gate(Arc<(Mutex<(usize, usize)>, Condvar)>);

    impl Gate {
        fn allow(&self, files: usize) {
            self.0.0.lock().1 = files;
            self.0.1.notify_all();
        }

        /// Until so many have been asked for.
        fn asked(&self, files: usize) {
            let mut now = self.0.0.lock();
            while now.0 < files {
                let late = self.0.1.wait_for(&mut now, BOUND).timed_out();
                assert!(!late, "{now:?}");
            }
        }
    }

    impl Disk for Gate {
        fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
            let mut now = self.0.0.lock();
            now.0 += 1;
            self.0.1.notify_all();
            while now.1 < now.0 {
                let late = self.0.1.wait_for(&mut now, BOUND).timed_out();
                assert!(!late, "{now:?}");
            }
            RealDisk.create(path)
        }
        fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
            RealDisk.open(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            RealDisk.rename(from, to)
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            RealDisk.remove(path)
        }
        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            RealDisk.sync_dir(dir)
        }
    }

    fn at(index: u64) -> LogId {
        LogIdV1 {
            term: 1,
            leader: 1,
            index,
        }
        .into()
    }

    fn set(value: &str) -> Vec<Change> {
        vec![(b"k".to_vec(), Some(value.into()))]
    }

    fn held(snapshots: &SnapshotDir) -> Vec<u8> {
        let (path, _) = snapshots.current().unwrap().unwrap();
        let content = mainstay_storage::snapshot::read(&path).unwrap();
        content.entries[0].1.clone()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
    async fn checkpoints_go_on_while_a_snapshot_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::default();
        let engine = Arc::new(MemoryEngine::new());
        let snapshots = SnapshotDir::open_on(dir.path(), Arc::new(gate.clone()));
        let snapshots = Arc::new(snapshots.unwrap());
        let fault = FaultCell::new();
        let log = LogStore::open(Arc::new(MemoryLog::new()), fault.clone()).unwrap();
        let checkpointer = Checkpointer::start(Parts {
            machine: Arc::new(Nothing),
            engine: engine.clone(),
            snapshots: snapshots.clone(),
            log: log.progress(),
            fault,
            interval: Duration::from_millis(2),
        })
        .unwrap();
        let ask = || {
            let checkpointer = checkpointer.clone();
            tokio::spawn(async move { checkpointer.snapshot().await.unwrap().last_log_id })
        };
        checkpointer.record(set("old"), at(1), None);
        let first = ask();
        tokio::task::block_in_place(|| gate.asked(1));
        checkpointer.record(set("new"), at(2), None);
        let begun = Instant::now();
        while engine.load().unwrap().entries[0].1 != b"new" {
            assert!(begun.elapsed() < BOUND, "no checkpoint meanwhile");
            tokio::task::yield_now().await;
        }
        // Whoever asks now asks for what there is now.
        let second = ask();
        gate.allow(1);
        assert_eq!(first.await.unwrap(), Some(at(1)));
        assert_eq!(held(&snapshots), b"old");
        gate.allow(2);
        assert_eq!(second.await.unwrap(), Some(at(2)));
        assert_eq!(held(&snapshots), b"new");
        checkpointer.stop(true);
    }

    #[test]
    fn one_that_is_broken_off_leaves_nothing_and_nobody_unanswered() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::default();
        let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
        let mark = Mark {
            applied: Some(at(1)),
            ..Mark::default()
        };
        engine.checkpoint(&set("v"), &mark.encode()).unwrap();
        let snapshots = SnapshotDir::open_on(dir.path(), Arc::new(gate.clone()));
        let snapshots = Arc::new(snapshots.unwrap());
        let (asker, _answer) = tokio::sync::oneshot::channel();
        let export = Export::begin(mark, &engine, &snapshots, vec![asker], || {}).unwrap();
        gate.asked(1);
        let told = export.cancel.clone();
        let cancelling = std::thread::spawn(|| export.cancel());
        let begun = Instant::now();
        while !told.load(Ordering::Relaxed) {
            assert!(begun.elapsed() < BOUND);
            std::thread::yield_now();
        }
        gate.allow(1);
        assert_eq!(cancelling.join().unwrap().unwrap().len(), 1);
        assert!(snapshots.current().unwrap().is_none());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
