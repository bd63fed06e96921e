//! The tests that `node join` makes before it serves: is each controller there, and its registry?
//! Says so line by line, as users of the reference tool know it. Changes nothing anywhere.

use serde::Deserialize;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

/// For each answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// The part of a status answer that is of interest here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Envelope {
    body: Status,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    registry_address: String,
}

/// Test every controller and its registry, printing one line per test. `true`: at least one
/// controller is there.
pub async fn test_controllers(
    client: &reqwest::Client,
    controllers: &[String],
    out: &mut (dyn Write + Send),
) -> io::Result<bool> {
    let mut good = false;
    for url in controllers {
        write!(out, "Testing connection to controller {url}: ")?;
        out.flush()?;
        match status(client, url).await {
            Ok(status) => {
                good = true;
                writeln!(out, "OK")?;
                test_registry(client, &status.registry_address, out).await?;
            }
            Err(why) => writeln!(out, "FAILED ({why})")?,
        }
    }
    Ok(good)
}

async fn test_registry(
    client: &reqwest::Client,
    url: &str,
    out: &mut (dyn Write + Send),
) -> io::Result<()> {
    if url.is_empty() {
        // A controller that wants a login does not tell its registry; the agent learns it later.
        return Ok(());
    }
    let url = url.trim_end_matches('/');
    write!(out, "Testing connection to the registry {url}: ")?;
    out.flush()?;
    match get(client, &format!("{url}/registry/status")).await {
        Ok(answer) if answer.status().is_success() => writeln!(out, "OK"),
        Ok(answer) => writeln!(out, "FAILED (answered {})", answer.status()),
        Err(why) => writeln!(out, "FAILED ({why})"),
    }
}

async fn status(client: &reqwest::Client, url: &str) -> Result<Status, String> {
    let answer = get(client, &format!("{url}/api/v1/status")).await?;
    match answer.status().as_u16() {
        200 => {
            let answer: Result<Envelope, _> = answer.json().await;
            let envelope = answer.map_err(|_| "not a controller: its status makes no sense")?;
            Ok(envelope.body)
        }
        401 => Ok(Status::default()),
        _ => Err(format!("answered {}", answer.status())),
    }
}

async fn get(client: &reqwest::Client, url: &str) -> Result<reqwest::Response, String> {
    let answer = client.get(url).timeout(ANSWER_TIME).send().await;
    answer.map_err(|error| {
        if error.is_timeout() {
            return format!("no answer within {} s", ANSWER_TIME.as_secs());
        }
        let mut text = String::new();
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = cause {
            text.clear();
            let _ = write!(text, "{error}");
            cause = error.source();
        }
        text
    })
}

/// `a,b` as the operator writes it, as base addresses.
pub fn split_urls(list: &str) -> Vec<String> {
    list.split(',')
        .map(|url| url.trim().trim_end_matches('/'))
        .filter(|url| !url.is_empty())
        .map(|url| {
            if url.contains("://") {
                url.to_owned()
            } else {
                format!("http://{url}")
            }
        })
        .collect()
}
