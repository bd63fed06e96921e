//! A member's side: its state, as it is after everything acknowledged before the call, as a stream.
//!
//! Memory: one entry and one piece. The state is not copied and not locked: a snapshot file is made from
//! the state store by the thread that writes it, and read back from disk.

use super::Header;
use crate::stamp;
use mainstay_raft::{Group, GroupError};
use mainstay_storage::StorageError;
use mainstay_storage::snapshot::{SnapshotEncoder, SnapshotReader};
use std::time::Duration;

/// About the bytes handed on at once.
const PIECE: usize = 256 << 10;

/// Who saves.
#[derive(Clone, Debug)]
pub struct Saver {
    /// The cluster.
    pub cluster_id: String,
    /// This member's name.
    pub name: String,
    /// Its release.
    pub release: String,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No leader in time, or this member has stopped.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The snapshot file cannot be read back.
    #[error("cannot read the snapshot just made: {0}")]
    Storage(#[from] StorageError),
    /// A bug.
    #[error("{0}")]
    Other(String),
}

/// A verified snapshot, ready to be sent.
#[derive(Debug)]
pub struct Export {
    reader: SnapshotReader,
    meta: Vec<u8>,
    /// What it says of itself.
    pub header: Header,
}

/// Take a snapshot that has everything acknowledged before the call.
pub async fn take(group: &Group, saver: &Saver, deadline: Duration) -> Result<Export, ExportError> {
    let taken = group.snapshot(deadline).await?;
    let header = Header {
        cluster_id: saver.cluster_id.clone(),
        release: saver.release.clone(),
        saved_by: saver.name.clone(),
        created_ms: stamp::now_ms(),
        ..Header::new(taken.point.clone())
    };
    let meta = header
        .encode()
        .map_err(|e| ExportError::Other(e.to_string()))?;
    let reader = tokio::task::spawn_blocking(move || taken.read())
        .await
        .map_err(|e| ExportError::Other(e.to_string()))??;
    Ok(Export {
        reader,
        meta,
        header,
    })
}

impl Export {
    /// Length of the whole in bytes.
    pub fn bytes(&self) -> u64 {
        let info = self.reader.info();
        info.bytes - info.meta.len() as u64 + self.meta.len() as u64
    }

    /// Give all of it to `sink`, piece by piece. Blocks. `Ok(false)`: `sink` wants no more.
    pub fn pour(mut self, mut sink: impl FnMut(Vec<u8>) -> bool) -> Result<bool, StorageError> {
        let mut piece = Vec::with_capacity(PIECE);
        let mut encoder = SnapshotEncoder::begin(&self.meta, &mut piece)?;
        while let Some((key, value)) = self.reader.next_entry()? {
            encoder.entry(&key, &value, &mut piece)?;
            if piece.len() >= PIECE
                && !sink(std::mem::replace(&mut piece, Vec::with_capacity(PIECE)))
            {
                return Ok(false);
            }
        }
        encoder.end(&mut piece);
        Ok(sink(piece))
    }
}
