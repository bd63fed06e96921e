//! A rolling restart from one release to the next, and back, under load; then features are switched on
//! and the way back is closed, with words.

use crate::cluster::{Cluster, until};
use crate::kills::all_members_agree;
use crate::load::Writers;
use crate::push::push_small_template;
use crate::turn;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What every member answers for `field` of its status.
async fn figures(cluster: &Cluster, page: &str) -> Vec<Option<u64>> {
    let mut all = Vec::new();
    for member in &cluster.members {
        let url = format!("http://{}/metrics", member.api);
        let text = match cluster.client.get(url).send().await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(page)?.strip_prefix(' '));
        all.push(line.and_then(|n| n.parse().ok()));
    }
    all
}

/// One member after the other is stopped and started again with `binary`; writes go on.
async fn roll(cluster: &mut Cluster, writers: &Writers, binary: &Path) {
    for n in 0..3 {
        writers.progress(50).await;
        cluster.stop(n).await;
        writers.progress(50).await;
        cluster.members[n].binary = binary.to_owned();
        cluster.start(n);
        cluster.wait_ready(&[n]).await;
    }
    writers.progress(50).await;
}

/// `MAINSTAY_OLD_BINARY=path` names the release to come from (`tests/upgrade.sh` builds it from a
/// commit); without it this release is its own predecessor, and only the restarts are tested.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_changes_the_release_and_back() {
    let _turn = turn().await;
    let new = PathBuf::from(crate::cluster::BIN);
    let old = std::env::var_os("MAINSTAY_OLD_BINARY").map(PathBuf::from);
    eprintln!("from {old:?}");
    let from = old.as_deref().unwrap_or(&new);
    let mut cluster = Cluster::new(3);
    for n in 0..3 {
        cluster.members[n].binary = from.to_owned();
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let template = push_small_template(&cluster, "load").await;
    let writers = Writers::start(&cluster, &template, 8).await;
    // Forth, back, forth: nothing is switched on meanwhile, or the way back would not work.
    roll(&mut cluster, &writers, &new).await;
    roll(&mut cluster, &writers, from).await;
    cluster
        .environment
        .push(("MAINSTAY_FEATURE_GRACE_S", "0".to_owned()));
    roll(&mut cluster, &writers, &new).await;
    until(
        "features switched on everywhere",
        Duration::from_secs(30),
        || async {
            let levels = figures(&cluster, "mainstay_features").await;
            let all = levels.iter().all(|l| l.is_some_and(|l| l > 0));
            all.then_some(())
        },
    )
    .await;
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
    all_members_agree(&cluster).await;
    until(
        "states compared and equal",
        Duration::from_secs(20),
        || async {
            let seen = figures(&cluster, "mainstay_state_agreed_index").await;
            let differing = figures(&cluster, "mainstay_state_differing_members").await;
            let equal = differing.iter().all(|n| *n == Some(0));
            (equal && seen.iter().all(|at| at.is_some_and(|at| at > 0))).then_some(())
        },
    )
    .await;
    if let Some(old) = old {
        the_way_back_is_closed(&mut cluster, &old, &new).await;
    }
}

/// The old release does not start on what the new one wrote, and loses nothing of it.
async fn the_way_back_is_closed(cluster: &mut Cluster, old: &Path, new: &Path) {
    cluster.stop(0).await;
    cluster.members[0].binary = old.to_owned();
    cluster.start(0);
    until("the old release gives up", Duration::from_secs(30), || {
        let ended = cluster.exited(0);
        async move { ended.map(|status| assert!(!status.success())) }
    })
    .await;
    cluster.reap(0);
    cluster.members[0].binary = new.to_owned();
    cluster.start(0);
    cluster.wait_ready(&[0, 1, 2]).await;
    all_members_agree(cluster).await;
}
