//! A hash of the applied state that does not depend on how it came about: kept up with every change,
//! remembered at positions that all members share, so that they can compare. Knows no peer.
//!
//! ```text
//!   digest(state) = sum over all keys of hash(key, value)      (wrapping, 64 bits)
//! ```
//!
//! A changed key costs two short hashes and no look at the rest. Equal states have equal digests;
//! different ones differ but for one chance in 2^64. It finds accidents and bugs, it is no defence
//! against forgery.

use crate::machine::Change;
use std::collections::{HashMap, VecDeque};

/// The digest is remembered whenever the applied index is a multiple of this. Batches are cut there.
pub(crate) const EVERY: u64 = 1024;
/// Remembered digests: a member that applies this many times [`EVERY`] entries later than another
/// can still be compared with it.
const KEPT: usize = 128;

/// The digest at an applied index.
pub(crate) type At = (u64, u64);

/// The digest of the newest state, and of some earlier ones.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    /// Hash of each key to the hash of what it holds.
    values: HashMap<u64, u64>,
    sum: u64,
    applied: u64,
    kept: VecDeque<At>,
}

impl Digests {
    /// Of an empty state, applied up to `applied`; what is in it is added next.
    pub(crate) fn at(applied: u64) -> Self {
        Self {
            applied,
            ..Self::default()
        }
    }

    /// Add an entry of a state that is read as a whole.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.set(key, Some(value));
    }

    #[cfg(test)]
    fn of(entries: &[(Vec<u8>, Vec<u8>)], applied: u64) -> Self {
        let mut digests = Self::at(applied);
        for (key, value) in entries {
            digests.add(key, value);
        }
        digests
    }

    /// Follow a batch that was applied up to `applied`.
    pub(crate) fn follow(&mut self, changes: &[Change], applied: u64) {
        for (key, value) in changes {
            self.set(key, value.as_deref());
        }
        self.applied = applied;
        if applied.is_multiple_of(EVERY) {
            self.kept.push_back((applied, self.sum));
            if self.kept.len() > KEPT {
                self.kept.pop_front();
            }
        }
    }

    fn set(&mut self, key: &[u8], value: Option<&[u8]>) {
        let name = hash(&[key]);
        let old = match value {
            Some(value) => {
                let new = hash(&[&(key.len() as u64).to_le_bytes(), key, value]);
                self.sum = self.sum.wrapping_add(new);
                self.values.insert(name, new)
            }
            None => self.values.remove(&name),
        };
        self.sum = self.sum.wrapping_sub(old.unwrap_or(0));
    }

    /// The newest.
    pub(crate) fn newest(&self) -> At {
        (self.applied, self.sum)
    }

    /// All that are known, by ascending index, each index once.
    pub(crate) fn all(&self) -> Vec<At> {
        let newest = self.newest();
        let kept = self.kept.iter().copied().filter(|at| at.0 != newest.0);
        kept.chain([newest]).collect()
    }
}

/// Stable across releases and machines: members compare it.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(key: &str, value: Option<&str>) -> Change {
        (key.into(), value.map(Into::into))
    }

    #[test]
    fn the_way_to_a_state_does_not_matter() {
        let mut one = Digests::default();
        one.follow(&[change("a", Some("1")), change("b", Some("2"))], 2);
        one.follow(&[change("a", None), change("c", Some("3"))], 4);
        one.follow(&[change("c", Some("4")), change("never", None)], 5);
        let mut other = Digests::default();
        other.follow(&[change("c", Some("4")), change("b", Some("2"))], 5);
        assert_eq!(one.newest(), other.newest());
        let whole = [("b", "2"), ("c", "4")].map(|(k, v)| (k.into(), v.into()));
        assert_eq!(Digests::of(&whole, 5).newest(), one.newest());
    }

    #[test]
    fn every_difference_shows() {
        let of = |entries: &[(&str, &str)]| {
            let entries: Vec<_> = entries
                .iter()
                .map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()))
                .collect();
            Digests::of(&entries, 1).newest().1
        };
        let all = [
            of(&[]),
            of(&[("a", "")]),
            of(&[("", "a")]),
            of(&[("ab", "c")]),
            of(&[("a", "bc")]),
            of(&[("a", "b"), ("c", "d")]),
            of(&[("a", "d"), ("c", "b")]),
        ];
        for (n, one) in all.iter().enumerate() {
            assert!(!all[n + 1..].contains(one), "{n}");
        }
    }

    #[test]
    fn shared_positions_are_kept_up_to_a_bound() {
        let mut digests = Digests::default();
        for n in 1..=EVERY * (KEPT as u64 + 2) {
            digests.follow(&[change("n", Some(&n.to_string()))], n);
        }
        let all = digests.all();
        assert_eq!(all.len(), KEPT);
        assert_eq!(all[0].0, EVERY * 3);
        assert!(all.windows(2).all(|w| w[1].0 - w[0].0 == EVERY));
        digests.follow(&[], EVERY * 200 + 1);
        assert_eq!(digests.all().len(), KEPT + 1);
        assert_eq!(digests.all().last(), Some(&digests.newest()));
    }

    /// Members of different releases compare these.
    #[test]
    fn golden_digest() {
        let mut digests = Digests::default();
        digests.follow(&[change("key", Some("value"))], 7);
        assert_eq!(digests.newest(), (7, GOLDEN));
    }

    const GOLDEN: u64 = 14_927_111_897_153_726_279;
}
