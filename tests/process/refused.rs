//! What must be refused at start, with a sentence that tells what to do: a wrong token, another
//! cluster's data directory, a wiped member.

use crate::cluster::{Cluster, until};
use crate::turn;
use std::time::Duration;

pub(crate) async fn says(cluster: &Cluster, name: &str, words: &[&str]) {
    until(
        &format!("{name} says {words:?}"),
        Duration::from_secs(20),
        || async {
            let log = cluster.log(name);
            log.lines()
                .any(|l| words.iter().all(|w| l.contains(w)))
                .then_some(())
        },
    )
    .await;
}

async fn voters(cluster: &Cluster, n: usize) -> usize {
    let list = cluster
        .call(n, "GET", "/api/v1/members", None)
        .await
        .unwrap();
    list.as_array()
        .unwrap()
        .iter()
        .filter(|m| m["role"] == "voter")
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_token_is_refused() {
    let _turn = turn().await;
    let mut cluster = Cluster::new(3);
    cluster.start(0);
    cluster.start(1);
    cluster.wait_ready(&[0, 1]).await;
    let right = std::mem::replace(&mut cluster.token, "another-token".to_owned());
    cluster.start(2);
    says(&cluster, "c3", &["--cluster-token"]).await;
    assert_eq!(voters(&cluster, 0).await, 2, "the stranger did not join");
    if cluster.exited(2).is_none() {
        cluster.kill(2);
    }
    cluster.token = right;
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_member_is_refused_and_can_be_replaced() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    until("three voters", Duration::from_secs(20), || async {
        (voters(&cluster, 0).await == 3).then_some(())
    })
    .await;
    cluster.kill(2);
    std::fs::remove_dir_all(&cluster.members[2].data).unwrap();
    cluster.start(2);
    says(&cluster, "c3", &["mainstay member replace c3"]).await;
    if cluster.exited(2).is_none() {
        cluster.kill(2);
    }
    cluster.cli_ok(&["member", "replace", "c3"]);
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    until("three voters again", Duration::from_secs(30), || async {
        (voters(&cluster, 2).await == 3).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_clusters_data_directory_is_refused() {
    let _turn = turn().await;
    let mut other = Cluster::new(1);
    other.start(0);
    other.wait_ready(&[0]).await;
    other.kill(0);

    let mut cluster = Cluster::ready().await;
    cluster.kill(2);
    std::fs::remove_dir_all(&cluster.members[2].data).unwrap();
    let foreign = other.members[0].data.clone();
    std::fs::rename(foreign, &cluster.members[2].data).unwrap();
    cluster.start(2);
    says(&cluster, "c3", &["data directory"]).await;
    cluster.leader().await;
}
