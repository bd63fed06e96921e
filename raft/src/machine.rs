//! What committed bytes are applied to, seen from consensus: bytes in, bytes out, batches of them.

use bytes::Bytes;
pub use mainstay_storage::engine::Change;

/// The machine cannot go on (an entry it cannot decode, a broken invariant): the member stops.
#[derive(Debug, thiserror::Error)]
#[error("state machine stopped: {0}")]
pub struct Fault(pub String);

/// Entries of a whole state, as they are read.
pub type Entries<'a> = dyn Iterator<Item = Result<(Vec<u8>, Vec<u8>), Fault>> + 'a;

/// A deterministic state machine. Calls come one at a time, in log order.
pub trait Machine: Send + Sync + 'static {
    /// Refuse a command that [`apply`](Self::apply) could not read, in words, before it is in the
    /// log: there, it stops every member for good.
    fn check(&self, command: &Bytes) -> Result<(), String> {
        let _ = command;
        Ok(())
    }
    /// Apply committed commands in order; one answer each.
    fn apply(&self, commands: Vec<Bytes>) -> Result<Vec<Bytes>, Fault>;
    /// Keys changed since the last call, with their newest values.
    fn take_changes(&self) -> Vec<Change>;
    /// Everything, in key order.
    fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)>;
    /// Replace everything by these entries, which come in key order; or, if one of them is an error,
    /// answer it and change nothing.
    fn import(&self, entries: &mut Entries<'_>) -> Result<(), Fault>;
}
