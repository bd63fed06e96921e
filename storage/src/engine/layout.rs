//! How keys, values and the mark lie in a flat ordered store: pure functions over bytes. Knows no store.
//!
//! ```text
//! 0x00                               current generation, number and sum of its entries
//! 0x01 generation(u64 BE) key        head of a value: its digest and length, and its first bytes
//! 0x02 generation(u64 BE) key part   further bytes of a long value (part: u32 BE, from 1)
//! ```
//! `key` is 0x00 for the mark, and 0x01 followed by the caller's key for an entry.
//! A value in the store is never longer than [`PART_LEN`] and a small head: longer ones would go to files
//! that the store does not sync. A generation is one whole content; only one is current.

use std::ops::Range;

/// Longest piece of a value.
pub(super) const PART_LEN: usize = 2800;
/// The key of [`Root`].
pub(super) const ROOT_KEY: &[u8] = &[0];
/// Bytes before the key in the key of a head or part.
pub(super) const KEY_PREFIX_LEN: usize = 9;
/// The mark's key within a generation.
pub(super) const MARK_KEY: &[u8] = &[0];
/// First byte of an entry's key within a generation.
const ENTRY: u8 = 1;
const HEAD: u8 = 1;
const PART: u8 = 2;
const VERSION: u8 = 1;
const HEAD_LEN: usize = 1 + 8 + 8;

/// Which generation is current, and what it amounts to. Moves in the same batch as the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) generation: u64,
    /// Changes committed so far: never goes back.
    pub(super) commits: u64,
    /// Entries in the generation.
    pub(super) count: u64,
    /// Wrapping sum of the entries' digests: a lost or a resurrected entry shows.
    pub(super) sum: u64,
}

/// Head of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head<'a> {
    /// Of key and whole value.
    pub(super) digest: u64,
    /// Of the whole value.
    pub(super) len: u64,
    /// The value's first bytes.
    pub(super) first: &'a [u8],
}

impl Head<'_> {
    /// Parts beside the head.
    pub(super) fn parts(&self) -> u32 {
        parts(self.len)
    }
}

fn parts(len: u64) -> u32 {
    let rest = len.saturating_sub(PART_LEN as u64);
    u32::try_from(rest.div_ceil(PART_LEN as u64)).unwrap_or(u32::MAX)
}

/// First eight bytes of BLAKE3 over key length, key and value.
pub(super) fn digest(key: &[u8], value: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

pub(super) fn head_key(generation: u64, key: &[u8]) -> Vec<u8> {
    prefixed(HEAD, generation, key)
}

pub(super) fn part_key(generation: u64, key: &[u8], part: u32) -> Vec<u8> {
    let mut bytes = prefixed(PART, generation, key);
    bytes.extend_from_slice(&part.to_be_bytes());
    bytes
}

fn prefixed(kind: u8, generation: u64, key: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(KEY_PREFIX_LEN + key.len() + 4);
    bytes.push(kind);
    bytes.extend_from_slice(&generation.to_be_bytes());
    bytes.extend_from_slice(key);
    bytes
}

/// Prefix of all heads of a generation.
pub(super) fn heads_of(generation: u64) -> Vec<u8> {
    prefixed(HEAD, generation, &[])
}

/// Where keys of generations other than `current` may be, as half-open ranges.
pub(super) fn other_generations(current: u64) -> Vec<Range<Vec<u8>>> {
    [HEAD, PART]
        .into_iter()
        .flat_map(|kind| {
            let after = current.checked_add(1).map(|next| prefixed(kind, next, &[]));
            [
                Some(prefixed(kind, 0, &[])..prefixed(kind, current, &[])),
                after.map(|from| from..vec![kind + 1]),
            ]
        })
        .flatten()
        .collect()
}

/// An entry's key within a generation.
pub(super) fn entry_key(key: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + key.len());
    bytes.push(ENTRY);
    bytes.extend_from_slice(key);
    bytes
}

