//! `mainstay template`: push, pull, list, show, delete, revert, replicas, distribute. Talks to the API port for
//! what the dialect knows, and to the registry ports (learnt from the member list) for bytes.

mod copy;
mod distribute;
mod suspend;

use self::copy::{PullArgs, PushArgs};
use self::distribute::DistributeArgs;
use super::client::{ApiClient, query};
use super::table::{self, Output, Table};
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use mainstay_agent::transfer::api::{REPLICAS, TagReplicas, USAGE, Usage};
use serde::Deserialize;
use serde_json::{Value, json};

/// Push, pull and manage templates.
#[derive(Args, Debug)]
pub struct TemplateArgs {
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Subcommand, Debug)]
enum TemplateCommand {
    /// Push a disk as a new tag; interrupted, the same command goes on where it was
    Push(Box<PushArgs>),
    /// Pull a tag's disk into a file; interrupted, the same command goes on where it was
    Pull(PullArgs),
    /// List all templates
    List,
    /// Show one template with its tags
    Show {
        /// Template, by name or id
        template: String,
    },
    /// Delete a template with all its tags, or one of its tags and no other
    Delete {
        /// Template, by name or id
        template: String,
        /// Only this tag
        #[arg(long, conflicts_with = "number")]
        tag: Option<String>,
        /// Only the tag with this number
        #[arg(long)]
        number: Option<u32>,
    },
    /// Change what is said of a tag
    Describe {
        /// Template, by name or id
        template: String,
        /// Tag name; the latest when absent
        #[arg(long)]
        tag: Option<String>,
        /// Shown with the tag
        #[arg(long, required_unless_present = "arch")]
        description: Option<String>,
        /// What it runs on
        #[arg(long, value_parser = ["amd64", "arm64"])]
        arch: Option<String>,
    },
    /// Delete a tag and every later one; the latest tag if none is named
    Revert {
        /// Template, by name or id
        template: String,
        /// Tag name
        #[arg(long, conflicts_with = "number")]
        tag: Option<String>,
        /// Tag number
        #[arg(long)]
        number: Option<u32>,
    },
    /// Show which members hold a tag, and how far the others are
    Replicas {
        /// Template, by name or id
        template: String,
        /// Only this tag; all when absent
        #[arg(long)]
        tag: Option<String>,
    },
    /// Let nodes fetch a tag before an instance needs it
    Distribute(DistributeArgs),
    /// Show distributions, or how far one is on each node
    Distributions {
        /// Request id; all when absent
        id: Option<String>,
    },
    /// Nodes that have not fetched it need not; what is on others stays
    CancelDistribution {
        /// Request id
        id: String,
    },
    /// Let nodes drop what they have cached of a template; what a VM stands on goes after its end
    RemoveFromNodes {
        /// Template, by name or id; by id also one that was deleted
        template: String,
        /// On this node, by name or id; may be repeated [default: all]
        #[arg(long = "node", value_name = "NODE")]
        nodes: Vec<String>,
    },
}

/// Carry out a `template` command.
pub async fn run(args: TemplateArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    let client = ApiClient::new(endpoints)?;
    match args.command {
        TemplateCommand::Push(args) => copy::push(&client, &args, output).await,
        TemplateCommand::Pull(args) => copy::pull(&client, &args, output).await,
        TemplateCommand::List => list(&client, output).await,
        TemplateCommand::Show { template } => {
            let id = find(&client, &template).await?;
            let mut shown: Value = client.get(&by_id(&id)).await?;
            add_usage(&client, &id, &mut shown).await;
            Ok(table::emit(output, &shown, tags)?)
        }
        TemplateCommand::Delete {
            template,
            tag,
            number,
        } => {
            let id = find(&client, &template).await?;
            let (path, said) = match (&tag, number) {
                (None, None) => (by_id(&id), format!("template {template} deleted")),
                _ => {
                    let named = tag.clone().or_else(|| Some(number?.to_string()));
                    let said = format!("tag {} of {template} deleted", named.unwrap_or_default());
                    (tag_path(&id), said)
                }
            };
            let selector = json!({"tag": tag, "number": number});
            let _: Value = client.delete(&path, &selector).await?;
            done(output, &json!({"id": id}), &said)
        }
        TemplateCommand::Describe {
            template,
            tag,
            description,
            arch,
        } => {
            let id = find(&client, &template).await?;
            let said = json!({"tag": tag, "description": description, "arch": arch});
            let _: Value = client.put(&tag_path(&id), &said).await?;
            done(
                output,
                &json!({"id": id}),
                &format!("template {template} described"),
            )
        }
        TemplateCommand::Revert {
            template,
            tag,
            number,
        } => {
            let id = find(&client, &template).await?;
            let selector = json!({"tag": tag, "number": number});
            let path = format!("/api/v1/registry/revert{}", query(&[("id", &id)]));
            let _: Value = client.delete(&path, &selector).await?;
            done(
                output,
                &json!({"id": id}),
                &format!("template {template} reverted"),
            )
        }
        TemplateCommand::Distribute(args) => distribute::request(&client, &args, output).await,
        TemplateCommand::Distributions { id } => {
            distribute::show(&client, id.as_deref(), output).await
        }
        TemplateCommand::CancelDistribution { id } => {
            distribute::cancel(&client, &id, output).await
        }
        TemplateCommand::RemoveFromNodes { template, nodes } => {
            distribute::evict(&client, &template, &nodes, output).await
        }
        TemplateCommand::Replicas { template, tag } => {
            replicas(&client, &template, tag.as_deref(), output).await
        }
    }
}

