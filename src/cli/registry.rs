//! `mainstay registry`: give back the room of chunks that no tag needs, and verify what is stored. Every
//! member looks after its own disk, so each is asked by itself, on its registry port.

use super::client::{ApiClient, query};
use super::status::MemberRow;
use super::table::{self, Output, Table};
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use futures::future::join_all;
use mainstay_agent::transfer::api::{
    Collection, CollectionStatus, GC, QUOTA, QuotaRequest, SCRUB, ScrubStatus, USAGE, Usage,
};
use serde::Serialize;
use serde_json::json;
use std::time::Duration;

/// Pause between two looks at work under way.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Look after what the members store.
#[derive(Args, Debug)]
pub struct RegistryArgs {
    #[command(subcommand)]
    command: RegistryCommand,
}

#[derive(Subcommand, Debug)]
enum RegistryCommand {
    /// Give back the room of chunks that no tag has needed for the members' --gc-grace
    Gc {
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
        /// Only this member, by name
        #[arg(long, value_name = "NAME")]
        member: Option<String>,
    },
    /// Show how far the members are with verifying what they store
    Scrub {
        /// Verify everything now, as fast as the disks can, and wait for the end
        #[arg(long)]
        now: bool,
        /// Only this member, by name
        #[arg(long, value_name = "NAME")]
        member: Option<String>,
    },
    /// Show what each template and OCI repository takes on a member's disk, compressed, each chunk once
    Usage,
    /// Set how much may be stored: of everything, or of one template or OCI repository. Pushes that would
    /// exceed it are refused
    Quota {
        /// A size such as 200GiB, or "none"
        #[arg(value_name = "SIZE")]
        size: String,
        /// Only of the template or OCI repository of this name; it need not be there yet
        #[arg(long, value_name = "NAME")]
        template: Option<String>,
    },
}

/// A member's answer, or why there is none.
#[derive(Serialize)]
struct Row<T> {
    member: String,
    #[serde(flatten)]
    answer: Option<T>,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
}

/// Carry out a `registry` command.
pub async fn run(args: RegistryArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    match args.command {
        RegistryCommand::Gc { dry_run, member } => {
            let members = members(endpoints, member.as_deref()).await?;
            let rows = each(&members, |client| collect(client, dry_run)).await;
            table::emit(output, &rows, |rows| draw_collections(rows))?;
            let refused = |c: &Collection| (!c.refused.is_empty()).then(|| c.refused.clone());
            all_well(&rows, refused)
        }
        RegistryCommand::Scrub { now, member } => {
            let members = members(endpoints, member.as_deref()).await?;
            let rows = each(&members, |client| scrub(client, now)).await;
            table::emit(output, &rows, |rows| draw_scrubs(rows, now))?;
            let lost = |s: &ScrubStatus| s.broken.first().cloned();
            all_well(&rows, lost)
        }
        RegistryCommand::Usage => {
            let usage: Usage = any(endpoints).await?.get(USAGE).await?;
            Ok(table::emit(output, &usage, draw_usage)?)
        }
        RegistryCommand::Quota { size, template } => {
            let bytes =
                match size.as_str() {
                    "none" => None,
                    text => Some(crate::space::bytes(text).with_context(|| {
                        format!("{text}: give a size such as 200GiB, or \"none\"")
                    })?),
                };
            let template = template.unwrap_or_default();
            let asked = QuotaRequest { template, bytes };
            let usage: Usage = any(endpoints).await?.put(QUOTA, &asked).await?;
            Ok(table::emit(output, &usage, draw_usage)?)
        }
    }
}

/// Of any member's registry.
async fn any(endpoints: &[String]) -> anyhow::Result<ApiClient> {
    let members = members(endpoints, None).await?;
    let urls: Vec<String> = members.into_iter().map(|m| m.registry_url).collect();
    Ok(ApiClient::new(&urls)?)
}

fn draw_usage(usage: &Usage) -> Table {
    let mut table = Table::new(&["TEMPLATE", "SIZE", "STORED", "UNIQUE", "QUOTA", "TAGS"]);
    let quota = |quota: Option<u64>| quota.map(table::bytes).unwrap_or_default();
    for of in &usage.templates {
        table.row([
            of.name.clone(),
            table::bytes(of.logical_bytes),
            table::bytes(of.stored_bytes),
            table::bytes(of.unique_bytes),
            quota(of.quota),
            of.tags.len().to_string(),
        ]);
    }
    for of in &usage.repositories {
        table.row([
            format!("{} (OCI)", of.name),
            String::new(),
            table::bytes(of.stored_bytes),
            table::bytes(of.unique_bytes),
            quota(of.quota),
            of.artifacts.to_string(),
        ]);
    }
    let there = |name: &String| {
        let template = usage.templates.iter().any(|t| t.name == *name);
        template || usage.repositories.iter().any(|r| r.name == *name)
    };
    for (name, bytes) in &usage.quotas {
        if !name.is_empty() && !there(name) {
            let bytes = table::bytes(*bytes);
            table.row([name, "", "", "", &bytes, "0"].map(str::to_owned));
        }
    }
    let all = table::bytes(usage.stored_bytes);
    let incomplete = match usage.whole {
        true => "",
        false => "this member does not hold everything yet",
    };
    table.row(["(all)", "", &all, "", &quota(usage.quota), incomplete].map(str::to_owned));
    table
}

async fn members(endpoints: &[String], only: Option<&str>) -> anyhow::Result<Vec<MemberRow>> {
    let client = ApiClient::new(endpoints)?;
    let mut members: Vec<MemberRow> = client.get("/api/v1/members").await?;
    members.retain(|m| only.is_none_or(|name| m.name == name));
    match only {
        Some(name) if members.is_empty() => {
            bail!("there is no member {name}: see `mainstay member list`")
        }
        _ => Ok(members),
    }
}

