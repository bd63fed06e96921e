//! Write-behind of the applied state: changed keys collect in memory and go to the engine in small
//! paced checkpoints, on one blocking thread (`worker`) that also installs snapshots, and has them made
//! beside it (`export`). Knows no peer.
//!
//! # Why a crash between any two lines recovers
//!
//! Three things are on disk: the log `L` (with its purge mark `P`), the engine `E` (state and mark
//! `E.mark`, one atomic batch), the newest snapshot file `S`. The thread keeps, at every instant,
//!
//! ```text
//!   P <= S <= E.mark <= last durable entry of L          (or S is being installed: P <= E.mark < S)
//! ```
//!
//! * *Checkpoint*: waits until the log is durable up to what it captured, then one atomic batch.
//!   A crash before it leaves the older mark; everything after that mark is in `L` (`P <= E.mark`)
//!   and is applied again from there, with the same outcome (the machine is deterministic).
//! * *Snapshot*: first a checkpoint, then a copy of what the engine holds at that moment. Checkpoints go
//!   on meanwhile, so `S <= E.mark`; the file appears by rename. Only when it is durable does the core
//!   purge (`P <= S`). A crash in between leaves more log than needed.
//! * *Install*: the received file was verified before it came here. The machine takes it (memory
//!   only); the file becomes `S` by rename; the engine is replaced in one atomic step; only then
//!   does the core purge. A crash before the rename: nothing happened. Between rename and replace:
//!   `S > E.mark`, and at start the core installs the current snapshot again. After replace, before
//!   purge: the log ends before the mark, and at start the core closes the hole by purging to it. A
//!   snapshot that is being made is broken off first: it would be the newest file with older content.
//! * *Failure*: the first error of any of these stops the member; nothing is retried on a disk
//!   that lied once.

use super::digest::{At, Digests};
use super::fault::{FaultCell, chain};
use super::log::LogProgress;
use super::worker::{Worker, import};
use crate::codec::Mark;
use crate::machine::{Change, Machine};
use crate::types::{LogId, SnapshotMeta, StoredMembership};
use mainstay_storage::engine::Engine;
use mainstay_storage::snapshot::{SnapshotDir, SnapshotReader};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};

/// A checkpoint starts at once when this much has changed: big ones stall the disk for everyone.
const NUDGE_BYTES: usize = 1 << 20;
/// Applying waits when this much is not yet durable.
const PENDING_MAX: usize = 64 << 20;

/// State changed since the last checkpoint, and the position it belongs to.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) keys: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    pub(super) bytes: usize,
    pub(super) mark: Mark,
    pub(super) dirty: bool,
}

impl Changed {
    fn merge(&mut self, changes: Vec<Change>) {
        for (key, value) in changes {
            let key_len = key.len();
            self.bytes += key_len + value.as_ref().map_or(0, Vec::len);
            if let Some(old) = self.keys.insert(key, value) {
                self.bytes -= key_len + old.map_or(0, |v| v.len());
            }
        }
    }
}

pub(super) type Reply<T> = oneshot::Sender<io::Result<T>>;

/// What the thread is told to do.
pub(super) enum Order {
    Nudge,
    /// Answered when there is one; with a way to say that its making has ended.
    Snapshot(Reply<SnapshotMeta>, Sender<Order>),
    /// A snapshot has been made, or could not.
    Exported(Sender<Order>),
    Install(Box<Install>, Reply<()>),
    /// Stop; with a last checkpoint or, as in a crash, without.
    Stop {
        checkpoint: bool,
    },
}

/// A verified snapshot on its way in.
pub(crate) struct Install {
    pub(crate) reader: SnapshotReader,
    /// It was received; else it is the current one already (a crash cut an install short).
    pub(crate) received: bool,
}

/// Shared between the apply path and the thread.
pub(crate) struct Checkpointer {
    changed: Arc<Mutex<Changed>>,
    relieved: Arc<Notify>,
    applied: watch::Sender<u64>,
    digests: Arc<Mutex<Digests>>,
    /// Index of the mark that the engine holds.
    durable: Arc<AtomicU64>,
    orders: Mutex<Sender<Order>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread works with.
pub(crate) struct Parts {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) snapshots: Arc<SnapshotDir>,
    pub(crate) log: Arc<LogProgress>,
    pub(crate) fault: FaultCell,
    pub(crate) interval: Duration,
}

