//! The leader ends, again and again, under load: how long until the next acknowledged write, and is
//! everything that was acknowledged there, once? Ids that no two requests share are compared at the end.

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::{rounds, turn};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Clients; each makes instances and writes to the newest of them.
const CLIENTS: usize = 8;
/// Writes to an instance before the next one is made.
const WRITES: u64 = 9;
/// No write may wait for longer.
const GAP_MAX: Duration = Duration::from_secs(10);

/// `MAINSTAY_LEADER_KILLS=100` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_costs_a_moment_and_no_write() {
    let _turn = turn().await;
    let kills = rounds("MAINSTAY_LEADER_KILLS", 3);
    measure("kill -9 of the leader", kills, false).await;
}

/// `MAINSTAY_LEADER_STOPS=30` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_leader_costs_a_moment_and_no_write() {
    let _turn = turn().await;
    let stops = rounds("MAINSTAY_LEADER_STOPS", 2);
    measure("SIGTERM of the leader", stops, true).await;
}

/// What one client was told.
#[derive(Default)]
struct Told {
    /// When writes were acknowledged.
    moments: Vec<Instant>,
    /// Instances by name: acknowledged, or unknown.
    made: BTreeMap<String, bool>,
    /// The last number that was acknowledged, by instance.
    written: BTreeMap<String, u64>,
}

struct Shared {
    apis: Vec<String>,
    template: String,
    stop: AtomicBool,
    acknowledged: AtomicU64,
}

async fn measure(what: &str, rounds: usize, clean: bool) {
    let mut cluster = Cluster::ready().await;
    let shared = Arc::new(Shared {
        apis: cluster.members.iter().map(|m| m.api.clone()).collect(),
        template: push_small_template(&cluster, "load").await,
        stop: AtomicBool::new(false),
        acknowledged: AtomicU64::new(0),
    });
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        clients.spawn(work(n, Arc::clone(&shared)));
    }
    let mut ends = Vec::new();
    for _ in 0..rounds {
        progress(&shared, 100).await;
        let leader = cluster.leader().await;
        ends.push(Instant::now());
        if clean {
            cluster.stop(leader).await;
        } else {
            cluster.kill(leader);
        }
        progress(&shared, 100).await;
        cluster.start(leader);
        cluster.wait_ready(&[leader]).await;
    }
    progress(&shared, 100).await;
    shared.stop.store(true, Ordering::SeqCst);
    let mut told = Told::default();
    while let Some(one) = clients.join_next().await {
        let one = one.unwrap();
        told.moments.extend(one.moments);
        told.made.extend(one.made);
        told.written.extend(one.written);
    }
    let (lost, doubled) = compare(&cluster, &told).await;
    let gaps = gaps(&mut told.moments, &ends);
    eprintln!("{}", row(what, &gaps, &told, lost, doubled));
    assert_eq!((lost, doubled), (0, 0));
    assert!(gaps.iter().all(|gap| *gap < GAP_MAX), "{gaps:?}");
}

async fn progress(shared: &Shared, more: u64) {
    let goal = shared.acknowledged.load(Ordering::SeqCst) + more;
    until("writes go on", Duration::from_secs(30), || async {
        (shared.acknowledged.load(Ordering::SeqCst) >= goal).then_some(())
    })
    .await;
}

/// The longest time without an acknowledgement around each end: from the last one before it on.
fn gaps(moments: &mut [Instant], ends: &[Instant]) -> Vec<Duration> {
    moments.sort();
    let around = |(n, end): (usize, &Instant)| {
        let next = ends.get(n + 1);
        let within = |pair: &&[Instant]| pair[1] >= *end && next.is_none_or(|next| pair[0] < *next);
        let pairs = moments.windows(2).filter(within);
        pairs
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or_default()
    };
    ends.iter().enumerate().map(around).collect()
}

fn row(what: &str, gaps: &[Duration], told: &Told, lost: usize, doubled: usize) -> String {
    let mut sorted = gaps.to_vec();
    sorted.sort();
    let at = |part: usize| sorted[(sorted.len() * part / 100).min(sorted.len() - 1)].as_millis();
    format!(
        "| what | times | gap p50 | p95 | max | acknowledged | made | lost | duplicated |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n\
         | {what} | {} | {} ms | {} ms | {} ms | {} | {} | {lost} | {doubled} |",
        gaps.len(),
        at(50),
        at(95),
        at(100),
        told.moments.len(),
        told.made.len(),
    )
}

