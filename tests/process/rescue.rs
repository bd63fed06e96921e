//! Two of three data directories are gone; one of three is damaged. Each is put right by the one command that
//! the error names.

use crate::cluster::{BIN, Cluster, until};
use crate::push::{noise_file, push_small_template};
use crate::snapshots::{add_instances, instances, offline};
use crate::turn;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub(crate) async fn voters(cluster: &Cluster, n: usize, count: usize) {
    until("all are voters", Duration::from_secs(60), || async {
        let list = cluster.call(n, "GET", "/api/v1/members", None).await.ok()?;
        let list = list.as_array()?;
        let all = list.len() == count && list.iter().all(|m| m["role"] == "voter");
        all.then_some(())
    })
    .await;
}

async fn cluster_id(cluster: &Cluster, n: usize) -> String {
    let row = cluster
        .call(n, "GET", "/api/v1/cluster/status", None)
        .await
        .unwrap();
    row["cluster_id"].as_str().unwrap().to_owned()
}

fn recover(data: &Path, dry_run: bool) -> Value {
    let data = data.to_str().unwrap();
    let mut args = vec!["member", "recover", "--data-dir", data, "--output", "json"];
    if dry_run {
        args.push("--dry-run");
    }
    let out = offline(&args);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {error}");
    serde_json::from_slice(&out.stdout).unwrap()
}

fn fails(args: &[&str], words: &str) {
    let out = offline(args);
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && error.contains(words),
        "{args:?}: {error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_directory_becomes_a_cluster_with_everything_acknowledged() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    voters(&cluster, 0, 3).await;
    let template = push_small_template(&cluster, "any").await;
    let mut ids = add_instances(&cluster, &template, 30).await;
    ids.sort();
    let old = cluster_id(&cluster, 2).await;
    let data = cluster.members[2].data.clone();
    let at = data.to_str().unwrap();
    fails(&["member", "recover", "--data-dir", at], "in use");
    // Everything acknowledged is on this disk, whoever led: the last write went through all three.
    until("the third has it all", Duration::from_secs(20), || async {
        (instances(&cluster, 2).await == ids).then_some(())
    })
    .await;
    let lost: PathBuf = cluster.dir.path().join("lost");
    for n in 0..3 {
        cluster.kill(n);
    }
    // One is gone for good, the other comes back later.
    std::fs::remove_dir_all(&cluster.members[0].data).unwrap();
    std::fs::rename(&cluster.members[1].data, &lost).unwrap();

    let dry = recover(&data, true);
    assert_eq!(dry["cluster_id"], old.as_str());
    assert_eq!(dry["members"].as_array().unwrap().len(), 3);
    assert!(dry["last_index"].as_u64() >= dry["applied_index"].as_u64());
    assert!(dry["new_cluster_id"].is_null());
    assert_eq!(recover(&data, true), dry, "a dry run changes nothing");
    // A crash in the middle: no member starts, the same command goes on.
    let command = format!("mainstay member recover --data-dir {at}");
    std::fs::write(data.join("unfinished"), &command).unwrap();
    let error = refusal(&cluster, 2);
    assert!(error.contains(&command), "{error}");
    fails(&["member", "repair", "--data-dir", at], &command);
    let done = recover(&data, false);
    let new = done["new_cluster_id"].as_str().unwrap().to_owned();
    assert_ne!(new, old);

    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    assert_eq!(instances(&cluster, 2).await, ids);
    assert_eq!(cluster_id(&cluster, 2).await, new);
    // The directory that was away still belongs to the old cluster: both sides say no.
    std::fs::rename(&lost, &cluster.members[1].data).unwrap();
    cluster.start(1);
    until(
        "it is told whose it is",
        Duration::from_secs(20),
        || async {
            let log = cluster.log("c2");
            (log.contains(&old) && log.contains(&new) && log.contains("empty --data-dir"))
                .then_some(())
        },
    )
    .await;
    voters(&cluster, 2, 1).await;
    cluster.kill(1);
    std::fs::remove_dir_all(&cluster.members[1].data).unwrap();
    cluster.start(0);
    cluster.start(1);
    cluster.wait_ready(&[0, 1]).await;
    voters(&cluster, 2, 3).await;
    // The image is on its way to the others, from the one that kept it.
    held_by_all(&cluster, &["any"]).await;
    cluster.kill(2);
    ids.extend(add_instances(&cluster, &template, 1).await);
    ids.sort();
    assert_eq!(instances(&cluster, 0).await, ids);
}

/// Flip one bit of a file, `part` of the way through what it holds: the rest is room for more.
fn flip(path: &Path, part: f64) {
    let mut bytes = std::fs::read(path).unwrap();
    let full: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    bytes[full[(full.len() as f64 * part) as usize]] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

fn first_file(dir: &Path, ending: &str) -> PathBuf {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|p| p.to_string_lossy().ends_with(ending))
        .collect();
    files.sort();
    files.swap_remove(0)
}

