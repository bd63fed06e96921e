//! What every implementation must do, and what files must survive. One binary for the crate.

#![allow(clippy::unwrap_used, clippy::print_stderr)] // helpers of tests; figures of long forms

mod chunks;
mod churn;
mod damage;
mod datadir;
mod disk;
mod engine;
mod fence;
mod kill;
mod log;
mod power;
mod shared;
mod sharing;
mod snapshot;
mod support;
