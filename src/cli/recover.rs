//! `mainstay member recover`: the last data directory of a cluster that lost its majority becomes a cluster
//! of one. Offline: the member must not run.

use super::table::{self, Output, Table};
use crate::rescue::recover::{Report, VERB, recover};
use clap::Args;
use std::path::PathBuf;

/// What `member recover` is told.
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// The data directory of a stopped member
    #[arg(long, env = "MAINSTAY_DATA_DIR")]
    data_dir: PathBuf,
    /// Only say what is there and what may be lost
    #[arg(long)]
    dry_run: bool,
}

/// Carry it out.
pub async fn run(args: RecoverArgs, output: Output) -> anyhow::Result<()> {
    let command = format!("{VERB} --data-dir {}", args.data_dir.display());
    let work = move || recover(&args.data_dir, args.dry_run, &command);
    let report = tokio::task::spawn_blocking(work).await??;
    table::emit(output, &report, draw)?;
    if output == Output::Table {
        for note in &report.notes {
            table::line(&format!("note: {note}"))?;
        }
        table::line(&next(&report))?;
    }
    Ok(())
}

fn next(report: &Report) -> String {
    match &report.new_cluster_id {
        None => {
            "nothing was changed; without --dry-run this member becomes a cluster of one".to_owned()
        }
        Some(id) => format!(
            "member {} is now the cluster {id}, alone: start it and wait until it is ready; then start the others with empty data directories",
            report.name
        ),
    }
}

fn draw(report: &Report) -> Table {
    let mut table = Table::new(&["WHAT", "VALUE"]);
    let members: Vec<_> = report
        .members
        .iter()
        .map(|m| format!("{} ({}, {})", m.name, m.role, m.id))
        .collect();
    let rows = [
        ("member", format!("{}, {}", report.name, report.id)),
        ("cluster", report.cluster_id.clone()),
        ("members known here", members.join(", ")),
        ("term", report.term.to_string()),
        ("last index", report.last_index.to_string()),
        (
            "committed, as known here",
            report.committed_index.to_string(),
        ),
        ("in the stored state", report.applied_index.to_string()),
        ("not known to be committed", report.open_count.to_string()),
    ];
    for (what, value) in rows {
        table.row([what.to_owned(), value]);
    }
    for entry in &report.open {
        table.row([
            format!("  entry {}", entry.index),
            format!("term {}: {}", entry.term, entry.what),
        ]);
    }
    table
}
