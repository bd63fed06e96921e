//! The connection: failover, silence, memory, strangers.

use crate::stub::*;
use mainstay_agent::join;
use std::time::Duration;

#[tokio::test]
async fn a_dead_home_is_left_for_another_and_vms_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let (one, two) = (Stub::new(&cluster).await, Stub::new(&cluster).await);
    let agent = agent(dir.path(), &[&one, &two]).await;
    cluster.want(vec![run("a", 2)]);
    let started = cluster.phase("a", "running").await.vm.unwrap().started_ms;
    let (home, other) = if *one.streams.borrow() > 0 {
        (one, two)
    } else {
        (two, one)
    };
    home.kill().await;
    other.streamed(1).await;
    cluster.want(vec![run("a", 2), run("b", 2)]);
    cluster.phase("b", "running").await;
    let seen = cluster.phase("a", "running").await;
    assert_eq!(seen.vm.unwrap().started_ms, started);
    // Everybody away: VMs go on.
    other.kill().await;
    tokio::time::timeout(Duration::from_millis(700), std::future::pending::<()>())
        .await
        .unwrap_err();
    assert_eq!(agent.vms().await, ["a", "b"]);
}

#[tokio::test]
async fn a_silent_home_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let (one, two) = (Stub::new(&cluster).await, Stub::new(&cluster).await);
    let _agent = agent(dir.path(), &[&one, &two]).await;
    cluster
        .reported("anything", |r| !r.node_id.is_empty())
        .await;
    let (home, other) = if *one.streams.borrow() > 0 {
        (one, two)
    } else {
        (two, one)
    };
    home.fall_silent();
    other.streamed(1).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
}

#[tokio::test]
async fn members_that_were_told_are_remembered_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let (one, two) = (Stub::new(&cluster).await, Stub::new(&cluster).await);
    *cluster.controllers.lock().unwrap() = vec![one.url.clone(), two.url.clone()];
    let first = agent(dir.path(), &[&one]).await;
    let seen = cluster
        .reported("anything", |r| !r.node_id.is_empty())
        .await;
    let told = dir.path().join("node.json");
    until("the list is on disk", async || {
        std::fs::read_to_string(&told).unwrap().contains(&two.url)
    })
    .await;
    first.kill().await;
    let url = one.url.clone();
    one.kill().await;
    // The operator's list names only the dead one.
    let _second = agent_with(dir.path(), vec![url], 9).await;
    two.streamed(1).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    assert_eq!(cluster.reports.borrow().node_id, seen.node_id);
}

/// A home that is removed before the next report is answered has said who else there is.
#[tokio::test]
async fn members_that_only_the_stream_told_are_used_and_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let (one, two) = (Stub::new(&cluster).await, Stub::new(&cluster).await);
    let first = agent(dir.path(), &[&one]).await;
    one.streamed(1).await;
    let both = vec![one.url.clone(), two.url.clone()];
    // Neither registrations nor reports are told of anybody, as before.
    cluster.desired.send_modify(|set| set.controllers = both);
    let kept = dir.path().join("node.json");
    until("the list is on disk", async || {
        std::fs::read_to_string(&kept).unwrap().contains(&two.url)
    })
    .await;
    // Nothing is said of members, as by those of an earlier release: nothing is forgotten.
    cluster.desired.send_modify(|set| set.controllers.clear());
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    let url = one.url.clone();
    one.kill().await;
    two.streamed(1).await;
    first.kill().await;
    let _second = agent_with(dir.path(), vec![url], 9).await;
    two.streamed(2).await;
}

#[tokio::test]
async fn an_older_set_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    let newest = cluster.desired.borrow().clone();
    cluster.desired.send_modify(|set| {
        set.generation -= 1;
        set.instances = vec![stop("a", 3)];
    });
    home.streamed(3).await;
    assert_eq!(agent.vms().await, ["a"]);
    assert_eq!(agent.executor.generation(), newest.generation);
    cluster.desired.send_replace(newest);
    cluster.want(vec![stop("a", 3)]);
    cluster.phase("a", "gone").await;
}

#[tokio::test]
async fn a_forgotten_node_registers_again() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let _agent = agent(dir.path(), &[&home]).await;
    cluster
        .reported("anything", |r| !r.node_id.is_empty())
        .await;
    *cluster.known.lock().unwrap() = false;
    let mut registered = cluster.registered.subscribe();
    let again = registered.wait_for(|n| *n >= 2);
    let again = tokio::time::timeout(Duration::from_secs(20), again).await;
    again.expect("registered again").unwrap();
}

#[tokio::test]
async fn another_cluster_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    cluster
        .reported("anything", |r| !r.node_id.is_empty())
        .await;
    first.kill().await;
    *cluster.id.lock().unwrap() = "cluster-2".to_owned();
    let second = agent(dir.path(), &[&home]).await;
    let ended = tokio::time::timeout(Duration::from_secs(20), second.task).await;
    let error = ended.unwrap().unwrap().to_string();
    assert!(error.contains("belongs to cluster cluster-1"), "{error}");
}

#[tokio::test]
async fn join_says_line_by_line_who_is_there() {
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let dead = Stub::new(&cluster).await;
    let dead_url = dead.url.clone();
    dead.kill().await;
    let client = mainstay_agent::agent::http_client().unwrap();
    let urls = join::split_urls(&format!("{}/, {dead_url}", home.url));
    let mut out = Vec::new();
    assert!(
        join::test_controllers(&client, &urls, &mut out)
            .await
            .unwrap()
    );
    let text = String::from_utf8(out).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let first = format!("Testing connection to controller {}: OK", home.url);
    assert_eq!(lines[0], first);
    let second = format!("Testing connection to controller {dead_url}: FAILED (");
    assert!(lines[1].starts_with(&second), "{text}");
    let mut out = Vec::new();
    assert!(
        !join::test_controllers(&client, &urls[1..], &mut out)
            .await
            .unwrap()
    );
}
