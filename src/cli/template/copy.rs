//! Push and pull from the command line: arguments, progress, and where an unfinished pull is kept.

use super::super::client::{ApiClient, query};
use super::super::table::{self, Output};
use super::suspend::SuspendArgs;
use super::{done, registries};
use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use mainstay_agent::transfer::api::{self, Forward, TagInfo};
use mainstay_agent::transfer::{
    MACHINE_FILE, MEMORY_FILE, Manifest, PushSpec, pull_file, push_file,
};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A registry that does not accept a connection within this time is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Args, Debug)]
pub(super) struct PushArgs {
    /// Template name; made if there is none
    template: String,
    /// Name of the new tag
    #[arg(long)]
    tag: String,
    /// The disk, qcow2 or raw
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
    /// Shown with the tag
    #[arg(long, default_value = "")]
    description: String,
    /// What it runs on
    #[arg(long, default_value = host_arch(), value_parser = ["amd64", "arm64"])]
    arch: String,
    /// Format of the disk [default: as the file says]
    #[arg(long, value_parser = ["qcow2", "raw"])]
    format: Option<String>,
    /// Forward a port of every instance: NAME:GUEST_PORT[:HOST_PORT]
    #[arg(long, value_name = "RULE", value_parser = forward)]
    forward: Vec<Forward>,
    #[command(flatten)]
    suspend: SuspendArgs,
    /// Verified copies that make the tag visible
    #[arg(long, value_enum, default_value_t = Durability::Majority)]
    durability: Durability,
    /// Longest wait in seconds for the tag to be visible, and held as --durability says
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wait: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Durability {
    /// More than half of the members
    Majority,
    /// Every member
    All,
    /// The one that was pushed to
    One,
}

#[derive(Args, Debug)]
pub(super) struct PullArgs {
    /// Template, by name or id
    template: String,
    /// Tag name; the latest when absent
    #[arg(long)]
    tag: Option<String>,
    /// Where to; an existing file is replaced once all bytes are there
    #[arg(long, value_name = "FILE")]
    disk: PathBuf,
    /// Where the memory of a suspended tag goes to
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Where the machine goes to that the memory belongs to
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
}

fn host_arch() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

fn forward(rule: &str) -> Result<Forward, String> {
    let port = |text: &str| {
        text.parse::<u16>()
            .map_err(|_| format!("{text:?} is not a port: write NAME:GUEST_PORT[:HOST_PORT]"))
    };
    let mut parts = rule.splitn(3, ':');
    let name = parts.next().unwrap_or_default().to_owned();
    let guest_port = port(parts.next().unwrap_or_default())?;
    let host_port = parts.next().map_or(Ok(0), port)?;
    Ok(Forward {
        name,
        guest_port,
        host_port,
    })
}

/// Push a disk and say what became of it.
pub(super) async fn push(
    client: &ApiClient,
    args: &PushArgs,
    output: Output,
) -> anyhow::Result<()> {
    let registries = registries(client).await?;
    let what = Box::pin(args.suspend.prepare(&args.disk, args.format.as_ref())).await;
    let what = what.with_context(|| format!("cannot push {}", args.disk.display()))?;
    let spec = PushSpec {
        template: args.template.clone(),
        tag: args.tag.clone(),
        description: args.description.clone(),
        arch: args.arch.clone(),
        format: what.format.clone(),
        beside: what.beside.clone(),
        forwards: args.forward.clone(),
        durability: match args.durability {
            Durability::Majority => api::Durability::Majority,
            Durability::All => api::Durability::All,
            Durability::One => api::Durability::One,
        },
        wait: Duration::from_secs(args.wait),
        save: String::new(),
    };
    let bar = bar();
    let progress = |done: u64, total: u64| show(&bar, done, total);
    let pushed = push_file(&http()?, &registries, &what.disk, &spec, &progress).await;
    bar.finish_and_clear();
    let pushed = pushed.with_context(|| format!("cannot push {}", args.disk.display()))?;
    let tag = &pushed.tag;
    if !tag.is_held() {
        bail!(
            "{}:{} is stored on {} of {} members that must hold it, and {}{}: the members go on \
             copying it, see `mainstay template replicas {}`",
            tag.template,
            tag.tag,
            tag.copies
                .map_or(tag.holders.len(), |copies| copies as usize),
            tag.copies_needed,
            if tag.visible {
                "visible already"
            } else {
                "not visible yet"
            },
            without(&registries, tag).await,
            tag.template
        );
    }
    let text = format!(
        "{}:{} pushed as number {} of {}: {} sent of {}, held by {} members",
        tag.template,
        tag.tag,
        tag.number,
        tag.template_id,
        table::bytes(pushed.sent_bytes),
        table::bytes(tag.size),
        tag.holders.len()
    );
    let data =
        json!({"tag": tag, "sent_chunks": pushed.sent_chunks, "sent_bytes": pushed.sent_bytes});
    done(output, &data, &text)
}

/// Who lacks it and why, for a message; nothing when nobody can say.
async fn without(registries: &[String], tag: &TagInfo) -> String {
    let number = tag.number.to_string();
    let pairs = [("template", tag.template_id.as_str()), ("number", &number)];
    let path = format!("{}{}", api::REPLICAS, query(&pairs));
    let Ok(client) = ApiClient::new(registries) else {
        return String::new();
    };
    let rows: Vec<api::Replica> = client.get(&path).await.unwrap_or_default();
    let lacking = rows.iter().filter(|row| row.state != "complete");
    let lacking: Vec<String> = lacking
        .map(|row| match row.message.as_str() {
            "" => format!("{} is {}", row.name, row.state),
            why => format!("{} is {} ({why})", row.name, row.state),
        })
        .collect();
    match lacking.is_empty() {
        true => String::new(),
        false => format!(": {}", lacking.join("; ")),
    }
}

/// Pull a disk. Unfinished bytes are kept in `FILE.part`, where the next attempt finds them.
pub(super) async fn pull(
    client: &ApiClient,
    args: &PullArgs,
    output: Output,
) -> anyhow::Result<()> {
    let registries = registries(client).await?;
    let mut pairs = vec![("template", args.template.as_str())];
    pairs.extend(args.tag.as_deref().map(|tag| ("tag", tag)));
    let path = format!("{}{}", api::TAG, query(&pairs));
    let tag: TagInfo = ApiClient::new(&registries)?
        .get(&path)
        .await
        .with_context(|| {
            format!(
                "template {} {}",
                args.template,
                args.tag.as_deref().unwrap_or("")
            )
        })?;
    if !tag.visible {
        bail!(
            "{}:{} is not visible yet: too few members hold it",
            tag.template,
            tag.tag
        );
    }
    let first = pull_part(&registries, &tag, 0, &args.disk).await?;
    let beside = [(&args.state, MEMORY_FILE), (&args.machine, MACHINE_FILE)];
    for (to, name) in beside {
        let Some(to) = to else { continue };
        let Some(at) = first.files.iter().position(|f| f.name == name) else {
            bail!("{}:{} is not of a suspended VM", tag.template, tag.tag);
        };
        pull_part(&registries, &tag, at, to).await?;
    }
    let text = format!(
        "{}:{} pulled to {}",
        tag.template,
        tag.tag,
        args.disk.display()
    );
    done(output, &json!({"tag": tag, "file": args.disk}), &text)
}

/// One file of a tag; its manifest.
async fn pull_part(
    registries: &[String],
    tag: &TagInfo,
    at: usize,
    to: &Path,
) -> anyhow::Result<Manifest> {
    let part = part_of(to)?;
    let bar = bar();
    let progress = |done: u64, total: u64| show(&bar, done, total);
    let pulled = pull_file(&http()?, registries, &tag.manifest, at, &part, &progress).await;
    bar.finish_and_clear();
    let pulled = pulled.with_context(|| format!("cannot pull {}:{}", tag.template, tag.tag))?;
    std::fs::rename(&part, to).with_context(|| format!("cannot rename {}", part.display()))?;
    sync_dir_of(to).with_context(|| format!("cannot sync {}", to.display()))?;
    Ok(pulled)
}

fn part_of(disk: &Path) -> anyhow::Result<PathBuf> {
    let Some(name) = disk.file_name() else {
        bail!("{} is not a file", disk.display())
    };
    if disk.is_dir() {
        bail!("{} is a directory", disk.display());
    }
    let mut name = name.to_owned();
    name.push(".part");
    Ok(disk.with_file_name(name))
}

/// A renamed file survives a power cut only with its directory.
fn sync_dir_of(file: &Path) -> std::io::Result<()> {
    let dir = file
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::File::open(dir)?.sync_all()
}

fn http() -> anyhow::Result<reqwest::Client> {
    let builder = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .no_proxy()
        .http1_only();
    builder.build().context("cannot set up an HTTP client")
}

/// On a terminal a bar, elsewhere nothing.
fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}