impl Checkpointer {
    /// Load the engine into the machine and start the thread.
    pub(crate) fn start(parts: Parts) -> io::Result<Arc<Self>> {
        let fail = |e: &dyn std::error::Error| io::Error::other(chain(e));
        let (found, entries) = parts.engine.read().map_err(|e| fail(&e))?;
        let mark = found.as_deref().map(Mark::decode).transpose()?;
        let index = mark
            .as_ref()
            .and_then(|m| m.applied)
            .map_or(0, |id| id.index);
        let mut digests = Digests::default();
        if mark.is_some() {
            digests = import(&*parts.machine, entries, index).map_err(|e| fail(&e))?;
        } else {
            drop(entries);
        }
        let mark = mark.unwrap_or_default();
        let applied = watch::Sender::new(index);
        let durable = Arc::new(AtomicU64::new(index));
        let digests = Arc::new(Mutex::new(digests));
        let changed = Arc::new(Mutex::new(Changed {
            mark,
            ..Changed::default()
        }));
        let relieved = Arc::new(Notify::new());
        let (tx, rx) = channel();
        let worker = Worker {
            parts,
            changed: changed.clone(),
            relieved: relieved.clone(),
            applied: applied.clone(),
            digests: digests.clone(),
            durable: durable.clone(),
            export: None,
            waiting: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(move || worker.run(&rx))?;
        Ok(Arc::new(Self {
            changed,
            relieved,
            applied,
            digests,
            durable,
            orders: Mutex::new(tx),
            thread: Mutex::new(Some(thread)),
        }))
    }

    pub(crate) fn mark(&self) -> Mark {
        self.changed.lock().mark.clone()
    }

    /// What was applied up to here is in the durable log and in the engine, whatever happens.
    pub(crate) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Follows the applied index.
    pub(crate) fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    /// Digests of the state, now and at positions that other members remember as well.
    pub(crate) fn digests(&self) -> Vec<At> {
        self.digests.lock().all()
    }

    /// The newest of them.
    pub(crate) fn newest_digest(&self) -> At {
        self.digests.lock().newest()
    }

    /// Record what a batch changed and how far it went.
    pub(crate) fn record(
        &self,
        changes: Vec<Change>,
        applied: LogId,
        membership: Option<StoredMembership>,
    ) {
        self.digests.lock().follow(&changes, applied.index);
        let nudge = {
            let mut changed = self.changed.lock();
            let before = changed.bytes;
            changed.merge(changes);
            changed.mark.applied = Some(applied);
            if let Some(m) = membership {
                changed.mark.membership = m;
            }
            changed.dirty = true;
            before < NUDGE_BYTES && changed.bytes >= NUDGE_BYTES
        };
        if nudge {
            self.order(Order::Nudge);
        }
        self.applied.send_replace(applied.index);
    }

    /// Wait while too much is not yet durable.
    pub(crate) async fn relief(&self, fault: &FaultCell) -> io::Result<()> {
        loop {
            let notified = self.relieved.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if let Some(why) = fault.get() {
                return Err(io::Error::other(why));
            }
            if self.changed.lock().bytes < PENDING_MAX {
                return Ok(());
            }
            notified.await;
        }
    }

    /// Make a snapshot of the state as it is now.
    pub(crate) async fn snapshot(&self) -> io::Result<SnapshotMeta> {
        let (tx, rx) = oneshot::channel();
        let orders = self.orders.lock().clone();
        self.order(Order::Snapshot(tx, orders));
        rx.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Replace the state by a verified snapshot.
    pub(crate) async fn install(&self, install: Install) -> io::Result<()> {
        let (tx, rx) = oneshot::channel();
        self.order(Order::Install(Box::new(install), tx));
        rx.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Stop the thread and wait for it (blocks).
    pub(crate) fn stop(&self, checkpoint: bool) {
        self.order(Order::Stop { checkpoint });
        if let Some(thread) = self.thread.lock().take() {
            // A panic in the thread was recorded as a fault already.
            let _ = thread.join();
        }
    }

    fn order(&self, order: Order) {
        // A send fails only after the thread ended; a caller that waits then sees its reply dropped.
        let _ = self.orders.lock().send(order);
    }
}

fn stopped() -> io::Error {
    io::Error::other("the checkpoint thread has stopped")
}
