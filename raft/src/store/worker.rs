//! The one thread that writes checkpoints and installs snapshots. Why what it does in which order survives
//! a crash: [`checkpoint`](super::checkpoint).

use super::checkpoint::{Changed, Install, Order, Parts, Reply};
use super::digest::Digests;
use super::export::{Export, meta};
use super::fault::chain;
use crate::codec::Mark;
use crate::machine::{Change, Fault, Machine};
use crate::types::SnapshotMeta;
use mainstay_storage::UntilError;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;
use tokio::sync::{Notify, watch};

/// See [`checkpoint`](super::checkpoint).
pub(super) struct Worker {
    pub(super) parts: Parts,
    pub(super) changed: Arc<Mutex<Changed>>,
    pub(super) relieved: Arc<Notify>,
    pub(super) applied: watch::Sender<u64>,
    pub(super) digests: Arc<Mutex<Digests>>,
    pub(super) durable: Arc<AtomicU64>,
    /// The snapshot that is being made.
    pub(super) export: Option<Export>,
    /// Those who asked too late for that one.
    pub(super) waiting: Vec<Reply<SnapshotMeta>>,
}

impl Worker {
    pub(super) fn run(mut self, orders: &Receiver<Order>) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.serve(orders)));
        if outcome.is_err() {
            self.parts.fault.raise("the checkpoint thread panicked");
        }
        if let Some(export) = self.export.take() {
            // It stops with a fault, or because it was told to: there is nobody left to hear of it.
            let _ = export.cancel();
        }
        self.relieved.notify_waiters();
    }

    fn serve(&mut self, orders: &Receiver<Order>) {
        let mut due = Instant::now() + self.parts.interval;
        loop {
            let order = match orders.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(order) => order,
                Err(RecvTimeoutError::Timeout) => Order::Nudge,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let outcome = match order {
                Order::Nudge => self.checkpoint().map(drop),
                Order::Snapshot(reply, orders) => {
                    self.waiting.push(reply);
                    self.export(orders)
                }
                Order::Exported(orders) => self.exported().and_then(|()| self.export(orders)),
                Order::Install(install, reply) => {
                    // Those who waited for what is broken off here are seen to when it says its end.
                    let installed = self.cancel().and_then(|()| self.install(*install));
                    answer(installed, reply)
                }
                Order::Stop { checkpoint } => {
                    if checkpoint && let Err(e) = self.checkpoint() {
                        self.parts.fault.raise(format!("last checkpoint: {e}"));
                    }
                    return;
                }
            };
            if let Err(why) = outcome {
                self.parts.fault.raise(why);
                return;
            }
            self.relieved.notify_waiters();
            due = Instant::now() + self.parts.interval;
        }
    }

    /// Bring the engine to the applied position; the mark it now has.
    fn checkpoint(&self) -> Result<Mark, String> {
        let (keys, mark) = {
            let mut changed = self.changed.lock();
            if !changed.dirty {
                return Ok(changed.mark.clone());
            }
            changed.dirty = false;
            (std::mem::take(&mut changed.keys), changed.mark.clone())
        };
        // Read after the capture: everything captured was appended before it was applied.
        let ticket = self.parts.log.issued();
        if !self.parts.log.wait(ticket) {
            return Err("the log failed under a checkpoint".into());
        }
        let changes: Vec<Change> = keys.into_iter().collect();
        let size: usize = changes
            .iter()
            .map(|(k, v)| k.len() + v.as_ref().map_or(0, Vec::len))
            .sum();
        self.parts
            .engine
            .checkpoint(&changes, &mark.encode())
            .map_err(|e| format!("checkpoint: {}", chain(&e)))?;
        self.hold(&mark);
        // Only now: what is being written still counts against the limit.
        self.changed.lock().bytes -= size;
        Ok(mark)
    }

    /// Have a snapshot made for those who wait, unless one is being made: that one may lack what
    /// they ask for, so they wait for the next.
    fn export(&mut self, orders: Sender<Order>) -> Result<(), String> {
        if self.export.is_some() || self.waiting.is_empty() {
            return Ok(());
        }
        let mark = self.checkpoint()?;
        let current = self.parts.snapshots.current();
        let current = current.map_err(|e| format!("snapshot: {}", chain(&e)))?;
        if current.is_some_and(|(_, held)| held == mark.encode()) {
            for asker in self.waiting.drain(..) {
                // The asker may have gone.
                let _ = asker.send(Ok(meta(&mark)));
            }
            return Ok(());
        }
        let askers = std::mem::take(&mut self.waiting);
        let ended = move || {
            let again = orders.clone();
            // A send fails only after this thread ended.
            let _ = orders.send(Order::Exported(again));
        };
        let Parts {
            engine, snapshots, ..
        } = &self.parts;
        self.export = Some(Export::begin(mark, engine, snapshots, askers, ended)?);
        Ok(())
    }

    fn exported(&mut self) -> Result<(), String> {
        // Not one that was begun after that whose end this is.
        let ended = self.export.take_if(|export| export.has_ended());
        ended.map_or(Ok(()), Export::finish)
    }

    /// Break off the snapshot that is being made; those who asked for it ask for the next.
    fn cancel(&mut self) -> Result<(), String> {
        if let Some(export) = self.export.take() {
            self.waiting.extend(export.cancel()?);
        }
        Ok(())
    }

    /// The engine holds this, durably.
    fn hold(&self, mark: &Mark) {
        let index = mark.applied.map_or(0, |id| id.index);
        self.durable.fetch_max(index, Ordering::AcqRel);
    }

    fn install(&self, install: Install) -> Result<(), String> {
        let fail = |e: &dyn std::error::Error| format!("installing a snapshot: {}", chain(e));
        let Install {
            mut reader,
            received,
        } = install;
        let meta = reader.info().meta.clone();
        let mark = Mark::decode(&meta).map_err(|e| fail(&e))?;
        reader.rewind().map_err(|e| fail(&e))?;
        let index = mark.applied.map_or(0, |id| id.index);
        let digests =
            import(&*self.parts.machine, reader.entries(), index).map_err(|e| fail(&e))?;
        if received {
            let name = super::snapshot::name(mark.applied);
            self.parts
                .snapshots
                .adopt_verified(reader.path(), &name)
                .map_err(|e| fail(&e))?;
        }
        reader.rewind().map_err(|e| fail(&e))?;
        let mut entries = UntilError::new(reader.entries());
        // Replaced by a cut content, the engine must not be used again; nor is it: this member stops.
        let replaced = self.parts.engine.replace(&mut entries, &meta);
        entries.outcome().map_err(|e| fail(&e))?;
        replaced.map_err(|e| fail(&e))?;
        self.hold(&mark);
        *self.digests.lock() = digests;
        *self.changed.lock() = Changed {
            mark,
            ..Changed::default()
        };
        self.applied.send_replace(index);
        Ok(())
    }
}

/// Replace the machine's state; what that changed is not to be checkpointed. The digest of the new one.
pub(super) fn import(
    machine: &dyn Machine,
    entries: impl Iterator<Item = mainstay_storage::Result<(Vec<u8>, Vec<u8>)>>,
    applied: u64,
) -> Result<Digests, Fault> {
    let mut digests = Digests::at(applied);
    let mut entries = entries.map(|entry| {
        let (key, value) = entry.map_err(|e| Fault(chain(&e)))?;
        digests.add(&key, &value);
        Ok((key, value))
    });
    machine.import(&mut entries)?;
    drop(machine.take_changes());
    Ok(digests)
}

/// Give the outcome to whoever waits, and the failure to the caller as well.
fn answer<T>(outcome: Result<T, String>, reply: Reply<T>) -> Result<(), String> {
    let failure = outcome.as_ref().err().cloned();
    // The asker may have gone; the work is done all the same.
    let _ = reply.send(outcome.map_err(io::Error::other));
    failure.map_or(Ok(()), Err)
}
