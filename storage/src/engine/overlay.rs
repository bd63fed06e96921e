//! What one reader needs to see a store as it was when it began, while the store is changed: the older
//! values of keys that were changed before the reader came to them. Pure bookkeeping, knows no store.
//!
//! ```text
//!   keys in order      a  b  c  d  e  f
//!   reader             passed ^
//!   a change of `b`    needs nothing: the reader has it
//!   a change of `e`    keeps the older `e` here first, once
//! ```
//!
//! The writer keeps the older value *before* it changes the key, the reader asks *after* it has read the
//! key: a value that it read while it changed is never used. Memory: what is changed ahead of the
//! reader, until it comes there.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Bound;

/// A value and its digest; `None`: the key did not exist.
pub(super) type Older = Option<(Vec<u8>, u64)>;

/// Between one reader and the writer.
#[derive(Debug, Default)]
pub(super) struct Overlay(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    passed: Option<Vec<u8>>,
    older: BTreeMap<Vec<u8>, Older>,
    state: Reading,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reading {
    #[default]
    On,
    /// The reader has everything.
    Done,
    /// Everything was replaced under it.
    Over,
}

/// What the reader does with the key that it found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It counts as it was read.
    Found,
    /// It did not exist.
    Skip,
    /// It had this value.
    Instead((Vec<u8>, u64)),
    /// Another key comes before it, which is no longer there.
    Before(Vec<u8>, (Vec<u8>, u64)),
    /// There was nothing more.
    End,
    /// Everything was replaced: the rest cannot be told.
    Over,
}

impl Overlay {
    /// Must the older value of `key` be kept before it is changed?
    pub(super) fn needs(&self, key: &[u8]) -> bool {
        let inner = self.0.lock();
        inner.state == Reading::On
            && inner.passed.as_deref().is_none_or(|passed| passed < key)
            && !inner.older.contains_key(key)
    }

    /// Keep it.
    pub(super) fn keep(&self, key: Vec<u8>, older: Older) {
        let mut inner = self.0.lock();
        // The reader may have come there meanwhile.
        if inner.state == Reading::On && inner.passed.as_ref().is_none_or(|passed| *passed < key) {
            inner.older.entry(key).or_insert(older);
        }
    }

    /// Everything is about to be replaced.
    pub(super) fn replaced(&self) {
        let mut inner = self.0.lock();
        if inner.state == Reading::On {
            inner.state = Reading::Over;
            inner.older.clear();
        }
    }

    /// The reader has read `found`, the first key in the store behind those that it passed, or nothing.
    pub(super) fn next(&self, found: Option<&[u8]>) -> Step {
        let mut inner = self.0.lock();
        match inner.state {
            Reading::On => inner.next(found),
            Reading::Done => Step::End,
            Reading::Over => Step::Over,
        }
    }
}

impl Inner {
    fn next(&mut self, found: Option<&[u8]>) -> Step {
        loop {
            let behind = self
                .passed
                .clone()
                .map_or(Bound::Unbounded, Bound::Excluded);
            let upto = found.map_or(Bound::Unbounded, |key| Bound::Included(key.to_vec()));
            let first = self.older.range((behind, upto)).next();
            let Some(key) = first.map(|(key, _)| key.clone()) else {
                let Some(found) = found else {
                    self.state = Reading::Done;
                    return Step::End;
                };
                self.passed = Some(found.to_vec());
                return Step::Found;
            };
            let older = self.older.remove(&key).flatten();
            self.passed = Some(key.clone());
            match (older, found == Some(&key[..])) {
                (Some(older), true) => return Step::Instead(older),
                (None, true) => return Step::Skip,
                (Some(older), false) => return Step::Before(key, older),
                // Came and went ahead of the reader.
                (None, false) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> (Vec<u8>, u64) {
        (text.as_bytes().to_vec(), 7)
    }

    fn change(overlay: &Overlay, key: &[u8], older: Option<&str>) {
        if overlay.needs(key) {
            overlay.keep(key.to_vec(), older.map(value));
        }
    }

    #[test]
    fn what_was_changed_ahead_is_told_as_it_was() {
        let overlay = Overlay::default();
        assert_eq!(overlay.next(Some(b"a")), Step::Found);
        change(&overlay, b"a", Some("passed"));
        change(&overlay, b"b", Some("first"));
        change(&overlay, b"b", Some("second"));
        change(&overlay, b"c", None);
        change(&overlay, b"d", Some("removed"));
        change(&overlay, b"d2", None);
        assert_eq!(overlay.next(Some(b"b")), Step::Instead(value("first")));
        assert_eq!(overlay.next(Some(b"c")), Step::Skip);
        let before = Step::Before(b"d".to_vec(), value("removed"));
        assert_eq!(overlay.next(Some(b"e")), before);
        // Changed after it was read and before it was told.
        change(&overlay, b"e", Some("read"));
        assert_eq!(overlay.next(Some(b"e")), Step::Instead(value("read")));
        change(&overlay, b"z", Some("last"));
        let before = Step::Before(b"z".to_vec(), value("last"));
        assert_eq!(overlay.next(None), before);
        assert_eq!(overlay.next(None), Step::End);
        assert!(!overlay.needs(b"zz"), "nobody reads any more");
        assert_eq!(overlay.next(None), Step::End);
    }

    #[test]
    fn a_replacement_ends_it() {
        let overlay = Overlay::default();
        change(&overlay, b"b", Some("older"));
        overlay.replaced();
        assert_eq!(overlay.next(Some(b"b")), Step::Over);
        assert!(!overlay.needs(b"c"));
    }
}
