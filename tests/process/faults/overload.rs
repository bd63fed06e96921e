//! More than a member can take: what waits is bounded in number and in bytes, whoever comes too many is
//! told so at once, and afterwards everything is as it was.

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::{rounds, turn};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that each client sends.
const BODY_LEN: usize = 128 << 10;
/// What waits at most (64 MiB of bodies), a few times over, as JSON, commands and buffers.
const RSS_MAX_MIB: u64 = 900;

fn rss_mib(cluster: &Cluster, n: usize) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", cluster.pid(n))).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        >> 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_connections_meet_a_bound_and_a_clear_answer() {
    let _turn = turn().await;
    let clients = rounds("MAINSTAY_OVERLOAD_CLIENTS", 1000);
    let cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "t").await;
    let leader = cluster.leader().await;
    let others: Vec<usize> = (0..3).filter(|n| *n != leader).collect();
    // Nothing can be committed: everything that comes waits.
    for n in &others {
        cluster.signal(*n, "STOP");
    }
    let url = format!("http://{}/api/v1/vm", cluster.members[leader].api);
    let body = json!({"vmid": template, "metadata": {"big": "x".repeat(BODY_LEN)}});
    let body: Arc<str> = body.to_string().into();
    let mut asked = tokio::task::JoinSet::new();
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(30))
        .build()
        .unwrap();
    for _ in 0..clients {
        let (client, url, body) = (client.clone(), url.clone(), Arc::clone(&body));
        asked.spawn(async move {
            let begun = Instant::now();
            let answer = client
                .post(url)
                .body(body.to_string())
                .send()
                .await
                .unwrap();
            let retry = answer.headers().contains_key("retry-after");
            let status = answer.status().as_u16();
            (status, retry, answer.text().await.unwrap(), begun.elapsed())
        });
    }
    let mut worst = 0;
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    while let Some(answered) = asked.join_next().await {
        let (status, retry, text, _) = answered.unwrap();
        worst = worst.max(rss_mib(&cluster, leader));
        assert_eq!((status, retry), (503, true), "{text}");
        let what = if text.contains("overloaded") {
            "overloaded"
        } else {
            "waited"
        };
        *seen.entry(what).or_default() += 1;
    }
    eprintln!("{clients} clients: {seen:?}, at most {worst} MiB");
    assert!(seen.get("overloaded").is_some_and(|n| *n > 0), "{seen:?}");
    assert!(worst < RSS_MAX_MIB, "{worst} MiB");
    for n in &others {
        cluster.signal(*n, "CONT");
    }
    until("writes again", Duration::from_secs(30), || async {
        let body = Some(json!({"name": "g"}));
        cluster
            .call(leader, "POST", "/api/v1/group", body)
            .await
            .ok()
    })
    .await;
}
