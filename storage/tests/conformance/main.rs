//! What every implementation must do, and what files must survive. One binary for the crate.

mod engine;
mod log;
mod support;
