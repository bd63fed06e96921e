//! Nodes that pull one template at once: they serve each other, whoever is killed meanwhile.

use crate::cluster::{Cluster, until};
use crate::push::{noise_file, template_id};
use crate::{rounds, turn};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// Bytes that a member has sent to clients and nodes.
async fn sent_by(cluster: &Cluster, n: usize) -> u64 {
    let url = format!("http://{}/metrics", cluster.members[n].api);
    let page = cluster.client.get(url).send().await.unwrap();
    let page = page.text().await.unwrap();
    let line = page
        .lines()
        .find_map(|l| l.strip_prefix("mainstay_sent_bytes_total "));
    line.unwrap().parse().unwrap()
}

/// The same of all members that run.
pub(crate) async fn sent(cluster: &Cluster) -> u64 {
    let mut total = 0;
    for n in (0..3).filter(|n| cluster.running(*n)) {
        total += sent_by(cluster, n).await;
    }
    total
}

/// The whole image with this content on a node, once it is there.
pub(crate) fn image_on(cluster: &Cluster, node: &str) -> Option<PathBuf> {
    let images = cluster.dir.path().join(node).join("images");
    let folders = std::fs::read_dir(images).ok()?.flatten();
    let mut whole = folders
        .map(|f| f.path())
        .filter(|f| f.join("whole").exists());
    whole.next().map(|f| f.join("disk"))
}

/// Ids of the nodes by name.
pub(crate) async fn node_id(cluster: &Cluster, name: &str) -> String {
    until("the node has joined", LIMIT, || async {
        let n = (0..3).find(|n| cluster.running(*n))?;
        let nodes = cluster.call(n, "GET", "/api/v1/node", None).await.ok()?;
        let node = nodes.as_array()?.iter().find(|n| n["node_name"] == name)?;
        Some(node["node_id"].as_str()?.to_owned())
    })
    .await
}

/// `MAINSTAY_PULL_MB=1024 MAINSTAY_PULL_NODES=10` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_pull_at_once_while_a_node_and_a_member_are_killed() {
    let _turn = turn().await;
    let megabytes = rounds("MAINSTAY_PULL_MB", 128);
    let count = rounds("MAINSTAY_PULL_NODES", 5);
    let mut cluster = Cluster::ready().await;
    let disk = cluster.dir.path().join("big.raw");
    noise_file(&disk, megabytes << 20, 11);
    let path = disk.to_str().unwrap();
    let push = [
        "template",
        "push",
        "big",
        "--tag",
        "v1",
        "--durability",
        "all",
    ];
    cluster.cli_ok(&[&push[..], &["--disk", path]].concat());
    let template = template_id(&cluster, "big").await.unwrap();
    let copy = (megabytes << 20) as u64;
    let names: Vec<String> = (0..count).map(|n| format!("n{n}")).collect();
    let flags = ["--driver", "fake", "--share-listen", "127.0.0.1:0"];
    for name in &names {
        cluster.start_agent(name, &flags);
    }
    let mut ids = Vec::new();
    for name in &names {
        ids.push(node_id(&cluster, name).await);
    }
    assert_eq!(sent(&cluster).await, 0);

    // All at once; then one of them is killed while it has a part, and a member that serves them.
    for id in &ids {
        let body = json!({"vmid": template, "count": 1, "node_id": id});
        cluster
            .call(0, "POST", "/api/v1/vm", Some(body))
            .await
            .unwrap();
    }
    until("some of it is on its way", LIMIT, || async {
        (sent(&cluster).await > copy / 10).then_some(())
    })
    .await;
    cluster.kill_agent("n0");
    assert!(
        image_on(&cluster, "n0").is_none(),
        "killed too late to tell"
    );
    let victim = (cluster.leader().await + 1) % 3;
    let of_victim = sent_by(&cluster, victim).await;
    cluster.kill(victim);
    for name in &names[1..] {
        let pulled = until("the image is whole", LIMIT, || async {
            image_on(&cluster, name)
        });
        let pulled = std::fs::read(pulled.await).unwrap();
        assert!(
            pulled == std::fs::read(&disk).unwrap(),
            "{name} has other bytes"
        );
    }
    // One copy, and once more what the killed ones were to give.
    let used = of_victim + sent(&cluster).await;
    assert!(used < 4 * copy, "{used} bytes, one copy is {copy}");

    // It goes on where it was, and its neighbours have what it lacks.
    let at = sent(&cluster).await;
    cluster.start_agent("n0", &flags);
    let pulled = until("the killed one is whole", LIMIT, || async {
        image_on(&cluster, "n0")
    });
    assert!(std::fs::read(pulled.await).unwrap() == std::fs::read(&disk).unwrap());
    let again = sent(&cluster).await - at;
    assert!(again < copy, "{again} bytes for the rest of one of {copy}");
    eprintln!(
        "{count} nodes, {megabytes} MiB each: members sent {:.2} copies, and {:.2} for the one that came back",
        used as f64 / copy as f64,
        again as f64 / copy as f64
    );
}
