//! The whole journey with a real VM: push, replicate, start, kill the leader, kill everything,
//! everything still there, terminate.

use crate::cluster::{Cluster, until};
use crate::kills::all_members_agree;
use crate::load::Writers;
use crate::push::{push_small_template, template_id};
use crate::turn;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

/// The tiny guest, built once and again when its sources change.
pub(crate) fn guest() -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let image = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("tiny.qcow2");
    let built = std::fs::metadata(&image).and_then(|m| m.modified());
    if !built.is_ok_and(|built| built > newest(&root.join("guest"))) {
        let out = Command::new(root.join("guest/build.sh"))
            .arg(&image)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.success(),
            "guest/build.sh (see deploy/install-deps.sh): {error}"
        );
    }
    image
}

fn newest(path: &Path) -> SystemTime {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let own = meta.modified().unwrap();
    if !meta.is_dir() {
        return own;
    }
    let inner = std::fs::read_dir(path).unwrap();
    let inner = inner.map(|entry| newest(&entry.unwrap().path()));
    inner.max().map_or(own, |newest| newest.max(own))
}

pub(crate) async fn instance(cluster: &Cluster, n: usize, id: &str) -> Option<Value> {
    cluster
        .call(n, "GET", &format!("/api/v1/vm?id={id}"), None)
        .await
        .ok()
}

