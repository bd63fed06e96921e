//! The controller: composition of model, storage, raft and agent into one process.
//!
//! See ARCHITECTURE.md for the code map.

#[cfg(all(feature = "seeded-bugs", not(debug_assertions)))]
compile_error!("seeded bugs are for tests: never build a release with them");

pub mod agents;
pub mod app;
pub mod backup;
pub mod bucket;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod founding;
pub mod http;
pub mod listen;
pub mod machine;
pub mod peer;
pub mod reconcile;
pub mod registry;
pub mod rescue;
pub mod server;
pub mod space;
pub mod stamp;
