//! `mainstay template distribute` and its like: let nodes fetch a tag, see how far they are, give it up.

use super::super::client::{ApiClient, ClientError, query};
use super::super::table::{self, Output, Table};
use super::{done, find, text};
use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PATH: &str = "/api/v1/registry/vm/distribute";
/// Time between two looks at one that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Args, Debug)]
pub(super) struct DistributeArgs {
    /// Template, by name or id
    template: String,
    /// Tag name; the latest when absent
    #[arg(long)]
    tag: Option<String>,
    /// To this node, by name or id; may be repeated [default: all of the tag's architecture]
    #[arg(long = "node", value_name = "NODE")]
    nodes: Vec<String>,
    /// To the nodes of this group, by name or id
    #[arg(long)]
    group: Option<String>,
    /// Wait until every node has it
    #[arg(long)]
    wait: bool,
    /// Longest wait in seconds
    #[arg(long, default_value_t = 3600, requires = "wait")]
    timeout: u64,
}

/// The id of the one of `all` that has this id, or else this name.
fn named(all: &[Value], [id, name]: [&str; 2], wanted: &str) -> anyhow::Result<String> {
    let with = |member| {
        let found = all.iter().filter(move |o| o[member] == wanted);
        found.filter_map(|o| o[id].as_str()).collect::<Vec<_>>()
    };
    let mut found = with(id);
    if found.is_empty() {
        found = with(name);
    }
    match found[..] {
        [one] => Ok(one.to_owned()),
        [] => bail!("there is no {wanted}"),
        _ => bail!("several are named {wanted}: say which, by id"),
    }
}

/// The ids of these nodes.
async fn node_ids(client: &ApiClient, nodes: &[String]) -> anyhow::Result<Vec<String>> {
    if nodes.is_empty() {
        return Ok(Vec::new());
    }
    let all: Vec<Value> = client.get("/api/v1/node").await?;
    let ids = nodes.iter().map(|node| {
        let id = named(&all, ["node_id", "node_name"], node);
        id.context("--node: see `mainstay node list`")
    });
    ids.collect()
}

pub(super) async fn request(
    client: &ApiClient,
    args: &DistributeArgs,
    output: Output,
) -> anyhow::Result<()> {
    let template = find(client, &args.template).await?;
    let nodes = node_ids(client, &args.nodes).await?;
    let mut group = None;
    if let Some(wanted) = &args.group {
        let all: Vec<Value> = client.get("/api/v1/group").await?;
        let id = named(&all, ["id", "name"], wanted);
        group = Some(id.context("--group: `GET /api/v1/group` lists them")?);
    }
    let body = json!({
        "template_id": template, "tag": args.tag, "node_ids": nodes, "group_id": group,
    });
    let accepted: Value = client.post(PATH, &body).await?;
    let id = text(&accepted["request_id"]);
    if !args.wait {
        return done(output, &accepted, &format!("distribution {id}"));
    }
    let until = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        let now: Value = match client.get(&at(&id)).await {
            // It goes on without us: members may come back before it ends.
            Err(ClientError::Unreachable(_)) if Instant::now() < until => {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            other => other.with_context(|| format!("distribution {id}"))?,
        };
        let nodes = || now["distribute_status"].as_object().into_iter().flatten();
        if nodes().all(|(_, node)| node["status"] == true) {
            return Ok(table::emit(output, &now, draw)?);
        }
        if now["ended"] == true {
            table::emit(output, &now, draw)?;
            bail!("given up on some nodes");
        }
        if Instant::now() >= until {
            table::emit(output, &now, draw)?;
            bail!(
                "not on every node after {} s; it goes on: see `mainstay template distributions {id}`",
                args.timeout
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One of them.
fn at(id: &str) -> String {
    format!("{PATH}{}", query(&[("id", id)]))
}

async fn look(client: &ApiClient, id: &str) -> anyhow::Result<Value> {
    let found = client.get(&at(id)).await;
    found.with_context(|| format!("distribution {id}"))
}

pub(super) async fn show(
    client: &ApiClient,
    id: Option<&str>,
    output: Output,
) -> anyhow::Result<()> {
    if let Some(id) = id {
        let one = look(client, id).await?;
        return Ok(table::emit(output, &one, draw)?);
    }
    let all: Vec<Value> = client.get(PATH).await?;
    Ok(table::emit(output, &all, |all| {
        let mut table = Table::new(&["ID", "TEMPLATE", "TAG", "REQUESTED", "NODES", "DONE"]);
        for one in all {
            let nodes = || one["distribute_status"].as_object().into_iter().flatten();
            let request = &one["request"];
            table.row([
                text(&request["request_id"]),
                text(&request["template_id"]),
                text(&request["tag"]),
                text(&request["time_requested"]),
                nodes().count().to_string(),
                nodes()
                    .filter(|(_, n)| n["status"] == true)
                    .count()
                    .to_string(),
            ]);
        }
        table
    })?)
}

fn draw(one: &Value) -> Table {
    let mut table = Table::new(&["NODE", "NAME", "STATE", "MESSAGE"]);
    for (id, node) in one["distribute_status"].as_object().into_iter().flatten() {
        let percent = node["progress"].as_f64().unwrap_or(0.0) * 100.0;
        let state = match node["status"] == true {
            true => "done".to_owned(),
            false => format!("{percent:.0}%"),
        };
        table.row([
            id.clone(),
            text(&node["node_name"]),
            state,
            text(&node["error"]),
        ]);
    }
    table
}

pub(super) async fn cancel(client: &ApiClient, id: &str, output: Output) -> anyhow::Result<()> {
    let _: Value = client
        .delete(&at(id), &json!({}))
        .await
        .with_context(|| format!("distribution {id}"))?;
    done(
        output,
        &json!({ "id": id }),
        &format!("distribution {id} is cancelled"),
    )
}

pub(super) async fn evict(
    client: &ApiClient,
    template: &str,
    nodes: &[String],
    output: Output,
) -> anyhow::Result<()> {
    // One that was deleted has no name any more, and may be in caches still.
    let id = find(client, template)
        .await
        .unwrap_or_else(|_| template.to_owned());
    let body = json!({ "id": id, "node_ids": node_ids(client, nodes).await? });
    let asked: Value = client
        .delete("/api/v1/registry/vm/remove", &body)
        .await
        .with_context(|| format!("template {template}"))?;
    let count = asked["requests_sent"].as_u64().unwrap_or(0);
    done(
        output,
        &asked,
        &format!("{count} nodes are asked to drop it"),
    )
}
