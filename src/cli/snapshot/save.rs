//! `mainstay snapshot save`: receive a snapshot from the first member that sends a whole one.

use super::super::client::{ApiClient, ClientError};
use super::super::table::{self, Output};
use crate::backup::file::Partial;
use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A member that does not accept a connection within this time is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A member makes the snapshot first: minutes for a very large state.
const FIRST_BYTE_MAX: Duration = Duration::from_secs(600);
/// A stream that does not move for this long is given up.
const STALL_MAX: Duration = Duration::from_secs(60);
/// Members are asked again for so long while there is no leader.
const PATIENCE: Duration = Duration::from_secs(30);
const ROUND_PAUSE: Duration = Duration::from_millis(300);

#[derive(Args, Debug)]
pub(super) struct SaveArgs {
    /// Where to; it appears once all of it was received and checked
    file: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

/// Why a member's stream was of no use.
enum Failed {
    /// Another one may do better.
    Next(String),
    /// No other one would.
    Here(anyhow::Error),
}

pub(super) async fn run(
    args: SaveArgs,
    endpoints: &[String],
    output: Output,
) -> anyhow::Result<()> {
    let client = ApiClient::new(endpoints)?;
    let http = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .no_proxy()
        .build()
        .context("cannot set up an HTTP client")?;
    let mut partial = Partial::create(&args.file, args.force)?;
    let until = Instant::now() + PATIENCE;
    loop {
        let mut tried = Vec::new();
        for endpoint in client.endpoints() {
            match receive(&http, endpoint, &mut partial).await {
                Ok(()) => return finish(partial, &args, output).await,
                Err(Failed::Here(error)) => return Err(error),
                Err(Failed::Next(why)) => tried.push((endpoint.clone(), why)),
            }
        }
        if Instant::now() + ROUND_PAUSE >= until {
            return Err(ClientError::Unreachable(tried).into());
        }
        tokio::time::sleep(ROUND_PAUSE).await;
    }
}

/// The whole stream of one member.
async fn receive(
    http: &reqwest::Client,
    endpoint: &str,
    partial: &mut Partial,
) -> Result<(), Failed> {
    let next = |e: reqwest::Error| Failed::Next(reason(&e));
    partial.restart().map_err(Failed::Here)?;
    let asked = http.get(format!("{endpoint}/api/v1/snapshot")).send();
    let asked = tokio::time::timeout(FIRST_BYTE_MAX, asked).await;
    let mut response = asked
        .map_err(|_| Failed::Next("no answer in time".to_owned()))?
        .map_err(next)?;
    let status = response.status();
    if status != reqwest::StatusCode::OK {
        let text = response.text().await.unwrap_or_default();
        let envelope: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let why = envelope["message"]
            .as_str()
            .unwrap_or(text.trim())
            .to_owned();
        return Err(Failed::Next(format!("HTTP {status}: {why}")));
    }
    let Some(total) = response.content_length() else {
        return Err(Failed::Next(
            "it does not say how long its answer is".to_owned(),
        ));
    };
    let bar = bar(total);
    let mut received = 0;
    loop {
        let piece = tokio::time::timeout(STALL_MAX, response.chunk()).await;
        let piece = piece
            .map_err(|_| Failed::Next(format!("stopped after {received} of {total} bytes")))?
            .map_err(next)?;
        let Some(piece) = piece else { break };
        partial.write(&piece).map_err(Failed::Here)?;
        received += piece.len() as u64;
        bar.set_position(received);
    }
    bar.finish_and_clear();
    if received == total {
        Ok(())
    } else {
        Err(Failed::Next(format!(
            "cut off after {received} of {total} bytes"
        )))
    }
}

async fn finish(partial: Partial, args: &SaveArgs, output: Output) -> anyhow::Result<()> {
    let work = move || {
        let found = partial.check().context("what was received is damaged")?;
        partial.finish()?;
        anyhow::Ok(found)
    };
    let found = tokio::task::spawn_blocking(work).await??;
    if found.cluster_id.is_empty() {
        bail!("the member did not say which cluster this is");
    }
    match output {
        Output::Json => table::emit(output, &found, |_| table::Table::default())?,
        Output::Table => table::line(&format!(
            "saved to {}: cluster {}, index {}, {}; checked",
            args.file.display(),
            found.cluster_id,
            found.index,
            table::bytes(found.bytes)
        ))?,
    }
    Ok(())
}

/// On a terminal a bar, elsewhere nothing.
fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// The innermost cause: reqwest's own text repeats the URL only.
fn reason(error: &dyn std::error::Error) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}
