//! Members that pause and disks that are slow: who was away comes back quietly, who is too slow to lead
//! hands over, and when all are slow nobody does.

use super::shim::{Fault, Shim, op};
use crate::cluster::{Cluster, until};
use crate::load::Writers;
use crate::push::push_small_template;
use crate::{rounds, turn};
use std::time::{Duration, Instant};

async fn term(cluster: &Cluster, n: usize) -> u64 {
    let row = cluster.call(n, "GET", "/api/v1/cluster/status", None).await;
    row.unwrap()["term"].as_u64().unwrap()
}

/// Pauses of this length, in seconds: a minute in the long form.
fn pause() -> Duration {
    Duration::from_secs(rounds("MAINSTAY_PAUSE_SECONDS", 3) as u64)
}

async fn awake(cluster: &Cluster, n: usize) {
    let url = format!("http://{}/readyz", cluster.members[n].api);
    until("the member is back", Duration::from_secs(30), || async {
        let answer = cluster.client.get(&url).send().await.ok()?;
        (answer.status() == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_member_comes_back_without_disturbing_the_leader() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 4).await;
    writers.progress(20).await;
    let leader = cluster.leader().await;
    let paused = (leader + 1) % 3;
    let before = term(&cluster, leader).await;
    cluster.signal(paused, "STOP");
    let end = Instant::now() + pause();
    while Instant::now() < end {
        writers.progress(20).await;
    }
    cluster.signal(paused, "CONT");
    awake(&cluster, paused).await;
    writers.progress(200).await;
    assert_eq!(cluster.leader().await, leader);
    assert_eq!(
        term(&cluster, paused).await,
        before,
        "the term did not move"
    );
    let told = writers.stop_only().await;
    told.check(&cluster, paused).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_leader_is_replaced_and_follows_when_it_is_back() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 4).await;
    writers.progress(20).await;
    let old = cluster.leader().await;
    let rest: Vec<usize> = (0..3).filter(|n| *n != old).collect();
    cluster.signal(old, "STOP");
    until("another leader", Duration::from_secs(20), || async {
        let row = cluster
            .call(rest[0], "GET", "/api/v1/cluster/status", None)
            .await;
        let row = row.ok()?;
        let list = cluster
            .call(rest[0], "GET", "/api/v1/members", None)
            .await
            .ok()?;
        let name = |n: usize| cluster.members[n].name.clone();
        let led = list.as_array()?.iter().find(|m| m["id"] == row["leader"])?;
        (led["name"] != name(old).as_str()).then_some(())
    })
    .await;
    let now = term(&cluster, rest[0]).await;
    let end = Instant::now() + pause();
    while Instant::now() < end {
        writers.progress(20).await;
    }
    cluster.signal(old, "CONT");
    awake(&cluster, old).await;
    writers.progress(200).await;
    assert_ne!(cluster.leader().await, old);
    assert_eq!(
        term(&cluster, old).await,
        now,
        "it followed, it did not fight"
    );
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
}

/// A cluster whose members `which` have a disk that can be slowed down.
async fn cluster_with_brakes(which: &[usize]) -> (Cluster, Vec<Shim>) {
    let mut cluster = Cluster::new(3);
    let mut shims = Vec::new();
    for &n in which {
        let part = format!("{}/log/", cluster.members[n].data.display());
        let shim = Shim::new(cluster.dir.path(), &[part]);
        shim.attach(&mut cluster, n);
        shims.push(shim);
    }
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    (cluster, shims)
}

const SLOW: Fault = Fault::Delay {
    ms: 1100,
    calls: 1 << 40,
};

async fn complains(cluster: &Cluster, n: usize, of: &str) -> Option<()> {
    let row = cluster
        .call(n, "GET", "/api/v1/cluster/status", None)
        .await
        .ok()?;
    row["errors"].to_string().contains(of).then_some(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_with_a_slow_disk_hands_over_and_writes_are_fast_again() {
    let _turn = turn().await;
    let (cluster, shims) = cluster_with_brakes(&[0]).await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 4).await;
    until("the lead", Duration::from_secs(20), || async {
        cluster.cli(&["member", "transfer-leader", "c1"]);
        (cluster.leader().await == 0).then_some(())
    })
    .await;
    let before = term(&cluster, 0).await;
    shims[0].set(op::SYNC, 1, SLOW);
    until("another leader", Duration::from_secs(20), || async {
        (cluster.leader().await != 0).then_some(())
    })
    .await;
    assert!(shims[0].hits() > 0);
    let leader = cluster.leader().await;
    assert_eq!(
        term(&cluster, leader).await,
        before + 1,
        "handed over, not fought over"
    );
    until("it says why", Duration::from_secs(10), || {
        complains(&cluster, 0, "its disk is slow")
    })
    .await;
    writers.progress(300).await;
    assert_eq!(cluster.leader().await, leader, "it stays there");
    shims[0].set(op::SYNC, 1, Fault::None);
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_disks_are_slow_the_leader_stays() {
    let _turn = turn().await;
    let (cluster, shims) = cluster_with_brakes(&[0, 1, 2]).await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 4).await;
    let leader = cluster.leader().await;
    for shim in &shims {
        shim.set(op::SYNC, 1, SLOW);
    }
    for n in 0..3 {
        until("all are slow", Duration::from_secs(30), || {
            complains(&cluster, n, "its disk is slow")
        })
        .await;
    }
    // One of them may have been found slow first, and have handed over to one found so later.
    let (leader_now, term_now) = (cluster.leader().await, term(&cluster, leader).await);
    writers.progress(20).await;
    assert_eq!(cluster.leader().await, leader_now);
    assert_eq!(
        term(&cluster, leader).await,
        term_now,
        "nobody hands over to another slow one"
    );
    for shim in &shims {
        shim.set(op::SYNC, 1, Fault::None);
    }
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
}
