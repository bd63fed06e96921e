//! A state store in memory: the second implementation, for tests and in-process clusters.

use super::{Change, Engine, Entries};
use crate::{Result, StorageError};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Holds everything in memory.
#[derive(Debug, Default)]
pub struct MemoryEngine {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    mark: Option<Vec<u8>>,
    entries: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl MemoryEngine {
    /// An empty engine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn copy<'a>(&self) -> (Option<Vec<u8>>, Entries<'a>) {
        let inner = self.inner.lock();
        let entries = inner.entries.clone().into_iter().map(Ok);
        (inner.mark.clone(), Box::new(entries))
    }
}

impl Engine for MemoryEngine {
    fn read(&self) -> Result<(Option<Vec<u8>>, Entries<'_>)> {
        Ok(self.copy())
    }

    fn view(self: Arc<Self>) -> Result<(Option<Vec<u8>>, Entries<'static>)> {
        Ok(self.copy())
    }

    fn checkpoint(&self, changes: &[Change], mark: &[u8]) -> Result<()> {
        let mut inner = self.inner.lock();
        for (key, value) in changes {
            match value {
                Some(value) => inner.entries.insert(key.clone(), value.clone()),
                None => inner.entries.remove(key),
            };
        }
        inner.mark = Some(mark.to_vec());
        Ok(())
    }

    fn replace(
        &self,
        entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
        mark: &[u8],
    ) -> Result<()> {
        let entries: Vec<_> = entries.collect();
        if entries.windows(2).any(|w| w[0].0 >= w[1].0) {
            return Err(StorageError::Misuse("keys must ascend".into()));
        }
        let entries = entries.into_iter().collect();
        *self.inner.lock() = Inner {
            mark: Some(mark.to_vec()),
            entries,
        };
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        0
    }
}
