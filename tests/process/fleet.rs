//! Many nodes: `mainstay bench schedule` is a fleet of simulated ones, each with the connections and the protocol of a real agent.

use crate::cluster::{Cluster, binary, until};
use crate::push::noise_file;
use crate::{rounds, turn};
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// Longest time that a phase may take.
const PATIENCE: Duration = Duration::from_secs(900);

async fn instances(cluster: &Cluster, n: usize) -> Option<Value> {
    let stats = cluster.call(n, "GET", "/api/v1/stats", None).await.ok()?;
    Some(json!([stats["nodes"], stats["instances"]]))
}

/// The leader dies while instances are placed on a fleet: each instance that was asked for is started on one node, none twice,
/// none is lost, whichever member is asked. Long form: `MAINSTAY_FLEET_NODES=5000`, twenty instances on each.
#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_is_filled_although_the_leader_dies() {
    let _turn = turn().await;
    let nodes = rounds("MAINSTAY_FLEET_NODES", 100);
    let wanted = nodes * 20;
    let mut cluster = Cluster::ready().await;
    let disk = cluster.dir.path().join("fleet.raw");
    noise_file(&disk, 100_000, 3);
    let disk = disk.to_str().unwrap();
    cluster.cli_ok(&[
        "template", "push", "fleet", "--tag", "v1", "--disk", disk, "--arch", "amd64",
    ]);
    let mut bench = tokio::process::Command::new(binary())
        .args([
            "bench",
            "schedule",
            "--template",
            "fleet",
            "--output",
            "json",
        ])
        .args([
            "--nodes",
            &nodes.to_string(),
            "--instances",
            &wanted.to_string(),
        ])
        .args([
            "--per-request",
            "20",
            "--rate-seconds",
            "0",
            "--idle-seconds",
            "0",
        ])
        .args(["--endpoints", &cluster.endpoints()])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut phases = BufReader::new(bench.stdout.take().unwrap()).lines();
    let joined = phases.next_line().await.unwrap().unwrap();
    assert!(joined.contains(r#""join""#), "{joined}");

    let leader = cluster.leader().await;
    let other = (leader + 1) % 3;
    until("a part is there", PATIENCE, || async {
        let now = instances(&cluster, other).await?;
        let all = now[1].as_object()?.values();
        let all = all.filter_map(Value::as_u64).sum::<u64>();
        (all as usize >= wanted / 10).then_some(())
    })
    .await;
    cluster.kill(leader);
    let filled = phases.next_line().await.unwrap().unwrap();
    assert!(filled.contains(r#""fill""#), "{filled}");
    eprintln!("{joined}\n{filled}");
    cluster.start(leader);
    cluster.wait_ready(&[leader]).await;

    let right = json!([nodes, {"Started": wanted}]);
    for n in 0..3 {
        assert_eq!(instances(&cluster, n).await.unwrap(), right, "member {n}");
    }
    let ended = bench.wait().await.unwrap();
    assert!(ended.success(), "{ended}");
}
