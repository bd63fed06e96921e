//! `mainstay member`: list and change the members. Every change is asked of one member, which has the
//! leader carry it out.

use super::client::ApiClient;
use super::status::{self, MemberRow};
use super::table::{self, Output, Table};
use super::{recover, repair};
use anyhow::bail;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

/// List and change the members.
#[derive(Args, Debug)]
pub struct MemberArgs {
    #[command(subcommand)]
    command: MemberCommand,
}

#[derive(Debug, Subcommand)]
enum MemberCommand {
    /// Every member of the group
    List,
    /// Let a member with a fresh data directory take the place of one that lost its own
    Replace {
        /// Its name in the member list
        name: String,
        /// Also if the old one still answers
        #[arg(long)]
        force: bool,
    },
    /// Take a member out of the group for good
    Remove {
        /// Name or id
        name: String,
        /// Also if it still answers
        #[arg(long)]
        force: bool,
    },
    /// Make the last data directory of a cluster that lost its majority a cluster of one (offline)
    Recover(recover::RecoverArgs),
    /// Let a member whose data directory is damaged join again, keeping its chunks (while it is stopped)
    Repair(repair::RepairArgs),
    /// Hand the leadership to another member
    TransferLeader {
        /// Name or id; any that has caught up when absent
        name: Option<String>,
    },
}

/// Carry out a `member` command.
pub async fn run(args: MemberArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    match args.command {
        MemberCommand::List => list(endpoints, output).await,
        MemberCommand::Replace { name, force } => {
            let text = change(endpoints, "replace", json!({"name": name, "force": force})).await?;
            table::line(&text)?;
            Ok(())
        }
        MemberCommand::Remove { name, force } => {
            let text = change(endpoints, "remove", json!({"name": name, "force": force})).await?;
            table::line(&text)?;
            Ok(())
        }
        MemberCommand::Recover(args) => recover::run(args, output).await,
        MemberCommand::Repair(args) => repair::run(args, endpoints, output).await,
        MemberCommand::TransferLeader { name } => {
            let text = change(endpoints, "transfer-leader", json!({"name": name})).await?;
            table::line(&text)?;
            Ok(())
        }
    }
}

async fn change(endpoints: &[String], verb: &str, body: Value) -> anyhow::Result<String> {
    let client = ApiClient::new(endpoints)?;
    Ok(client
        .post(&format!("/api/v1/member/{verb}"), &body)
        .await?)
}

async fn list(endpoints: &[String], output: Output) -> anyhow::Result<()> {
    let members = status::members(endpoints).await?;
    if members.is_empty() {
        bail!("not part of a cluster yet: start the other members of the list");
    }
    Ok(table::emit(output, &members, |members| draw(members))?)
}

fn draw(members: &[MemberRow]) -> Table {
    let mut table = Table::new(&["NAME", "ID", "ROLE", "LEADER", "API", "REGISTRY", "PEER"]);
    for m in members {
        table.row([
            m.name.as_str(),
            m.id.as_str(),
            m.role.as_str(),
            if m.is_leader { "yes" } else { "" },
            m.api_url.as_str(),
            m.registry_url.as_str(),
            m.peer_url.as_str(),
        ]);
    }
    table
}
