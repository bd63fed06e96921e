//! The replicated state as consensus sees it: bytes in, bytes out. Decodes, applies, encodes; knows
//! nothing of who proposed or of disks.

use bytes::Bytes;
use mainstay_model::{State, codec};
use mainstay_raft::machine::{Change, Fault};
use parking_lot::RwLock;
use std::sync::Arc;

/// [`mainstay_raft::Machine`] over the shared state that every read looks at.
pub struct ModelMachine {
    state: Arc<RwLock<State>>,
}

impl ModelMachine {
    /// Over the state that [`crate::app::App`] reads.
    pub fn new(state: Arc<RwLock<State>>) -> Self {
        Self { state }
    }
}

impl mainstay_raft::Machine for ModelMachine {
    fn apply(&self, commands: Vec<Bytes>) -> Result<Vec<Bytes>, Fault> {
        // Decoded before the lock is taken: readers wait only for the applying itself.
        let envelopes = commands
            .iter()
            .map(|bytes| codec::decode_envelope(bytes))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| Fault(format!("cannot decode a committed command: {e}")))?;
        let mut state = self.state.write();
        let outcomes: Vec<_> = envelopes
            .iter()
            .map(|envelope| state.apply(envelope))
            .collect();
        drop(state);
        Ok(outcomes
            .iter()
            .map(|outcome| Bytes::from(codec::encode_outcome(outcome)))
            .collect())
    }

    fn take_changes(&self) -> Vec<Change> {
        self.state.write().take_changes()
    }

    fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.state.read().export()
    }

    fn import(&self, entries: Vec<(Vec<u8>, Vec<u8>)>) -> Result<(), Fault> {
        let state = State::import(entries.into_iter())
            .map_err(|e| Fault(format!("cannot read the stored state: {e}")))?;
        *self.state.write() = state;
        Ok(())
    }
}
