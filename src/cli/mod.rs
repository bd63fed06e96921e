//! The command line: which verbs there are, where their endpoints come from, and what exit code a
//! script sees. Each verb's part talks to a cluster over its public ports only; none opens a data
//! directory of a running member.
//!
//! | exit code | means |
//! | --- | --- |
//! | 0 | done |
//! | 1 | the cluster, or this machine, said no; the reason is on standard error |
//! | 2 | the command line is wrong |
//! | 3 | no member answered |
//! | others | of `instance exec` and `ssh`: the program's; 124 it was killed for its time, 125 it was not run, or its end is unknown |

pub mod access;
pub mod bench;
pub mod client;
pub mod dev;
mod fetch;
mod fleet;
pub mod instance;
pub mod load;
pub mod member;
pub mod node;
pub mod recover;
pub mod registry;
pub mod repair;
mod save;
pub mod server;
pub mod snapshot;
pub mod status;
pub mod table;
pub mod template;

use crate::config::ServerArgs;
use clap::{CommandFactory, Parser, Subcommand};
use client::ClientError;
use std::io::Write;
use std::process::ExitCode;
use table::Output;

/// Release and build, as shown to people and clients.
pub const VERSION: &str = match option_env!("MAINSTAY_VERSION") {
    Some(version) => version,
    None => concat!(env!("CARGO_PKG_VERSION"), "-dev"),
};
/// What is asked without `--endpoints`.
const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:8090";

/// A highly available VM cloud in one binary.
#[derive(Debug, Parser)]
#[command(name = "mainstay", version = VERSION)]
struct Cli {
    /// API addresses of members; the next is asked when one does not answer [default: http://127.0.0.1:8090]
    #[arg(long, global = true, env = "MAINSTAY_ENDPOINTS", value_delimiter = ',')]
    endpoints: Vec<String>,
    /// Form of results
    #[arg(long, global = true, value_enum, default_value_t = Output::Table, env = "MAINSTAY_OUTPUT")]
    output: Output,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run one member
    Server(Box<ServerArgs>),
    /// Three members and one node on this machine, a template pushed, ready to use
    Dev(dev::DevArgs),
    /// Every member: leader, term, index, size, errors
    Status,
    /// List and change the members
    Member(member::MemberArgs),
    /// Join as a node; list, show, drain and remove nodes
    Node(node::NodeArgs),
    /// Start, list, show, restart and terminate instances; get into them
    Instance(Box<instance::InstanceArgs>),
    /// Push, pull and manage templates
    Template(template::TemplateArgs),
    /// Give back room that no tag needs; verify what the members store
    Registry(registry::RegistryArgs),
    /// Save the whole state, check a saved one, make a new cluster from it
    Snapshot(snapshot::SnapshotArgs),
    /// Measure a cluster under load
    Bench(bench::BenchArgs),
    /// Print a completion script for a shell
    Completion {
        /// Which
        shell: clap_complete::Shell,
    },
}

/// Parse the command line, carry it out, answer with the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return failed(&anyhow::Error::new(e).context("cannot start")),
    };
    let done = runtime.block_on(run(cli));
    // A blocking call that is still under way must not keep the process.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let endpoints = match cli.endpoints {
        none if none.is_empty() => vec![DEFAULT_ENDPOINT.to_owned()],
        some => some,
    };
    let output = cli.output;
    match cli.verb {
        Verb::Server(args) => Box::pin(server::run(*args)).await,
        Verb::Dev(args) => Box::pin(dev::run(args)).await,
        Verb::Status => status::run(&endpoints, output).await,
        Verb::Member(args) => member::run(args, &endpoints, output).await,
        Verb::Node(args) => Box::pin(node::run(args, &endpoints, output)).await,
        Verb::Instance(args) => Box::pin(instance::run(*args, &endpoints, output)).await,
        Verb::Template(args) => Box::pin(template::run(args, &endpoints, output)).await,
        Verb::Registry(args) => Box::pin(registry::run(args, &endpoints, output)).await,
        Verb::Snapshot(args) => Box::pin(snapshot::run(args, &endpoints, output)).await,
        Verb::Bench(args) => Box::pin(bench::run(args, &endpoints, output == Output::Json)).await,
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mainstay", &mut script);
            Ok(std::io::stdout().lock().write_all(&script)?)
        }
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    if let Some(exit) = error.downcast_ref::<access::Exit>() {
        if !exit.message.is_empty() {
            writeln!(std::io::stderr().lock(), "error: {exit}").ok();
        }
        return ExitCode::from(exit.code);
    }
    // Whoever reads standard error is gone: nobody is left to tell.
    writeln!(std::io::stderr().lock(), "error: {error:#}").ok();
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable(_)) => ExitCode::from(3),
        Some(ClientError::Usage(_)) => ExitCode::from(2),
        _ if error.is::<crate::config::ConfigError>() => ExitCode::from(2),
        _ => ExitCode::from(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn endpoints_may_follow_the_verb() {
        let cli = Cli::parse_from(["mainstay", "status", "--endpoints", "a:1,b:2"]);
        assert_eq!(cli.endpoints, ["a:1", "b:2"]);
    }
}
