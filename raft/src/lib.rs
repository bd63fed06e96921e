//! Consensus for opaque bytes: openraft inside, none of its types outside. Knows no VM.
//!
//! * [`Group`]: this process's member of the Raft group: propose, read barrier, membership, status.
//! * [`Machine`]: what the committed bytes are applied to.
//! * [`Dialer`]: how another member is reached; [`Group::serve`] takes the other end.

pub mod group;
pub mod machine;
pub mod transport;

pub use group::{Group, GroupConfig, GroupError, MemberStatus, Role, Status};
pub use machine::{Fault, Machine};
pub use transport::{Dialer, Member, PeerStream};
