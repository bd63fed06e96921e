//! A machine that dies: every member says so, its instances end in `Error`, and it may come back.

use crate::cluster::{Cluster, until};
use crate::push::{noise_file, template_id};
use crate::turn;
use serde_json::{Value, json};
use std::time::Duration;

/// Of one wait; the times below are a third of it.
const LIMIT: Duration = Duration::from_secs(20);
const FLAGS: [&str; 4] = ["--node-unreachable-ms", "3000", "--node-lease-ms", "6000"];

/// Until the only node is in this state on all three members.
async fn node_is(cluster: &Cluster, state: &str) {
    for n in 0..3 {
        let what = format!("the node is {state} on member {n}");
        until(&what, LIMIT, || async {
            let nodes = cluster.call(n, "GET", "/api/v1/node", None).await.ok()?;
            (nodes.as_array()?.len() == 1 && nodes[0]["state"] == state).then_some(())
        })
        .await;
    }
}

async fn instance_is(cluster: &Cluster, n: usize, id: &str, state: &str) -> Value {
    let what = format!("the instance is {state} on member {n}");
    until(&what, LIMIT, || async {
        let path = format!("/api/v1/vm?id={id}");
        let found = cluster.call(n, "GET", &path, None).await.ok()?;
        (found["instance_state"] == state).then_some(found)
    })
    .await
}

/// What members tell each other of nodes is none of the clients' business.
async fn heartbeats_come_from_members_only(cluster: &Cluster) {
    let status = async |at: &str, path: &str| {
        let call = cluster.client.post(format!("http://{at}{path}")).body("{}");
        call.send().await.unwrap().status().as_u16()
    };
    let member = &cluster.members[0];
    assert_eq!(status(&member.api, "/agent/v1/exchange").await, 404);
    assert_eq!(status(&member.api, "/peer/v1/nodes").await, 404);
    assert_eq!(status(&member.peer, "/peer/v1/nodes").await, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_is_seen_by_all_and_may_come_back() {
    let _turn = turn().await;
    let mut cluster = Cluster::new(3);
    cluster.flags = FLAGS.to_vec();
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    heartbeats_come_from_members_only(&cluster).await;

    let disk = cluster.dir.path().join("small.raw");
    noise_file(&disk, 100_000, 3);
    let disk = disk.to_str().unwrap().to_owned();
    cluster.cli_ok(&["template", "push", "small", "--tag", "v1", "--disk", &disk]);
    let template = template_id(&cluster, "small").await.unwrap();
    cluster.start_agent("node1", &["--driver", "fake"]);
    let body = json!({"vmid": template, "count": 1});
    let ids = cluster.call(0, "POST", "/api/v1/vm", Some(body)).await;
    let ids = ids.unwrap();
    let id = ids[0].as_str().unwrap();
    instance_is(&cluster, 0, id, "Started").await;
    node_is(&cluster, "Active").await;

    cluster.kill_agent("node1");
    node_is(&cluster, "Offline").await;
    for n in 0..3 {
        let failed = instance_is(&cluster, n, id, "Error").await;
        assert_eq!(failed["message"], "node lost", "{failed}");
    }

    cluster.start_agent("node1", &["--driver", "fake"]);
    node_is(&cluster, "Active").await;
    instance_is(&cluster, 1, id, "Error").await;
}
