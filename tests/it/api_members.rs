//! The API on three members: what was acknowledged on one is seen on all; answers while leaders
//! change; answers without a quorum.

use crate::cluster::Cluster;
use axum::body::Body;
use http::Request;
use mainstay_model::{Command, CommandId, Envelope};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_on_one_member_is_seen_on_all_at_once() {
    let cluster = Cluster::start(3).await;
    cluster.template(&["v1"]).await;
    for round in 0..20 {
        let (a, b, c) = (round % 3, (round + 1) % 3, (round + 2) % 3);
        let ids = cluster
            .call(a, "POST", "/api/v1/vm", json!({"vmid": "t1"}))
            .await
            .body();
        let path = format!("/api/v1/vm?id={}", ids[0].as_str().unwrap());
        let list = cluster.get(b, "/api/v1/vm").await.body();
        assert!(
            list.as_array()
                .unwrap()
                .iter()
                .any(|w| w["instance_id"] == ids[0])
        );
        assert_eq!(cluster.get(c, &path).await.body()["instance_id"], ids[0]);
        cluster
            .call(b, "PUT", &path, json!({"metadata": {"round": round}}))
            .await
            .body();
        assert_eq!(
            cluster.get(a, &path).await.body()["metadata"]["round"],
            round
        );
        cluster
            .call(c, "DELETE", "/api/v1/vm", json!({"id": ids[0]}))
            .await
            .body();
        assert_eq!(
            cluster.get(b, &path).await.body()["instance_state"],
            "Terminating"
        );
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_lives_through_a_leader_change() {
    let cluster = Cluster::start(3).await;
    cluster.template(&["v1"]).await;
    let leader = cluster.leader().await;
    let asked = (leader + 1) % 3;
    let all = [1, 2, 3];
    cluster
        .network
        .isolate(cluster.members[leader].id, &all, true);
    let post = Request::post("/api/v1/vm")
        .header("idempotency-key", "once")
        .body(Body::from(r#"{"vmid":"t1","count":2}"#))
        .unwrap();
    let (post, status) = tokio::join!(
        cluster.send(asked, post),
        cluster.get(asked, "/api/v1/status")
    );
    let ids = post.body();
    assert_eq!(status.body()["status"], "Running", "held, not refused");
    let list = cluster.get((leader + 2) % 3, "/api/v1/vm").await.body();
    assert_eq!(
        list.as_array().unwrap().len(),
        ids.as_array().unwrap().len(),
        "exactly once"
    );
    // The former leader comes back and must not answer from the past.
    cluster
        .network
        .isolate(cluster.members[leader].id, &all, false);
    let list = cluster.get(leader, "/api/v1/vm").await.body();
    assert_eq!(list.as_array().unwrap().len(), 2);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_there_is_an_answer_in_time() {
    let cluster = Cluster::start(3).await;
    cluster.template(&["v1"]).await;
    // A linearizable read, so that the age of a later stale one is known.
    cluster.get(0, "/api/v1/vm").await.body();
    cluster.network.isolate(1, &[1, 2, 3], true);
    let begin = Instant::now();
    let (ready, status, read, write) = tokio::join!(
        cluster.get(0, "/readyz"),
        cluster.get(0, "/api/v1/status"),
        cluster.get(0, "/api/v1/vm"),
        cluster.call(0, "POST", "/api/v1/vm", json!({"vmid": "t1"})),
    );
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    for answer in [&ready, &status, &read, &write] {
        let (code, text) = answer.refusal();
        assert_eq!(code, 503, "{text}");
        assert_eq!(answer.headers["retry-after"], "1");
        assert!(
            text.contains("nothing was changed") || text.contains("outcome is unknown"),
            "{text}"
        );
    }
    let stale = cluster
        .get(0, "/api/v1/registry/vm?consistency=stale")
        .await;
    assert_eq!(stale.body()[0]["name"], "debian");
    assert!(
        stale.headers["x-mainstay-applied-index"]
            .to_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0
    );
    let age: u64 = stale.headers["x-mainstay-age-ms-max"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(Duration::from_millis(age) <= begin.elapsed() + Duration::from_secs(20));
    // "Not found" is no truth about now either, and says so.
    for path in ["vm", "registry/vm", "node", "group"] {
        let path = format!("/api/v1/{path}?id=nobody&consistency=stale");
        let nothing = cluster.get(0, &path).await;
        assert_eq!(nothing.refusal(), (200, "Not found".to_owned()), "{path}");
        assert!(
            nothing.headers.contains_key("x-mainstay-age-ms-max"),
            "{path}"
        );
    }
    assert_eq!(cluster.get(0, "/livez").await.status, 200);
    let row = cluster.get(0, "/api/v1/cluster/status").await.body();
    assert_eq!(
        (&row["name"], &row["id"]),
        (&json!("c1"), &json!("0000000000000001"))
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_this_members_row() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    // Elected is not yet applied.
    cluster.get(leader, "/readyz").await;
    let members = cluster.get(leader, "/api/v1/members").await.body();
    let leaders: Vec<_> = members
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["is_leader"] == true)
        .collect();
    assert_eq!(leaders.len(), 1);
    let second = &members[1];
    let urls = ["api_url", "registry_url", "peer_url"].map(|u| second[u].clone());
    assert_eq!(
        urls,
        ["http://c2:8090", "http://c2:8089", "http://c2:8091"].map(Value::from)
    );
    assert_eq!(
        (&second["id"], &second["role"]),
        (&json!("0000000000000002"), &json!("voter"))
    );
    let row = cluster.get(leader, "/api/v1/cluster/status").await.body();
    assert_eq!(
        (&row["is_leader"], &row["is_learner"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(
        (&row["db_size"], &row["errors"]),
        (&json!(4096), &json!([]))
    );
    assert_eq!(row["version"], "0.1.0-abcdef12");
    for figure in ["term", "index", "applied"] {
        assert!(row[figure].as_u64().unwrap() > 0, "{row}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn before_it_is_a_cluster_a_member_says_so() {
    let cluster = Cluster::uninitialised(1).await;
    assert_eq!(cluster.get(0, "/readyz").await.refusal().0, 503);
    let row = cluster.get(0, "/api/v1/cluster/status").await.body();
    assert_eq!(row["errors"], json!(["not yet a member of a cluster"]));
    assert_eq!(
        (&row["name"], &row["is_leader"]),
        (&json!("c1"), &json!(false))
    );
    assert_eq!(cluster.get(0, "/api/v1/members").await.body(), json!([]));
    cluster.stop().await;
}

/// A bug on one member alone: it applied what the others did not.
#[tokio::test]
async fn a_member_with_another_state_answers_nothing_from_it() {
    let cluster = Cluster::start(3).await;
    cluster.template(&["v1"]).await;
    let leader = cluster.leader().await;
    let odd = (leader + 1) % 3;
    let rogue = Envelope {
        id: CommandId(1),
        stamp_ms: 1,
        command: Command::DeleteTemplate { id: "t1".into() },
    };
    cluster.members[odd].state.write().apply(&rogue);
    cluster.node().await;
    let mut seen = cluster.members[odd].group.agreement();
    let judged = seen.wait_for(|seen| seen.diverged);
    let judged = tokio::time::timeout(Duration::from_secs(20), judged).await;
    assert!(judged.is_ok_and(|seen| seen.is_ok()), "never judged");
    for path in ["/api/v1/vm", "/api/v1/vm?consistency=stale", "/readyz"] {
        let (status, text) = cluster.get(odd, path).await.refusal();
        assert_eq!(status, 503, "{path}");
        assert!(text.contains("mainstay member repair"), "{path}: {text}");
    }
    let row = cluster.get(odd, "/api/v1/cluster/status").await.body();
    assert!(row["errors"].to_string().contains("diverged"), "{row}");
    let page = cluster.get(odd, "/metrics").await;
    assert!(page.text().contains("mainstay_state_diverged 1\n"));
    assert!(!page.text().contains("mainstay_templates"));
    // The others go on, and say who it is.
    let mut named = cluster.members[leader].group.agreement();
    let named = named.wait_for(|seen| !seen.differing.is_empty());
    let named = tokio::time::timeout(Duration::from_secs(20), named).await;
    assert!(named.is_ok_and(|seen| seen.is_ok()), "never named");
    let row = cluster.get(leader, "/api/v1/cluster/status").await.body();
    let text = format!("members hold another state than this one: c{}", odd + 1);
    assert_eq!(row["errors"], json!([text]));
    assert_eq!(cluster.get(leader, "/readyz").await.status, 200);
    let page = cluster.get(leader, "/metrics").await;
    assert!(page.text().contains("mainstay_state_diverged 0\n"));
    assert!(page.text().contains("mainstay_templates 1\n"));
    cluster.stop().await;
}

/// A client that takes gzip gets the file all the same, with its length; asked for twice, by a member that
/// lives on.
#[tokio::test]
async fn a_snapshot_is_sent_as_it_is() {
    let cluster = Cluster::start(1).await;
    for n in 0..40 {
        let group = json!({"name": format!("group {n}"), "description": "x".repeat(100)});
        cluster.call(0, "POST", "/api/v1/group", group).await.body();
    }
    let plain = cluster.get(0, "/api/v1/snapshot").await;
    assert!(plain.bytes.len() > 4096);
    for _ in 0..2 {
        let request = Request::get("/api/v1/snapshot").header("accept-encoding", "gzip, deflate");
        let packed = cluster.send(0, request.body(Body::empty()).unwrap()).await;
        assert_eq!(packed.headers.get("content-encoding"), None);
        let length = packed.bytes.len().to_string();
        assert_eq!(packed.headers["content-length"], length.as_str());
        assert_eq!(packed.bytes.len(), plain.bytes.len());
    }
    cluster.stop().await;
}
