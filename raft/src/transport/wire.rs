//! What members say to each other, as bytes. Knows no socket.

use crate::codec::{self, LogIdV1, VoteV1};
use crate::transport::Member;
use crate::types::{LogId, Types, Vote};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, VoteRequest, VoteResponse,
};
use serde::{Deserialize, Serialize};
use std::io;

/// Longest command: with it, the longest append still fits a frame.
pub(crate) const COMMAND_MAX: usize = super::frame::PAYLOAD_MAX / 2;

/// Milliseconds to wait, position of the first attempt.
const PROPOSE_HEADER: usize = 4 + 8;

/// Kinds of frames. Requests below 128, answers above.
pub(crate) mod kind {
    pub(crate) const HELLO: u8 = 1;
    pub(crate) const APPEND: u8 = 2;
    pub(crate) const VOTE: u8 = 3;
    pub(crate) const PRE_VOTE: u8 = 4;
    pub(crate) const TRANSFER: u8 = 5;
    pub(crate) const PROPOSE: u8 = 6;
    pub(crate) const READ_INDEX: u8 = 7;
    pub(crate) const ADMIN: u8 = 8;
    pub(crate) const SNAPSHOT_BEGIN: u8 = 9;
    pub(crate) const SNAPSHOT_DATA: u8 = 10;
    pub(crate) const SNAPSHOT_END: u8 = 11;
    pub(crate) const DIGESTS: u8 = 12;
    pub(crate) const FITNESS: u8 = 13;
    pub(crate) const CLAIM: u8 = 14;
    /// The answer; its payload depends on the request.
    pub(crate) const ANSWER: u8 = 128;
    /// The request could not be served; the payload says why.
    pub(crate) const FAILED: u8 = 129;
    /// Still at it (long work on a snapshot).
    pub(crate) const PROGRESS: u8 = 130;
}

/// What a connection is for. Separate ones, so that bulk never delays a heartbeat or a vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Lane {
    /// Heartbeats, votes, read indexes, membership: small and urgent.
    Control,
    /// Log entries and forwarded commands.
    Data,
    /// One snapshot.
    Snapshot,
}

/// The first frame of a connection.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) cluster_id: String,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) lane: Lane,
}

/// How far a member's disk goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Of the newest vote.
    pub(crate) term: u64,
    /// Of the last entry.
    pub(crate) index: u64,
}

/// What a member says of its own disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) from: u64,
    pub(crate) has: Position,
    /// What it will always have.
    pub(crate) kept: Position,
}

/// What another member knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Known {
    /// It said that it will always have this.
    Kept(Position),
    /// The leader of this term has its acknowledgement of this entry.
    Acknowledged(Position),
}

impl Known {
    pub(crate) fn position(self) -> Position {
        match self {
            Self::Kept(position) | Self::Acknowledged(position) => position,
        }
    }

    /// Can a disk that has `has` not be the one of which this is known?
    pub(crate) fn contradicts(self, has: Position) -> bool {
        match self {
            Self::Kept(kept) => has.term < kept.term || has.index < kept.index,
            // A leader of a later term may have had it replaced.
            Self::Acknowledged(entry) => has.term <= entry.term && has.index < entry.index,
        }
    }
}

/// The answer to a [`Claim`]: one's own, and what is known against the other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) claim: Claim,
    pub(crate) against: Option<Known>,
}

#[derive(Serialize, Deserialize)]
struct AppendHead {
    vote: VoteV1,
    prev: Option<LogIdV1>,
    commit: Option<LogIdV1>,
    entries: u32,
}

pub(crate) fn encode_append(request: &AppendEntriesRequest<Types>) -> Bytes {
    let head = AppendHead {
        vote: (&request.vote).into(),
        prev: request.prev_log_id.map(Into::into),
        commit: request.leader_commit.map(Into::into),
        entries: u32::try_from(request.entries.len()).expect("batches are limited"),
    };
    let mut out = BytesMut::from(&codec::encode(&head)[..]);
    for entry in &request.entries {
        let at = out.len();
        out.put_u32_le(0);
        codec::put_entry(&mut out, entry);
        let len = u32::try_from(out.len() - at - 4).expect("entries are limited");
        out[at..at + 4].copy_from_slice(&len.to_le_bytes());
    }
    out.freeze()
}

