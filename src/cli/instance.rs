//! `mainstay instance`: start, list, show, restart, save and terminate instances over the REST dialect, and ways into
//! them (`access`). Knows the dialect's members by name; refuses to interpret states beyond waiting for one.

use super::access::{self, ExecArgs, LogsArgs, SshArgs, TcpArgs, VncArgs};
use super::client::{ApiClient, query};
use super::save::{self, SaveArgs};
use super::table::{self, Output, Table};
use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Time between two looks at an instance that is waited for.
pub(super) const POLL: Duration = Duration::from_millis(500);

/// Start, list, show, restart, save and terminate instances; get into them.
#[derive(Args, Debug)]
pub struct InstanceArgs {
    #[command(subcommand)]
    command: InstanceCommand,
}

#[derive(Subcommand, Debug)]
enum InstanceCommand {
    /// Start instances of a template; prints their ids
    Start(Box<StartArgs>),
    /// List all instances
    List,
    /// Show one instance
    Show {
        /// Instance id
        id: String,
    },
    /// End instances' VMs at once and start them again on their disks
    Restart {
        /// Instance ids
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Make a tag of an instance's disk; the instance ends when the tag is there
    #[command(alias = "save-image")]
    Save(Box<SaveArgs>),
    /// Run a program in a started instance's guest, and exit with its exit code
    Exec(ExecArgs),
    /// Be at an instance's serial console; Ctrl-] ends
    Console {
        /// Instance id
        id: String,
    },
    /// Print what an instance's console said, and its startup script
    Logs(LogsArgs),
    /// SSH to an instance, with this machine's `ssh`
    Ssh(SshArgs),
    /// Connect to a port of an instance's guest
    Tcp(TcpArgs),
    /// Show an instance's screen to VNC viewers on this machine
    Vnc(VncArgs),
    /// End instances and delete their VMs
    Terminate {
        /// Instance ids
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Args, Debug)]
pub(super) struct WaitArgs {
    /// Wait until it is done
    #[arg(long)]
    pub(super) wait: bool,
    /// Longest wait in seconds
    #[arg(long, default_value_t = 600, requires = "wait")]
    pub(super) timeout: u64,
}

#[derive(Args, Debug)]
struct StartArgs {
    /// Template, by name or id
    template: String,
    /// Tag name; the latest when absent
    #[arg(long)]
    tag: Option<String>,
    /// How many
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Shown name
    #[arg(long)]
    name: Option<String>,
    /// Your mark on the instance
    #[arg(long)]
    external_id: Option<String>,
    /// On this node only (id)
    #[arg(long)]
    node: Option<String>,
    /// In this node group (id)
    #[arg(long)]
    group: Option<String>,
    /// 1 to 10000, lower goes first
    #[arg(long)]
    priority: Option<u32>,
    /// Virtual CPUs
    #[arg(long)]
    vcpu: Option<u32>,
    /// Memory in MB
    #[arg(long)]
    ram: Option<u32>,
    /// Shell script to run in the guest; the instance is Started once it ended with 0
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Do not wait for the script's end, nor keep its output
    #[arg(long, requires = "script")]
    no_monitor: bool,
    /// Seconds until the script is given up
    #[arg(long, value_name = "SECONDS", requires = "script")]
    script_timeout: Option<u32>,
    /// Forward a port, in place of the template's: NAME:GUEST_PORT[:HOST_PORT]
    #[arg(long, value_name = "RULE")]
    forward: Vec<String>,
    /// Metadata: KEY=VALUE
    #[arg(long, value_name = "KEY=VALUE")]
    metadata: Vec<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Carry out an `instance` command.
pub async fn run(args: InstanceArgs, endpoints: &[String], output: Output) -> anyhow::Result<()> {
    let client = ApiClient::new(endpoints)?;
    match args.command {
        InstanceCommand::Start(args) => start(&client, &args, output).await,
        InstanceCommand::List => list(&client, output).await,
        InstanceCommand::Show { id } => {
            let instance = get(&client, &id).await?;
            Ok(table::emit(output, &instance, details)?)
        }
        InstanceCommand::Restart { ids, wait } => restart(&client, &ids, &wait, output).await,
        InstanceCommand::Exec(args) => access::exec(&client, &args).await,
        InstanceCommand::Console { id } => access::console(&client, &id).await,
        InstanceCommand::Logs(args) => access::logs(&client, &args).await,
        InstanceCommand::Ssh(args) => access::ssh(&args, endpoints).await,
        InstanceCommand::Tcp(args) => access::tcp(&client, &args).await,
        InstanceCommand::Vnc(args) => access::vnc(&client, &args).await,
        InstanceCommand::Save(args) => save::run(&client, &args, output).await,
        InstanceCommand::Terminate { ids, wait } => terminate(&client, &ids, &wait, output).await,
    }
}

async fn start(client: &ApiClient, args: &StartArgs, output: Output) -> anyhow::Result<()> {
    let template = template_id(client, &args.template).await?;
    let body = start_body(args, &template)?;
    let ids: Vec<String> = client.post("/api/v1/vm", &body).await?;
    if !args.wait.wait {
        return Ok(table::emit(output, &ids, |ids| id_table(ids))?);
    }
    let mut started = Vec::new();
    for instance in wait_for(client, &ids, &args.wait, "Started").await? {
        started.push(instance);
    }
    Ok(table::emit(output, &started, |all| {
        instances(all.iter(), &Map::new())
    })?)
}

fn start_body(args: &StartArgs, template: &str) -> anyhow::Result<Value> {
    let mut body = json!({
        "vmid": template, "tag": args.tag, "count": args.count, "name": args.name,
        "external_id": args.external_id, "node_id": args.node, "group_id": args.group,
        "priority": args.priority, "vcpu": args.vcpu, "vram": args.ram,
        "script_timeout": args.script_timeout,
    });
    if let Some(path) = &args.script {
        let script =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        body["startup_script"] = json!(STANDARD.encode(script));
        body["script_monitoring"] = json!(!args.no_monitor);
    }
    if !args.forward.is_empty() {
        let rules: anyhow::Result<Vec<Value>> = args.forward.iter().map(|r| forward(r)).collect();
        body["port_forwarding_override"] = json!(rules?);
    }
    let mut metadata = Map::new();
    for pair in &args.metadata {
        let (key, value) = pair.split_once('=').context("--metadata is KEY=VALUE")?;
        metadata.insert(key.to_owned(), json!(value));
    }
    body["metadata"] = json!(metadata);
    Ok(body)
}

fn forward(rule: &str) -> anyhow::Result<Value> {
    let parts: Vec<&str> = rule.split(':').collect();
    match parts[..] {
        [name, guest] => Ok(json!({"name": name, "guest_port": guest})),
        [name, guest, host] => Ok(json!({"name": name, "guest_port": guest, "host_port": host})),
        _ => bail!("--forward is NAME:GUEST_PORT or NAME:GUEST_PORT:HOST_PORT, not {rule:?}"),
    }
}

/// A template's id, given that or its name.
pub(super) async fn template_id(client: &ApiClient, wanted: &str) -> anyhow::Result<String> {
    let all: Vec<Value> = client.get("/api/v1/registry/vm?apiVer=v1").await?;
    let found = |member: &str| all.iter().find(|t| t[member] == wanted);
    let Some(template) = found("id").or_else(|| found("name")) else {
        bail!("no template is called {wanted:?}: see `mainstay template list`");
    };
    Ok(text(&template["id"]))
}

async fn get(client: &ApiClient, id: &str) -> anyhow::Result<Value> {
    let path = format!("/api/v1/vm{}", query(&[("id", id)]));
    client
        .get(&path)
        .await
        .with_context(|| format!("instance {id}"))
}

async fn list(client: &ApiClient, output: Output) -> anyhow::Result<()> {
    let all: Vec<Value> = client.get("/api/v1/vm").await?;
    let names = match output {
        Output::Json => Map::new(),
        Output::Table => {
            let templates: Vec<Value> = client.get("/api/v1/registry/vm?apiVer=v1").await?;
            templates
                .into_iter()
                .map(|t| (text(&t["id"]), t["name"].clone()))
                .collect()
        }
    };
    let inner = all.iter().map(|wrapper| &wrapper["vm"]);
    Ok(table::emit(output, &all, |_| instances(inner, &names))?)
}

async fn restart(
    client: &ApiClient,
    ids: &[String],
    wait: &WaitArgs,
    output: Output,
) -> anyhow::Result<()> {
    for id in ids {
        let () = client
            .post("/api/v1/rpc/vm/restart", &json!({ "instance_id": id }))
            .await
            .with_context(|| format!("instance {id}"))?;
    }
    if wait.wait {
        wait_for(client, ids, wait, "Started").await?;
    }
    Ok(table::emit(output, &ids, |ids| id_table(ids))?)
}

async fn terminate(
    client: &ApiClient,
    ids: &[String],
    wait: &WaitArgs,
    output: Output,
) -> anyhow::Result<()> {
    for id in ids {
        let () = client
            .delete("/api/v1/vm", &json!({ "id": id }))
            .await
            .with_context(|| format!("instance {id}"))?;
    }
    if wait.wait {
        wait_for(client, ids, wait, "Terminated").await?;
    }
    Ok(table::emit(output, &ids, |ids| id_table(ids))?)
}

/// Wait until all are in `state`. For the end of an instance, one that is forgotten has reached it.
async fn wait_for(
    client: &ApiClient,
    ids: &[String],
    wait: &WaitArgs,
    state: &str,
) -> anyhow::Result<Vec<Value>> {
    let until = Instant::now() + Duration::from_secs(wait.timeout);
    let mut done = Vec::new();
    for id in ids {
        loop {
            let instance = match get(client, id).await {
                Err(e) if state == "Terminated" && e.root_cause().to_string() == "Not found" => {
                    break;
                }
                other => other?,
            };
            let now = text(&instance["instance_state"]);
            if now == state {
                done.push(instance);
                break;
            }
            if state == "Started" && ["Error", "Terminating", "Terminated"].contains(&now.as_str())
            {
                bail!("instance {id} is {now}: {}", why(&instance));
            }
            if Instant::now() + POLL > until {
                let s = wait.timeout;
                bail!(
                    "instance {id} is still {now} after {s} s{}",
                    after_colon(&why(&instance))
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(done)
}

fn why(instance: &Value) -> String {
    let message = text(&instance["message"]);
    let stderr = text(&instance["startup_script"]["stderr"]);
    let reasons = [
        message,
        text(&instance["waiting_for"]),
        stderr.trim().to_owned(),
    ];
    reasons
        .into_iter()
        .filter(|r| !r.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

fn after_colon(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

fn id_table(ids: &[String]) -> Table {
    let mut table = Table::new(&["INSTANCE"]);
    for id in ids {
        table.row([id.as_str()]);
    }
    table
}

fn instances<'a>(all: impl Iterator<Item = &'a Value>, names: &Map<String, Value>) -> Table {
    let mut table = Table::new(&[
        "INSTANCE", "STATE", "TEMPLATE", "TAG", "NODE", "ADDRESS", "AGE",
    ]);
    for instance in all {
        let template = text(&instance["vmid"]);
        let template = names.get(&template).map_or(template, text);
        let state = match (
            text(&instance["instance_state"]),
            instance["progress"].as_f64(),
        ) {
            (state, Some(part)) if state == "Pulling" || state == "Pushing" => {
                format!("{state} {:.0}%", part * 100.0)
            }
            (state, _) => state,
        };
        let created = age_ms(&text(&instance["cr_time"]))
            .map(table::age)
            .unwrap_or_default();
        table.row([
            text(&instance["instance_id"]),
            state,
            template,
            text(&instance["tag"]),
            text(&instance["node_id"]),
            address(&instance["vminfo"]),
            created,
        ]);
    }
    table
}

/// Where the guest can be reached: its SSH port, else its first forwarded port, else its own address.
fn address(vm: &Value) -> String {
    let rules = vm["port_forwarding"].as_array();
    let rule = rules.and_then(|r| r.iter().find(|r| r["guest_port"] == 22).or(r.first()));
    match rule {
        Some(rule) => format!("{}:{}", text(&vm["host_ip"]), rule["host_port"]),
        None => text(&vm["ip"]),
    }
}

/// Every member on a line of its own, nested ones with dotted names.
fn details(instance: &Value) -> Table {
    let mut table = Table::new(&["MEMBER", "VALUE"]);
    flatten(&mut table, "", instance);
    table
}

fn flatten(table: &mut Table, prefix: &str, value: &Value) {
    let at = |key: &str| {
        if prefix.is_empty() {
            key.to_owned()
        } else {
            format!("{prefix}.{key}")
        }
    };
    match value {
        Value::Object(members) => members.iter().for_each(|(k, v)| flatten(table, &at(k), v)),
        Value::Array(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(n, v)| flatten(table, &at(&n.to_string()), v));
        }
        other => {
            for (n, line) in text(other).lines().enumerate() {
                table.row([if n == 0 { prefix } else { "" }, line]);
            }
        }
    }
}

/// A value as a person reads it: text without quotes, nothing for `null`.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn age_ms(time: &str) -> Option<u64> {
    let then = OffsetDateTime::parse(time, &Rfc3339).ok()?;
    let age = OffsetDateTime::from(SystemTime::now()) - then;
    u64::try_from(age.whole_milliseconds()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: InstanceArgs,
    }

    fn start_args(line: &str) -> StartArgs {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        match cli.args.command {
            InstanceCommand::Start(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_start_line_becomes_a_request() {
        let line = "x start debian --tag v1 --count 3 --priority 5 --forward ssh:22 --forward web:80:8080 \
                    --metadata job=a=b --wait --timeout 5";
        let body = start_body(&start_args(line), "id-1").unwrap();
        let expected = json!({
            "vmid": "id-1", "tag": "v1", "count": 3, "name": null, "external_id": null, "node_id": null,
            "group_id": null, "priority": 5, "vcpu": null, "vram": null, "script_timeout": null,
            "port_forwarding_override": [
                {"name": "ssh", "guest_port": "22"},
                {"name": "web", "guest_port": "80", "host_port": "8080"},
            ],
            "metadata": {"job": "a=b"},
        });
        assert_eq!(body, expected);
        assert!(start_body(&start_args("x start d --forward 22"), "i").is_err());
        assert!(start_body(&start_args("x start d --script /nonexistent/file"), "i").is_err());
        for bad in [
            "x start",
            "x start d --timeout 5",
            "x terminate",
            "x start d --no-monitor",
        ] {
            assert!(
                Cli::try_parse_from(bad.split_whitespace()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn instances_as_people_read_them() {
        let started = json!({
            "instance_id": "i1", "instance_state": "Started", "vmid": "t1", "tag": "v1", "node_id": "n1",
            "cr_time": "not a time", "progress": 0.0,
            "vminfo": {"host_ip": "10.0.0.9", "ip": "10.0.2.15", "port_forwarding":
                [{"guest_port": 80, "host_port": 1}, {"guest_port": 22, "host_port": 2}]},
        });
        let pulling = json!({
            "instance_id": "i2", "instance_state": "Pulling", "vmid": "t2", "tag": "v1", "progress": 0.256,
        });
        let names = Map::from_iter([("t1".to_owned(), json!("debian"))]);
        let table = instances([&started, &pulling].into_iter(), &names).to_string();
        let expected = "\
INSTANCE  STATE        TEMPLATE  TAG  NODE  ADDRESS     AGE
i1        Started      debian    v1   n1    10.0.0.9:2
i2        Pulling 26%  t2        v1
";
        assert_eq!(table, expected);
        let shown = details(&json!({"a": {"b": [1, {"c": "x\ny"}]}, "n": null})).to_string();
        assert_eq!(
            shown,
            "MEMBER   VALUE\na.b.0    1\na.b.1.c  x\n         y\n"
        );
    }

    #[test]
    fn ages_come_from_the_wire_format() {
        let past = crate::http::time::Rfc3339(crate::stamp::now_ms() - 90_000);
        let age = age_ms(&past.to_string()).unwrap();
        assert!((90_000..100_000).contains(&age), "{age}");
        assert_eq!(age_ms("0001"), None);
    }
}