/// The caller's key, from the key within a generation.
pub(super) fn caller_key(key: &[u8]) -> Option<&[u8]> {
    let (kind, key) = key.split_first()?;
    (*kind == ENTRY).then_some(key)
}

/// The pieces of a value: the head, then the parts in order, each to be stored under its own key.
pub(super) fn split(digest: u64, value: &[u8]) -> (Vec<u8>, impl Iterator<Item = (u32, &[u8])>) {
    let (first, rest) = value.split_at(value.len().min(PART_LEN));
    let mut head = Vec::with_capacity(HEAD_LEN + first.len());
    head.push(VERSION);
    head.extend_from_slice(&digest.to_le_bytes());
    head.extend_from_slice(&(value.len() as u64).to_le_bytes());
    head.extend_from_slice(first);
    (head, (1u32..).zip(rest.chunks(PART_LEN)))
}

/// Parse a head; the digest is not checked yet.
pub(super) fn parse_head(bytes: &[u8]) -> Option<Head<'_>> {
    let (fixed, first) = bytes.split_at_checked(HEAD_LEN)?;
    let head = Head {
        digest: u64::from_le_bytes(fixed[1..9].try_into().ok()?),
        len: u64::from_le_bytes(fixed[9..17].try_into().ok()?),
        first,
    };
    let expected = head.len.min(PART_LEN as u64);
    (fixed[0] == VERSION && first.len() as u64 == expected).then_some(head)
}

/// Root as bytes: version, crc32 of the rest, generation, commits, count, sum.
pub(super) fn encode_root(root: Root) -> Vec<u8> {
    let mut body = Vec::new();
    for word in [root.generation, root.commits, root.count, root.sum] {
        body.extend_from_slice(&word.to_le_bytes());
    }
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// Parse and verify a root.
pub(super) fn parse_root(bytes: &[u8]) -> Option<Root> {
    let (version, rest) = bytes.split_first()?;
    let (crc, body) = rest.split_at_checked(4)?;
    if *version != VERSION || body.len() != 32 || crc != crc32fast::hash(body).to_le_bytes() {
        return None;
    }
    let word = |at: usize| Some(u64::from_le_bytes(body[at..at + 8].try_into().ok()?));
    Some(Root {
        generation: word(0)?,
        commits: word(8)?,
        count: word(16)?,
        sum: word(24)?,
    })
}

/// The file beside the store: number of commits that are durable, and crc32 of that.
pub(super) fn encode_durable(commits: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&commits.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..8]);
    bytes[8..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Parse and verify it.
pub(super) fn parse_durable(bytes: &[u8]) -> Option<u64> {
    let (number, crc) = bytes.split_at_checked(8)?;
    (crc == crc32fast::hash(number).to_le_bytes())
        .then_some(u64::from_le_bytes(number.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_short_and_come_back() {
        for len in [0, 1, PART_LEN, PART_LEN + 1, 10 * PART_LEN, 100_000] {
            let value: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let (head, parts) = split(digest(b"k", &value), &value);
            assert!(head.len() < 3 << 10);
            let parsed = parse_head(&head).unwrap();
            let mut whole = parsed.first.to_vec();
            let mut count = 0;
            for (number, part) in parts {
                count += 1;
                assert_eq!(number, count);
                assert!(part.len() <= PART_LEN);
                whole.extend_from_slice(part);
            }
            assert_eq!(parsed.parts(), count);
            assert_eq!(whole, value);
        }
    }

    #[test]
    fn golden_root() {
        let root = Root {
            generation: 2,
            commits: 5,
            count: 3,
            sum: 4,
        };
        let bytes = encode_root(root);
        assert_eq!(
            hex::encode(&bytes),
            "01c8196e640200000000000000050000000000000003000000000000000400000000000000"
        );
        assert_eq!(parse_root(&bytes), Some(root));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(parse_root(&flipped), None);
        }
    }
}
