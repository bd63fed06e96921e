//! What an error says about a proposal whose first attempt may have been appended.

use crate::support::{BOUND, Cluster, command, eventually, number};
use mainstay_raft::{GroupConfig, GroupError};
use std::time::Duration;

fn others(cluster: &Cluster, id: u64) -> Vec<u64> {
    cluster.ids().into_iter().filter(|o| *o != id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_stops_under_a_sent_proposal_does_not_know_the_outcome() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let via = others(&cluster, leader)[0];
    let group = cluster.nodes[&via].group();
    let machine = &cluster.nodes[&leader].machine;
    // The connection is there: it is not made while one direction is cut.
    cluster.put(via, "b", 1).await;
    // The proposal gets through, its answer does not.
    cluster.net.cut(leader, via, true);
    let stop = async {
        eventually("commit", || machine.get("a") == 1).await;
        group.halt().await;
    };
    let (write, ()) = tokio::join!(group.propose(command(900, "a", 1), BOUND), stop);
    assert!(matches!(write, Err(GroupError::Unknown)), "{write:?}");
    let write = group.propose(command(901, "a", 1), BOUND).await;
    assert!(matches!(write, Err(GroupError::Stopped(_))), "{write:?}");
}

fn short_memory(config: &mut GroupConfig) {
    config.retry_entries = 20;
}

/// Propose through a leader that nobody hears, let the others write `puts` times meanwhile, heal.
/// Again, should another have been elected on a busy machine just before the leader was cut off.
async fn propose_through_a_lost_leader(puts: u64) -> (Cluster, Result<u64, GroupError>) {
    for _ in 0..20 {
        let cluster = Cluster::founded(3, short_memory).await;
        let old = cluster.leader().await;
        let rest = others(&cluster, old);
        let group = cluster.nodes[&old].group();
        let before = group.status().last_log;
        cluster.net.isolate(old, &cluster.ids(), true);
        let meanwhile = async {
            let appended = async {
                eventually("append", || group.status().last_log > before).await;
            };
            let soon = Duration::from_secs(2);
            let appended = tokio::time::timeout(soon, appended).await.is_ok();
            if appended {
                cluster.leader_among(&rest).await;
                for _ in 0..puts {
                    cluster.put(rest[0], "b", 1).await;
                }
            }
            cluster.net.isolate(old, &cluster.ids(), false);
            appended
        };
        let write = group.propose(command(900, "a", 1), BOUND);
        let (write, appended) = tokio::join!(write, meanwhile);
        if appended {
            cluster.converge().await;
            return (cluster, write.map(|sum| number(&sum)));
        }
    }
    panic!("the leader never kept its office long enough");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_is_retried_while_the_log_has_hardly_moved() {
    let (cluster, write) = propose_through_a_lost_leader(3).await;
    assert!(matches!(write, Ok(1)), "{write:?}");
    assert_eq!(cluster.get(1, "a").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_is_not_retried_after_the_log_has_moved_on() {
    let started = std::time::Instant::now();
    let (cluster, write) = propose_through_a_lost_leader(40).await;
    assert!(matches!(write, Err(GroupError::Unknown)), "{write:?}");
    assert!(
        started.elapsed() < BOUND - Duration::from_secs(2),
        "told as soon as it is certain, not at the deadline"
    );
    assert_eq!(cluster.get(1, "a").await, 0, "not appended again");
}
