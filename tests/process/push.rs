//! Pushes: small ones for other tests, and pushes whose client or receiver is killed on the way.

use crate::cluster::{BIN, Cluster, until};
use crate::{Dice, rounds, turn};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A file of `len` bytes that does not compress.
pub(crate) fn noise_file(path: &Path, len: usize, seed: u64) {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    std::fs::write(path, bytes).unwrap();
}

/// Push a template of a few hundred kilobytes; its id.
pub(crate) async fn push_small_template(cluster: &Cluster, name: &str) -> String {
    let disk = cluster.dir.path().join(format!("{name}.raw"));
    noise_file(&disk, 300_000, 7);
    // Of another architecture, so that no node here ever runs an instance of it.
    let disk = disk.to_str().unwrap();
    let arch = if cfg!(target_arch = "x86_64") {
        "arm64"
    } else {
        "amd64"
    };
    let of = ["--tag", "v1", "--disk", disk, "--arch", arch];
    cluster.cli_ok(&[&["template", "push", name], &of[..]].concat());
    let limit = Duration::from_secs(30);
    until("a pushed template is listed", limit, || {
        template_id(cluster, name)
    })
    .await
}

/// Id of a template by name, seen through member 0 or the next that runs.
pub(crate) async fn template_id(cluster: &Cluster, name: &str) -> Option<String> {
    let n = (0..cluster.members.len()).find(|n| cluster.running(*n))?;
    let list = cluster
        .call(n, "GET", "/api/v1/registry/vm", None)
        .await
        .ok()?;
    let found = list.as_array()?.iter().find(|t| t["name"] == name)?["id"]
        .as_str()?
        .to_owned();
    Some(found)
}

fn push_command(cluster: &Cluster, disk: &Path, tag: &str) -> Command {
    let mut command = Command::new(BIN);
    command
        .args([
            "template",
            "push",
            "big",
            "--tag",
            tag,
            "--endpoints",
            &cluster.endpoints(),
        ])
        .arg("--disk")
        .arg(disk)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Tags of `big` that member `n` shows.
async fn visible_tags(cluster: &Cluster, n: usize) -> Option<Vec<String>> {
    let list = cluster
        .call(n, "GET", "/api/v1/registry/vm", None)
        .await
        .ok()?;
    let Some(template) = list.as_array()?.iter().find(|t| t["name"] == "big") else {
        return Some(Vec::new());
    };
    let path = format!("/api/v1/registry/vm?id={}", template["id"].as_str()?);
    let template: Value = cluster.call(n, "GET", &path, None).await.ok()?;
    let tags = template["versions"].as_array()?.iter();
    Some(
        tags.filter_map(|v| v["tag"].as_str().map(str::to_owned))
            .collect(),
    )
}

fn pull_equals(cluster: &Cluster, n: usize, tag: &str, disk: &Path) {
    let copy: PathBuf = cluster.dir.path().join(format!("copy-{n}"));
    let out = Command::new(BIN)
        .args(["template", "pull", "big", "--tag", tag, "--endpoints"])
        .arg(format!("http://{}", cluster.members[n].api))
        .arg("--disk")
        .arg(&copy)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "pull: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let equal = std::fs::read(&copy).unwrap() == std::fs::read(disk).unwrap();
    assert!(equal, "{tag} pulled through member {n} differs");
    std::fs::remove_file(copy).unwrap();
}

/// `MAINSTAY_PUSH_CUTS=20` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_push_is_resumed_and_never_half_visible() {
    let _turn = turn().await;
    let cuts = rounds("MAINSTAY_PUSH_CUTS", 4);
    let mut dice = Dice::new("interrupted push");
    let mut cluster = Cluster::ready().await;
    for cut in 0..cuts {
        let tag = format!("t{cut}");
        let disk = cluster.dir.path().join("big.raw");
        noise_file(&disk, 24 << 20, dice.below(u64::MAX));
        let mut client = push_command(&cluster, &disk, &tag).spawn().unwrap();
        // Where in the push it is cut is the random input of this test.
        tokio::time::sleep(Duration::from_millis(dice.below(400))).await;
        let victim = (cut % 2 == 1).then(|| dice.below(3) as usize);
        if let Some(victim) = victim {
            cluster.kill(victim);
        } else {
            let _ = client.kill();
        }
        let whole = client.wait().unwrap().success();
        // Whatever is visible now is whole.
        for n in (0..3).filter(|n| cluster.running(*n)).collect::<Vec<_>>() {
            let shown = visible_tags(&cluster, n).await.unwrap_or_default();
            if shown.contains(&tag) {
                pull_equals(&cluster, n, &tag, &disk);
            } else {
                assert!(!whole, "an acknowledged push is not visible on member {n}");
            }
        }
        if let Some(victim) = victim {
            cluster.start(victim);
            cluster.wait_ready(&[victim]).await;
        }
        assert!(
            push_command(&cluster, &disk, &tag)
                .status()
                .unwrap()
                .success(),
            "resumed push"
        );
        for n in 0..3 {
            until("the tag is visible", Duration::from_secs(30), || async {
                visible_tags(&cluster, n).await.filter(|t| t.contains(&tag))
            })
            .await;
            pull_equals(&cluster, n, &tag, &disk);
        }
    }
    eprintln!("{cuts} interrupted pushes, each resumed, never half visible");
}
