//! One record of the write-ahead log: its bytes, its checksum, and how to tell a record from noise.
//! Knows no file and no order of records.
//!
//! A record names the segment and the offset it was written at, so that a record's bytes found
//! anywhere else (inside an entry, or left over from an older file) are never taken for one. It also
//! says up to which offset of its segment everything was durable when it was written: damage below that
//! offset cannot be a torn write.

use bytes::Bytes;

/// Format of the records; a higher one is refused.
pub(super) const VERSION: u8 = 1;
/// Bytes before the body.
pub(super) const HEADER_LEN: usize = 32;
/// Largest body. A length beyond it is noise.
pub(super) const BODY_LEN_MAX: usize = 1 << 30;

/// What a record says. Byte values are on disk: never reuse one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// First record of each segment: everything that earlier segments said and that still holds.
    Start(Start),
    /// The vote.
    Vote(Bytes),
    /// An entry.
    Entry(u64, Bytes),
    /// Entries after the index are gone (all when `None`).
    Truncate(Option<u64>),
    /// Entries up to the index are gone; segments below `oldest` are not needed any more.
    Purge {
        index: u64,
        oldest: u64,
        mark: Bytes,
    },
    /// The committed mark.
    Committed(Option<Bytes>),
    /// Nothing but its own header: everything before it is durable.
    Synced,
}

/// Body of [`Record::Start`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Start {
    /// Oldest segment that was still needed.
    pub(super) oldest: u64,
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<Bytes>,
    pub(super) purged: Option<(u64, Bytes)>,
}

/// A well-formed record found in a buffer.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) record: Record,
    /// Header and body.
    pub(super) len: usize,
    /// What it claims was durable before it.
    pub(super) durable: u64,
}

/// Why there is no record at a place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Bad {
    /// Too short, wrong place or wrong checksum.
    Noise,
    /// Intact, but of a newer release.
    Newer(u8),
    /// Intact, but makes no sense: a bug wrote it.
    Nonsense,
}

/// Where a record is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) durable: u64,
}

impl Record {
    fn kind(&self) -> u8 {
        match self {
            Self::Start(_) => 1,
            Self::Vote(_) => 2,
            Self::Entry(..) => 3,
            Self::Truncate(_) => 4,
            Self::Purge { .. } => 5,
            Self::Committed(_) => 6,
            Self::Synced => 7,
        }
    }

    fn body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Start(start) => {
                put_u64(out, start.oldest);
                put_option(out, start.vote.as_deref());
                put_option(out, start.committed.as_deref());
                put_option(out, start.purged.as_ref().map(|(_, mark)| &mark[..]));
                put_u64(out, start.purged.as_ref().map_or(0, |(index, _)| *index));
            }
            Self::Vote(vote) => out.extend_from_slice(vote),
            Self::Entry(index, bytes) => {
                put_u64(out, *index);
                out.extend_from_slice(bytes);
            }
            Self::Truncate(after) => {
                out.push(u8::from(after.is_some()));
                put_u64(out, after.unwrap_or(0));
            }
            Self::Purge {
                index,
                oldest,
                mark,
            } => {
                put_u64(out, *index);
                put_u64(out, *oldest);
                out.extend_from_slice(mark);
            }
            Self::Committed(mark) => put_option(out, mark.as_deref()),
            Self::Synced => {}
        }
    }

    /// Append the record's bytes to `out`; returns their number.
    pub(super) fn encode(&self, place: Place, out: &mut Vec<u8>) -> usize {
        let from = out.len();
        out.extend_from_slice(&[0; HEADER_LEN]);
        self.body(out);
        let len = out.len() - from - HEADER_LEN;
        let len32 =
            u32::try_from(len).expect("bodies are bounded by BODY_LEN_MAX when they are queued");
        let head = &mut out[from..from + HEADER_LEN];
        head[4..8].copy_from_slice(&len32.to_le_bytes());
        head[8] = self.kind();
        head[9] = VERSION;
        // 10..12 stay zero.
        head[12..16].copy_from_slice(&segment_tag(place.segment).to_le_bytes());
        head[16..24].copy_from_slice(&place.offset.to_le_bytes());
        head[24..32].copy_from_slice(&place.durable.to_le_bytes());
        let crc = crc32fast::hash(&out[from + 4..]);
        out[from..from + 4].copy_from_slice(&crc.to_le_bytes());
        out.len() - from
    }
}

/// The record that starts at `at` in the bytes of `segment` (`buf` begins at `buf_offset` of the file).
pub(super) fn decode(buf: &[u8], at: usize, buf_offset: u64, segment: u64) -> Result<Found, Bad> {
    let bytes = buf.get(at..).ok_or(Bad::Noise)?;
    let head = bytes.get(..HEADER_LEN).ok_or(Bad::Noise)?;
    let offset = buf_offset + at as u64;
    if get_u64(head, 16) != Some(offset) || get_u32(head, 12) != Some(segment_tag(segment)) {
        return Err(Bad::Noise);
    }
    let len = get_u32(head, 4).ok_or(Bad::Noise)? as usize;
    if len > BODY_LEN_MAX {
        return Err(Bad::Noise);
    }
    let whole = bytes.get(..HEADER_LEN + len).ok_or(Bad::Noise)?;
    if get_u32(head, 0) != Some(crc32fast::hash(&whole[4..])) {
        return Err(Bad::Noise);
    }
    if head[9] != VERSION {
        return Err(Bad::Newer(head[9]));
    }
    let record = parse(head[8], &whole[HEADER_LEN..]).ok_or(Bad::Nonsense)?;
    let durable = get_u64(head, 24).ok_or(Bad::Noise)?;
    Ok(Found {
        record,
        len: whole.len(),
        durable,
    })
}

