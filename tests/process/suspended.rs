//! A suspended template with real VMs: pushed to one member, started through another, ready in a fraction of the
//! time that a boot takes, and every instance a guest of its own.

use crate::cluster::{Cluster, until};
use crate::journey::{base64, guest, wait_state};
use crate::push::template_id;
use crate::turn;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// What the command line is told, once all members are known to know suspended templates.
pub(crate) async fn push(cluster: &Cluster, args: &[&str]) {
    until("pushed", Duration::from_secs(120), || async {
        let out = cluster.cli(args);
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        let early = error.contains("knows no suspended templates");
        assert!(out.status.success() || early, "{args:?}: {error}");
        out.status.success().then_some(())
    })
    .await;
}

/// Ids of new instances of a tag; the script tells who the guest is.
async fn start(cluster: &Cluster, template: &str, tag: &str, count: usize) -> Vec<String> {
    let script = "hostname; cat /etc/machine-id; head -c 32 /dev/urandom | md5sum; cat /tmp/alive 2>/dev/null || echo booted";
    let body = json!({
        "vmid": template, "tag": tag, "count": count, "script_monitoring": true, "script_timeout": 120,
        "startup_script": base64(script.as_bytes()),
    });
    let ids = cluster
        .call(1, "POST", "/api/v1/vm", Some(body))
        .await
        .unwrap();
    let ids = ids.as_array().unwrap().iter();
    ids.map(|id| id.as_str().unwrap().to_owned()).collect()
}

async fn end(cluster: &Cluster, ids: &[String]) {
    for id in ids {
        let gone = cluster.call(2, "DELETE", "/api/v1/vm", Some(json!({"id": id})));
        gone.await.unwrap();
    }
    for id in ids {
        wait_state(cluster, 2, id, "Terminated").await;
    }
}

/// Seconds from each request to `Started` with its script's end, one after the other.
async fn one_by_one(
    cluster: &Cluster,
    template: &str,
    tag: &str,
    count: usize,
) -> (Vec<f64>, Vec<Value>) {
    let (mut took, mut seen) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let begun = Instant::now();
        let ids = start(cluster, template, tag, 1).await;
        seen.push(wait_state(cluster, 2, &ids[0], "Started").await);
        took.push(begun.elapsed().as_secs_f64());
        end(cluster, &ids).await;
    }
    took.sort_by(f64::total_cmp);
    (took, seen)
}

