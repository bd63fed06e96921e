//! A large push during which a member is killed and another one wiped, and bits that flip afterwards:
//! everything is whole again by itself. And what a push promises by its durability.
//!
//! `MAINSTAY_PUSH_MB=2048` is the long form; it prints how long each step took.

use crate::cluster::{Cluster, binary, until};
use crate::gc::{asked, flip};
use crate::push::noise_file;
use crate::{Dice, rounds, turn};
use mainstay_agent::transfer::api::{Replica, SCRUB, ScrubStatus};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// `mb` MiB of data in a file three times as long: runs of 4 MiB, every third of which compresses.
fn sparse_file(path: &Path, mb: u64, seed: u64) {
    let file = File::create(path).unwrap();
    file.set_len(3 * mb * MIB).unwrap();
    let mut state = seed | 1;
    let mut run = vec![0_u8; 4 << 20];
    for n in 0..mb / 4 {
        for (at, word) in run.chunks_exact_mut(8).enumerate() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = if n % 3 == 2 && at % 4 != 0 { n } else { state };
            word.copy_from_slice(&value.to_le_bytes());
        }
        file.write_all_at(&run, n * 12 * MIB).unwrap();
    }
}

fn push(cluster: &Cluster, disk: &Path, more: &[&str]) -> Child {
    Command::new(binary())
        .args(["template", "push", "big", "--tag", "v1", "--disk"])
        .arg(disk)
        .args(more)
        .args(["--endpoints", &cluster.endpoints()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A figure of member `n`.
async fn metric(cluster: &Cluster, n: usize, name: &str) -> Option<u64> {
    let url = format!("http://{}/metrics", cluster.members[n].api);
    let page = cluster
        .client
        .get(url)
        .send()
        .await
        .ok()?
        .text()
        .await
        .ok()?;
    let line = page
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line?.parse().ok()
}

async fn rows(cluster: &Cluster, n: usize) -> Option<Vec<Replica>> {
    asked(
        cluster,
        n,
        "/registry/mainstay/v1/replicas?template=big&tag=v1",
    )
    .await
}

/// Every member holds every byte, and nothing is damaged anywhere.
async fn all_whole(cluster: &Cluster) -> Option<()> {
    let rows = rows(cluster, 0).await?;
    let complete = rows.len() == 3 && rows.iter().all(|r| r.state == "complete");
    for n in 0..3 {
        let scrub: ScrubStatus = asked(cluster, n, SCRUB).await?;
        if scrub.damaged_now > 0 || !scrub.broken.is_empty() {
            return None;
        }
    }
    complete.then_some(())
}

async fn stored_mb(cluster: &Cluster, n: usize) -> u64 {
    metric(cluster, n, "mainstay_chunk_stored_bytes")
        .await
        .unwrap_or(0)
        / MIB
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_push_survives_a_killed_and_a_wiped_member_and_flipped_bits() {
    let _turn = turn().await;
    let mb = rounds("MAINSTAY_PUSH_MB", 64) as u64;
    let limit = Duration::from_secs(120 + mb / 2);
    let mut dice = Dice::new("large push");
    let mut cluster = Cluster::new(3);
    cluster.flags = vec![
        "--scrub-rate",
        "256MiB",
        "--scrub-every",
        "1s",
        "--feature-grace-s",
        "0",
    ];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let disk = cluster.dir.path().join("big.raw");
    sparse_file(&disk, mb, dice.below(u64::MAX));

    // Killed with a quarter of it: the client goes on through another member.
    let begin = Instant::now();
    let mut client = push(&cluster, &disk, &["--wait", "3600"]);
    until("a quarter was sent", limit, || async {
        (stored_mb(&cluster, 0).await >= mb / 8).then_some(())
    })
    .await;
    assert!(
        client.try_wait().unwrap().is_none(),
        "the push is over before anything happened"
    );
    cluster.kill(0);
    let killed = begin.elapsed();
    until(
        "the client goes on through another member",
        limit,
        || async { (stored_mb(&cluster, 1).await >= mb / 16).then_some(()) },
    )
    .await;
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    // Wiped, and put back by its name, while the push goes on or right after it.
    let under_way = client.try_wait().unwrap().is_none();
    cluster.kill(2);
    std::fs::remove_dir_all(&cluster.members[2].data).unwrap();
    cluster.cli_ok(&["member", "replace", "c3"]);
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    let wiped = begin.elapsed();
    let out = tokio::task::block_in_place(|| client.wait_with_output()).unwrap();
    let acknowledged = begin.elapsed();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    until("every member holds it", limit, || all_whole(&cluster)).await;
    let held = begin.elapsed();

    // Twenty chunks spoilt on one member.
    let before: ScrubStatus = asked(&cluster, 1, SCRUB).await.unwrap();
    let flipped = Instant::now();
    let all = flip(&cluster.members[1].data, 20, &mut dice);
    until("every flipped bit is found", limit, || async {
        let now: ScrubStatus = asked(&cluster, 1, SCRUB).await?;
        (now.damaged >= before.damaged + 20).then_some(())
    })
    .await;
    let found = flipped.elapsed();
    until("everything is whole again", limit, || all_whole(&cluster)).await;
    let whole = flipped.elapsed();

    // The bytes, through the member that was wiped and through the one that was spoilt.
    for n in [1, 2] {
        let copy = cluster.dir.path().join("copy");
        let _ = std::fs::remove_file(&copy);
        let url = format!("http://{}", cluster.members[n].api);
        let pulled = Command::new(binary())
            .args(["template", "pull", "big", "--endpoints", &url, "--disk"])
            .arg(&copy)
            .output()
            .unwrap();
        assert!(
            pulled.status.success(),
            "{}",
            String::from_utf8_lossy(&pulled.stderr)
        );
        let same = Command::new("cmp").args([&disk, &copy]).status().unwrap();
        assert!(same.success(), "through member {n}");
    }
    let seconds = |at: Duration| format!("{:.1} s", at.as_secs_f64());
    eprintln!(
        "{mb} MiB of data: receiver killed at {}, another wiped at {} ({}), acknowledged at {}, all three whole at {}; \
         20 of {all} chunks spoilt: found after {}, whole after {}",
        seconds(killed),
        seconds(wiped),
        if under_way {
            "during the push"
        } else {
            "after the push"
        },
        seconds(acknowledged),
        seconds(held),
        seconds(found),
        seconds(whole)
    );
}

/// What `replicas` says of each member, by name.
async fn states(cluster: &Cluster, n: usize) -> Vec<String> {
    let rows = rows(cluster, n).await.unwrap_or_default();
    let mut states: Vec<String> = rows
        .into_iter()
        .map(|r| format!("{} {}", r.name, r.state))
        .collect();
    states.sort_unstable();
    states
}

/// Visible only once it holds what was promised; who is waited for is named; and it becomes true by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_waits_for_the_copies_that_were_asked_for() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    let disk = cluster.dir.path().join("small.raw");
    noise_file(&disk, 3 << 20, 5);
    cluster.kill(2);
    cluster.leader().await;
    // All: one is away.
    let out = push(&cluster, &disk, &["--durability", "all", "--wait", "10"]);
    let out = tokio::task::block_in_place(|| out.wait_with_output()).unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("stored on 2 of 3 members that must hold it"),
        "{said}"
    );
    assert!(said.contains("c3 is unknown"), "{said}");
    let shown = |list: Value| list.as_array().map(Vec::len);
    let list = cluster
        .call(0, "GET", "/api/v1/registry/vm", None)
        .await
        .unwrap();
    assert_eq!(shown(list), Some(0), "not visible before all hold it");
    let states = states(&cluster, 0).await;
    assert_eq!(states[..2], ["c1 complete", "c2 complete"], "{states:?}");
    // The same, for as long as it takes.
    let mut waiting = push(&cluster, &disk, &["--durability", "all", "--wait", "600"]);
    until("it waits", Duration::from_secs(30), || async {
        metric(&cluster, 0, "mainstay_chunks")
            .await
            .filter(|n| *n > 0)
    })
    .await;
    assert!(
        waiting.try_wait().unwrap().is_none(),
        "not before c3 is back"
    );
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    let out = tokio::task::block_in_place(|| waiting.wait_with_output()).unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let rows = rows(&cluster, 1).await.unwrap();
    assert!(
        rows.iter().all(|r| r.state == "complete"),
        "acknowledged: {rows:?}"
    );

    // Majority: one may be away.
    cluster.kill(1);
    cluster.leader().await;
    noise_file(&disk, 3 << 20, 6);
    let push_as = |tag: &str, durability: &str| {
        let path = disk.to_str().unwrap();
        let of = ["--tag", tag, "--disk", path, "--durability", durability];
        cluster.cli(&[&["template", "push", "big"], &of[..]].concat())
    };
    assert!(push_as("v2", "majority").status.success());
    // One: the receiver's copy is enough, though it may be lost with it.
    noise_file(&disk, 3 << 20, 7);
    assert!(push_as("v3", "one").status.success());
    cluster.start(1);
    cluster.wait_ready(&[1]).await;
    until(
        "who was away has everything",
        Duration::from_secs(60),
        || async {
            let all = cluster.cli_json(&["template", "replicas", "big"]);
            let tags = all.as_array()?;
            let mut rows = tags.iter().flat_map(|t| t["replicas"].as_array().unwrap());
            (tags.len() == 3 && rows.all(|r| r["state"] == "complete")).then_some(())
        },
    )
    .await;
}

/// Client and receiver die together; the push is made again through the others alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_whose_client_and_receiver_died_is_ended_through_another_member() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    let disk = cluster.dir.path().join("big.raw");
    sparse_file(&disk, 48, 99);
    let mut client = push(&cluster, &disk, &[]);
    until("a part was sent", Duration::from_secs(60), || async {
        (stored_mb(&cluster, 0).await >= 4).then_some(())
    })
    .await;
    client.kill().unwrap();
    client.wait().unwrap();
    cluster.kill(0);
    cluster.leader().await;
    let out = push(&cluster, &disk, &[]);
    let out = tokio::task::block_in_place(|| out.wait_with_output()).unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    // And again once the receiver is back: nothing is sent twice, nothing is there twice.
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    let path = disk.to_str().unwrap();
    let of = [
        "template",
        "push",
        "big",
        "--tag",
        "v1",
        "--disk",
        path,
        "--durability",
        "all",
    ];
    let again = cluster.cli_json(&of);
    assert_eq!(again["tag"]["number"], 0, "{again}");
    until("all hold it", Duration::from_secs(60), || {
        all_whole(&cluster)
    })
    .await;
    let copy = cluster.dir.path().join("copy");
    cluster.cli_ok(&["template", "pull", "big", "--disk", copy.to_str().unwrap()]);
    assert!(
        Command::new("cmp")
            .args([&disk, &copy])
            .status()
            .unwrap()
            .success()
    );

    // One tag goes, as an operator sees it; what is said of another; what they take.
    noise_file(&disk, 1 << 20, 3);
    for tag in ["v2", "v3"] {
        cluster.cli_ok(&["template", "push", "big", "--tag", tag, "--disk", path]);
    }
    cluster.cli_ok(&["template", "delete", "big", "--tag", "v2"]);
    let told = |args: &[&str]| cluster.cli_json(args);
    let shown = told(&["template", "show", "big"]);
    let tags: Vec<&str> = shown["versions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["tag"].as_str().unwrap())
        .collect();
    assert_eq!(tags, ["v1", "v3"]);
    assert!(
        shown["versions"][0]["stored_bytes"].as_u64()
            > shown["versions"][1]["stored_bytes"].as_u64()
    );
    let stored = shown["stored_bytes"].as_u64().unwrap();
    assert_eq!(
        told(&["registry", "usage"])["stored_bytes"].as_u64(),
        Some(stored)
    );
}
