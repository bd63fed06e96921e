//! `mainstay member`: list and change the members. Every change is asked of one member, which has the
//! leader carry it out.

use super::client::ApiClient;
use super::status::{self, MemberRow};
use super::table::{self, Output, Table};
use super::{recover, repair};
use anyhow::bail;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// List and change the members.
#[derive(Args, Debug)]
pub struct MemberArgs {
    #[command(subcommand)]
    command: MemberCommand,
}

#[derive(Debug, Subcommand)]
enum MemberCommand {
    /// Every member of the group: its part, whether it answers, how far it is behind
    List,
    /// Print the command that makes a fresh machine a member; changes nothing by itself
    Add {
        /// The new member's name
        name: String,
        /// It shall hold a copy of everything, but have no vote
        #[arg(long)]
        learner: bool,
    },
    /// Give a learner a vote
    Promote {
        /// Name or id
        name: String,
    },
    /// Tell the others where a member is now; its own flags, when they change, do the same
    Update {
        /// Name or id
        name: String,
        /// Where the other members reach it
        #[arg(long, value_name = "URL")]
        peer_url: Option<String>,
        /// Where clients reach it
        #[arg(long, value_name = "URL")]
        api_url: Option<String>,
        /// Where registry clients reach it
        #[arg(long, value_name = "URL")]
        registry_url: Option<String>,
        /// Also if it does not answer there yet
        #[arg(long)]
        force: bool,
    },
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
        /// Also if only it holds the bytes of some templates: these are lost
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
    let text = match args.command {
        MemberCommand::List => return list(endpoints, output).await,
        MemberCommand::Add { name, learner } => {
            return add(endpoints, output, &name, learner).await;
        }
        MemberCommand::Promote { name } => {
            change(endpoints, "promote", json!({ "name": name })).await?
        }
        MemberCommand::Update {
            name,
            peer_url,
            api_url,
            registry_url,
            force,
        } => {
            let body = json!({
                "name": name, "peer_url": peer_url, "api_url": api_url,
                "registry_url": registry_url, "force": force,
            });
            change(endpoints, "update", body).await?
        }
        MemberCommand::Replace { name, force } => {
            take_out(endpoints, "replace", &name, force).await?
        }
        MemberCommand::Remove { name, force } => {
            take_out(endpoints, "remove", &name, force).await?
        }
        MemberCommand::Recover(args) => return recover::run(args, output).await,
        MemberCommand::Repair(args) => return repair::run(args, endpoints, output).await,
        MemberCommand::TransferLeader { name } => {
            change(endpoints, "transfer-leader", json!({ "name": name })).await?
        }
    };
    Ok(table::line(&text)?)
}

async fn change<T: DeserializeOwned>(
    endpoints: &[String],
    verb: &str,
    body: Value,
) -> anyhow::Result<T> {
    let client = ApiClient::new(endpoints)?;
    Ok(client
        .post(&format!("/api/v1/member/{verb}"), &body)
        .await?)
}

/// With the identity that carries the name now: when the answer is lost and the request is sent again,
/// it must not meet the one that has taken the name since.
async fn take_out(
    endpoints: &[String],
    verb: &str,
    name: &str,
    force: bool,
) -> anyhow::Result<String> {
    let members = status::members(endpoints).await?;
    let meant = members.iter().find(|m| m.name == name || m.id == name);
    let id = meant.map(|m| m.id.clone());
    let body = json!({ "name": name, "id": id, "force": force });
    change(endpoints, verb, body).await
}

/// What the member says of one that is to come.
#[derive(Deserialize, Serialize)]
struct Added {
    command: String,
    note: String,
}

async fn add(
    endpoints: &[String],
    output: Output,
    name: &str,
    learner: bool,
) -> anyhow::Result<()> {
    let body = json!({ "name": name, "learner": learner });
    let added: Added = change(endpoints, "add", body).await?;
    if output == Output::Json {
        return Ok(table::emit(output, &added, |_| Table::new(&[]))?);
    }
    table::line("Run this on the new machine, with its own address for HOST:")?;
    table::line(&format!("\n    {}\n", added.command))?;
    table::line(&format!(
        "It joins by itself; follow it with `mainstay member list`. Note: {}.",
        added.note
    ))?;
    Ok(())
}

async fn list(endpoints: &[String], output: Output) -> anyhow::Result<()> {
    let members = status::members_seen_by_leader(endpoints).await?;
    if members.is_empty() {
        bail!("not part of a cluster yet: start the other members of the list");
    }
    Ok(table::emit(output, &members, |members| draw(members))?)
}

fn draw(members: &[MemberRow]) -> Table {
    let mut table = Table::new(&[
        "NAME", "ID", "ROLE", "LEADER", "ANSWERS", "MATCHED", "LAG", "API", "REGISTRY", "PEER",
    ]);
    let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
    for m in members {
        let role = if m.leaving {
            format!("{} (leaving)", m.role)
        } else {
            m.role.clone()
        };
        let answers = match m.answers {
            Some(true) => "yes",
            Some(false) => "no",
            None => "-",
        };
        table.row([
            m.name.clone(),
            m.id.clone(),
            role,
            if m.is_leader { "yes" } else { "" }.to_owned(),
            answers.to_owned(),
            number(m.matched),
            number(m.lag),
            m.api_url.clone(),
            m.registry_url.clone(),
            m.peer_url.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_is_known_and_no_more() {
        let member = |name: &str| MemberRow {
            name: name.into(),
            role: "voter".into(),
            ..MemberRow::default()
        };
        let rows = [
            MemberRow {
                answers: Some(true),
                matched: Some(90),
                lag: Some(10),
                ..member("c1")
            },
            MemberRow {
                answers: Some(false),
                leaving: true,
                ..member("c2")
            },
            member("c3"),
        ];
        let text = draw(&rows).to_string();
        let row = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(row("c1")[1..], ["voter", "yes", "90", "10"]);
        assert_eq!(row("c2")[1..], ["voter", "(leaving)", "no", "-", "-"]);
        assert_eq!(row("c3")[1..], ["voter", "-", "-", "-"]);
    }
}
