//! Distributions: every node fetches a template before an instance needs it, whoever leads meanwhile.

use crate::cluster::{Cluster, until};
use crate::nodes_pull::node_id;
use crate::push::{noise_file, template_id};
use crate::turn;
use serde_json::{Value, json};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const PATH: &str = "/api/v1/registry/vm/distribute";
const FLAGS: [&str; 4] = ["--driver", "fake", "--share-listen", "127.0.0.1:0"];

fn push(cluster: &Cluster, tag: &str, megabytes: usize) {
    let disk = cluster.dir.path().join(format!("{tag}.raw"));
    noise_file(
        &disk,
        megabytes << 20,
        tag.len() as u64 * 77 + megabytes as u64,
    );
    let disk = disk.to_str().unwrap();
    let args = [
        "template",
        "push",
        "t",
        "--tag",
        tag,
        "--durability",
        "all",
        "--disk",
        disk,
    ];
    cluster.cli_ok(&args);
}

/// What member `n` says of one; never that all of it is there and that it is not done.
async fn look(cluster: &Cluster, n: usize, id: &str) -> Option<Value> {
    let path = format!("{PATH}?id={id}");
    let found = cluster.call(n, "GET", &path, None).await.ok()?;
    for node in found["distribute_status"].as_object()?.values() {
        let progress = node["progress"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&progress), "{found}");
        assert_eq!(node["status"] == true, progress == 1.0, "{found}");
    }
    Some(found)
}

fn on_disk(cluster: &Cluster, node: &str) -> usize {
    let images = cluster.dir.path().join(node).join("images");
    let folders = std::fs::read_dir(images).into_iter().flatten().flatten();
    folders.filter(|f| f.path().join("whole").exists()).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_distribution_reaches_every_node_and_outlives_its_leader() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    push(&cluster, "v1", 48);
    let template = template_id(&cluster, "t").await.unwrap();
    let mut nodes = Vec::new();
    for name in ["n1", "n2", "n3"] {
        cluster.start_agent(name, &FLAGS);
        nodes.push(node_id(&cluster, name).await);
    }
    cluster.cli_ok(&["node", "drain", &nodes[1]]);

    // An entry for each node at once, at every member; a draining one included.
    let body = json!({"template_id": template, "tag": "v1"});
    let accepted = cluster.call(1, "POST", PATH, Some(body)).await.unwrap();
    let id = accepted["request_id"].as_str().unwrap();
    for n in 0..3 {
        let seen = look(&cluster, n, id).await.unwrap();
        assert_eq!(seen["request"]["template_id"], template.as_str());
        assert!(
            seen["request"]["time_requested"]
                .as_str()
                .unwrap()
                .ends_with('Z')
        );
        for node in &nodes {
            assert!(seen["distribute_status"][node].is_object(), "{seen}");
        }
    }
    // The leader dies, and a node, while they fetch it.
    let leader = cluster.leader().await;
    cluster.kill_agent("n3");
    cluster.kill(leader);
    let survivor = (leader + 1) % 3;
    until("the nodes that live have it", LIMIT, || async {
        let seen = look(&cluster, survivor, id).await?;
        let status = &seen["distribute_status"];
        let done = |node: &String| status[node]["status"] == true;
        (done(&nodes[0]) && done(&nodes[1])).then_some(())
    })
    .await;
    cluster.start_agent("n3", &FLAGS);
    until("every node has it", LIMIT, || async {
        let seen = look(&cluster, survivor, id).await?;
        let mut all = seen["distribute_status"].as_object()?.values();
        (seen["ended"] == true && all.all(|n| n["status"] == true)).then_some(())
    })
    .await;
    for name in ["n1", "n2", "n3"] {
        assert_eq!(on_disk(&cluster, name), 1, "{name}");
    }
    cluster.start(leader);
    cluster.wait_ready(&[leader]).await;

    // One that is away has its entry; cancelled, it never fetches it.
    push(&cluster, "v22", 8);
    push(&cluster, "v333", 1);
    cluster.kill_agent("n1");
    let args = [
        "template",
        "distribute",
        "t",
        "--tag",
        "v22",
        "--node",
        "n1",
        "--node",
        &nodes[2],
    ];
    let accepted = cluster.cli_json(&args);
    let id = accepted["request_id"].as_str().unwrap().to_owned();
    until("the other one has it", LIMIT, || async {
        let seen = look(&cluster, 0, &id).await?;
        (seen["distribute_status"][&nodes[2]]["status"] == true).then_some(())
    })
    .await;
    let seen = look(&cluster, 2, &id).await.unwrap();
    assert_eq!(seen["distribute_status"][&nodes[0]]["status"], false);
    assert_eq!(seen["ended"], false);
    cluster.cli_ok(&["template", "cancel-distribution", &id]);
    let seen = look(&cluster, 1, &id).await.unwrap();
    assert_eq!(seen["ended"], true, "{seen}");
    assert_eq!(seen["distribute_status"][&nodes[0]]["error"], "cancelled");
    cluster.start_agent("n1", &FLAGS);
    let wait = [
        "template",
        "distribute",
        "t",
        "--node",
        "n1",
        "--wait",
        "--timeout",
        "100",
    ];
    cluster.cli_ok(&wait);
    assert_eq!(
        on_disk(&cluster, "n1"),
        2,
        "v1 and v333, not what was cancelled"
    );
    let listed = cluster.cli_ok(&["template", "distributions"]);
    assert_eq!(listed.lines().count(), 4, "{listed}");

    // It is dropped again where it is not wanted, also by a node that is away just now.
    cluster.kill_agent("n2");
    let args = [
        "template",
        "remove-from-nodes",
        "t",
        "--node",
        "n1",
        "--node",
        "n2",
    ];
    let asked = cluster.cli_json(&args);
    assert_eq!(asked["requests_sent"], 2, "{asked}");
    cluster.start_agent("n2", &FLAGS);
    for name in ["n1", "n2"] {
        until("it is dropped", LIMIT, || async {
            (on_disk(&cluster, name) == 0).then_some(())
        })
        .await;
    }
    assert_eq!(on_disk(&cluster, "n3"), 2, "it was not asked");
    until("every member knows", LIMIT, || async {
        let again = cluster.cli_json(&args);
        (again["requests_sent"] == 0).then_some(())
    })
    .await;

    // A node without room says so, and is not at one for ever; it is tried again until that is given up.
    let full = [&FLAGS[..], &["--reserve-space", "100000T"]].concat();
    cluster.start_agent("n4", &full);
    let n4 = node_id(&cluster, "n4").await;
    let body = json!({"template_id": template, "node_ids": [n4]});
    let accepted = cluster.call(0, "POST", PATH, Some(body)).await.unwrap();
    let id = accepted["request_id"].as_str().unwrap();
    let of_n4 = async |n: usize| {
        let seen = look(&cluster, n, id).await?;
        Some(seen["distribute_status"][&n4].clone())
    };
    for n in 0..3 {
        until("every member tells why", LIMIT, || async {
            let error = of_n4(n).await?["error"].as_str()?.to_owned();
            error.contains("lack of disk space").then_some(())
        })
        .await;
    }
    let revert = format!("/api/v1/registry/revert?id={template}");
    cluster.call(1, "DELETE", &revert, None).await.unwrap();
    let seen = of_n4(2).await.unwrap();
    assert_eq!(seen["error"], "the tag was deleted");
    assert_eq!(on_disk(&cluster, "n4"), 0);
}