fn said(instance: &Value) -> Vec<String> {
    let said = instance["startup_script"]["stdout"].as_str().unwrap();
    said.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_of_a_suspended_template_go_on_where_it_was() {
    let _turn = turn().await;
    let disk = guest();
    let disk = disk.to_str().unwrap();
    let mut cluster = Cluster::ready().await;
    let warm = cluster.dir.path().join("warm.sh");
    std::fs::write(&warm, "echo alive >/tmp/alive").unwrap();
    let mut args = vec![
        "template",
        "push",
        "tiny",
        "--disk",
        disk,
        "--forward",
        "http:80",
    ];
    cluster.cli_ok(&[&args[..], &["--tag", "cold"]].concat());
    let work = cluster.dir.path().to_str().unwrap().to_owned();
    args.extend([
        "--tag",
        "frozen",
        "--suspend",
        "--ram",
        "128",
        "--accel",
        "tcg",
    ]);
    args.extend(["--script", warm.to_str().unwrap(), "--work-dir", &work]);
    push(&cluster, &args).await;
    assert!(cluster.vm_processes().is_empty(), "nothing of it runs on");
    let left = std::fs::read_dir(&work).unwrap().flatten();
    let left = left.filter(|f| f.file_name().to_string_lossy().contains("suspend"));
    assert_eq!(left.count(), 0, "nothing of it is left");

    let template = template_id(&cluster, "tiny").await.unwrap();
    let path = format!("/api/v1/registry/vm?id={template}");
    let shown: Value = cluster.call(2, "GET", &path, None).await.unwrap();
    assert_eq!(shown["versions"][0]["state_files"], json!([]));
    assert_eq!(shown["versions"][1]["state_files"], json!(["memory.state"]));

    let clones = crate::rounds("MAINSTAY_CLONES", 3);
    let capacity = (clones + 1).to_string();
    let flags = [
        "--driver",
        "qemu",
        "--accel",
        "tcg",
        "--capacity",
        &capacity,
    ];
    cluster.start_agent("node1", &flags);
    for tag in ["cold", "frozen"] {
        // Fills the image cache.
        one_by_one(&cluster, &template, tag, 1).await;
    }
    let (cold, booted) = one_by_one(&cluster, &template, "cold", 3).await;
    let (warm, resumed) = one_by_one(&cluster, &template, "frozen", 3).await;
    eprintln!(
        "request to Started and the end of its script, one after the other: booted {cold:.2?} s, resumed {warm:.2?} s"
    );
    assert_eq!(said(&booted[0])[3], "booted");
    assert!(resumed.iter().all(|i| said(i)[3] == "alive"));
    assert!(warm[1] < cold[1] / 2.0, "no fraction of the time");

    // Several at once: each a guest of its own, and the clones before them others again.
    let begun = Instant::now();
    let ids = start(&cluster, &template, "frozen", clones).await;
    let mut all = resumed;
    for id in &ids {
        let started = wait_state(&cluster, 2, id, "Started").await;
        eprintln!(
            "{clones} at once: {:.2} s, {}",
            begun.elapsed().as_secs_f64(),
            said(&started).join(" ")
        );
        let how = started["vminfo"]["accelerator"].as_str().unwrap();
        assert!(how.ends_with(", resumed"), "{how}");
        let port = &started["vminfo"]["port_forwarding"][0]["host_port"];
        let page = cluster
            .client
            .get(format!("http://127.0.0.1:{port}/hostname"));
        let page = page.send().await.unwrap().text().await.unwrap();
        assert_eq!(page.trim(), said(&started)[0], "reached from outside");
        all.push(started);
    }
    for part in 0..3 {
        let parts: BTreeSet<String> = all.iter().map(|i| said(i)[part].clone()).collect();
        assert_eq!(parts.len(), all.len(), "{parts:?}");
    }
    end(&cluster, &ids).await;
    killed_while_it_resumes(&mut cluster, &template, &flags).await;
    everything_goes_while_they_resume(&mut cluster, &template, &flags).await;
}

/// Their tag is deleted, their node drains, the leader dies and the agent with it: they get there.
async fn everything_goes_while_they_resume(cluster: &mut Cluster, template: &str, flags: &[&str]) {
    let node = crate::nodes_pull::node_id(cluster, "node1").await;
    let ids = start(cluster, template, "frozen", 2).await;
    until("a QEMU runs", Duration::from_secs(60), || async {
        (!cluster.vm_processes().is_empty()).then_some(())
    })
    .await;
    cluster.cli_ok(&["template", "delete", template, "--tag", "frozen"]);
    let leader = cluster.leader().await;
    cluster.kill(leader);
    cluster.kill_agent("node1");
    cluster.start_agent("node1", flags);
    until("it drains", Duration::from_secs(60), || async {
        let out = cluster.cli(&["node", "drain", &node]);
        out.status.success().then_some(())
    })
    .await;
    let n = (leader + 1) % 3;
    for id in &ids {
        assert_came_to_life(&settled(cluster, n, id).await);
    }
    cluster.start(leader);
    cluster.wait_ready(&[0, 1, 2]).await;
    end(cluster, &ids).await;
    until("no VM process", Duration::from_secs(20), || async {
        cluster.vm_processes().is_empty().then_some(())
    })
    .await;
    cluster.cli_ok(&["node", "resume", &node]);
    let body = json!({"vmid": template, "tag": "frozen"});
    let refused = cluster.call(1, "POST", "/api/v1/vm", Some(body)).await;
    assert!(refused.is_err(), "its tag is deleted: {refused:?}");
}

async fn settled(cluster: &Cluster, n: usize, id: &str) -> Value {
    until("it has settled", Duration::from_secs(120), || async {
        let path = format!("/api/v1/vm?id={id}");
        let found = cluster.call(n, "GET", &path, None).await.ok()?;
        ["Started", "Error"]
            .contains(&found["instance_state"].as_str()?)
            .then_some(found)
    })
    .await
}

fn assert_came_to_life(found: &Value) {
    if found["instance_state"] == "Started" {
        assert_eq!(said(found)[3], "alive");
    } else {
        // Killed while its script ran: that is never run twice.
        let why = found["message"].as_str().unwrap();
        assert!(
            why.contains("restarted while the startup script ran"),
            "{why}"
        );
    }
}

/// kill -9 of the agent while an instance comes to life: the next one brings it there, once.
async fn killed_while_it_resumes(cluster: &mut Cluster, template: &str, flags: &[&str]) {
    let ids = start(cluster, template, "frozen", 1).await;
    until("its QEMU runs", Duration::from_secs(60), || async {
        (!cluster.vm_processes().is_empty()).then_some(())
    })
    .await;
    cluster.kill_agent("node1");
    cluster.start_agent("node1", flags);
    assert_came_to_life(&settled(cluster, 0, &ids[0]).await);
    end(cluster, &ids).await;
    until("no VM process", Duration::from_secs(20), || async {
        cluster.vm_processes().is_empty().then_some(())
    })
    .await;
}
