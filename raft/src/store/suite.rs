//! The consensus library's conformance suite on our stores, over memory and over files.

use super::checkpoint::{Checkpointer, Parts};
use super::fault::FaultCell;
use super::log::LogStore;
use super::machine::StateMachine;
use crate::machine::{Change, Entries, Fault, Machine};
use crate::types::Types;
use bytes::Bytes;
use mainstay_storage::engine::{Engine, MemoryEngine, SledEngine};
use mainstay_storage::log::{Log, MemoryLog, Wal};
use mainstay_storage::snapshot::SnapshotDir;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Counts commands; state in one key.
#[derive(Default)]
struct Counter(parking_lot::Mutex<(u64, bool)>);

impl Machine for Counter {
    fn apply(&self, commands: Vec<Bytes>) -> Result<Vec<Bytes>, Fault> {
        let mut state = self.0.lock();
        state.0 += commands.len() as u64;
        state.1 = true;
        Ok(commands)
    }
    fn take_changes(&self) -> Vec<Change> {
        let mut state = self.0.lock();
        let changed = std::mem::take(&mut state.1);
        let value = state.0.to_le_bytes().to_vec();
        changed
            .then(|| (b"count".to_vec(), Some(value)))
            .into_iter()
            .collect()
    }
    fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        vec![(b"count".to_vec(), self.0.lock().0.to_le_bytes().to_vec())]
    }
    fn import(&self, entries: &mut Entries<'_>) -> Result<(), Fault> {
        let entries = entries.collect::<Result<Vec<_>, _>>()?;
        let value = entries.first().map(|(_, v)| v.as_slice().try_into());
        let count = value.transpose().map_err(|_| Fault("count".into()))?;
        self.0.lock().0 = count.map_or(0, u64::from_le_bytes);
        Ok(())
    }
}

struct Builder {
    files: bool,
}

/// Keeps what a store needs until its test is over.
struct Keep {
    checkpointer: Arc<Checkpointer>,
    _dir: TempDir,
}

impl Drop for Keep {
    fn drop(&mut self) {
        self.checkpointer.stop(false);
    }
}

impl StoreBuilder<Types, LogStore, StateMachine, Keep> for Builder {
    async fn build(&self) -> Result<(Keep, LogStore, StateMachine), StorageError<Types>> {
        let dir = tempfile::tempdir().unwrap();
        let (log, engine): (Arc<dyn Log>, Arc<dyn Engine>) = if self.files {
            let wal = Wal::open(&dir.path().join("log")).unwrap();
            (
                Arc::new(wal),
                Arc::new(SledEngine::open(&dir.path().join("state")).unwrap()),
            )
        } else {
            (Arc::new(MemoryLog::new()), Arc::new(MemoryEngine::new()))
        };
        let fault = FaultCell::new();
        let log = LogStore::open(log, fault.clone()).unwrap();
        let snapshots = Arc::new(SnapshotDir::open(&dir.path().join("snapshots")).unwrap());
        let machine = Arc::new(Counter::default());
        let checkpointer = Checkpointer::start(Parts {
            machine: machine.clone(),
            engine,
            snapshots: snapshots.clone(),
            log: log.progress(),
            fault: fault.clone(),
            interval: Duration::from_millis(50),
        })
        .unwrap();
        let sm = StateMachine::new(machine, checkpointer.clone(), snapshots, fault);
        Ok((
            Keep {
                checkpointer,
                _dir: dir,
            },
            log,
            sm,
        ))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_in_memory_conform() {
    Suite::test_all(Builder { files: false }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_in_files_conform() {
    Suite::test_all(Builder { files: true }).await.unwrap();
}