/// Acknowledged things that are not there, and things that are there too often, over all members.
async fn compare(cluster: &Cluster, told: &Told) -> (usize, usize) {
    let (mut lost, mut doubled) = (0, 0);
    for n in 0..cluster.members.len() {
        let list = cluster.call(n, "GET", "/api/v1/vm", None).await.unwrap();
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        let mut numbers = BTreeMap::new();
        for item in list.as_array().unwrap() {
            let name = item["external_id"].as_str().unwrap();
            assert!(told.made.contains_key(name), "nobody asked for {name}");
            *found.entry(name).or_default() += 1;
            let number = item["vm"]["metadata"]["n"].as_u64().unwrap_or(0);
            numbers.insert(item["instance_id"].as_str().unwrap(), number);
        }
        let missing =
            |(name, sure): &(&String, &bool)| **sure && !found.contains_key(name.as_str());
        lost += told.made.iter().filter(missing).count();
        // A later number without an answer may be there as well.
        let old = |(id, last): &(&String, &u64)| {
            numbers.get(id.as_str()).is_none_or(|number| number < last)
        };
        lost += told.written.iter().filter(old).count();
        doubled += found.values().filter(|count| **count > 1).count();
    }
    (lost, doubled)
}

/// Make an instance, write to it, make the next. Half of the requests for instances have a key and
/// are sent again until they are answered; the others are never sent again.
async fn work(client: usize, shared: Arc<Shared>) -> Told {
    let http = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(12))
        .build()
        .unwrap();
    let mut told = Told::default();
    let mut at = client;
    let mut number = 0_u64;
    while !shared.stop.load(Ordering::SeqCst) {
        number += 1;
        let name = format!("client-{client}-{number}");
        let body = json!({"vmid": shared.template, "external_id": name}).to_string();
        let keyed = number.is_multiple_of(2);
        let mut answer = None;
        while answer.is_none() {
            let url = format!("http://{}/api/v1/vm", shared.apis[at % shared.apis.len()]);
            let mut request = http.post(url).body(body.clone());
            if keyed {
                request = request.header("Idempotency-Key", &name);
            }
            answer = sent(&shared, &mut told, request, &mut at).await;
            if !keyed {
                break;
            }
        }
        told.made.insert(name, answer.is_some());
        let Some(id) = answer.and_then(|ids| Some(ids[0].as_str()?.to_owned())) else {
            continue;
        };
        for n in 1..=WRITES {
            let api = &shared.apis[at % shared.apis.len()];
            let url = format!("http://{api}/api/v1/vm?id={id}");
            let body = json!({"metadata": {"n": n}}).to_string();
            if sent(&shared, &mut told, http.put(url).body(body), &mut at)
                .await
                .is_some()
            {
                told.written.insert(id.clone(), n);
            }
        }
    }
    told
}

/// Send it; the body of an acknowledgement. Without one, the next request goes to the next member.
async fn sent(
    shared: &Shared,
    told: &mut Told,
    request: reqwest::RequestBuilder,
    at: &mut usize,
) -> Option<Value> {
    let text = match request.send().await {
        Ok(answer) => answer.text().await.unwrap_or_default(),
        Err(_) => String::new(),
    };
    let mut envelope: Value = serde_json::from_str(&text).unwrap_or_default();
    if envelope["status"] == "OK" {
        told.moments.push(Instant::now());
        shared.acknowledged.fetch_add(1, Ordering::SeqCst);
        return Some(envelope["body"].take());
    }
    *at += 1;
    // A port that is closed refuses at once: not a thousand times a second.
    tokio::time::sleep(Duration::from_millis(5)).await;
    None
}

#[test]
fn a_gap_is_looked_for_between_an_end_and_the_next() {
    let begin = Instant::now();
    let at = |ms| begin + Duration::from_millis(ms);
    let mut moments = [0, 10, 20, 900, 910, 1_000, 5_000].map(at);
    let found = gaps(&mut moments, &[at(15), at(950)]);
    let ms: Vec<_> = found.iter().map(Duration::as_millis).collect();
    assert_eq!(ms, [880, 4_000]);
}
