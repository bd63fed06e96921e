//! Fills empty stores with a state, so that the member that starts on them is a group of one which goes
//! on at a given position. Knows no snapshot file.
//!
//! The log holds no entry: it was purged up to the position, as after installing a snapshot. Everything
//! here is repeated from the beginning after a crash, on stores that were emptied again.

use super::{durable, storage};
use crate::Member;
use crate::codec::{LogIdV1, Mark, encode_log_id, encode_vote};
use crate::types::{LogId, Membership, StoredMembership, Vote};
use mainstay_storage::engine::Engine;
use mainstay_storage::log::Log;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// The member that will start, and where its log goes on.
#[derive(Clone, Debug)]
pub struct Seed {
    /// Its id, which no member had before.
    pub id: u64,
    /// Where it is.
    pub member: Member,
    /// The state counts as applied up to this index.
    pub index: u64,
    /// In this term.
    pub term: u64,
}

/// Fill empty stores. Durable on return.
pub fn seed(
    log: &dyn Log,
    engine: &dyn Engine,
    entries: &mut dyn Iterator<Item = (Vec<u8>, Vec<u8>)>,
    at: Seed,
) -> io::Result<()> {
    let applied: LogId = LogIdV1 {
        term: at.term,
        leader: at.id,
        index: at.index,
    }
    .into();
    let voters = vec![BTreeSet::from([at.id])];
    let members = BTreeMap::from([(at.id, at.member)]);
    let membership = Membership::new(voters, members).map_err(io::Error::other)?;
    let mark = Mark {
        applied: Some(applied),
        membership: StoredMembership::new(Some(applied), membership),
    };
    engine.replace(entries, &mark.encode()).map_err(storage)?;
    let vote = encode_vote(&Vote::new(at.term, at.id));
    durable(|done| log.save_vote(vote, done))?;
    durable(|done| log.purge(at.index, encode_log_id(applied), done))
}
