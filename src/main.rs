//! The `mainstay` binary: the command line, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    mainstay::cli::main()
}
