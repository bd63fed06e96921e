//! Saved snapshots: one file with everything the cloud knows at one index, outside of any member. Knows
//! what stands in the file, and how it is made, checked and kept; refuses to know the chunks of images,
//! which it names but does not hold.
//!
//! ```text
//! a member: read barrier -> snapshot file of its own -> the same entries under a header of ours -> stream
//! whoever receives: FILE.partial -> read again and checked, state and all -> fsync -> FILE
//! ```
//!
//! * [`export`]: a member's side. * [`mod@file`]: the receiver's. * [`inspect`]: the check, and what is in it.
//! * [`restore`]: a new cluster from one. * [`schedule`]: a member that saves by itself, and keeps the newest.

pub mod export;
pub mod file;
pub mod inspect;
pub mod restore;
pub mod schedule;

use mainstay_model::MemberId;
use mainstay_raft::offline::Point;
use mainstay_raft::{Member, MemberStatus, Role};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of [`Header`].
const VERSION: u32 = 1;
/// A header is small; a longer one is not ours.
const HEADER_LEN_MAX: usize = 1 << 20;

/// What a saved snapshot says of itself: JSON, the meta of the snapshot file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    version: u32,
    /// The cluster that it was taken from; empty in a snapshot file that a member made for itself.
    pub cluster_id: String,
    /// Release of the member that saved it.
    pub release: String,
    /// When, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Name of the member that saved it.
    pub saved_by: String,
    /// Everything up to this log index is in it.
    pub index: u64,
    /// Term of the entry at that index.
    pub term: u64,
    /// The members at that index.
    pub members: Vec<SavedMember>,
}

/// A member as a saved snapshot names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMember {
    /// Id, as it is shown everywhere.
    pub id: String,
    /// `voter` or `learner`.
    pub role: String,
    /// Name and addresses.
    #[serde(flatten)]
    pub member: Member,
}

impl Header {
    fn new(point: Point) -> Self {
        Self {
            version: VERSION,
            cluster_id: String::new(),
            release: String::new(),
            created_ms: 0,
            saved_by: String::new(),
            index: point.index,
            term: point.term,
            members: saved_members(point.members),
        }
    }

    fn encode(&self) -> anyhow::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    /// From a snapshot file's meta: a saved one's, or one that a member made for itself.
    fn decode(meta: &[u8]) -> anyhow::Result<Self> {
        anyhow::ensure!(meta.len() <= HEADER_LEN_MAX, "its header is too long");
        if meta.first() != Some(&b'{') {
            return Ok(Self::new(Point::decode(meta)?));
        }
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let found: Version = serde_json::from_slice(meta)?;
        anyhow::ensure!(
            found.version == VERSION,
            "it has format {}, and this release reads format {VERSION}: use the release that saved it",
            found.version
        );
        Ok(serde_json::from_slice(meta)?)
    }
}

fn saved_members(members: BTreeMap<u64, MemberStatus>) -> Vec<SavedMember> {
    let role = |role| match role {
        Role::Voter => "voter",
        Role::Learner => "learner",
    };
    members
        .into_iter()
        .map(|(id, at)| SavedMember {
            id: MemberId(id).to_string(),
            role: role(at.role).to_owned(),
            member: at.member,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes on disk of this release: a later one must still read them.
    #[test]
    fn golden_header() {
        let member = Member {
            name: "c1".into(),
            peer_url: "http://h:1".into(),
            api_url: "http://h:2".into(),
            registry_url: "http://h:3".into(),
        };
        let status = MemberStatus {
            member,
            role: Role::Voter,
            matched: None,
        };
        let header = Header {
            cluster_id: "c".into(),
            release: "1".into(),
            created_ms: 5,
            saved_by: "c1".into(),
            ..Header::new(Point {
                index: 7,
                term: 2,
                members: BTreeMap::from([(255, status)]),
            })
        };
        let text = r#"{"version":1,"cluster_id":"c","release":"1","created_ms":5,"saved_by":"c1","index":7,"term":2,"members":[{"id":"00000000000000ff","role":"voter","name":"c1","peer_url":"http://h:1","api_url":"http://h:2","registry_url":"http://h:3"}]}"#;
        assert_eq!(String::from_utf8(header.encode().unwrap()).unwrap(), text);
        assert_eq!(Header::decode(text.as_bytes()).unwrap(), header);
        let newer = text.replace("\"version\":1", "\"version\":2");
        let error = Header::decode(newer.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("format 2"), "{error}");
        assert!(Header::decode(b"").is_err());
    }
}
