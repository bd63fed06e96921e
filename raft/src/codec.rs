//! Bytes that outlive the process or leave it: log entries, the vote, marks, peer messages.
//! Every one starts with a version byte. Knows no file and no socket.
//!
//! The encoding is positional: a field is never added to a struct below. A new version gets a new
//! struct and a new number, and the old one stays readable. Golden bytes in the tests hold us to it.

use crate::transport::Member;
use crate::types::{Command, Entry, LeaderId, LogId, Membership, Payload, StoredMembership, Vote};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// The version that every encoding here has today.
const VERSION: u8 = 1;
/// version, kind, term, leader, index.
const ENTRY_HEADER: usize = 1 + 1 + 8 + 8 + 8;
/// Largest membership or other structured value that is decoded.
const STRUCT_MAX: usize = 4 << 20;

const KIND_BLANK: u8 = 0;
const KIND_NORMAL: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;

/// Position of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogIdV1 {
    pub(crate) term: u64,
    pub(crate) leader: u64,
    pub(crate) index: u64,
}

impl From<LogId> for LogIdV1 {
    fn from(id: LogId) -> Self {
        Self {
            term: id.leader_id.term,
            leader: id.leader_id.node_id,
            index: id.index,
        }
    }
}

impl From<LogIdV1> for LogId {
    fn from(id: LogIdV1) -> Self {
        Self {
            leader_id: LeaderId {
                term: id.term,
                node_id: id.leader,
            },
            index: id.index,
        }
    }
}

/// A vote; `committed` = granted by a quorum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VoteV1 {
    pub(crate) term: u64,
    pub(crate) member: u64,
    pub(crate) committed: bool,
}

impl From<&Vote> for VoteV1 {
    fn from(v: &Vote) -> Self {
        Self {
            term: v.leader_id.term,
            member: v.leader_id.node_id,
            committed: v.committed,
        }
    }
}

impl From<VoteV1> for Vote {
    fn from(v: VoteV1) -> Self {
        Self {
            leader_id: LeaderId {
                term: v.term,
                node_id: v.member,
            },
            committed: v.committed,
        }
    }
}

/// Voter sets (two while a change is under way) and all members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MembershipV1 {
    voters: Vec<BTreeSet<u64>>,
    members: BTreeMap<u64, Member>,
}

impl From<&Membership> for MembershipV1 {
    fn from(m: &Membership) -> Self {
        Self {
            voters: m.get_joint_config().clone(),
            members: m
                .nodes()
                .map(|(id, member)| (*id, member.clone()))
                .collect(),
        }
    }
}

impl TryFrom<MembershipV1> for Membership {
    type Error = io::Error;
    fn try_from(m: MembershipV1) -> io::Result<Self> {
        if m.voters.is_empty() && m.members.is_empty() {
            return Ok(Self::default());
        }
        Self::new(m.voters, m.members).map_err(|e| invalid(format!("membership: {e}")))
    }
}

/// What a checkpoint or a snapshot stands for: the applied position and the membership at it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
}

#[derive(Serialize, Deserialize)]
struct MarkV1 {
    applied: Option<LogIdV1>,
    membership_at: Option<LogIdV1>,
    membership: MembershipV1,
}

impl Mark {
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode(&MarkV1 {
            applied: self.applied.map(Into::into),
            membership_at: self.membership.log_id().map(Into::into),
            membership: self.membership.membership().into(),
        })
    }

    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let v1: MarkV1 = decode(bytes)?;
        Ok(Self {
            applied: v1.applied.map(Into::into),
            membership: StoredMembership::new(
                v1.membership_at.map(Into::into),
                v1.membership.try_into()?,
            ),
        })
    }
}

pub(crate) fn encode_vote(vote: &Vote) -> Bytes {
    encode(&VoteV1::from(vote)).into()
}

pub(crate) fn decode_vote(bytes: &[u8]) -> io::Result<Vote> {
    decode::<VoteV1>(bytes).map(Into::into)
}

pub(crate) fn encode_log_id(id: LogId) -> Bytes {
    encode(&LogIdV1::from(id)).into()
}

pub(crate) fn decode_log_id(bytes: &[u8]) -> io::Result<LogId> {
    decode::<LogIdV1>(bytes).map(Into::into)
}

/// An entry: a fixed little-endian header, then the payload as it is. Not the general codec, so
/// that decoding a command is a slice of the input and copies nothing.
pub(crate) fn put_entry(out: &mut BytesMut, entry: &Entry) {
    let (kind, payload) = match &entry.payload {
        Payload::Blank => (KIND_BLANK, Bytes::new()),
        Payload::Normal(Command(bytes)) => (KIND_NORMAL, bytes.clone()),
        Payload::Membership(m) => (KIND_MEMBERSHIP, encode(&MembershipV1::from(m)).into()),
    };
    out.reserve(ENTRY_HEADER + payload.len());
    out.put_u8(VERSION);
    out.put_u8(kind);
    out.put_u64_le(entry.log_id.leader_id.term);
    out.put_u64_le(entry.log_id.leader_id.node_id);
    out.put_u64_le(entry.log_id.index);
    out.put_slice(&payload);
}

