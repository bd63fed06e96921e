//! What the clients of one schedule share, and one request: sent, and its answer sorted into what it
//! says about the request's effect. Knows the wire; refuses to know faults.

use super::history::{KEYS, MISSING};
use super::links::MEMBERS_MAX;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// External ids of instances that clients make: this and a number.
pub(crate) const CREATED: &str = "made-";

/// Shared by all clients and the nemesis of a schedule.
pub(crate) struct Field {
    begin: Instant,
    /// API address of each member.
    pub(crate) apis: Vec<String>,
    /// Instances whose metadata is written.
    pub(crate) instances: Vec<String>,
    /// Templates that tags are taken from, with the number of tags each had.
    pub(crate) piles: Vec<(String, u32)>,
    /// Template of everything that is started. Nothing runs it.
    pub(crate) template: String,
    pub(crate) stop: AtomicBool,
    /// Raised just before a fault: whoever takes, takes now.
    pub(crate) burst: watch::Sender<u64>,
    /// Writes that each member acknowledged.
    pub(crate) acknowledged: [AtomicU64; MEMBERS_MAX],
    /// Which process of each member runs.
    pub(crate) process: [AtomicU32; MEMBERS_MAX],
    /// Counts values and names: never the same twice.
    numbers: AtomicU32,
}

/// The headers of a stale read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Age {
    pub(crate) applied: Option<u64>,
    pub(crate) ms_max: Option<u64>,
}

/// What an answer says.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Done; the envelope's body.
    Done(Value, Age),
    /// Understood and refused.
    Refused(String, Age),
    /// Nothing was changed, for certain.
    Nothing,
    /// The connection broke before an answer came.
    Dropped,
    /// Anything may have happened.
    Unknown,
}

impl Field {
    pub(crate) fn new(apis: Vec<String>, template: String) -> Self {
        Self {
            begin: Instant::now(),
            apis,
            instances: Vec::new(),
            piles: Vec::new(),
            template,
            stop: AtomicBool::new(false),
            burst: watch::Sender::new(0),
            acknowledged: Default::default(),
            process: Default::default(),
            numbers: AtomicU32::new(1),
        }
    }

    /// Microseconds since the schedule began.
    pub(crate) fn now(&self) -> u64 {
        self.begin.elapsed().as_micros() as u64
    }

    /// A number that no other call returns.
    pub(crate) fn number(&self) -> u32 {
        self.numbers.fetch_add(1, Ordering::SeqCst)
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Acknowledged writes of these members.
    pub(crate) fn acknowledged(&self, which: &[usize]) -> u64 {
        let of = |n: &usize| self.acknowledged[*n].load(Ordering::SeqCst);
        which.iter().map(of).sum()
    }

    /// Keys of an instance in an answer.
    pub(crate) fn values(instance: &Value) -> Vec<u32> {
        let of = |key| instance["metadata"][format!("k{key}")].as_u64();
        (0..KEYS).map(|key| of(key).unwrap_or(0) as u32).collect()
    }

    /// A list as the history has it.
    pub(crate) fn list(&self, body: &Value) -> (Vec<Vec<u32>>, BTreeMap<u32, u32>) {
        let mut registers = vec![vec![MISSING; KEYS]; self.instances.len()];
        let mut counts = BTreeMap::new();
        for item in body.as_array().into_iter().flatten() {
            let id = item["instance_id"].as_str().unwrap_or_default();
            if let Some(n) = self.instances.iter().position(|known| known == id) {
                registers[n] = Self::values(&item["vm"]);
            }
            let external = item["external_id"].as_str().unwrap_or_default();
            let number = external.strip_prefix(CREATED).and_then(|n| n.parse().ok());
            if let Some(number) = number {
                *counts.entry(number).or_default() += 1;
            }
        }
        (registers, counts)
    }
}

/// One request.
pub(crate) struct Call<'a> {
    pub(crate) method: &'static str,
    pub(crate) path: &'a str,
    pub(crate) body: Option<Value>,
    /// `Idempotency-Key`.
    pub(crate) key: Option<&'a str>,
    pub(crate) timeout: Duration,
}

/// A client of its own for each: its kept connections are no one else's.
pub(crate) fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// Send it to the member behind `api` and sort the answer.
pub(crate) async fn send(client: &reqwest::Client, api: &str, call: Call<'_>) -> Answer {
    let url = format!("http://{api}{}", call.path);
    let mut request = client
        .request(call.method.parse().unwrap(), url)
        .timeout(call.timeout);
    if let Some(key) = call.key {
        request = request.header("Idempotency-Key", key);
    }
    if let Some(body) = call.body {
        request = request.body(body.to_string());
    }
    let broken = |e: reqwest::Error| match e {
        e if e.is_connect() => Answer::Nothing,
        e if e.is_timeout() => Answer::Unknown,
        _ => Answer::Dropped,
    };
    let answer = match request.send().await {
        Ok(answer) => answer,
        Err(e) => return broken(e),
    };
    let status = answer.status().as_u16();
    let header = |name| answer.headers().get(name)?.to_str().ok()?.parse().ok();
    let age = Age {
        applied: header("x-mainstay-applied-index"),
        ms_max: header("x-mainstay-age-ms-max"),
    };
    let Ok(text) = answer.text().await else {
        return Answer::Dropped;
    };
    sort(status, &text, age)
}

fn sort(status: u16, text: &str, age: Age) -> Answer {
    let Ok(mut envelope) = serde_json::from_str::<Value>(text) else {
        return Answer::Unknown;
    };
    let message = envelope["message"].as_str().unwrap_or_default().to_owned();
    // These are promises, and the checker holds the members to them.
    let nothing = [
        "nothing was changed",
        "this member is not ready",
        "this member has stopped",
    ];
    match status {
        200 if envelope["status"] == "OK" => Answer::Done(envelope["body"].take(), age),
        200 | 400..=499 => Answer::Refused(format!("{status} {message}"), age),
        503 if nothing.iter().any(|text| message.contains(text)) => Answer::Nothing,
        _ => Answer::Unknown,
    }
}
