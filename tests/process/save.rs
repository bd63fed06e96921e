//! A running VM becomes a tag, and VMs of that tag have what was in it; with an agent and a member killed on the
//! way, and with a script that fails.

use crate::cluster::{Cluster, until};
use crate::journey::{base64, guest, instance, page, wait_state};
use crate::push::template_id;
use crate::turn;
use serde_json::{Value, json};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);

async fn start(cluster: &Cluster, template: &str, tag: &str) -> Value {
    let body = json!({"vmid": template, "tag": tag, "vram": 256});
    let ids = cluster
        .call(1, "POST", "/api/v1/vm", Some(body))
        .await
        .unwrap();
    wait_state(cluster, 0, ids[0].as_str().unwrap(), "Started").await
}

fn id(instance: &Value) -> String {
    instance["instance_id"].as_str().unwrap().to_owned()
}

/// Ask member `n` to save an instance; the request's id.
async fn save(cluster: &Cluster, n: usize, body: Value) -> String {
    let asked = cluster.call(n, "POST", "/api/v1/image", Some(body)).await;
    asked.unwrap()["request_id"].as_str().unwrap().to_owned()
}

/// What a request is, as far as any member that runs says so.
async fn request(cluster: &Cluster, id: &str) -> Option<Value> {
    let path = format!("/api/v1/image?id={id}");
    for n in (0..3).filter(|n| cluster.running(*n)) {
        if let Ok(found) = cluster.call(n, "GET", &path, None).await {
            return Some(found);
        }
    }
    None
}

async fn ended(cluster: &Cluster, id: &str) -> Value {
    until("the request has ended", LIMIT, || async {
        let found = request(cluster, id).await?;
        (found["status"] != "pending").then_some(found)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_becomes_a_tag() {
    let _turn = turn().await;
    let disk = guest();
    let mut cluster = Cluster::ready().await;
    let disk = disk.to_str().unwrap();
    let of = ["--tag", "v1", "--disk", disk, "--forward", "http:80"];
    cluster.cli_ok(&[&["template", "push", "tiny"], &of[..]].concat());
    let template = template_id(&cluster, "tiny").await.unwrap();
    cluster.start_agent("node1", &["--driver", "qemu"]);
    let first = start(&cluster, &template, "v1").await;

    // A script that fails, and that was to end it: nothing is saved, the instance runs on, untouched.
    let body = json!({
        "id": id(&first), "target_vm_id": template, "tag": "never", "cancel_on_script_failure": true,
        "script": base64(b"echo not ready >&2; exit 7"),
    });
    let failed = ended(&cluster, &save(&cluster, 2, body).await).await;
    assert_eq!(failed["status"], "error", "{failed}");
    assert_eq!(failed["error"]["Message"], "script exit code 7");
    assert_eq!(failed["script_result"]["return_code"], 7);
    assert_eq!(failed["script_result"]["stderr"], "not ready\n");
    let same = instance(&cluster, 1, &id(&first)).await.unwrap();
    assert_eq!(same["instance_state"], "Started");
    assert_eq!(same["vminfo"]["start_date"], first["vminfo"]["start_date"]);

    // A marker is written by the script; the agent and a member are killed on the way.
    let body = json!({
        "id": id(&first), "target_vm_id": template, "tag": "v2", "description": "with a mark",
        "script": base64(b"echo marked >/srv/www/mark && sync; echo written"),
    });
    let asked = save(&cluster, 1, body).await;
    until("its script has ended", LIMIT, || async {
        let found = request(&cluster, &asked).await?;
        assert_eq!(found["status"], "pending", "{found}");
        (!found["script_result"].is_null()).then_some(())
    })
    .await;
    cluster.kill_agent("node1");
    let leader = cluster.leader().await;
    cluster.kill(leader);
    cluster.start_agent("node1", &["--driver", "qemu"]);
    let done = ended(&cluster, &asked).await;
    assert_eq!(done["status"], "done", "{done}");
    assert_eq!(done["script_result"]["stdout"], "written\n");
    cluster.start(leader);
    cluster.wait_ready(&[leader]).await;
    until("the saved instance is gone", LIMIT, || async {
        match instance(&cluster, leader, &id(&first)).await {
            Some(seen) => (seen["instance_state"] == "Terminated").then_some(()),
            None => Some(()),
        }
    })
    .await;
    assert!(cluster.vm_processes().is_empty());

    // What was in it is in those that are started from the tag, ports included.
    let second = start(&cluster, &template, "v2").await;
    assert_eq!(page(&cluster, &second, "mark").await, "marked\n");

    // By the command line, into a template of its own, in place of nothing.
    let saved = cluster.cli_json(&[
        "instance",
        "save",
        &id(&second),
        "--tag",
        "v1",
        "--new-template",
        "tiny-marked",
        "--wait",
    ]);
    assert_eq!(saved["status"], "done", "{saved}");
    let made = template_id(&cluster, "tiny-marked").await.unwrap();
    assert_eq!(saved["request"]["TemplateID"], made.as_str());
    let third = start(&cluster, &made, "v1").await;
    assert_eq!(page(&cluster, &third, "mark").await, "marked\n");
    only_what_is_new_is_stored(&cluster);
}

/// A saved disk is its base but for what was written: of the new template little is its own.
fn only_what_is_new_is_stored(cluster: &Cluster) {
    let usage = cluster.cli_json(&["registry", "usage"]);
    let of = |name: &str| {
        let all = usage["templates"].as_array().unwrap();
        let found = all.iter().find(|t| t["name"] == name);
        found.unwrap_or_else(|| panic!("{usage}")).clone()
    };
    let marked = of("tiny-marked");
    let (stored, unique) = (
        marked["stored_bytes"].as_u64().unwrap(),
        marked["unique_bytes"].as_u64().unwrap(),
    );
    assert!(unique * 4 < stored, "{unique} of {stored} bytes are new");
}