fn by_id(id: &str) -> String {
    format!("/api/v1/registry/vm{}", query(&[("id", id)]))
}

fn tag_path(id: &str) -> String {
    format!("/api/v1/registry/tag{}", query(&[("id", id)]))
}

/// Stored and unique bytes of the template and its tags, as a member that can say so has them.
async fn add_usage(client: &ApiClient, id: &str, shown: &mut Value) {
    let Ok(registries) = registries(client).await else {
        return;
    };
    let Ok(registry) = ApiClient::new(&registries) else {
        return;
    };
    let path = format!("{USAGE}{}", query(&[("template", id)]));
    let Ok(usage) = registry.get::<Usage>(&path).await else {
        return;
    };
    let Some(of) = usage.templates.first() else {
        return;
    };
    shown["stored_bytes"] = json!(of.stored_bytes);
    shown["unique_bytes"] = json!(of.unique_bytes);
    for version in shown["versions"].as_array_mut().into_iter().flatten() {
        let number = version["number"].as_u64();
        let tag = of.tags.iter().find(|t| Some(u64::from(t.number)) == number);
        if let Some(tag) = tag {
            version["stored_bytes"] = json!(tag.stored_bytes);
            version["unique_bytes"] = json!(tag.unique_bytes);
        }
    }
}

fn done(output: Output, data: &Value, text: &str) -> anyhow::Result<()> {
    match output {
        Output::Json => Ok(table::emit(output, data, |_| Table::default())?),
        Output::Table => Ok(table::line(text)?),
    }
}

/// The id of a template given by name or id.
async fn find(client: &ApiClient, template: &str) -> anyhow::Result<String> {
    let all: Vec<Value> = client.get("/api/v1/registry/vm?apiVer=v1").await?;
    let named = all
        .iter()
        .find(|t| t["name"] == template || t["id"] == template);
    match named.and_then(|t| t["id"].as_str()) {
        Some(id) => Ok(id.to_owned()),
        None => bail!("there is no template {template}: see `mainstay template list`"),
    }
}

async fn list(client: &ApiClient, output: Output) -> anyhow::Result<()> {
    let all: Vec<Value> = client.get("/api/v1/registry/vm").await?;
    Ok(table::emit(output, &all, |all| {
        let mut table = Table::new(&["NAME", "ID", "SIZE", "ARCH", "LAST PUSH"]);
        for template in all {
            table.row([
                text(&template["name"]),
                text(&template["id"]),
                table::bytes(template["size"].as_u64().unwrap_or(0)),
                text(&template["arch"]),
                ago(&template["last_push"]),
            ]);
        }
        table
    })?)
}

