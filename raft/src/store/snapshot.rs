//! A snapshot as the consensus core passes it around: a file, open so that a newer one may replace
//! it while it is read. Knows no peer and no content.

use super::checkpoint::Checkpointer;
use super::fault::chain;
use crate::Member;
use crate::codec::Mark;
use crate::offline::Point;
use crate::types::{LeaderId, LogId, SnapshotMeta, Types};
use mainstay_storage::StorageError;
use mainstay_storage::snapshot::{SnapshotDir, SnapshotReader};
use openraft::storage::RaftSnapshotBuilder;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// A snapshot file. A received one was verified and is installed from its reader.
#[derive(Debug)]
pub(crate) struct SnapshotData {
    pub(crate) path: PathBuf,
    pub(crate) file: Option<File>,
    pub(crate) received: Option<SnapshotReader>,
    /// Where it is kept, if it is ours.
    pub(crate) home: Option<Arc<SnapshotDir>>,
}

impl SnapshotData {
    /// The file, verified: a damaged one would be refused by its receiver, for ever. It is discarded
    /// here, and made again when it is asked for next.
    pub(crate) async fn sound(self) -> io::Result<File> {
        let work = move || {
            let not_open = || io::Error::other("the snapshot file is not open");
            let mut file = self.file.ok_or_else(not_open)?;
            let verified = SnapshotReader::of(&self.path, file.try_clone()?);
            if let Err(error) = verified {
                if let (StorageError::Corrupt { .. }, Some(home)) = (&error, &self.home) {
                    home.discard(&self.path)
                        .map_err(|e| io::Error::other(chain(&e)))?;
                }
                return Err(io::Error::other(chain(&error)));
            }
            io::Seek::rewind(&mut file)?;
            Ok(file)
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(io::Error::other)?
    }
}

/// The id of the snapshot at a position; also its file name.
pub(crate) fn name(applied: Option<LogId>) -> String {
    match applied {
        Some(id) => format!(
            "{:016x}-{:08x}-{:016x}",
            id.index, id.leader_id.term, id.leader_id.node_id
        ),
        None => "empty".into(),
    }
}

/// A snapshot as the core holds it.
pub(crate) type Snapshot = openraft::storage::Snapshot<LeaderId, u64, Member, SnapshotData>;

/// The current snapshot file, opened. A newer one may replace it between look and open; then the
/// newer one is taken.
pub(crate) fn open_current(snapshots: &Arc<SnapshotDir>) -> io::Result<Option<Snapshot>> {
    loop {
        let current = match snapshots.current() {
            Ok(current) => current,
            Err(StorageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                continue;
            }
            Err(e) => return Err(io::Error::other(chain(&e))),
        };
        let Some((path, meta)) = current else {
            return Ok(None);
        };
        let file = match File::open(&path) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let mark = Mark::decode(&meta)?;
        return Ok(Some(Snapshot {
            meta: SnapshotMeta {
                last_log_id: mark.applied,
                last_membership: mark.membership,
            },
            snapshot: SnapshotData {
                path,
                file,
                received: None,
                home: Some(snapshots.clone()),
            },
        }));
    }
}

/// A snapshot for whoever asks from outside the group: an open file that stays readable when a newer one
/// takes its place.
#[derive(Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    file: File,
    /// What it stands for.
    pub point: Point,
}

impl SnapshotFile {
    /// The current one.
    pub(crate) fn current(snapshots: &Arc<SnapshotDir>) -> io::Result<Self> {
        let gone = || io::Error::other("the snapshot just made is gone");
        let Snapshot { meta, snapshot } = open_current(snapshots)?.ok_or_else(gone)?;
        let mark = Mark {
            applied: meta.last_log_id,
            membership: meta.last_membership,
        };
        Ok(Self {
            path: snapshot.path,
            file: snapshot.file.ok_or_else(gone)?,
            point: Point::of(&mark),
        })
    }

    /// Verify all of it (blocks), then read it.
    pub fn read(self) -> mainstay_storage::Result<SnapshotReader> {
        SnapshotReader::of(&self.path, self.file)
    }
}

/// Asks the checkpoint thread for a snapshot; never blocks applying.
pub(crate) struct Builder {
    pub(crate) checkpointer: Arc<Checkpointer>,
    pub(crate) snapshots: Arc<SnapshotDir>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let meta = self.checkpointer.snapshot().await?;
        tracing::info!(index = meta.last_log_id.map(|id| id.index), "snapshot made");
        let snapshots = self.snapshots.clone();
        let current = tokio::task::spawn_blocking(move || open_current(&snapshots))
            .await
            .map_err(io::Error::other)??;
        let mut current =
            current.ok_or_else(|| io::Error::other("the snapshot just made is gone"))?;
        // A snapshot installed meanwhile may have replaced the file; what was asked for is this one.
        current.meta = meta;
        Ok(current)
    }
}
