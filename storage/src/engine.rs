//! The durable copy of the applied state: keys and values, written behind by small checkpoints.
//!
//! A checkpoint is one atomic batch that carries the changed keys *and* the mark (applied index,
//! membership), so that a crash finds both or neither.

mod durable;
mod layout;
mod memory;
mod overlay;
mod sled;

pub use self::sled::SledEngine;
pub use memory::MemoryEngine;

use crate::Result;
use std::sync::Arc;

/// A key and its new value; `None` = removed.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// All that an engine holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The mark of the last checkpoint.
    pub mark: Option<Vec<u8>>,
    /// Every key and value, in key order.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Entries as they are read, in key order; an error is the last item.
pub type Entries<'a> = Box<dyn Iterator<Item = Result<(Vec<u8>, Vec<u8>)>> + Send + 'a>;

/// A durable key-value store. Implementations: `SledEngine`, `MemoryEngine`. Calls block; a failed
/// call is final (the member must stop).
pub trait Engine: Send + Sync + 'static {
    /// The mark, and every entry one by one, as they are at this call: checkpoints may go on meanwhile.
    /// A replacement ends the reading with an error. Memory: what is changed before it was read. Damage
    /// may show only at the end: nothing counts before the last was read.
    fn read(&self) -> Result<(Option<Vec<u8>>, Entries<'_>)>;
    /// The same for another thread.
    fn view(self: Arc<Self>) -> Result<(Option<Vec<u8>>, Entries<'static>)>;
    /// Read everything at once.
    fn load(&self) -> Result<Loaded> {
        let (mark, entries) = self.read()?;
        let entries = entries.collect::<Result<_>>()?;
        Ok(Loaded { mark, entries })
    }
    /// Apply `changes` and set the mark, atomically; durable on return. Values may be of any size.
    fn checkpoint(&self, changes: &[Change], mark: &[u8]) -> Result<()>;
    /// Replace everything (a snapshot was installed), atomically; durable on return. Keys must ascend
    /// (refused otherwise as [`crate::StorageError::Misuse`], with nothing changed).
    fn replace(
        &self,
        entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
        mark: &[u8],
    ) -> Result<()>;
    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;
}
