//! From a static list to one cluster, in any start order and however often members restart.
//!
//! ```text
//! no cluster id --hello to all--> a peer has one: take it, then join as learner, be promoted
//!                            \--> nobody has one, a majority is there: agree on a charter (paxos)
//! charter names us: its cluster id is ours, initialise the group with its founders (all do; idempotent)
//! charter does not name us: join
//! ```
//!
//! * [`paxos`] decides (pure). * [`ledger`] remembers. * [`run`] talks.
//!
//! A member that is refused never ends by itself: it says why (log, `/readyz`) and keeps asking, because
//! what is wrong may be on the other side and repaired there.

pub mod ledger;
pub mod paxos;
pub mod run;

pub use ledger::{Ledger, LedgerError};
pub use paxos::{Ballot, Charter, Founder, Reply, Request};
pub use run::{found, stay};
