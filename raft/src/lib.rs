//! Consensus for opaque bytes: openraft inside, none of its types outside. Knows no VM.
//!
//! * [`Group`]: this process's member of the Raft group: propose, read barrier, membership, status.
//! * [`Machine`]: what the committed bytes are applied to.
//! * [`offline`]: what is done to a member's stores while it does not run.
//! * [`Dialer`]: how another member is reached; [`Group::serve`] takes the other end.
//!
//! ```text
//!  Group::propose ──► leader's openraft ──► store::log (write-ahead log, one fdatasync per batch)
//!        │ forwarded      │  appends over transport::link (pipelined), answers in order
//!        ▼                ▼
//!  transport ◄──────► other members        committed ──► store::machine (apply in memory)
//!                                                            │ changed keys
//!                                                            ▼
//!                                                store::checkpoint (one thread, write behind)
//! ```

mod codec;
pub mod group;
pub mod machine;
pub mod offline;
#[cfg(feature = "seeded-bugs")]
mod seeded;
mod store;
pub mod transport;
mod types;

pub use group::{Agreement, Group, GroupConfig, GroupError, MemberStatus, Role, Status, Unfit};
pub use machine::{Fault, Machine};
pub use store::snapshot::SnapshotFile;
/// What of the consensus library's own messages is worth a line, as a filter of `tracing`. That a request met a
/// core which was told to stop is none: who asked is answered, and why a core ended by itself is said here.
pub const LOG_FILTER: &str = "openraft=error,openraft::raft::raft_inner=off";

pub use transport::{Dialer, Member, PeerStream};
