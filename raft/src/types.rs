//! The consensus library's types, instantiated once. Nothing here is visible outside the crate.

use crate::store::machine::StateMachine;
use crate::transport::Member;
use bytes::Bytes;
use std::fmt;

/// A proposed command: opaque.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Command(pub(crate) Bytes);

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// What the machine answered: opaque.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer(pub(crate) Bytes);

// The re-exported runtime is marked deprecated in favour of a crate that we would have to pin too.
#[allow(deprecated)]
mod declare {
    use super::{Answer, Command, Member};
    openraft::declare_raft_types!(
        /// Type configuration.
        pub(crate) Types:
            D = Command,
            R = Answer,
            Node = Member,
    );
}
pub(crate) use declare::Types;

pub(crate) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub(crate) type LogId = openraft::LogId<LeaderId>;
pub(crate) type Vote = openraft::Vote<LeaderId>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type StoredMembership = openraft::StoredMembership<LeaderId, u64, Member>;
pub(crate) type Payload = openraft::EntryPayload<Command, u64, Member>;
pub(crate) type Entry = openraft::Entry<LeaderId, Payload>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, Member>;
pub(crate) type Raft = openraft::Raft<Types, StateMachine>;
pub(crate) type RpcError = openraft::errors::RPCError<Types>;
