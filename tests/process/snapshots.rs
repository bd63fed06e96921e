//! Saved snapshots: everything acknowledged is in one; damage anywhere is refused; a new cluster made from
//! one holds the same state.

use crate::cluster::{BIN, Cluster, until};
use crate::push::push_small_template;
use crate::turn;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Run the command line without a cluster.
pub(crate) fn offline(args: &[&str]) -> Output {
    let mut command = Command::new(BIN);
    command
        .args(args)
        .env("MAINSTAY_ENDPOINTS", "http://127.0.0.1:9")
        .stdin(Stdio::null());
    command.output().expect("the command line runs")
}

/// What `snapshot verify` says of a good file.
pub(crate) fn verified(file: &Path) -> Value {
    let out = offline(&[
        "snapshot",
        "verify",
        file.to_str().unwrap(),
        "--output",
        "json",
    ]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}: {error}", file.display());
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Save through the members that run; where.
pub(crate) fn save(cluster: &Cluster, name: &str) -> PathBuf {
    let file = cluster.dir.path().join(name);
    cluster.cli_ok(&["snapshot", "save", file.to_str().unwrap()]);
    file
}

/// Add `count` instances of a template that no node here can run; their ids.
pub(crate) async fn add_instances(cluster: &Cluster, template: &str, count: u64) -> Vec<String> {
    let n = (0..cluster.members.len())
        .find(|n| cluster.running(*n))
        .unwrap();
    let body = json!({"vmid": template, "count": count});
    let ids = cluster
        .call(n, "POST", "/api/v1/vm", Some(body))
        .await
        .unwrap();
    let ids: Vec<String> = serde_json::from_value(ids).unwrap();
    assert_eq!(ids.len() as u64, count);
    ids
}

pub(crate) async fn add_group(cluster: &Cluster, name: &str) {
    let n = (0..cluster.members.len())
        .find(|n| cluster.running(*n))
        .unwrap();
    let body = json!({"name": name, "description": ""});
    cluster
        .call(n, "POST", "/api/v1/group", Some(body))
        .await
        .unwrap();
}

/// Ids of all instances, as member `n` has them.
pub(crate) async fn instances(cluster: &Cluster, n: usize) -> Vec<String> {
    let list = cluster.call(n, "GET", "/api/v1/vm", None).await.unwrap();
    let list = list.as_array().unwrap().iter();
    let mut ids: Vec<String> = list
        .map(|i| i["instance_id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort();
    ids
}

fn refused(file: &Path, what: &str) {
    let out = offline(&["snapshot", "verify", file.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1), "{what}");
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(error.contains("not a good snapshot"), "{what}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn save_verify_restore_is_a_round_trip() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "any").await;
    let mut ids = add_instances(&cluster, &template, 20).await;
    ids.sort();
    add_group(&cluster, "builders").await;
    let file = save(&cluster, "one.snap");
    let found = verified(&file);
    assert_eq!(found["counts"]["instances"], 20, "{found}");
    assert_eq!(found["counts"]["templates"], 1);
    assert_eq!(found["counts"]["groups"], 1);
    assert_eq!(found["members"].as_array().unwrap().len(), 3);
    assert_eq!(found["images"][0]["tags"][0], "any:v1");
    // Through a member that does not lead, with one down: the others answer in its place.
    cluster.kill(0);
    let later = verified(&save(&cluster, "two.snap"));
    assert_eq!(later["cluster_id"], found["cluster_id"]);
    let existing = cluster.cli(&["snapshot", "save", file.to_str().unwrap()]);
    assert!(!existing.status.success());
    assert!(String::from_utf8_lossy(&existing.stderr).contains("--force"));
    cluster.cli_ok(&["snapshot", "save", file.to_str().unwrap(), "--force"]);
    let found = verified(&file);
    let mut names = std::fs::read_dir(cluster.dir.path()).unwrap();
    let partial = |n: std::io::Result<std::fs::DirEntry>| {
        let name = n.unwrap().file_name();
        name.to_string_lossy().contains("partial")
    };
    assert!(!names.any(partial), "nothing half is left");

    // A few flips and cuts through the whole tool; every byte is tried in the storage crate's tests.
    let bytes = std::fs::read(&file).unwrap();
    let bad = cluster.dir.path().join("bad.snap");
    for step in 0..12 {
        let at = step * (bytes.len() - 1) / 11;
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (step % 8);
        std::fs::write(&bad, flipped).unwrap();
        refused(&bad, &format!("flip at {at}"));
        std::fs::write(&bad, &bytes[..at]).unwrap();
        refused(&bad, &format!("cut at {at}"));
    }

    let old_cluster = found["cluster_id"].clone();
    drop(cluster);
    restored_holds_the_same(&file, &bytes, &found, &ids).await;
    assert_ne!(old_cluster, "");
}

/// A new cluster of three, made from a saved file.
async fn restored_holds_the_same(saved: &Path, bytes: &[u8], found: &Value, ids: &[String]) {
    assert!(!saved.exists(), "the first cluster's directory is gone");
    let mut cluster = Cluster::new(3);
    let file = cluster.dir.path().join("saved.snap");
    std::fs::write(&file, bytes).unwrap();
    let data = cluster.members[0].data.clone();
    let data = data.to_str().unwrap();
    let file = file.to_str().unwrap();
    let restore = [
        "snapshot",
        "restore",
        file,
        "--name",
        "c1",
        "--data-dir",
        data,
    ];
    // What a crash in the middle leaves: no member starts on it, the same command begins anew.
    std::fs::create_dir_all(Path::new(data).join("log")).unwrap();
    let command = format!("mainstay {}", restore.join(" "));
    std::fs::write(Path::new(data).join("unfinished"), &command).unwrap();
    let out = cluster.server_command(0).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains(&command), "{error}");
    let out = offline(&restore);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let again = offline(&restore);
    let error = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        !again.status.success() && error.contains("already belongs"),
        "{error}"
    );

    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    let alone = verified(&save(&cluster, "alone.snap"));
    assert_eq!(alone["state_digest"], found["state_digest"], "{alone}");
    assert_ne!(alone["cluster_id"], found["cluster_id"]);
    let bumped = found["index"].as_u64().unwrap() + (1 << 36);
    assert!(alone["index"].as_u64().unwrap() > bumped, "{alone}");
    cluster.start(1);
    cluster.start(2);
    cluster.wait_ready(&[1, 2]).await;
    until("three voters", Duration::from_secs(60), || async {
        let list = cluster.call(0, "GET", "/api/v1/members", None).await.ok()?;
        let voters = list.as_array()?.iter().filter(|m| m["role"] == "voter");
        // The first one's addresses are those that it has now.
        let right = list.as_array()?.iter().all(|m| {
            let at = cluster
                .members
                .iter()
                .find(|at| m["name"] == at.name.as_str());
            at.is_some_and(|at| m["peer_url"] == format!("http://{}", at.peer))
        });
        (voters.count() == 3 && right).then_some(())
    })
    .await;
    for n in 0..3 {
        assert_eq!(instances(&cluster, n).await, ids, "member {n}");
    }
    // It works: it takes writes, and survives the loss of the one that was restored.
    let template = push_small_template(&cluster, "another").await;
    cluster.kill(0);
    add_instances(&cluster, &template, 1).await;
    assert_eq!(instances(&cluster, 1).await.len(), ids.len() + 1);
}

/// What was acknowledged before the call is in the file, while writes go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_under_load_has_what_was_acknowledged_before_it() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "any").await;
    for round in 1..=4_u64 {
        let before = instances(&cluster, 0).await.len() as u64;
        let write = add_instances(&cluster, &template, 50);
        let ids = write.await;
        // Others are on their way while it is saved.
        let more = {
            let client = cluster.client.clone();
            let url = format!("http://{}/api/v1/vm", cluster.members[1].api);
            let body = json!({"vmid": template, "count": 50}).to_string();
            tokio::spawn(async move { client.post(url).body(body).send().await })
        };
        let name = format!("load-{round}.snap");
        let file = tokio::task::block_in_place(|| save(&cluster, &name));
        let held = verified(&file)["counts"]["instances"].as_u64().unwrap();
        let all = before + ids.len() as u64;
        assert!(held == all || held == all + 50, "{held} of {all}");
        more.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_saves_by_itself_and_keeps_the_newest() {
    let _turn = turn().await;
    let mut cluster = Cluster::new(1);
    let kept = cluster.dir.path().join("kept");
    let dir: &'static str = Box::leak(kept.to_string_lossy().into_owned().into_boxed_str());
    cluster.flags = vec![
        "--snapshot-dir",
        dir,
        "--snapshot-every",
        "1s",
        "--snapshot-keep",
        "2",
    ];
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    let names = || {
        let mut names: Vec<PathBuf> = std::fs::read_dir(&kept)
            .into_iter()
            .flatten()
            .map(|f| f.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "mainstay-snapshot"))
            .collect();
        names.sort();
        names
    };
    let seen = std::sync::Mutex::new(std::collections::BTreeSet::new());
    until("five were saved", Duration::from_secs(60), || async {
        let mut seen = seen.lock().unwrap();
        seen.extend(names());
        (seen.len() >= 5).then_some(())
    })
    .await;
    cluster.stop(0).await;
    let left = names();
    // A third one is there only between its rename and the removal of the oldest.
    assert!((2..=3).contains(&left.len()), "{left:?}");
    for file in left {
        verified(&file);
    }
}
