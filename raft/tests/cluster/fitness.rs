//! Members that should not lead: they hand over, do not campaign, are not chosen, and lead all the
//! same when nobody else can.

use crate::support::{Cluster, eventually};
use mainstay_raft::{GroupError, Unfit};
use std::time::Duration;

const KEY: &str = "test";

fn reluctant(cluster: &Cluster, id: u64) {
    let why = Unfit::Reluctant("its disk is slow".into());
    cluster.nodes[&id].group().unfit(KEY, Some(why));
}

fn barred(cluster: &Cluster, id: u64) {
    let why = Unfit::Barred("its state differs".into());
    cluster.nodes[&id].group().unfit(KEY, Some(why));
}

fn fit(cluster: &Cluster, id: u64) {
    cluster.nodes[&id].group().unfit(KEY, None);
}

fn others(cluster: &Cluster, id: u64) -> Vec<u64> {
    cluster.ids().into_iter().filter(|o| *o != id).collect()
}

/// The leader that all of `ids` agree on, once it is another than `old`.
async fn next_leader(cluster: &Cluster, ids: &[u64], old: u64) -> u64 {
    cluster
        .wait(ids[0], "another leader", |s| {
            s.leader.is_some_and(|l| l != old && ids.contains(&l))
        })
        .await;
    cluster.leader_among(ids).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unfit_leader_hands_over_and_does_not_campaign() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let unfit = cluster.leader().await;
    let term = cluster.nodes[&unfit].group().status().term;
    reluctant(&cluster, unfit);
    let mut leader = next_leader(&cluster, &cluster.ids(), unfit).await;
    let status = cluster.nodes[&unfit].group().status();
    assert_eq!(status.unfit, ["its disk is slow"]);
    assert_eq!(status.term, term + 1, "handed over, not fought over");
    // Whoever leads is cut off: of the two that are left, always the fit one follows.
    for _ in 0..4 {
        // One that lacks an entry could not win, fit or not.
        cluster.converge().await;
        cluster.net.isolate(leader, &cluster.ids(), true);
        let rest = others(&cluster, leader);
        let next = next_leader(&cluster, &rest, leader).await;
        assert_ne!(next, unfit, "an unfit member campaigned");
        cluster.put(unfit, "a", 1).await;
        cluster.net.isolate(leader, &cluster.ids(), false);
        cluster
            .wait(leader, "follow", |s| s.leader == Some(next))
            .await;
        leader = next;
    }
    fit(&cluster, unfit);
    assert!(cluster.nodes[&unfit].group().status().unfit.is_empty());
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_nobody_is_fit_the_leader_stays_until_somebody_is() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let term = cluster.nodes[&leader].group().status().term;
    for id in cluster.ids() {
        reluctant(&cluster, id);
    }
    // Longer than an attempt to hand over takes, writes go on in the same term.
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_millis(2500) {
        cluster.put(1, "a", 1).await;
    }
    let status = cluster.nodes[&leader].group().status();
    assert_eq!((status.leader, status.term), (Some(leader), term));
    let rest = others(&cluster, leader);
    fit(&cluster, rest[0]);
    cluster
        .wait(rest[1], "the fit one", |s| s.leader == Some(rest[0]))
        .await;
    // It goes; the two that are left would rather not, and do.
    cluster.net.isolate(rest[0], &cluster.ids(), true);
    let next = next_leader(&cluster, &[leader, rest[1]], rest[0]).await;
    cluster.put(next, "a", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_chooses_a_fit_member_and_refuses_an_unfit_one() {
    let cluster = Cluster::founded(3, |_| {}).await;
    for _ in 0..3 {
        let leader = cluster.leader().await;
        let rest = others(&cluster, leader);
        let group = cluster.nodes[&leader].group();
        eventually("hear of everyone", || group.answering().len() == 3).await;
        reluctant(&cluster, rest[0]);
        let error = group.transfer_leader(Some(rest[0])).await.unwrap_err();
        assert!(
            matches!(&error, GroupError::Refused(why) if why.contains("its disk is slow")),
            "{error}"
        );
        group.transfer_leader(None).await.unwrap();
        assert_eq!(next_leader(&cluster, &cluster.ids(), leader).await, rest[1]);
        fit(&cluster, rest[0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_barred_member_gives_the_lead_to_a_reluctant_one_and_never_takes_it() {
    let cluster = Cluster::founded(3, |_| {}).await;
    let leader = cluster.leader().await;
    let rest = others(&cluster, leader);
    reluctant(&cluster, rest[0]);
    barred(&cluster, rest[1]);
    barred(&cluster, leader);
    cluster
        .wait(leader, "the reluctant one", |s| s.leader == Some(rest[0]))
        .await;
    cluster.net.isolate(rest[0], &cluster.ids(), true);
    let soon = Duration::from_secs(5);
    let write = crate::support::command(900, "a", 1);
    let write = cluster.nodes[&leader].group().propose(write, soon).await;
    assert!(write.is_err(), "a barred member took the lead: {write:?}");
    cluster.net.isolate(rest[0], &cluster.ids(), false);
    cluster.put(leader, "a", 1).await;
    cluster
        .wait(leader, "the reluctant one again", |s| {
            s.leader == Some(rest[0])
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_alone_leads_whatever_is_said_of_it() {
    let mut cluster = Cluster::new(0, |_| {}).await;
    cluster.add(1, true).await;
    cluster.found().await;
    cluster.put(1, "a", 1).await;
    cluster.halt(1).await;
    cluster.start(1).await;
    barred(&cluster, 1);
    assert_eq!(cluster.put(1, "a", 1).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_hangs_hands_over_and_is_trusted_again_later() {
    let cluster = Cluster::founded(3, |c| c.slow_disk_calm = Duration::from_secs(1)).await;
    let slow = cluster.leader().await;
    let term = cluster.nodes[&slow].group().status().term;
    cluster.put(slow, "a", 1).await;
    cluster.nodes[&slow].memory_log().hold();
    // The others are a majority: writes go on meanwhile.
    let fast = others(&cluster, slow);
    let writes = async {
        while cluster.nodes[&fast[0]].group().status().leader == Some(slow) {
            cluster.put(fast[0], "a", 1).await;
        }
    };
    // The slow one cannot even write down that there is another leader.
    tokio::join!(writes, next_leader(&cluster, &fast, slow));
    let term_now = cluster.nodes[&fast[0]].group().status().term;
    assert_eq!(term_now, term + 1, "handed over, not fought over");
    let status = cluster.nodes[&slow].group().status();
    assert!(status.unfit[0].contains("its disk is slow"), "{status:?}");
    cluster.nodes[&slow].memory_log().release();
    cluster
        .wait(slow, "trusted again", |s| s.unfit.is_empty())
        .await;
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_disks_hang_the_leader_stays() {
    let cluster = Cluster::founded(3, |c| c.slow_disk_calm = Duration::from_secs(1)).await;
    let leader = cluster.leader().await;
    let term = cluster.nodes[&leader].group().status().term;
    for node in cluster.nodes.values() {
        node.memory_log().hold();
    }
    let slow = || {
        cluster
            .nodes
            .values()
            .all(|n| !n.group().status().unfit.is_empty())
    };
    let write = cluster.put(leader, "a", 1);
    let all_slow = async {
        eventually("all are slow", slow).await;
        // Some attempts to hand over later it is still the same.
        let until = std::time::Instant::now() + Duration::from_millis(2500);
        eventually("a while", || std::time::Instant::now() > until).await;
        let status = cluster.nodes[&leader].group().status();
        assert_eq!((status.leader, status.term), (Some(leader), term));
        for node in cluster.nodes.values() {
            node.memory_log().release();
        }
    };
    tokio::join!(write, all_slow);
    assert_eq!(cluster.get(leader, "a").await, 1);
}
