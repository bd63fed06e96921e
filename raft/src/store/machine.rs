//! The state machine as the consensus core sees it: committed entries in batches to the
//! [`Machine`], what they changed to the checkpointer. Knows no disk.

use super::checkpoint::{Checkpointer, Install};
use super::digest;
use super::fault::FaultCell;
use super::snapshot::{Builder, Snapshot, SnapshotData, name, open_current};
use crate::machine::Machine;
use crate::types::{Answer, Command, Entry, LogId, Payload, SnapshotMeta, StoredMembership, Types};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use mainstay_storage::snapshot::{SnapshotDir, SnapshotReader};
use openraft::OptionalSend;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use std::io;
use std::sync::Arc;

/// At most this many entries are applied before their changes are handed on and answers sent.
const BATCH: usize = 512;

/// See the module.
pub(crate) struct StateMachine {
    machine: Arc<dyn Machine>,
    checkpointer: Arc<Checkpointer>,
    snapshots: Arc<SnapshotDir>,
    fault: FaultCell,
}

#[derive(Default)]
struct Batch {
    commands: Vec<Bytes>,
    /// In log order; `true` for the entries that carry a command.
    waiting: Vec<(bool, Option<ApplyResponder<Types>>)>,
    last: Option<LogId>,
    membership: Option<StoredMembership>,
}

impl Batch {
    /// Is it as long as it may get? Also where members compare their states: all must stop there.
    fn ends(&self) -> bool {
        let shared = |id: LogId| id.index.is_multiple_of(digest::EVERY);
        self.waiting.len() >= BATCH || self.last.is_some_and(shared)
    }

    fn push(&mut self, entry: Entry, responder: Option<ApplyResponder<Types>>) {
        self.last = Some(entry.log_id);
        let is_command = match entry.payload {
            Payload::Blank => false,
            Payload::Normal(Command(bytes)) => {
                self.commands.push(bytes);
                true
            }
            Payload::Membership(m) => {
                self.membership = Some(StoredMembership::new(Some(entry.log_id), m));
                false
            }
        };
        self.waiting.push((is_command, responder));
    }
}

impl StateMachine {
    pub(crate) fn new(
        machine: Arc<dyn Machine>,
        checkpointer: Arc<Checkpointer>,
        snapshots: Arc<SnapshotDir>,
        fault: FaultCell,
    ) -> Self {
        Self {
            machine,
            checkpointer,
            snapshots,
            fault,
        }
    }

    fn run(&self, batch: Batch) -> io::Result<()> {
        let Some(last) = batch.last else {
            return Ok(());
        };
        let asked = batch.commands.len();
        let answers = if asked == 0 {
            Vec::new()
        } else {
            self.apply_commands(batch.commands, last)?
        };
        let changes = self.machine.take_changes();
        self.checkpointer.record(changes, last, batch.membership);
        let mut answers = answers.into_iter();
        for (is_command, responder) in batch.waiting {
            let answer = if is_command {
                answers.next().unwrap_or_default()
            } else {
                Bytes::new()
            };
            if let Some(responder) = responder {
                responder.send(Answer(answer));
            }
        }
        Ok(())
    }

    fn apply_commands(&self, commands: Vec<Bytes>, last: LogId) -> io::Result<Vec<Bytes>> {
        let asked = commands.len();
        let outcome = self
            .machine
            .apply(commands)
            .map_err(|e| e.0)
            .and_then(|answers| {
                if answers.len() == asked {
                    return Ok(answers);
                }
                Err(format!("{} answers to {asked} commands", answers.len()))
            });
        outcome.map_err(|why| {
            let why = format!("applying up to entry {}: {why}", last.index);
            self.fault.raise(why.clone());
            io::Error::other(why)
        })
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let mark = self.checkpointer.mark();
        Ok((mark.applied, mark.membership))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut batch = Batch::default();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            batch.push(entry, responder);
            if batch.ends() {
                self.run(std::mem::take(&mut batch))?;
                self.checkpointer.relief(&self.fault).await?;
            }
        }
        self.run(batch)?;
        self.checkpointer.relief(&self.fault).await
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            checkpointer: self.checkpointer.clone(),
            snapshots: self.snapshots.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> io::Result<()> {
        let install = verified(snapshot, self.snapshots.clone(), meta.last_log_id).await?;
        let found = crate::codec::Mark::decode(&install.reader.info().meta)?;
        if found.applied != meta.last_log_id || found.membership != meta.last_membership {
            return Err(io::Error::other(
                "the snapshot file is not the announced one",
            ));
        }
        self.checkpointer.install(install).await?;
        tracing::info!(
            index = meta.last_log_id.map(|id| id.index),
            "snapshot installed"
        );
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        if self.snapshots.lacking() {
            // A damaged one was discarded; the core, which counts on one, would stop without.
            self.checkpointer.snapshot().await?;
        }
        let snapshots = self.snapshots.clone();
        tokio::task::spawn_blocking(move || open_current(&snapshots))
            .await
            .map_err(io::Error::other)?
    }
}

/// A snapshot to install: already verified when it was received, else verified now.
/// Our own current file (a crash cut an install short) stays where it is; another one is copied in.
async fn verified(
    mut snapshot: SnapshotData,
    snapshots: Arc<SnapshotDir>,
    applied: Option<LogId>,
) -> io::Result<Install> {
    if let Some(reader) = snapshot.received.take() {
        return Ok(Install {
            reader,
            received: true,
        });
    }
    let work = move || {
        let fail = |e: &dyn std::error::Error| io::Error::other(super::fault::chain(e));
        let current = snapshots.current().map_err(|e| fail(&e))?;
        let ours = current.is_some_and(|(path, _)| path == snapshot.path);
        let path = if ours {
            snapshot.path
        } else {
            let copy = snapshots.incoming(&name(applied));
            std::fs::copy(&snapshot.path, &copy)?;
            copy
        };
        let reader = SnapshotReader::open(&path).map_err(|e| fail(&e))?;
        Ok(Install {
            reader,
            received: !ours,
        })
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}
