//! A log in memory: the second implementation, for tests and in-process clusters. Shares no code with the
//! files' one on purpose: each is the other's check.

use super::{Done, Log, LogEntry, LogState, Pace};
use crate::{Result, StorageError};
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Instant;

/// Holds everything in memory; callbacks run on the caller's thread, in queue order.
#[derive(Default)]
pub struct MemoryLog {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    content: Content,
    /// What a crash would leave, while the disk is held.
    held: Option<Content>,
    held_since: Option<Instant>,
    calls: VecDeque<(Done, Result<()>)>,
    calling: bool,
    stopped: Option<String>,
}

#[derive(Clone, Default)]
struct Content {
    entries: BTreeMap<u64, Bytes>,
    purged: Option<(u64, Bytes)>,
    vote: Option<Bytes>,
    committed: Option<Bytes>,
}

impl std::fmt::Debug for MemoryLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryLog").finish_non_exhaustive()
    }
}

impl MemoryLog {
    /// An empty log.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on every change fails, as after a failed write.
    pub fn stop(&self, why: &str) {
        self.inner.lock().stopped = Some(why.to_owned());
    }

    /// A slow disk: until [`MemoryLog::release`] changes are visible but not durable, and no callback runs.
    pub fn hold(&self) {
        let mut inner = self.inner.lock();
        if inner.held.is_none() {
            inner.held = Some(inner.content.clone());
            inner.held_since = Some(Instant::now());
        }
    }

    /// The disk caught up: everything is durable, and the callbacks run.
    pub fn release(&self) {
        let mut inner = self.inner.lock();
        inner.held = None;
        inner.held_since = None;
        call_back(&self.inner, inner);
    }

    /// A crash: what was durable, as a new log. This one is stopped; callbacks that wait fail.
    #[must_use]
    pub fn crash(&self) -> Self {
        let why = "the process crashed";
        let mut inner = self.inner.lock();
        let content = inner.held.take().unwrap_or_else(|| inner.content.clone());
        inner.stopped = Some(why.into());
        for (_, result) in &mut inner.calls {
            *result = Err(StorageError::Stopped(why.into()));
        }
        call_back(&self.inner, inner);
        Self {
            inner: Mutex::new(Inner {
                content,
                ..Inner::default()
            }),
        }
    }

    /// Make a change and call `done` after those of earlier changes.
    fn change(&self, done: Done, change: impl FnOnce(&mut Content) -> Result<()>) {
        let mut inner = self.inner.lock();
        let result = match &inner.stopped {
            Some(why) => Err(StorageError::Stopped(why.clone())),
            None => change(&mut inner.content),
        };
        inner.calls.push_back((done, result));
        call_back(&self.inner, inner);
    }
}

/// Whoever finds nobody calling does the calling, outside the lock: a callback may come back with another
/// change.
fn call_back<'a>(log: &'a Mutex<Inner>, mut inner: MutexGuard<'a, Inner>) {
    if std::mem::replace(&mut inner.calling, true) {
        return;
    }
    while inner.held.is_none()
        && let Some((done, result)) = inner.calls.pop_front()
    {
        drop(inner);
        done(result);
        inner = log.lock();
    }
    inner.calling = false;
}

impl Content {
    fn next(&self) -> Option<u64> {
        let last = self.entries.last_key_value().map(|(index, _)| *index);
        let purged = self.purged.as_ref().map(|(index, _)| *index);
        last.or(purged).map(|index| index + 1)
    }

    fn append(&mut self, entries: Vec<LogEntry>) -> Result<()> {
        let Some(from) = entries.first().map(|e| e.index) else {
            return Ok(());
        };
        let gap = entries.windows(2).any(|w| w[1].index != w[0].index + 1);
        if gap || self.next().is_some_and(|next| next != from) {
            return Err(StorageError::Misuse(format!(
                "append at {from}, but the log continues at {:?}",
                self.next()
            )));
        }
        self.entries
            .extend(entries.into_iter().map(|e| (e.index, e.bytes)));
        Ok(())
    }
}

impl Log for MemoryLog {
    fn state(&self) -> LogState {
        let content = &self.inner.lock().content;
        LogState {
            first: content.entries.first_key_value().map(|(index, _)| *index),
            last: content.entries.last_key_value().map(|(index, _)| *index),
            purged: content.purged.clone(),
            vote: content.vote.clone(),
            committed: content.committed.clone(),
            disk_bytes: 0,
        }
    }

    /// Held, with something to write: the disk is taking its time.
    fn pace(&self) -> Pace {
        let inner = self.inner.lock();
        let waits = !inner.calls.is_empty();
        Pace {
            under_way: inner
                .held_since
                .filter(|_| waits)
                .map(|since| since.elapsed()),
            ..Pace::default()
        }
    }

    fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogEntry>> {
        let mut found = Vec::new();
        if range.is_empty() {
            return Ok(found);
        }
        let mut bytes = 0usize;
        for (index, entry) in self.inner.lock().content.entries.range(range) {
            bytes = bytes.saturating_add(entry.len());
            if !found.is_empty() && bytes > max_bytes {
                break;
            }
            found.push(LogEntry {
                index: *index,
                bytes: entry.clone(),
            });
        }
        Ok(found)
    }

    fn append(&self, entries: Vec<LogEntry>, done: Done) {
        self.change(done, |content| content.append(entries));
    }

    fn save_vote(&self, vote: Bytes, done: Done) {
        self.change(done, |content| {
            content.vote = Some(vote);
            Ok(())
        });
    }

    fn save_committed(&self, mark: Option<Bytes>, done: Done) {
        self.change(done, |content| {
            content.committed = mark;
            Ok(())
        });
    }

    fn truncate_after(&self, index: Option<u64>, done: Done) {
        self.change(done, |content| {
            content
                .entries
                .retain(|i, _| index.is_some_and(|after| *i <= after));
            Ok(())
        });
    }

    fn purge(&self, index: u64, mark: Bytes, done: Done) {
        self.change(done, |content| {
            if content.purged.as_ref().is_none_or(|(old, _)| index > *old) {
                content.entries.retain(|i, _| *i > index);
                content.purged = Some((index, mark));
            }
            Ok(())
        });
    }
}
