//! The `mainstay` binary: the command line, nothing else.

use std::process::ExitCode;

/// A quarter of a member's processor time was the system's allocator; see docs/decisions.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    mainstay::cli::main()
}