pub(crate) fn decode_append(mut bytes: Bytes) -> io::Result<AppendEntriesRequest<Types>> {
    let (head, used): (AppendHead, usize) = codec::decode_prefix(&bytes)?;
    bytes.advance(used);
    let mut entries = Vec::new();
    for _ in 0..head.entries {
        if bytes.len() < 4 {
            return Err(short());
        }
        let len = bytes.get_u32_le() as usize;
        if bytes.len() < len {
            return Err(short());
        }
        entries.push(codec::decode_entry(bytes.split_to(len))?);
    }
    if !bytes.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "bytes after the last entry",
        ));
    }
    Ok(AppendEntriesRequest {
        vote: head.vote.into(),
        prev_log_id: head.prev.map(Into::into),
        leader_commit: head.commit.map(Into::into),
        entries,
    })
}

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an append ends early")
}

#[derive(Serialize, Deserialize)]
enum AppendAnswer {
    Success,
    Conflict,
    HigherVote(VoteV1),
}

pub(crate) fn encode_append_answer(answer: &AppendEntriesResponse<Types>) -> Bytes {
    let answer = match answer {
        AppendEntriesResponse::Success => AppendAnswer::Success,
        // A member answers for the whole request or not at all.
        AppendEntriesResponse::PartialSuccess(_) | AppendEntriesResponse::Conflict => {
            AppendAnswer::Conflict
        }
        AppendEntriesResponse::HigherVote(v) => AppendAnswer::HigherVote(v.into()),
    };
    codec::encode(&answer).into()
}

/// `prev` and `last` are those of the request.
pub(crate) fn decode_append_answer(
    bytes: &[u8],
    prev: Option<LogId>,
    last: Option<LogId>,
) -> io::Result<StreamAppendResult<Types>> {
    Ok(match codec::decode(bytes)? {
        AppendAnswer::Success => Ok(last),
        AppendAnswer::HigherVote(v) => Err(StreamAppendError::HigherVote(v.into())),
        AppendAnswer::Conflict => match prev {
            Some(prev) => Err(StreamAppendError::Conflict(prev)),
            None => {
                let text = "a conflict before the first entry";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        },
    })
}

#[derive(Serialize, Deserialize)]
struct VoteAsk {
    vote: VoteV1,
    last: Option<LogIdV1>,
    transfer: bool,
}

pub(crate) fn encode_vote_request(r: &VoteRequest<Types>) -> Bytes {
    let ask = VoteAsk {
        vote: (&r.vote).into(),
        last: r.last_log_id.map(Into::into),
        transfer: r.leadership_transfer,
    };
    codec::encode(&ask).into()
}

pub(crate) fn decode_vote_request(bytes: &[u8]) -> io::Result<VoteRequest<Types>> {
    let ask: VoteAsk = codec::decode(bytes)?;
    let mut request = VoteRequest::new(ask.vote.into(), ask.last.map(Into::into));
    request.leadership_transfer = ask.transfer;
    Ok(request)
}

#[derive(Serialize, Deserialize)]
struct VoteAnswer {
    vote: VoteV1,
    granted: bool,
    last: Option<LogIdV1>,
}

pub(crate) fn encode_vote_answer(r: &VoteResponse<Types>) -> Bytes {
    let answer = VoteAnswer {
        vote: (&r.vote).into(),
        granted: r.vote_granted,
        last: r.last_log_id.map(Into::into),
    };
    codec::encode(&answer).into()
}

pub(crate) fn decode_vote_answer(bytes: &[u8]) -> io::Result<VoteResponse<Types>> {
    let answer: VoteAnswer = codec::decode(bytes)?;
    let vote: Vote = answer.vote.into();
    Ok(VoteResponse::new(
        vote,
        answer.last.map(Into::into),
        answer.granted,
    ))
}

#[derive(Serialize, Deserialize)]
struct TransferAsk {
    from: VoteV1,
    to: u64,
    last: Option<LogIdV1>,
}

pub(crate) fn encode_transfer(r: &TransferLeaderRequest<Types>) -> Bytes {
    let ask = TransferAsk {
        from: r.from_leader().into(),
        to: *r.to_node_id(),
        last: r.last_log_id().copied().map(Into::into),
    };
    codec::encode(&ask).into()
}

pub(crate) fn decode_transfer(bytes: &[u8]) -> io::Result<TransferLeaderRequest<Types>> {
    let ask: TransferAsk = codec::decode(bytes)?;
    Ok(TransferLeaderRequest::new(
        ask.from.into(),
        ask.to,
        ask.last.map(Into::into),
    ))
}

/// A change of the membership or of the leader, carried to the leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Admin {
    AddLearner {
        id: u64,
        member: Member,
    },
    Promote {
        id: u64,
    },
    Remove {
        id: u64,
    },
    Transfer {
        to: Option<u64>,
    },
    /// New addresses of a member that is in; never lets one in.
    Update {
        id: u64,
        member: Member,
    },
    /// Would `Remove` be refused now? Changes nothing.
    MayRemove {
        id: u64,
    },
}