fn parse(kind: u8, body: &[u8]) -> Option<Record> {
    let copy = Bytes::copy_from_slice;
    Some(match kind {
        1 => Record::Start(parse_start(body)?),
        2 => Record::Vote(copy(body)),
        3 => Record::Entry(get_u64(body, 0)?, copy(&body[8..])),
        4 if body.len() == 9 => Record::Truncate((body[0] != 0).then_some(get_u64(body, 1)?)),
        5 => Record::Purge {
            index: get_u64(body, 0)?,
            oldest: get_u64(body, 8)?,
            mark: copy(&body[16..]),
        },
        6 => {
            let mut rest = body;
            let mark = take_option(&mut rest)?;
            rest.is_empty().then_some(Record::Committed(mark))?
        }
        7 if body.is_empty() => Record::Synced,
        _ => return None,
    })
}

fn parse_start(body: &[u8]) -> Option<Start> {
    let oldest = get_u64(body, 0)?;
    let mut rest = &body[8..];
    let vote = take_option(&mut rest)?;
    let committed = take_option(&mut rest)?;
    let mark = take_option(&mut rest)?;
    let index = get_u64(rest, 0)?;
    (rest.len() == 8).then(|| Start {
        oldest,
        vote,
        committed,
        purged: mark.map(|mark| (index, mark)),
    })
}

/// Segment numbers are compared by their low half in records: four thousand million segments of 64 MiB.
#[allow(clippy::cast_possible_truncation)]
fn segment_tag(segment: u64) -> u32 {
    segment as u32
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_option(out: &mut Vec<u8>, value: Option<&[u8]>) {
    out.push(u8::from(value.is_some()));
    let value = value.unwrap_or_default();
    put_u64(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn get_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn get_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

fn take_option(rest: &mut &[u8]) -> Option<Option<Bytes>> {
    let some = *rest.first()? != 0;
    let len = usize::try_from(get_u64(rest, 1)?).ok()?;
    let value = rest.get(9..9usize.checked_add(len)?)?;
    let bytes = some.then(|| Bytes::copy_from_slice(value));
    *rest = &rest[9 + len..];
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Record> {
        let b = Bytes::from_static;
        vec![
            Record::Start(Start::default()),
            Record::Start(Start {
                oldest: 3,
                vote: Some(b(b"v")),
                committed: Some(b(b"")),
                purged: Some((9, b(b"mark"))),
            }),
            Record::Vote(b(b"vote")),
            Record::Entry(7, b(b"entry")),
            Record::Truncate(None),
            Record::Truncate(Some(4)),
            Record::Purge {
                index: 5,
                oldest: 2,
                mark: b(b"m"),
            },
            Record::Committed(None),
            Record::Committed(Some(b(b"c"))),
            Record::Synced,
        ]
    }

    #[test]
    fn every_record_comes_back_and_only_from_its_own_place() {
        for record in samples() {
            let place = Place {
                segment: 2,
                offset: 100,
                durable: 64,
            };
            let mut bytes = vec![0xAA; 100];
            let len = record.encode(place, &mut bytes);
            let found = decode(&bytes, 100, 0, 2).unwrap();
            assert_eq!((found.record, found.len, found.durable), (record, len, 64));
            assert_eq!(decode(&bytes, 100, 0, 3).unwrap_err(), Bad::Noise);
            assert_eq!(decode(&bytes, 100, 1, 2).unwrap_err(), Bad::Noise);
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes[..cut], 100, 0, 2).unwrap_err(), Bad::Noise);
            }
            for bit in 0..len * 8 {
                let mut flipped = bytes.clone();
                flipped[100 + bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode(&flipped, 100, 0, 2).unwrap_err(), Bad::Noise);
            }
        }
    }

    /// The bytes on disk are a contract with every later release.
    #[test]
    fn golden_records() {
        let expected = [
            "1c6346462b00000001010000020000000201000000000000640000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
            "a332966f300000000101000002000000020100000000000064000000000000000300000000000000010100000000000000760100000000000000000104000000000000006d61726b0900000000000000",
            "2899709104000000020100000200000002010000000000006400000000000000766f7465",
            "e047b0390d0000000301000002000000020100000000000064000000000000000700000000000000656e747279",
            "9002368509000000040100000200000002010000000000006400000000000000000000000000000000",
            "2918071609000000040100000200000002010000000000006400000000000000010400000000000000",
            "441a7e5211000000050100000200000002010000000000006400000000000000050000000000000002000000000000006d",
            "7623d3e809000000060100000200000002010000000000006400000000000000000000000000000000",
            "5fa7660a0a00000006010000020000000201000000000000640000000000000001010000000000000063",
            "0c8c2f8a00000000070100000200000002010000000000006400000000000000",
        ];
        for (record, expected) in samples().into_iter().zip(expected) {
            let place = Place {
                segment: 2,
                offset: 0x0102,
                durable: 0x64,
            };
            let mut bytes = Vec::new();
            record.encode(place, &mut bytes);
            assert_eq!(hex::encode(&bytes), expected, "{record:?}");
        }
        assert_eq!(samples().len(), expected.len());
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = Vec::new();
        let place = Place {
            segment: 1,
            offset: 0,
            durable: 0,
        };
        Record::Synced.encode(place, &mut bytes);
        bytes[9] = 2;
        let crc = crc32fast::hash(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode(&bytes, 0, 0, 1).unwrap_err(), Bad::Newer(2));
    }
}