pub(crate) async fn wait_state(cluster: &Cluster, n: usize, id: &str, state: &str) -> Value {
    until(
        &format!("{id} is {state} on member {n}"),
        Duration::from_secs(120),
        || async {
            let found = instance(cluster, n, id).await?;
            assert!(
                found["instance_state"] != "Error" || state == "Error",
                "instance failed: {}",
                found["message"]
            );
            (found["instance_state"] == state).then_some(found)
        },
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn push_start_kill_restart_terminate() {
    let _turn = turn().await;
    let disk = guest();
    let mut cluster = Cluster::new(3);
    for n in [1, 2, 0] {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;

    // Push to any member; all three hold the same verified bytes.
    cluster.cli_ok(&[
        "template",
        "push",
        "tiny",
        "--tag",
        "v1",
        "--disk",
        disk.to_str().unwrap(),
        "--forward",
        "http:80",
    ]);
    let template = template_id(&cluster, "tiny").await.unwrap();
    until(
        "all three members hold the tag",
        Duration::from_secs(60),
        || async {
            let replicas = cluster.cli_json(&["template", "replicas", "tiny", "--tag", "v1"]);
            let rows = replicas.as_array()?;
            (rows.len() == 3 && rows.iter().all(|r| r["state"] == "complete")).then_some(())
        },
    )
    .await;

    // Start a real VM with a monitored script.
    cluster.start_agent("node1", &["--driver", "qemu"]);
    let script =
        "echo hello from $(uname -s); echo oops >&2; echo $$.$(date +%s) >/srv/www/mark; sync";
    let body = json!({
        "vmid": template, "count": 1, "script_monitoring": true, "script_timeout": 60,
        "startup_script": base64(script.as_bytes()),
    });
    let ids = cluster
        .call(1, "POST", "/api/v1/vm", Some(body))
        .await
        .unwrap();
    let id = ids[0].as_str().unwrap().to_owned();
    let started = wait_state(&cluster, 2, &id, "Started").await;
    assert_eq!(started["startup_script"]["return_code"], 0, "{started}");
    assert_eq!(
        started["startup_script"]["stdout"], "hello from Linux\n",
        "{started}"
    );
    assert_eq!(started["startup_script"]["stderr"], "oops\n", "{started}");
    assert!(
        !started["vminfo"]["ip"].as_str().unwrap().is_empty(),
        "{started}"
    );
    let forward = &started["vminfo"]["port_forwarding"][0];
    assert_eq!(forward["guest_port"], 80, "{started}");
    assert!(forward["host_port"].as_u64().unwrap() > 0, "{started}");
    let uuid = started["vminfo"]["uuid"].clone();

    // kill -9 the leader while eight clients write.
    let load = push_small_template(&cluster, "load").await;
    let writers = Writers::start(&cluster, &load, 8).await;
    writers.progress(100).await;
    let leader = cluster.leader().await;
    cluster.kill(leader);
    writers.progress(200).await;
    let survivor = (leader + 1) % 3;
    let seen = instance(&cluster, survivor, &id).await.unwrap();
    assert_eq!(seen["instance_state"], "Started", "the VM is untouched");
    cluster.start(leader);
    cluster.wait_ready(&[leader]).await;
    writers.progress(50).await;
    let told = writers.stop_only().await;
    told.check(&cluster, survivor).await;
    told.check(&cluster, leader).await;
    all_members_agree(&cluster).await;

    // kill -9 all three, restart: everything is still there.
    for n in 0..3 {
        cluster.kill(n);
    }
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    told.check(&cluster, 0).await;
    for n in 0..3 {
        let seen = instance(&cluster, n, &id).await.unwrap();
        assert_eq!(seen["instance_state"], "Started");
        assert_eq!(seen["vminfo"]["uuid"], uuid, "the same VM");
    }
    assert_eq!(
        cluster.vm_processes().len(),
        1,
        "one VM process, still running"
    );

    // kill -9 the agent: the VM runs on and is adopted.
    cluster.kill_agent("node1");
    assert_eq!(cluster.vm_processes().len(), 1, "the VM outlives its agent");
    cluster.start_agent("node1", &["--driver", "qemu"]);

    restarted(&cluster, &id).await;

    // Terminate: Terminated, and nothing is left.
    cluster
        .call(1, "DELETE", "/api/v1/vm", Some(json!({"id": id})))
        .await
        .unwrap();
    wait_state(&cluster, 0, &id, "Terminated").await;
    until("no VM process", Duration::from_secs(20), || async {
        cluster.vm_processes().is_empty().then_some(())
    })
    .await;
}

/// Restarted by one member while the node's home may be another: the same VM, disk and ports, another start;
/// never an error on the way.
async fn restarted(cluster: &Cluster, id: &str) {
    let before = wait_state(cluster, 0, id, "Started").await;
    let mark = page(cluster, &before, "mark").await;
    cluster
        .call(
            2,
            "POST",
            "/api/v1/rpc/vm/restart",
            Some(json!({"instance_id": id})),
        )
        .await
        .unwrap();
    let what = "restarted";
    let after = until(what, Duration::from_secs(120), || async {
        let seen = instance(cluster, 1, id).await?;
        let state = seen["instance_state"].as_str()?.to_owned();
        assert!(["Started", "Stopping"].contains(&state.as_str()), "{seen}");
        let again = seen["vminfo"]["start_date"] != before["vminfo"]["start_date"];
        (state == "Started" && again).then_some(seen)
    })
    .await;
    for same in ["uuid", "port_forwarding", "creation_date"] {
        assert_eq!(after["vminfo"][same], before["vminfo"][same]);
    }
    assert_eq!(
        after["startup_script"], before["startup_script"],
        "not run again"
    );
    assert_eq!(
        page(cluster, &after, "mark").await,
        mark,
        "its disk was kept"
    );
    assert_eq!(cluster.vm_processes().len(), 1);
}

/// What the guest's web server says, once it does.
pub(crate) async fn page(cluster: &Cluster, instance: &Value, path: &str) -> String {
    let port = &instance["vminfo"]["port_forwarding"][0]["host_port"];
    let url = format!("http://127.0.0.1:{port}/{path}");
    until(
        "the guest's web server answers",
        Duration::from_secs(60),
        || async {
            let sent = cluster.client.get(&url).timeout(Duration::from_secs(5));
            let answer = sent.send().await.ok()?;
            answer.error_for_status().ok()?.text().await.ok()
        },
    )
    .await
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
