//! The controller: composition of model, storage, raft and agent into one process.
//!
//! See ARCHITECTURE.md for the code map.

pub mod agents;
pub mod app;
pub mod cli;
pub mod http;
pub mod registry;
pub mod stamp;
