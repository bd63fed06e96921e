//! A disk that fills up: first pushes are refused, then the lead is handed over, then the reserve is given
//! up; reads and the log go on throughout, and with room everything comes back by itself.

use super::shim::{Fault, Shim, op};
use crate::cluster::{Cluster, until};
use crate::load::Writers;
use crate::push::{noise_file, push_small_template};
use crate::turn;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// The mark of the members under test; half of it for the lead, a quarter in reserve.
const LOW: u64 = 32 * MIB;

/// A small file system of its own, mounted for the length of a test.
struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// ext4 in a file where loop devices can be had, else memory. Both need root, as CI has.
    fn mount(dir: &Path, at: &Path, bytes: u64) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let run = |program: &str, args: &[&str]| {
            let out = Command::new(program).args(args).output();
            out.is_ok_and(|out| out.status.success())
        };
        let (image, place) = (dir.join("disk.img"), at.to_str().unwrap());
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let made = image.to_str().unwrap();
        let ext4 = run("mkfs.ext4", &["-q", "-m", "0", "-O", "^has_journal", made])
            && run("mount", &["-o", "loop", made, place]);
        if !ext4 {
            let size = format!("size={bytes}");
            let memory = run("mount", &["-t", "tmpfs", "-o", &size, "none", place]);
            assert!(
                memory,
                "this test mounts a small file system: run it as root"
            );
        }
        Self { at: at.to_owned() }
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.at).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Leave about `bytes` free.
    fn fill_to(&self, bytes: u64) {
        // On a disk that is full already even a name may find no room.
        let Some(ballast) = self.append_to("ballast") else {
            return;
        };
        let held = ballast.metadata().unwrap().len();
        let more = self.free().saturating_sub(bytes);
        let flags = rustix::fs::FallocateFlags::empty();
        if more > 0 {
            let _ = rustix::fs::fallocate(&ballast, flags, 0, held + more);
        }
    }

    fn append_to(&self, name: &str) -> Option<File> {
        let mut options = File::options();
        options.create(true).append(true);
        options.open(self.at.join(name)).ok()
    }

    /// Take everything, to the last block.
    fn fill(&self) {
        self.fill_to(0);
        let piece = vec![1; 4096];
        let Some(mut crumbs) = self.append_to("crumbs") else {
            return;
        };
        while std::io::Write::write_all(&mut crumbs, &piece).is_ok() {}
    }

    fn empty(&self) {
        for name in ["ballast", "crumbs"] {
            let _ = std::fs::remove_file(self.at.join(name));
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Three members; the first has a small disk.
async fn cluster_with_small_disk() -> (Cluster, SmallDisk) {
    let mut cluster = Cluster::new(3);
    let at = cluster.dir.path().join("small");
    let disk = SmallDisk::mount(cluster.dir.path(), &at, 256 * MIB);
    cluster.members[0].data = at.join("c1");
    cluster.flags = vec!["--low-disk", "32MiB"];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    (cluster, disk)
}

/// What member `n` says is wrong with it.
async fn errors(cluster: &Cluster, n: usize) -> String {
    let row = cluster.call(n, "GET", "/api/v1/cluster/status", None).await;
    let row = row.unwrap_or_default();
    let errors = row["errors"].as_array().cloned().unwrap_or_default();
    let texts: Vec<&str> = errors.iter().filter_map(Value::as_str).collect();
    texts.join("; ")
}

async fn says(cluster: &Cluster, n: usize, what: &str) {
    until(what, Duration::from_secs(20), || async {
        errors(cluster, n).await.contains(what).then_some(())
    })
    .await;
}

/// Status and message of an empty push to member `n`.
async fn offer(cluster: &Cluster, n: usize) -> (u16, String) {
    let registry = &cluster.members[n].registry;
    let url = format!("http://{registry}{}", mainstay_agent::transfer::api::CHUNKS);
    let answer = cluster.client.put(url).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn lead(cluster: &Cluster, n: usize) {
    let name = cluster.members[n].name.clone();
    until("the lead", Duration::from_secs(20), || async {
        cluster.cli(&["member", "transfer-leader", &name]);
        (cluster.leader().await == n).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_costs_pushes_then_the_lead_and_nothing_else() {
    let _turn = turn().await;
    let (cluster, disk) = cluster_with_small_disk().await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 4).await;
    let reserve = cluster.members[0].data.join("reserve");
    until("the reserve", Duration::from_secs(10), || async {
        reserve.exists().then_some(())
    })
    .await;
    assert_eq!(offer(&cluster, 0).await.0, 200);
    lead(&cluster, 0).await;

    // Below the mark: no pushes, and still the leader.
    disk.fill_to(LOW * 3 / 4);
    says(&cluster, 0, "the disk is almost full").await;
    let (status, message) = offer(&cluster, 0).await;
    assert_eq!(status, 507, "{message}");
    assert!(message.contains("push through another member"), "{message}");
    writers.progress(20).await;
    assert_eq!(cluster.leader().await, 0, "pushes only are refused");
    // A push that may choose goes through another member.
    let image = cluster.dir.path().join("more.raw");
    noise_file(&image, 300_000, 11);
    let image = image.to_str().unwrap();
    cluster.cli_ok(&["template", "push", "more", "--tag", "v1", "--disk", image]);

    // Below half of it: the lead goes, the log and reads do not.
    disk.fill_to(LOW * 3 / 8);
    until("another leader", Duration::from_secs(20), || async {
        (cluster.leader().await != 0).then_some(())
    })
    .await;
    says(&cluster, 0, "does not take the lead").await;
    writers.progress(50).await;
    let list = cluster.call(0, "GET", "/api/v1/vm", None).await.unwrap();
    assert_eq!(list.as_array().unwrap().len(), 4);
    let refused = cluster.cli(&["member", "transfer-leader", "c1"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && why.contains("not fit to lead"),
        "{why}"
    );

    // Nothing left: what was kept in reserve carries the log on.
    disk.fill();
    until(
        "the reserve is given up",
        Duration::from_secs(10),
        || async { (!reserve.exists()).then_some(()) },
    )
    .await;
    writers.progress(50).await;
    cluster.call(0, "GET", "/api/v1/vm", None).await.unwrap();

    // Room again: all of it comes back by itself.
    disk.empty();
    until("fit again", Duration::from_secs(20), || async {
        (errors(&cluster, 0).await.is_empty() && reserve.exists()).then_some(())
    })
    .await;
    assert_eq!(offer(&cluster, 0).await.0, 200);
    lead(&cluster, 0).await;
    until("the copy that waited", Duration::from_secs(30), || async {
        let args = ["template", "replicas", "more", "--tag", "v1"];
        let rows = cluster.cli_json(&args);
        let whole = rows.as_array()?.iter().all(|r| r["state"] == "complete");
        whole.then_some(())
    })
    .await;
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_a_full_disk_stopped_says_so_and_comes_back_whole() {
    let _turn = turn().await;
    let (mut cluster, disk) = cluster_with_small_disk().await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 4).await;
    writers.progress(50).await;
    // Whatever it gives up is taken as well, until it can write no more.
    let begun = std::time::Instant::now();
    let status = loop {
        disk.fill();
        if let Some(status) = cluster.exited(0) {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "it still writes");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(status.code(), Some(1), "an end with a reason, no crash");
    let log = cluster.log("c1");
    let last = log
        .lines()
        .rev()
        .find(|l| l.contains("stopped"))
        .unwrap_or("");
    assert!(last.contains("No space left"), "{last}");
    writers.progress(50).await;
    // It starts, or says that it cannot; with room it does.
    cluster.kill_if_running(0);
    cluster.start(0);
    disk.empty();
    if cluster.exited(0).is_some() {
        cluster.kill_if_running(0);
        cluster.start(0);
    }
    until("ready again", Duration::from_secs(30), || async {
        let url = format!("http://{}/readyz", cluster.members[0].api);
        let answer = cluster.client.get(url).send().await.ok()?;
        (answer.status() == 200).then_some(())
    })
    .await;
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shim_counts_and_hits() {
    let _turn = turn().await;
    let mut cluster = Cluster::new(1);
    let shim = Shim::new(cluster.dir.path(), &["/c1/log/".to_owned()]);
    shim.attach(&mut cluster, 0);
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    assert!(shim.count() > 3 && shim.hits() == 0);
    shim.set(op::SYNC, 1, Fault::Once(super::shim::EIO));
    let started = cluster.call(
        0,
        "POST",
        "/api/v1/group",
        Some(serde_json::json!({"name": "g"})),
    );
    let _ = started.await;
    until("the fault", Duration::from_secs(10), || async {
        (shim.hits() >= 1).then_some(())
    })
    .await;
    assert!(shim.last().starts_with("fdatasync of "), "{}", shim.last());
}