/// Ask each member by itself, all at once.
async fn each<T, F: Future<Output = anyhow::Result<T>>>(
    members: &[MemberRow],
    ask: impl Fn(ApiClient) -> F,
) -> Vec<Row<T>> {
    let asked = members.iter().map(|member| {
        let client = ApiClient::new(std::slice::from_ref(&member.registry_url));
        let asked = client.map(&ask);
        async move {
            let answer = match asked {
                Ok(asked) => asked.await,
                Err(error) => Err(error.into()),
            };
            let error = answer.as_ref().err().map(|e| format!("{e:#}"));
            Row {
                member: member.name.clone(),
                answer: answer.ok(),
                error: error.unwrap_or_default(),
            }
        }
    });
    join_all(asked).await
}

/// The exit code: every member answered, and has nothing to complain about.
fn all_well<T>(rows: &[Row<T>], complaint: impl Fn(&T) -> Option<String>) -> anyhow::Result<()> {
    for row in rows {
        let said = row.answer.as_ref().and_then(&complaint);
        if let Some(why) = said.or_else(|| (!row.error.is_empty()).then(|| row.error.clone())) {
            bail!("member {}: {why}", row.member);
        }
    }
    Ok(())
}

async fn collect(client: ApiClient, dry_run: bool) -> anyhow::Result<Collection> {
    let path = format!(
        "{GC}{}",
        query(&[("dry_run", if dry_run { "1" } else { "0" })])
    );
    let asked: CollectionStatus = client.post(&path, &json!({})).await?;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now: CollectionStatus = client.get(GC).await?;
        if now.asked < asked.asked {
            bail!("it was started again meanwhile");
        }
        if let (true, Some(last)) = (now.done >= asked.asked, now.last) {
            return Ok(last);
        }
    }
}

async fn scrub(client: ApiClient, now: bool) -> anyhow::Result<ScrubStatus> {
    if !now {
        return Ok(client.get(SCRUB).await?);
    }
    let asked: ScrubStatus = client.post(SCRUB, &json!({})).await?;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now: ScrubStatus = client.get(SCRUB).await?;
        if now.asked < asked.asked {
            bail!("it was started again meanwhile");
        }
        if !now.failure.is_empty() {
            bail!("{}", now.failure);
        }
        if now.done >= asked.asked {
            return Ok(now);
        }
    }
}

fn draw_collections(rows: &[Row<Collection>]) -> Table {
    let mut table = Table::new(&[
        "MEMBER",
        "LIVE",
        "WAITING",
        "DEAD",
        "ON DISK",
        "GIVES BACK",
        "GIVEN BACK",
        "MESSAGE",
    ]);
    for row in rows {
        let Some(found) = &row.answer else {
            table.row([
                row.member.as_str(),
                "",
                "",
                "",
                "",
                "",
                "",
                row.error.as_str(),
            ]);
            continue;
        };
        let postponed = match found.postponed_packs {
            0 => String::new(),
            packs => format!("{packs} packs wait for room on the disk"),
        };
        table.row([
            row.member.clone(),
            table::bytes(found.live_bytes),
            table::bytes(found.waiting_bytes),
            table::bytes(found.dead_bytes),
            format!(
                "{} in {} packs",
                table::bytes(found.pack_bytes),
                found.packs
            ),
            table::bytes(found.reclaimable_bytes),
            table::bytes(found.freed_bytes),
            if found.refused.is_empty() {
                postponed
            } else {
                found.refused.clone()
            },
        ]);
    }
    table
}

/// `asked`: of the round that was waited for; the next one may have begun since.
fn draw_scrubs(rows: &[Row<ScrubStatus>], asked: bool) -> Table {
    let mut table = Table::new(&[
        "MEMBER",
        "ROUND",
        "VERIFIED",
        "DAMAGED",
        "DAMAGED NOW",
        "LAST ENDED",
        "MESSAGE",
    ]);
    for row in rows {
        let Some(now) = &row.answer else {
            table.row([row.member.as_str(), "", "", "", "", "", row.error.as_str()]);
            continue;
        };
        let (chunks, damaged) = match asked {
            true => (now.last_chunks, now.last_damaged),
            false => (now.round_chunks, now.round_damaged),
        };
        let percent = now.seen_bytes.min(now.total_bytes) * 100 / now.total_bytes.max(1);
        let ended = match now.ended_ms {
            0 => "never".to_owned(),
            at => format!(
                "{} ago",
                table::age(crate::stamp::now_ms().saturating_sub(at))
            ),
        };
        let mut message = now.broken.clone();
        message.extend((!now.failure.is_empty()).then(|| now.failure.clone()));
        table.row([
            row.member.clone(),
            match now.running && !asked {
                true => format!("{percent}%"),
                false => "done".to_owned(),
            },
            format!("{chunks} chunks"),
            damaged.to_string(),
            now.damaged_now.to_string(),
            ended,
            message.join("; "),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RegistryArgs,
    }

    #[test]
    fn the_documented_lines_parse() {
        for line in [
            "x gc",
            "x gc --dry-run --member c1",
            "x scrub",
            "x scrub --now",
            "x usage",
            "x quota 200GiB",
            "x quota none --template ci",
        ] {
            Cli::try_parse_from(line.split(' '))
                .map(|c| c.args)
                .unwrap();
        }
        assert!(Cli::try_parse_from(["x", "scrub", "--dry-run"]).is_err());
    }
}