fn tags(template: &Value) -> Table {
    let mut table = Table::new(&[
        "NUMBER",
        "TAG",
        "SIZE",
        "STORED",
        "UNIQUE",
        "ARCH",
        "PUSHED",
        "PULLED",
        "DESCRIPTION",
    ]);
    let bytes = |value: &Value| value.as_u64().map(table::bytes).unwrap_or_default();
    for tag in template["versions"].as_array().into_iter().flatten() {
        table.row([
            tag["number"].to_string(),
            text(&tag["tag"]),
            bytes(&tag["size"]),
            bytes(&tag["stored_bytes"]),
            bytes(&tag["unique_bytes"]),
            text(&tag["arch"]),
            ago(&tag["creation_date"]),
            ago(&tag["last_pull"]),
            text(&tag["description"]),
        ]);
    }
    table
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn ago(seconds: &Value) -> String {
    let then = seconds.as_u64().unwrap_or(0).saturating_mul(1000);
    if then == 0 {
        return String::new();
    }
    format!(
        "{} ago",
        table::age(crate::stamp::now_ms().saturating_sub(then))
    )
}

async fn replicas(
    client: &ApiClient,
    template: &str,
    tag: Option<&str>,
    output: Output,
) -> anyhow::Result<()> {
    let registry = ApiClient::new(&registries(client).await?)?;
    let pairs = [("template", template), ("all", "1")];
    let path = format!("{REPLICAS}{}", query(&pairs));
    let mut tags: Vec<TagReplicas> = registry
        .get(&path)
        .await
        .with_context(|| format!("template {template}"))?;
    if let Some(name) = tag {
        tags.retain(|t| t.tag == name);
        if tags.is_empty() {
            bail!("template {template} has no tag {name}");
        }
    }
    match (tag, tags.first()) {
        // Of one tag its rows, as ever.
        (Some(_), Some(one)) => Ok(table::emit(output, &one.replicas, |_| {
            draw_replicas(&tags)
        })?),
        _ => Ok(table::emit(output, &tags, |tags| draw_replicas(tags))?),
    }
}

fn draw_replicas(tags: &[TagReplicas]) -> Table {
    let mut table = Table::new(&["TAG", "MEMBER", "ID", "STATE", "BYTES", "MESSAGE"]);
    for tag in tags {
        let name = match tag.visible {
            true => tag.tag.clone(),
            false => format!("{} (not visible yet)", tag.tag),
        };
        for row in &tag.replicas {
            let copied = match row.total_bytes {
                0 => String::new(),
                total => format!(
                    "{} of {}",
                    table::bytes(row.done_bytes),
                    table::bytes(total)
                ),
            };
            let cells = [
                &name,
                &row.name,
                &row.member,
                &row.state,
                &copied,
                &row.message,
            ];
            table.row(cells.map(Clone::clone));
        }
    }
    table
}

#[derive(Deserialize)]
struct MemberRow {
    #[serde(default)]
    registry_url: String,
}

/// Registry addresses of all members.
async fn registries(client: &ApiClient) -> anyhow::Result<Vec<String>> {
    let members: Vec<MemberRow> = client.get("/api/v1/members").await?;
    let urls: Vec<String> = members
        .into_iter()
        .map(|m| m.registry_url)
        .filter(|url| !url.is_empty())
        .collect();
    if urls.is_empty() {
        bail!("the member list names no registry");
    }
    Ok(urls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: TemplateArgs,
    }

    #[test]
    fn the_documented_lines_parse() {
        for line in [
            "x push debian-ci --tag v1 --disk disk.qcow2",
            "x push d --tag v1 --disk f --forward ssh:22 --forward web:80:8080 --durability all --arch arm64",
            "x push d --tag v1 --disk f --suspend --ram 128 --vcpu 2 --accel tcg --script warm.sh --work-dir /var/tmp",
            "x push d --tag v1 --disk f --state m --machine j",
            "x pull debian-ci --tag v1 --disk copy.qcow2",
            "x pull debian-ci --tag v1 --disk d --state m --machine j",
            "x revert d --tag v1",
            "x revert d --number 3",
            "x replicas d",
            "x distribute d --tag v1 --node n1 --node n2 --wait",
            "x distribute d --group g1 --wait --timeout 60",
            "x distributions",
            "x distributions 1234",
            "x cancel-distribution 1234",
            "x remove-from-nodes d",
            "x remove-from-nodes d --node n1 --node n2",
        ] {
            Cli::try_parse_from(line.split(' '))
                .map(|c| c.args)
                .unwrap();
        }
        for line in [
            "x push d --disk f",
            "x push d --tag v1 --disk f --forward ssh",
            "x push d --tag v1 --disk f --forward ssh:70000",
            "x push d --tag v1 --disk f --arch sparc",
            "x push d --tag v1 --disk f --state m",
            "x push d --tag v1 --disk f --suspend --state m --machine j",
            "x push d --tag v1 --disk f --script warm.sh",
            "x revert d --tag v1 --number 3",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
