//! What every implementation must do, and what files must survive. One binary for the crate.

#![allow(clippy::unwrap_used)] // helpers of tests

mod damage;
mod datadir;
mod disk;
mod engine;
mod fence;
mod kill;
mod log;
mod power;
mod snapshot;
mod support;