pub(crate) fn encode_entry(entry: &Entry) -> Bytes {
    let mut out = BytesMut::new();
    put_entry(&mut out, entry);
    out.freeze()
}

pub(crate) fn decode_entry(mut bytes: Bytes) -> io::Result<Entry> {
    if bytes.len() < ENTRY_HEADER {
        return Err(invalid(format!("log entry of {} bytes", bytes.len())));
    }
    check_version(bytes.get_u8())?;
    let kind = bytes.get_u8();
    let id = LogIdV1 {
        term: bytes.get_u64_le(),
        leader: bytes.get_u64_le(),
        index: bytes.get_u64_le(),
    };
    let payload = match kind {
        KIND_BLANK if bytes.is_empty() => Payload::Blank,
        KIND_NORMAL => Payload::Normal(Command(bytes)),
        KIND_MEMBERSHIP => Payload::Membership(decode::<MembershipV1>(&bytes)?.try_into()?),
        other => return Err(invalid(format!("log entry of kind {other}"))),
    };
    Ok(Entry {
        log_id: id.into(),
        payload,
    })
}

/// Version byte, then the value.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = vec![VERSION];
    bincode::serde::encode_into_std_write(value, &mut out, bincode::config::standard())
        .expect("plain structs into memory always encode");
    out
}

/// The reverse of [`encode`]; refuses trailing bytes and another version.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    let (value, used) = decode_prefix(bytes)?;
    if used != bytes.len() {
        return Err(invalid(format!("{} bytes too many", bytes.len() - used)));
    }
    Ok(value)
}

/// [`decode`] of a value that something follows: the value and how many bytes it took.
pub(crate) fn decode_prefix<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<(T, usize)> {
    let (&version, rest) = bytes.split_first().ok_or_else(|| invalid("empty value"))?;
    check_version(version)?;
    let config = bincode::config::standard().with_limit::<STRUCT_MAX>();
    let (value, used) =
        bincode::serde::decode_from_slice(rest, config).map_err(|e| invalid(e.to_string()))?;
    Ok((value, used + 1))
}

fn check_version(found: u8) -> io::Result<()> {
    if found == VERSION {
        return Ok(());
    }
    Err(invalid(format!(
        "format version {found}, this release reads {VERSION}"
    )))
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(term: u64, leader: u64, index: u64) -> LogId {
        LogIdV1 {
            term,
            leader,
            index,
        }
        .into()
    }

    fn membership() -> Membership {
        let member = |n: &str| Member {
            name: n.into(),
            ..Member::default()
        };
        let members = BTreeMap::from([(1, member("a")), (2, member("b"))]);
        Membership::new(vec![BTreeSet::from([1])], members).unwrap()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn entries_survive_and_keep_their_bytes() {
        let entries = [
            Entry {
                log_id: id(1, 2, 3),
                payload: Payload::Blank,
            },
            Entry {
                log_id: id(1, 2, 4),
                payload: Payload::Normal(Command("hey".into())),
            },
            Entry {
                log_id: id(1, 2, 5),
                payload: Payload::Membership(membership()),
            },
        ];
        let golden = [
            "0100010000000000000002000000000000000300000000000000",
            "0101010000000000000002000000000000000400000000000000686579",
            "01020100000000000000020000000000000005000000000000000101010102010161000000020162000000",
        ];
        for (entry, golden) in entries.iter().zip(golden) {
            let bytes = encode_entry(entry);
            assert_eq!(hex(&bytes), golden);
            assert_eq!(&decode_entry(bytes).unwrap(), entry);
        }
    }

    #[test]
    fn vote_and_mark_survive_and_keep_their_bytes() {
        let vote = Vote::new_committed(7, 9);
        assert_eq!(hex(&encode_vote(&vote)), "01070901");
        assert_eq!(decode_vote(&encode_vote(&vote)).unwrap(), vote);
        let mark = Mark {
            applied: Some(id(3, 1, 300)),
            membership: StoredMembership::new(Some(id(1, 1, 2)), membership()),
        };
        let bytes = mark.encode();
        assert_eq!(
            hex(&bytes),
            "01010301fb2c0101010102010101020101610000000201620000 00".replace(' ', "")
        );
        assert_eq!(Mark::decode(&bytes).unwrap(), mark);
        assert_eq!(
            Mark::decode(&Mark::default().encode()).unwrap(),
            Mark::default()
        );
    }

    #[test]
    fn damage_is_refused_not_guessed() {
        let good = encode_entry(&Entry {
            log_id: id(1, 2, 3),
            payload: Payload::Blank,
        });
        for cut in 0..good.len() {
            assert!(decode_entry(good.slice(..cut)).is_err(), "{cut}");
        }
        let mut other_version = good.to_vec();
        other_version[0] = 2;
        assert!(decode_entry(other_version.into()).is_err());
        let mut other_kind = good.to_vec();
        other_kind[1] = 9;
        assert!(decode_entry(other_kind.into()).is_err());
        let mut long = encode_vote(&Vote::new(1, 1)).to_vec();
        long.push(0);
        assert!(decode_vote(&long).is_err());
        // A length prefix that claims more than there is must not be believed.
        assert!(
            decode::<Vec<u64>>(&[1, 0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err()
        );
    }
}
