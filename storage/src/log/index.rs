//! What the log holds now, in memory: where each entry lies, the newest entries themselves, the marks.
//! Changes here are visible at once; the writer fills in the places later. Knows no file.

use super::{LogEntry, LogState};
use bytes::Bytes;
use std::collections::VecDeque;
use std::ops::Range;

/// Where an entry's record lies. `segment` 0 = not written yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slot {
    /// Which append brought it: an index can be truncated and appended again before it is written.
    pub(super) ticket: u64,
    pub(super) segment: u64,
    pub(super) offset: u64,
    /// Length of the entry's bytes.
    pub(super) len: u32,
}

/// How to get an entry's bytes.
#[derive(Debug)]
pub(super) enum Source {
    Memory(Bytes),
    File(Slot),
}

/// Entries and marks. `slots[i]` is entry `first + i`; `cached` holds the bytes of the newest entries.
#[derive(Debug, Default)]
pub(super) struct Index {
    first: u64,
    slots: VecDeque<Slot>,
    cached: VecDeque<Bytes>,
    cached_bytes: usize,
    pub(super) purged: Option<(u64, Bytes)>,
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<Bytes>,
}

impl Index {
    pub(super) fn state(&self, disk_bytes: u64) -> LogState {
        LogState {
            first: self.first(),
            last: self.last(),
            purged: self.purged.clone(),
            vote: self.vote.clone(),
            committed: self.committed.clone(),
            disk_bytes,
        }
    }

    pub(super) fn first(&self) -> Option<u64> {
        (!self.slots.is_empty()).then_some(self.first)
    }

    pub(super) fn last(&self) -> Option<u64> {
        let len = self.slots.len() as u64;
        (len > 0).then(|| self.first + len - 1)
    }

    /// The only index that may come next; `None` = any.
    pub(super) fn next(&self) -> Option<u64> {
        match self.last() {
            Some(last) => Some(last + 1),
            None => self.purged.as_ref().map(|(index, _)| index + 1),
        }
    }

    /// Append one entry; the caller checked its index.
    pub(super) fn push(&mut self, entry: LogEntry, slot: Slot) {
        if self.slots.is_empty() {
            self.first = entry.index;
        }
        self.slots.push_back(slot);
        self.cached_bytes += entry.bytes.len();
        self.cached.push_back(entry.bytes);
    }

    /// The entry was written: remember where, unless it is gone or was replaced meanwhile.
    pub(super) fn place(&mut self, index: u64, at: Slot) {
        if let Some(slot) = self.position(index).and_then(|i| self.slots.get_mut(i))
            && slot.ticket == at.ticket
        {
            *slot = at;
        }
    }

    /// Forget bytes of the oldest cached entries that can be read from a file, down to `limit`.
    pub(super) fn evict(&mut self, limit: usize) {
        while self.cached_bytes > limit {
            let oldest = self.slots.len() - self.cached.len();
            if self.slots.get(oldest).is_none_or(|s| s.segment == 0) {
                return;
            }
            self.drop_oldest_cached();
        }
    }

    fn drop_oldest_cached(&mut self) {
        if let Some(bytes) = self.cached.pop_front() {
            self.cached_bytes -= bytes.len();
        }
    }

    pub(super) fn truncate_after(&mut self, after: Option<u64>) {
        let keep = match (after, self.first()) {
            (Some(after), Some(first)) if after >= first => {
                usize::try_from(after - first + 1).unwrap_or(usize::MAX)
            }
            _ => 0,
        };
        while self.slots.len() > keep {
            self.slots.pop_back();
            if let Some(bytes) = self.cached.pop_back() {
                self.cached_bytes -= bytes.len();
            }
        }
    }

    /// Whether a purge up to `index` would change anything.
    pub(super) fn purges(&self, index: u64) -> bool {
        self.purged
            .as_ref()
            .is_none_or(|(purged, _)| index > *purged)
    }

    /// Remove entries up to `index`; the caller checked [`Self::purges`].
    pub(super) fn purge(&mut self, index: u64, mark: Bytes) {
        while self.first().is_some_and(|first| first <= index) {
            if self.cached.len() == self.slots.len() {
                self.drop_oldest_cached();
            }
            self.slots.pop_front();
            self.first += 1;
        }
        self.purged = Some((index, mark));
    }

    /// What to read for `range`, at most about `max_bytes` (at least one entry).
    pub(super) fn plan(&self, range: Range<u64>, max_bytes: usize) -> Vec<(u64, Source)> {
        let Some(last) = self.last() else {
            return Vec::new();
        };
        let uncached = self.slots.len() - self.cached.len();
        let mut plan = Vec::new();
        let mut bytes = 0usize;
        for index in range.start.max(self.first)..range.end.min(last + 1) {
            let Some(at) = self.position(index) else {
                break;
            };
            let slot = self.slots[at];
            bytes = bytes.saturating_add(slot.len as usize);
            if !plan.is_empty() && bytes > max_bytes {
                break;
            }
            let source = match at.checked_sub(uncached) {
                Some(i) => Source::Memory(self.cached[i].clone()),
                None => Source::File(slot),
            };
            plan.push((index, source));
        }
        plan
    }

    fn position(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.first)?)
            .ok()
            .filter(|i| *i < self.slots.len())
    }
}