/// What a voter says when it is asked whether it should lead; the reasons in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fit {
    Yes,
    /// Only if no other can.
    Reluctant(String),
    /// Never.
    Barred(String),
}

/// The leader's answer to anything forwarded to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply<T> {
    Done(T),
    /// This member is not the leader (any more); nothing happened.
    NotLeader,
    /// Nothing happened; the same request may succeed in a moment.
    Busy(String),
    /// Nothing happened and asking again will not help.
    Refused(String),
    /// Too much is waiting here; nothing happened.
    Overloaded(String),
    /// It may or may not have happened.
    Unknown,
}

/// A forwarded command: how long its sender will wait, for a retry where the log was before the
/// first attempt (0 = this is the first), then the command as it is.
pub(crate) fn encode_propose(wait_ms: u32, retry: Option<u64>, command: &Bytes) -> Bytes {
    let mut out = BytesMut::with_capacity(PROPOSE_HEADER + command.len());
    out.put_u32_le(wait_ms);
    // Nothing was applied yet: 1 says the same, commands stand behind it.
    out.put_u64_le(retry.map_or(0, |since| since.max(1)));
    out.put_slice(command);
    out.freeze()
}

pub(crate) fn decode_propose(mut bytes: Bytes) -> io::Result<(u32, Option<u64>, Bytes)> {
    if bytes.len() < PROPOSE_HEADER {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a command without its header",
        ));
    }
    let wait_ms = bytes.get_u32_le();
    let retry = Some(bytes.get_u64_le()).filter(|since| *since > 0);
    Ok((wait_ms, retry, bytes))
}

/// The answer to a forwarded command: the machine's bytes as they are, behind a small header.
pub(crate) fn encode_proposed(reply: &Reply<Bytes>) -> Bytes {
    let (head, answer) = match reply {
        Reply::Done(answer) => (Reply::Done(()), answer.clone()),
        Reply::NotLeader => (Reply::NotLeader, Bytes::new()),
        Reply::Busy(why) => (Reply::Busy(why.clone()), Bytes::new()),
        Reply::Refused(why) => (Reply::Refused(why.clone()), Bytes::new()),
        Reply::Overloaded(why) => (Reply::Overloaded(why.clone()), Bytes::new()),
        Reply::Unknown => (Reply::Unknown, Bytes::new()),
    };
    let mut out = BytesMut::from(&codec::encode(&head)[..]);
    out.put_slice(&answer);
    out.freeze()
}

