//! The replicated state as consensus sees it: bytes in, bytes out. Decodes, applies, encodes; knows
//! nothing of who proposed or of disks.

use bytes::Bytes;
use mainstay_model::feature::SUPPORTED;
use mainstay_model::{State, codec};
use mainstay_raft::machine::{Change, Entries, Fault};
use mainstay_storage::UntilError;
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
    fn check(&self, command: &Bytes) -> Result<(), String> {
        let envelope = codec::decode_envelope(command)
            .map_err(|e| format!("a command that this release cannot read: {e}"))?;
        let needs = envelope.command.needs();
        if needs > 0 && needs > self.state.read().features {
            return Err(format!(
                "not yet: this needs feature level {needs}, which is switched on once every member runs a release that supports it"
            ));
        }
        Ok(())
    }

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
        supported(&state)?;
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

    fn import(&self, entries: &mut Entries<'_>) -> Result<(), Fault> {
        let mut entries = UntilError::new(entries);
        let imported = State::import(&mut entries);
        entries.outcome()?;
        let state = imported.map_err(|e| Fault(format!("cannot read the stored state: {e}")))?;
        supported(&state)?;
        let mut state = state;
        let mut present = self.state.write();
        state.succeed(&present);
        *present = state;
        Ok(())
    }
}

/// A member that does not know what the others do would hold another state than they.
pub(crate) fn supported(state: &State) -> Result<(), Fault> {
    if state.features <= SUPPORTED {
        return Ok(());
    }
    Err(Fault(format!(
        "the cluster uses features of level {}, this release supports {SUPPORTED}: start the release that the other members run",
        state.features
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_raft::{GroupConfig, Machine};

    #[test]
    fn what_cannot_be_decoded_is_refused_before_it_is_in_the_log() {
        let machine = ModelMachine::new(Arc::default());
        let refused = machine.check(&Bytes::from_static(b"no command"));
        assert!(refused.is_err_and(|why| why.contains("cannot read")));
        let envelope = mainstay_model::Envelope {
            id: crate::stamp::command_id(),
            stamp_ms: 1,
            command: mainstay_model::Command::DeleteGroup {
                id: mainstay_model::GroupId::from("g"),
            },
        };
        let bytes = Bytes::from(codec::encode_envelope(&envelope));
        assert_eq!(machine.check(&bytes), Ok(()));
        // It comes from the network: every cut of it is refused as well.
        for cut in 0..bytes.len() {
            assert!(machine.check(&bytes.slice(..cut)).is_err(), "{cut}");
        }
    }

    /// See `mainstay_raft::group::propose`: those in flight between the look and the append fit too.
    #[test]
    fn retries_end_before_commands_are_forgotten() {
        let retry = GroupConfig::new(1, "c").retry_entries;
        let recent = mainstay_model::limits::RECENT_COMMANDS as u64;
        assert!(2 * retry <= recent, "{retry} entries, {recent} commands");
    }
}
