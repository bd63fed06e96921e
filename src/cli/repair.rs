//! `mainstay member repair`: a member whose log, state or identity is damaged joins the living members again,
//! without fetching its images anew. The member itself must not run; a majority of the others must.

use super::table::{self, Output, Table};
use crate::rescue::repair::{Repaired, Request, VERB, repair};
use clap::Args;
use std::path::PathBuf;

/// What `member repair` is told.
#[derive(Args, Debug)]
pub struct RepairArgs {
    /// The data directory of a stopped member
    #[arg(long, env = "MAINSTAY_DATA_DIR")]
    data_dir: PathBuf,
    /// Its name; needed only if its identity is damaged
    #[arg(long)]
    name: Option<String>,
    /// Also if nothing is damaged
    #[arg(long)]
    force: bool,
}

/// Carry it out; members are looked for at `endpoints`, and where they were when this one last ran.
pub async fn run(args: RepairArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    let command = format!("{VERB} --data-dir {}", args.data_dir.display());
    let repaired = repair(Request {
        root: args.data_dir,
        endpoints: endpoints.to_vec(),
        name: args.name,
        force: args.force,
        command,
    })
    .await?;
    match output {
        Output::Json => table::emit(output, &repaired, |_| Table::default())?,
        Output::Table => {
            for damage in &repaired.damage {
                table::line(&format!("found: {damage}"))?;
            }
            table::line(&sentence(&repaired))?;
        }
    }
    Ok(())
}

fn sentence(repaired: &Repaired) -> String {
    format!(
        "member {} has a new identity, {}, in cluster {}; its chunks were kept: start it, and it catches up and votes again by itself",
        repaired.name, repaired.new_id, repaired.cluster_id
    )
}