pub(crate) fn decode_proposed(bytes: Bytes) -> io::Result<Reply<Bytes>> {
    let (head, used): (Reply<()>, usize) = codec::decode_prefix(&bytes)?;
    Ok(match head {
        Reply::Done(()) => Reply::Done(bytes.slice(used..)),
        Reply::NotLeader => Reply::NotLeader,
        Reply::Busy(why) => Reply::Busy(why),
        Reply::Refused(why) => Reply::Refused(why),
        Reply::Overloaded(why) => Reply::Overloaded(why),
        Reply::Unknown => Reply::Unknown,
    })
}

/// What comes before a snapshot's bytes; the file itself carries the mark.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotBegin {
    pub(crate) vote: VoteV1,
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Command, Entry, Payload};

    fn id(index: u64) -> LogId {
        LogIdV1 {
            term: 2,
            leader: 1,
            index,
        }
        .into()
    }

    #[test]
    fn appends_survive_and_short_ones_are_refused() {
        let entry = |index, payload| Entry {
            log_id: id(index),
            payload,
        };
        let request = AppendEntriesRequest::<Types> {
            vote: Vote::new_committed(2, 1),
            prev_log_id: Some(id(4)),
            leader_commit: Some(id(3)),
            entries: vec![
                entry(5, Payload::Blank),
                entry(6, Payload::Normal(Command(Bytes::from_static(b"abc")))),
            ],
        };
        let bytes = encode_append(&request);
        let back = decode_append(bytes.clone()).unwrap();
        assert_eq!(back.vote, request.vote);
        assert_eq!(back.prev_log_id, request.prev_log_id);
        assert_eq!(back.leader_commit, request.leader_commit);
        assert_eq!(back.entries, request.entries);
        // Every cut loses bytes the head announced; only the command's own end is not self-evident,
        // and its length prefix covers that.
        for cut in 0..bytes.len() {
            assert!(decode_append(bytes.slice(..cut)).is_err(), "{cut}");
        }
    }

    #[test]
    fn what_is_known_of_a_disk_contradicts_only_what_cannot_be() {
        let at = |term, index| Position { term, index };
        let kept = Known::Kept(at(3, 10));
        assert!(!kept.contradicts(at(3, 10)) && !kept.contradicts(at(4, 12)));
        assert!(kept.contradicts(at(4, 9)) && kept.contradicts(at(2, 20)));
        let acknowledged = Known::Acknowledged(at(3, 10));
        assert!(acknowledged.contradicts(at(3, 9)));
        assert!(acknowledged.contradicts(at(2, 9)));
        assert!(!acknowledged.contradicts(at(3, 10)));
        assert!(!acknowledged.contradicts(at(4, 9)), "replaced since");
    }

    #[test]
    fn proposals_say_whether_they_are_retries() {
        let command = Bytes::from_static(b"abc");
        for (sent, seen) in [(None, None), (Some(0), Some(1)), (Some(7), Some(7))] {
            let bytes = encode_propose(1500, sent, &command);
            assert_eq!(
                decode_propose(bytes.clone()).unwrap(),
                (1500, seen, command.clone())
            );
            for cut in 0..PROPOSE_HEADER {
                assert!(decode_propose(bytes.slice(..cut)).is_err(), "{cut}");
            }
        }
    }

    #[test]
    fn answers_survive() {
        let granted = VoteResponse::<Types>::new(Vote::new(3, 2), Some(id(9)), true);
        assert_eq!(
            decode_vote_answer(&encode_vote_answer(&granted)).unwrap(),
            granted
        );
        let higher = AppendEntriesResponse::HigherVote(Vote::new(3, 2));
        let bytes = encode_append_answer(&higher);
        let back = decode_append_answer(&bytes, None, None).unwrap();
        assert_eq!(back, Err(StreamAppendError::HigherVote(Vote::new(3, 2))));
        let bytes = encode_append_answer(&AppendEntriesResponse::Conflict);
        assert!(decode_append_answer(&bytes, None, None).is_err());
        let back = decode_append_answer(&bytes, Some(id(7)), Some(id(8))).unwrap();
        assert_eq!(back, Err(StreamAppendError::Conflict(id(7))));
    }
}
