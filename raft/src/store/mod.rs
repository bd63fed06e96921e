//! What consensus keeps: the log, the applied state, snapshots. Knows no peer.

pub(crate) mod checkpoint;
pub(crate) mod digest;
mod export;
pub(crate) mod fault;
#[cfg(test)]
mod holes;
pub(crate) mod log;
pub(crate) mod lost;
pub(crate) mod machine;
pub(crate) mod snapshot;
#[cfg(test)]
mod suite;
mod worker;