/// The command in backquotes that a refusal names.
pub(crate) fn named_command(text: &str) -> Vec<String> {
    let at = text
        .find("`mainstay member repair")
        .expect("a command is named");
    let rest = &text[at + 1..];
    let command = &rest[..rest.find('`').unwrap()];
    command.split(' ').skip(1).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_member_is_repaired_by_the_command_that_its_refusal_names() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    voters(&cluster, 0, 3).await;
    let template = push_small_template(&cluster, "any").await;
    let disk = cluster.dir.path().join("big.raw");
    noise_file(&disk, 8 << 20, 3);
    cluster.cli_ok(&[
        "template",
        "push",
        "big",
        "--tag",
        "v1",
        "--disk",
        disk.to_str().unwrap(),
    ]);
    let mut ids = add_instances(&cluster, &template, 30).await;
    ids.sort();
    held_by_all(&cluster, &["any", "big"]).await;
    let data = cluster.members[2].data.clone();
    let at = data.to_str().unwrap().to_owned();
    // A clean stop, so that the state store has a checkpoint to damage.
    for (round, what) in ["log", "state"].into_iter().enumerate() {
        until(
            "it has noted the members",
            Duration::from_secs(20),
            || async {
                let noted = std::fs::read_to_string(data.join("members")).unwrap_or_default();
                let named = |m: &crate::cluster::Member| noted.contains(&m.api);
                cluster.members.iter().all(named).then_some(())
            },
        )
        .await;
        cluster.stop(2).await;
        fails(
            &["member", "repair", "--data-dir", &at],
            "nothing is damaged",
        );
        let packs = packs(&data);
        match what {
            "log" => flip(&first_file(&data.join("log"), ".wal"), 0.2),
            // The store takes most flips for a torn end, and goes back in silence: its root is then too old.
            _ => damage_state(&data),
        }
        let error = refusal(&cluster, 2);
        let command = named_command(&error);
        assert_eq!(command[..2], ["member", "repair"], "{error}");
        let out = Command::new(BIN).args(&command).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{what}: {text}");
        cluster.start(2);
        cluster.wait_ready(&[2]).await;
        voters(&cluster, 0, 3).await;
        assert_eq!(instances(&cluster, 2).await, ids, "{what}");
        held_by_all(&cluster, &["any", "big"]).await;
        // Its chunks were not fetched again: no pack has grown, none is new.
        assert_eq!(self::packs(&data), packs, "{what}");
        ids.extend(add_instances(&cluster, &template, 1 + round as u64).await);
        ids.sort();
    }
    a_damaged_snapshot_is_made_again(&mut cluster, &data).await;
    assert_eq!(instances(&cluster, 2).await, ids);
}

/// Its content is in state and log as well: nobody has to do anything.
async fn a_damaged_snapshot_is_made_again(cluster: &mut Cluster, data: &Path) {
    let saved = cluster.dir.path().join("x.snap");
    let through = format!("http://{}", cluster.members[2].api);
    let out = offline(&[
        "snapshot",
        "save",
        saved.to_str().unwrap(),
        "--endpoints",
        &through,
    ]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    cluster.stop(2).await;
    flip(&first_file(&data.join("snapshots"), ".snap"), 0.5);
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    assert!(cluster.log("c3").contains("is damaged and is discarded"));
}

async fn held_by_all(cluster: &Cluster, names: &[&str]) {
    until("three verified copies", Duration::from_secs(60), || async {
        let held = |name: &&str| {
            let found = cluster.cli_json(&["template", "replicas", name, "--tag", "v1"]);
            found.to_string().matches("\"complete\"").count() >= 3
        };
        names.iter().all(held).then_some(())
    })
    .await;
}

/// Names and lengths of the packs.
fn packs(data: &Path) -> Vec<(String, u64)> {
    let files = std::fs::read_dir(data.join("chunks")).unwrap();
    let mut packs: Vec<_> = files
        .map(|f| f.unwrap())
        .map(|f| {
            let name = f.file_name().to_string_lossy().into_owned();
            (name, f.metadata().unwrap().len())
        })
        .filter(|(name, _)| name.ends_with(".mspk"))
        .collect();
    packs.sort();
    packs
}

/// Flip a bit at many places that hold something: most of the file is room for more.
fn damage_state(data: &Path) {
    let db = data.join("state").join("db");
    let mut bytes = std::fs::read(&db).unwrap();
    let full: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    for n in 0..40 {
        bytes[full[n * full.len() / 40]] ^= 1 << (n % 8);
    }
    std::fs::write(&db, bytes).unwrap();
}

/// What a server says that must refuse to start, within a bound.
pub(crate) fn refusal(cluster: &Cluster, n: usize) -> String {
    let mut command = cluster.server_command(n);
    let log = cluster.dir.path().join("refusal.log");
    command.stderr(std::fs::File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    let begin = std::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begin.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it started: {}", std::fs::read_to_string(&log).unwrap());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    text
}
