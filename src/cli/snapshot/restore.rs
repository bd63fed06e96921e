//! `mainstay snapshot restore`: a fresh data directory from a saved file. Talks to no member.

use crate::backup::restore::{Restored, VERB, restore};
use crate::config;
use clap::Args;
use mainstay_raft::Member;
use std::path::PathBuf;

#[derive(Args, Debug)]
pub(super) struct RestoreArgs {
    /// A file that `mainstay snapshot save` made
    file: PathBuf,
    /// Name of the new cluster's first member
    #[arg(long, env = "MAINSTAY_NAME")]
    name: String,
    /// An empty or new directory
    #[arg(long, env = "MAINSTAY_DATA_DIR")]
    data_dir: PathBuf,
    /// The new cluster's member list, as its servers will be given it
    #[arg(long, env = "MAINSTAY_INITIAL_CLUSTER")]
    initial_cluster: Option<String>,
}

/// Blocks.
pub(super) fn run(args: &RestoreArgs) -> anyhow::Result<Restored> {
    config::check_name(&args.name)?;
    let mut member = Member {
        name: args.name.clone(),
        ..Member::default()
    };
    if let Some(list) = &args.initial_cluster {
        let list = config::parse_list(list)?;
        let Some(own) = list.iter().find(|entry| entry.name == args.name) else {
            anyhow::bail!(config::ConfigError(format!(
                "--initial-cluster does not name this member, \"{}\"",
                args.name
            )));
        };
        member.peer_url.clone_from(&own.url);
    }
    let command = format!(
        "{VERB} {} --name {} --data-dir {}",
        args.file.display(),
        args.name,
        args.data_dir.display()
    );
    restore(&args.file, &args.data_dir, member, &command)
}

/// What was done, and what comes next.
pub(super) fn sentence(restored: &Restored) -> String {
    format!(
        "member {} of the new cluster {} is ready, with everything up to index {} of cluster {}: start it and wait until it is ready; \
         then start the others with empty data directories and the same --initial-cluster",
        restored.name, restored.cluster_id, restored.snapshot.index, restored.snapshot.cluster_id
    )
}
