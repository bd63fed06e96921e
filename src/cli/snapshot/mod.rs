//! `mainstay snapshot`: save the whole state to a file, check such a file, make a new cluster from it.

mod restore;
mod save;

use super::table::{self, Output, Table};
use crate::backup::inspect::{Inspected, inspect};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Save, check and restore the state.
#[derive(Args, Debug)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Save everything the cloud knows to a file, from any member, while it works
    Save(save::SaveArgs),
    /// Check a saved file (its hash, the state in it, that state's invariants) and print what is in it
    Verify {
        /// The file
        file: PathBuf,
    },
    /// Make an empty data directory the first member of a new cluster, with the state of a saved file
    Restore(restore::RestoreArgs),
}

/// Carry out a `snapshot` command.
pub async fn run(args: SnapshotArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    match args.command {
        SnapshotCommand::Save(args) => save::run(args, endpoints, output).await,
        SnapshotCommand::Verify { file } => {
            let found = tokio::task::spawn_blocking(move || inspect(&file)).await??;
            Ok(table::emit(output, &found, draw)?)
        }
        SnapshotCommand::Restore(args) => {
            let restored = tokio::task::spawn_blocking(move || restore::run(&args)).await??;
            match output {
                Output::Json => table::emit(output, &restored, |_| Table::default())?,
                Output::Table => table::line(&restore::sentence(&restored))?,
            }
            Ok(())
        }
    }
}

fn draw(found: &Inspected) -> Table {
    let mut table = Table::new(&["WHAT", "VALUE"]);
    let counts = found.counts;
    let names: Vec<_> = found
        .members
        .iter()
        .map(|m| format!("{} ({})", m.member.name, m.role))
        .collect();
    let of = |text: &str| if text.is_empty() { "unknown" } else { text }.to_owned();
    let rows = [
        ("cluster", of(&found.cluster_id)),
        (
            "saved by",
            format!("{}, release {}", of(&found.saved_by), of(&found.release)),
        ),
        ("created", found.created.clone()),
        ("index, term", format!("{}, {}", found.index, found.term)),
        ("members", names.join(", ")),
        (
            "instances",
            format!("{}, {} of them live", counts.instances, counts.live),
        ),
        (
            "templates",
            format!("{}, {} tags", counts.templates, counts.tags),
        ),
        ("nodes", counts.nodes.to_string()),
        ("groups", counts.groups.to_string()),
        (
            "images named",
            format!("{} (their bytes are not in the file)", found.images.len()),
        ),
        (
            "file",
            format!("{}, {} keys", table::bytes(found.bytes), found.entries),
        ),
        ("state digest", found.state_digest.clone()),
    ];
    for (what, value) in rows {
        table.row([what.to_owned(), value]);
    }
    table
}
