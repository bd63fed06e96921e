//! Tests of the model from outside: scripts with transcripts, golden bytes, random histories.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod distribute;
mod golden;
mod history;
mod room;
mod sample;
mod saves;
mod script;
mod sim;

/// Whether expectations are to be rewritten instead of compared.
fn update() -> bool {
    #[allow(clippy::disallowed_methods)] // the test harness, not the model, asks
    std::env::var_os("UPDATE").is_some()
}
