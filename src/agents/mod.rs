//! The controller's side of the node agents' protocol (`mainstay_agent::wire`): registration, the
//! stream of desired sets, reports. Turns what agents say into commands where something changed;
//! refuses to decide anything about instances or nodes (see `reconcile`).
//!
//! * [`liveness`]: heartbeats and soft figures, in memory, obtainable on every member.

pub mod liveness;

pub use liveness::Liveness;
