//! Which member an agent may call its home: one with a quorum behind it, whatever it thinks of itself.

use crate::cluster::{Cluster, member};
use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use mainstay::agents::{AgentsConfig, AgentsState, Liveness, agents_router, exchange_router};
use mainstay::peer::PeerClient;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tower::ServiceExt as _;

const LIMIT: Duration = Duration::from_secs(20);

/// Member `n` answers agents and members, with short times.
fn open(cluster: &mut Cluster, n: usize) {
    open_with(cluster, n, Duration::from_millis(50));
}

fn open_with(cluster: &mut Cluster, n: usize, heartbeat: Duration) {
    let config = AgentsConfig {
        heartbeat,
        exchange_every: Duration::from_millis(20),
        exchange_grace: Duration::from_millis(500),
        ..AgentsConfig::new("test", Duration::from_secs(20), Duration::from_secs(120))
    };
    let member = &mut cluster.members[n];
    let peers = PeerClient::new("token", member.id).unwrap();
    let state = AgentsState::new(member.app.clone(), Liveness::new(), peers, config);
    member.api = agents_router(state.clone()).merge(exchange_router(state));
}

/// Until node `n1` reports to member `n` with this result.
async fn reports(cluster: &Cluster, n: usize, wanted: StatusCode) {
    let begun = Instant::now();
    loop {
        let report = json!({"node_id": "n1"});
        let status = cluster.call(n, "POST", "/agent/v1/report", report).await;
        if status.status == wanted {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "still {}", status.status);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The stream of node `n1`, from member `n`.
async fn stream(cluster: &Cluster, n: usize) -> Body {
    let request = Request::get("/agent/v1/desired?node_id=n1");
    let request = request.body(Body::empty()).unwrap();
    let api = cluster.members[n].api.clone();
    api.oneshot(request).await.unwrap().into_body()
}

/// The next line of a stream.
async fn line(stream: &mut Body) -> Value {
    let next = tokio::time::timeout(LIMIT, stream.frame()).await;
    let next = next.expect("a line in time").unwrap().unwrap();
    serde_json::from_slice(&next.into_data().unwrap()).unwrap()
}

async fn exchange(cluster: &Cluster, n: usize, ask: Value) -> Value {
    let answer = cluster.call(n, "POST", "/peer/v1/nodes", ask).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_sends_its_agents_away() {
    let mut cluster = Cluster::start(3).await;
    cluster.node().await;
    let leader = cluster.leader().await;
    open(&mut cluster, leader);
    reports(&cluster, leader, StatusCode::OK).await;
    assert_eq!(exchange(&cluster, leader, json!({})).await["leader"], true);
    let mut stream = stream(&cluster, leader).await;
    assert!(line(&mut stream).await["generation"].is_u64());

    let id = cluster.members[leader].id;
    cluster.network.isolate(id, &[1, 2, 3], true);
    reports(&cluster, leader, StatusCode::SERVICE_UNAVAILABLE).await;
    let deluded = cluster.members[leader].group.status().is_leader();
    assert!(
        deluded,
        "it knows that it leads no more: this proves nothing"
    );
    assert_eq!(exchange(&cluster, leader, json!({})).await["leader"], false);
    let ended = tokio::time::timeout(LIMIT, stream.collect()).await;
    ended.expect("the stream ends in time").unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_kept_of_nodes_that_nobody_registered() {
    let mut cluster = Cluster::start(1).await;
    cluster.node().await;
    open(&mut cluster, 0);
    reports(&cluster, 0, StatusCode::OK).await;
    let heard = |node: &str| json!({"node": node, "home": 5, "beat": 1, "stats": {"vm_count": 9}});
    let told = json!({"told": {"heard": [heard("n1"), heard("n2")]}});
    let answer = exchange(&cluster, 0, told).await;
    let known = answer["told"]["heard"].as_array().unwrap();
    assert_eq!(known.len(), 1, "{answer}");
    assert_eq!(
        (&known[0]["node"], &known[0]["home"]),
        (&json!("n1"), &json!(5))
    );
    cluster.stop().await;
}

/// No heartbeat comes to the help of this one: the agent's report may be as late as the member's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_says_at_once_who_the_members_are_now() {
    let mut cluster = Cluster::uninitialised(2).await;
    let alone = BTreeMap::from([(1, member(1))]);
    cluster.members[0].group.initialize(alone).await.unwrap();
    cluster.leader().await;
    cluster.node().await;
    open_with(&mut cluster, 0, Duration::from_secs(600));
    let mut stream = stream(&cluster, 0).await;
    let first = line(&mut stream).await;
    assert_eq!(first["controllers"], json!(["http://c1:8090"]));
    let joins = cluster.members[0].group.add_learner(2, member(2));
    joins.await.unwrap();
    // The same may be said again before.
    let news = loop {
        let line = line(&mut stream).await;
        if line != first {
            break line;
        }
    };
    let both = json!(["http://c1:8090", "http://c2:8090"]);
    assert_eq!(news["controllers"], both);
    let both = json!(["http://c1:8089", "http://c2:8089"]);
    assert_eq!(news["registries"], both);
    cluster.stop().await;
}
