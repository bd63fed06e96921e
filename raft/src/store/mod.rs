//! What consensus keeps: the log, the applied state, snapshots. Knows no peer.

pub(crate) mod checkpoint;
pub(crate) mod fault;
pub(crate) mod log;
pub(crate) mod machine;
pub(crate) mod snapshot;
#[cfg(test)]
mod suite;
