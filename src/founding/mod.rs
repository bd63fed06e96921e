//! From a static list to one cluster, in any start order and however often members restart; and from
//! outside into a cluster that runs.
//!
//! ```text
//! no cluster id --hello to all--> a peer has one: take it, then join as learner, be promoted
//!                            \--> nobody has one, a majority is there: agree on a charter (paxos)
//! charter names us: its cluster id is ours, initialise the group with its founders (all do; idempotent)
//! charter does not name us: join
//! --join: never founds; takes the id of the one cluster that answers there, then the same
//! ```
//!
//! * [`paxos`] decides (pure). * [`ledger`] remembers. * [`run`] founds, `join` finds, [`stay()`] lives.
//! * `roll`: who answers where.
//!
//! A member that is refused never ends by itself: it says why (log, `/readyz`) and keeps asking, because
//! what is wrong may be on the other side and repaired there. Only one thing is final: an identity that
//! its cluster has taken out takes part in nothing any more.

mod join;
pub mod ledger;
pub mod paxos;
mod roll;
pub mod run;
mod stay;

pub use ledger::{Ledger, LedgerError};
pub use paxos::{Ballot, Charter, Founder, Reply, Request};
pub use run::found;
pub use stay::{Parted, stay};
