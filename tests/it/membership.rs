//! What an operator asks of the members: asked twice, on two members, while the leader changes, by
//! whoever dies in between. One answer, and what it says holds.

use crate::cluster::Cluster;
use mainstay::agents::Liveness;
use mainstay::peer::{MemberHttp, PeerClient};
use mainstay::reconcile::{ReconcileConfig, spawn};
use mainstay_model::{Command, MemberId};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);

async fn ask(cluster: &Cluster, n: usize, verb: &str, body: Value) -> Result<Value, (u16, String)> {
    let path = format!("/api/v1/member/{verb}");
    let answer = cluster.call(n, "POST", &path, body).await;
    match answer.json()["status"] == "OK" {
        true => Ok(answer.body()),
        false => Err(answer.refusal()),
    }
}

/// A cluster in which every feature is on.
async fn start(n: u64) -> Cluster {
    let cluster = Cluster::start(n).await;
    let level = mainstay_model::feature::SUPPORTED;
    let command = Command::SetFeatures { level };
    cluster.members[0].app.submit(command).await.unwrap();
    for n in 0..cluster.members.len() {
        cluster.get(n, "/readyz").await;
    }
    cluster
}

/// Until exactly these are members, as member `n` sees it.
async fn members_are(cluster: &Cluster, n: usize, wanted: &[u64]) {
    let begun = Instant::now();
    loop {
        let status = cluster.members[n].group.status();
        if status.members.keys().eq(wanted) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{:?}", status.members);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_add_says_how_and_changes_nothing() {
    let cluster = start(3).await;
    let (one, two) = tokio::join!(
        ask(&cluster, 0, "add", json!({"name": "c4"})),
        ask(&cluster, 2, "add", json!({"name": "c4"})),
    );
    let one = one.unwrap();
    assert_eq!(Ok(&one), two.as_ref());
    let command = one["command"].as_str().unwrap();
    assert!(
        command.starts_with("mainstay server --name c4 --data-dir ")
            && command.ends_with("--join http://c1:8091,http://c2:8091,http://c3:8091"),
        "{command}"
    );
    assert!(
        one["note"]
            .as_str()
            .unwrap()
            .contains("4 voters bear no more failures than 3")
    );
    let learner = ask(&cluster, 1, "add", json!({"name": "c4", "learner": true})).await;
    assert!(
        learner.unwrap()["command"]
            .as_str()
            .unwrap()
            .ends_with(" --learner")
    );
    let (_, why) = ask(&cluster, 0, "add", json!({"name": "c2"}))
        .await
        .unwrap_err();
    assert!(why.contains("mainstay member replace c2"), "{why}");
    let (_, why) = ask(&cluster, 0, "add", json!({"name": "c 4"}))
        .await
        .unwrap_err();
    assert!(why.contains("cannot be a member's name"), "{why}");
    members_are(&cluster, 0, &[1, 2, 3]).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_copies_are_not_removed_unless_that_is_wanted() {
    let cluster = start(3).await;
    // Held by member 1 alone.
    cluster.template(&["v1", "v2"]).await;
    let body = json!({"name": "c1"});
    let (status, why) = ask(&cluster, 1, "remove", body).await.unwrap_err();
    assert_eq!(status, 200, "{why}");
    assert!(
        why.contains("debian v1, debian v2") && why.contains("--force"),
        "{why}"
    );
    members_are(&cluster, 1, &[1, 2, 3]).await;
    let body = json!({"name": "c1", "force": true});
    // Twice at once, on two members, one of which may be the leader or the one that goes.
    let (one, two) = tokio::join!(
        ask(&cluster, 1, "remove", body.clone()),
        ask(&cluster, 2, "remove", body.clone()),
    );
    for said in [one, two] {
        let said = said.unwrap();
        let said = said.as_str().unwrap();
        assert!(
            said.contains("2 voters (c2, c3): none of them may fail")
                && said.contains("Lost with it, for no other member holds their bytes: debian v1")
                || said.contains("has been removed already"),
            "{said}"
        );
    }
    members_are(&cluster, 1, &[2, 3]).await;
    let again = ask(&cluster, 2, "remove", body).await.unwrap();
    assert_eq!(again, "member c1 has been removed already");
    let tags = {
        let state = cluster.members[1].state.read();
        let tags = state.templates[&"t1".into()].tags.values();
        tags.map(|t| t.holders.clone()).collect::<Vec<_>>()
    };
    assert_eq!(tags, [BTreeSet::new(), BTreeSet::new()]);
    // Two voters that both answer can let one go; the last one cannot go.
    let said = ask(&cluster, 1, "remove", json!({"name": "c2"}))
        .await
        .unwrap();
    assert!(
        said.as_str()
            .unwrap()
            .contains("1 voter (c3): it must not fail"),
        "{said}"
    );
    let (_, why) = ask(&cluster, 2, "remove", json!({"name": "c3"}))
        .await
        .unwrap_err();
    assert!(why.contains("c3 is the only voter"), "{why}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_costs_the_majority_is_refused_and_leaves_no_trace() {
    let cluster = start(3).await;
    let leader = cluster.leader().await;
    let (lost, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster
        .network
        .isolate(cluster.members[lost].id, &[1, 2, 3], true);
    let begun = Instant::now();
    let silent = cluster.members[lost].id;
    while cluster.members[leader].group.answering().contains(&silent) {
        assert!(begun.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for force in [false, true] {
        let body = json!({"name": format!("c{}", other + 1), "force": force});
        let (_, why) = ask(&cluster, leader, "remove", body).await.unwrap_err();
        let names_it = format!("silent: member c{}", lost + 1);
        assert!(
            why.contains(&names_it) && why.contains("not even --force"),
            "{why}"
        );
    }
    assert!(cluster.members[leader].app.retired().is_empty());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_removal_that_nobody_carried_out_is_finished_by_the_leader() {
    let cluster = start(3).await;
    let leader = cluster.leader().await;
    // Whoever was asked died between the record and the change; the leader itself is to go.
    let command = Command::RetireMember {
        id: MemberId(cluster.members[leader].id),
        name: format!("c{}", leader + 1),
        voters: BTreeSet::new(),
    };
    let rest = (leader + 1) % 3;
    cluster.members[rest].app.submit(command).await.unwrap();
    let list = cluster.get(leader, "/api/v1/members").await.body();
    let leaving = |m: &&Value| m["leaving"] == true;
    assert_eq!(list.as_array().unwrap().iter().filter(leaving).count(), 1);
    let reconcilers: Vec<_> = cluster
        .members
        .iter()
        .map(|m| {
            let http = MemberHttp::new(PeerClient::new("token", m.id).unwrap(), m.group.clone());
            spawn(
                m.app.clone(),
                Liveness::new(),
                http,
                ReconcileConfig::default(),
            )
        })
        .collect();
    let left: Vec<u64> = [1, 2, 3]
        .into_iter()
        .filter(|id| *id != cluster.members[leader].id)
        .collect();
    members_are(&cluster, rest, &left).await;
    reconcilers.iter().for_each(|r| r.abort());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_repetition_does_not_meet_who_took_the_name() {
    let cluster = start(3).await;
    let others: Vec<usize> = (0..3).filter(|n| *n != 1).collect();
    let body = json!({"name": "c2", "id": "0000000000000002", "force": true});
    ask(&cluster, others[0], "replace", body.clone())
        .await
        .unwrap();
    // Another identity takes the name.
    let member = mainstay_raft::Member {
        name: "c2".into(),
        peer_url: "http://c2-new:8091".into(),
        ..Default::default()
    };
    let group = &cluster.members[others[1]].group;
    group.add_learner(22, member).await.unwrap();
    for n in &others {
        let said = ask(&cluster, *n, "replace", body.clone()).await.unwrap();
        assert!(
            said.as_str().unwrap().contains("old identity of member c2"),
            "{said}"
        );
        let said = ask(&cluster, *n, "remove", body.clone()).await.unwrap();
        assert!(said.as_str().unwrap().contains("removed already"), "{said}");
    }
    members_are(&cluster, others[0], &[1, 3, 22]).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_are_checked_before_they_are_told() {
    let cluster = start(3).await;
    let (_, why) = ask(&cluster, 0, "update", json!({"name": "c2"}))
        .await
        .unwrap_err();
    assert!(why.contains("nothing to change"), "{why}");
    let bad = json!({"name": "c2", "api_url": "https://h/x"});
    let (_, why) = ask(&cluster, 0, "update", bad).await.unwrap_err();
    assert!(
        why.contains("api_url") && why.contains("http://HOST:PORT"),
        "{why}"
    );
    let body = json!({"name": "c2", "api_url": "cloud.example", "registry_url": "http://r:1"});
    for n in [0, 2] {
        let said = ask(&cluster, n, "update", body.clone()).await.unwrap();
        assert!(
            said.as_str()
                .unwrap()
                .contains("http://cloud.example:8090 (API)"),
            "{said}"
        );
    }
    let list = cluster.get(0, "/api/v1/members").await.body();
    let second = list
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["name"] == "c2")
        .unwrap()
        .clone();
    assert_eq!(
        (
            &second["api_url"],
            &second["registry_url"],
            &second["peer_url"]
        ),
        (
            &json!("http://cloud.example:8090"),
            &json!("http://r:1"),
            &json!("http://c2:8091")
        )
    );
    // The leader says who answers and who lags.
    let leader = cluster.leader().await;
    let list = cluster.get(leader, "/api/v1/members").await.body();
    for member in list.as_array().unwrap() {
        assert!(
            member["matched"].is_u64() && member["lag"].is_u64(),
            "{member}"
        );
        assert!(member["answers"].is_boolean(), "{member}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_releases_are_mixed_a_removal_is_not_recorded() {
    let cluster = Cluster::start(3).await;
    let said = ask(&cluster, 0, "remove", json!({"name": "c3"})).await;
    assert!(
        said.unwrap()
            .as_str()
            .unwrap()
            .contains("member c3 was removed")
    );
    members_are(&cluster, 0, &[1, 2]).await;
    // The earlier release could not read it.
    assert!(cluster.members[0].app.retired().is_empty());
    cluster.stop().await;
}
