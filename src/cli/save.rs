//! `mainstay instance save`: a running instance becomes a tag. Knows the dialect's members by name.

use super::client::{ApiClient, query};
use super::instance::{POLL, WaitArgs, template_id, text};
use super::table::{self, Output, Table};
use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Args, Debug)]
pub(super) struct SaveArgs {
    /// Instance id
    id: String,
    /// Name of the new tag
    #[arg(long)]
    tag: String,
    /// Template that it goes to, by name or id
    #[arg(long, required_unless_present = "new_template")]
    template: Option<String>,
    /// Name of a new template that it goes to
    #[arg(long, value_name = "NAME", conflicts_with = "template")]
    new_template: Option<String>,
    /// Free text
    #[arg(long)]
    description: Option<String>,
    /// Shell script to run in the guest before it is stopped
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// If the script does not end with 0, save nothing: the instance runs on
    #[arg(long, requires = "script")]
    cancel_on_script_failure: bool,
    /// Delete this tag, and every later one, when the new one is there; the latest if none is named
    #[arg(long, value_name = "TAG", num_args = 0..=1, default_missing_value = "", conflicts_with = "new_template")]
    revert: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) async fn run(client: &ApiClient, args: &SaveArgs, output: Output) -> anyhow::Result<()> {
    let template = match &args.template {
        Some(name) => Some(template_id(client, name).await?),
        None => None,
    };
    let asked: Value = client
        .post("/api/v1/image", &body(args, template.as_deref())?)
        .await
        .with_context(|| format!("instance {}", args.id))?;
    let request = text(&asked["request_id"]);
    if !args.wait.wait {
        return Ok(table::emit(output, &asked, |_| {
            one_row(&request, "pending")
        })?);
    }
    let done = wait_for(client, &request, &args.wait).await?;
    Ok(table::emit(output, &done, |done| {
        one_row(&request, &text(&done["status"]))
    })?)
}

fn body(args: &SaveArgs, template: Option<&str>) -> anyhow::Result<Value> {
    let mut body = json!({
        "id": args.id, "tag": args.tag, "target_vm_id": template, "new_template_name": args.new_template,
        "description": args.description, "suspend": false,
        "cancel_on_script_failure": args.cancel_on_script_failure,
        "revert_before_push": args.revert.is_some(), "revert_tag": args.revert,
    });
    if let Some(path) = &args.script {
        let script =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        body["script"] = json!(STANDARD.encode(script));
    }
    Ok(body)
}

async fn wait_for(client: &ApiClient, request: &str, wait: &WaitArgs) -> anyhow::Result<Value> {
    let until = Instant::now() + Duration::from_secs(wait.timeout);
    let path = format!("/api/v1/image{}", query(&[("id", request)]));
    loop {
        let now: Value = client.get(&path).await?;
        match text(&now["status"]).as_str() {
            "done" => return Ok(now),
            "error" => bail!("nothing was saved: {}", why(&now)),
            _ if Instant::now() + POLL > until => {
                bail!(
                    "request {request} is still pending after {} s",
                    wait.timeout
                );
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

fn why(request: &Value) -> String {
    let message = text(&request["error"]["Message"]);
    let stderr = text(&request["script_result"]["stderr"]);
    let reasons = [message, stderr.trim().to_owned()];
    let reasons = reasons.into_iter().filter(|r| !r.is_empty());
    reasons.collect::<Vec<_>>().join("; ")
}

fn one_row(request: &str, status: &str) -> Table {
    let mut table = Table::new(&["REQUEST", "STATUS"]);
    table.row([request, status]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: SaveArgs,
    }

    fn parse(line: &str) -> Result<SaveArgs, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.args)
    }

    #[test]
    fn a_save_line_becomes_a_request() {
        let args = parse("x i1 --tag v2 --template debian --revert --wait").unwrap();
        let expected = json!({
            "id": "i1", "tag": "v2", "target_vm_id": "t1", "new_template_name": null, "description": null,
            "suspend": false, "cancel_on_script_failure": false, "revert_before_push": true, "revert_tag": "",
        });
        assert_eq!(body(&args, Some("t1")).unwrap(), expected);
        let args = parse("x i1 --tag v2 --template debian --revert v1").unwrap();
        assert_eq!(body(&args, Some("t1")).unwrap()["revert_tag"], "v1");
        for bad in [
            "x i1 --template debian",
            "x i1 --tag v2",
            "x i1 --tag v2 --template a --new-template b",
            "x i1 --tag v2 --new-template b --revert",
            "x i1 --tag v2 --template a --cancel-on-script-failure",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
