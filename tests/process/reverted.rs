//! A member whose data directory was put back from a backup stops, and the command that it names makes it
//! a member again.

use crate::cluster::{BIN, Cluster, until};
use crate::rescue::{named_command, voters};
use crate::snapshots::add_group;
use crate::turn;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(done.unwrap().success());
}

/// The third has acknowledged everything, as the leader sees it.
async fn caught_up(cluster: &Cluster) {
    until("it has acknowledged everything", LIMIT, || async {
        let rows = cluster.cli_json(&["member", "list"]);
        let row = rows.as_array()?.iter().find(|m| m["name"] == "c3")?.clone();
        (row["lag"] == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_from_a_backup_is_refused_by_those_who_know_better() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    voters(&cluster, 0, 3).await;
    add_group(&cluster, "before").await;
    caught_up(&cluster).await;
    cluster.stop(2).await;
    let data = cluster.members[2].data.clone();
    let backup = cluster.dir.path().join("backup");
    copy(&data, &backup);
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    for n in 0..5 {
        add_group(&cluster, &format!("after-{n}")).await;
    }
    caught_up(&cluster).await;
    cluster.stop(2).await;
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&backup, &data).unwrap();
    cluster.start(2);
    let begun = std::time::Instant::now();
    while cluster.exited(2).is_none() {
        assert!(begun.elapsed() < LIMIT, "it runs:\n{}", cluster.log("c3"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.reap(2);
    let log = cluster.log("c3");
    let at = log
        .rfind("put back to an older state")
        .expect("it says why");
    let command = named_command(&log[at..]);
    let out = Command::new(BIN).args(&command).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {text}");
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    voters(&cluster, 0, 3).await;
    let list = cluster.call(2, "GET", "/api/v1/group", None).await.unwrap();
    assert_eq!(list.as_array().map(Vec::len), Some(6), "{list}");
}
