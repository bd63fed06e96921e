//! The wire contract, distributions: every node has its entry at once and at every member, a request is one however
//! often and wherever it is made, and what cannot be is refused whole.

use crate::cluster::Cluster;
use axum::body::Body;
use http::Request;
use mainstay_model::node::NodeSpec;
use mainstay_model::{Command, NodeId};
use serde_json::{Value, json};

const PATH: &str = "/api/v1/registry/vm/distribute";

/// Template `t1` with tags `v1` and `v2` for amd64, nodes `n1` (arm64), `a1` and `a2` (amd64), every feature on.
async fn cloud(members: u64) -> Cluster {
    let cluster = Cluster::start(members).await;
    let level = mainstay_model::feature::SUPPORTED;
    let app = &cluster.members[0].app;
    app.submit(Command::SetFeatures { level }).await.unwrap();
    cluster.template(&["v1", "v2"]).await;
    cluster.node().await;
    for id in ["a1", "a2"] {
        let spec = NodeSpec {
            name: format!("node {id}"),
            arch: "amd64".into(),
            ..NodeSpec::default()
        };
        let command = Command::RegisterNode {
            id: id.into(),
            spec: Box::new(spec),
        };
        app.submit(command).await.unwrap();
    }
    cluster
}

async fn ask(cluster: &Cluster, n: usize, body: Value) -> String {
    let accepted = cluster.call(n, "POST", PATH, body).await.body();
    assert_eq!(accepted.as_object().unwrap().len(), 1, "{accepted}");
    accepted["request_id"].as_str().unwrap().to_owned()
}

async fn look(cluster: &Cluster, n: usize, id: &str) -> Value {
    cluster.get(n, &format!("{PATH}?id={id}")).await.body()
}

fn nodes(shown: &Value) -> Vec<&str> {
    let status = shown["distribute_status"].as_object().unwrap();
    status.keys().map(String::as_str).collect()
}

/// What a node's agent would report.
async fn has(cluster: &Cluster, node: &str, numbers: &[u32]) {
    let images = numbers.iter().map(|n| ("t1".into(), *n)).collect();
    let id = NodeId::from(node);
    let command = Command::SetNodeImages { id, images };
    cluster.members[0].app.submit(command).await.unwrap();
}

#[tokio::test]
async fn every_node_has_its_entry_at_once_on_every_member() {
    let cluster = cloud(3).await;
    let none = cluster.get(0, PATH).await.body();
    assert_eq!(none, json!([]));
    has(&cluster, "a2", &[1]).await;
    let id = ask(&cluster, 1, json!({"template_id": "t1"})).await;
    for n in 0..3 {
        let shown = look(&cluster, n, &id).await;
        assert_eq!(nodes(&shown), ["a1", "a2"], "of the tag's architecture");
        let request = &shown["request"];
        assert_eq!(
            (
                &request["tag"],
                &request["version"],
                &request["template_id"]
            ),
            (&json!("v2"), &json!(1), &json!("t1"))
        );
        let status = &shown["distribute_status"];
        let waits = json!({"status": false, "progress": 0.0, "node_name": "node a1"});
        assert_eq!(status["a1"], waits);
        let done = json!({"status": true, "progress": 1.0, "node_name": "node a2"});
        assert_eq!(status["a2"], done);
        assert_eq!(shown["ended"], false);
        let listed = cluster.get(n, PATH).await.body();
        assert_eq!(listed, json!([shown]));
    }
    has(&cluster, "a1", &[0, 1]).await;
    assert_eq!(look(&cluster, 2, &id).await["ended"], true);
    // Named nodes and a group together, a node twice; another architecture if it is named.
    let group = json!({"name": "g", "description": ""});
    let group = cluster.call(0, "POST", "/api/v1/group", group).await.body();
    let group = group["id"]
        .as_str()
        .unwrap_or_else(|| group.as_str().unwrap());
    let join = json!({"node_ids": ["a1"], "group_ids": [group]});
    cluster
        .call(0, "POST", "/api/v1/node/group", join)
        .await
        .body();
    let body = json!({"template_id": "t1", "version": "0", "node_ids": ["n1", "n1"], "group_id": group, "group": "p"});
    let id = ask(&cluster, 2, body).await;
    let shown = look(&cluster, 0, &id).await;
    assert_eq!(nodes(&shown), ["a1", "n1"]);
    assert_eq!(shown["request"]["tag"], "v1");
    assert_eq!(shown["distribute_status"]["a1"]["status"], true);
    cluster.stop().await;
}

#[tokio::test]
async fn one_key_is_one_request_at_any_member_and_a_cancel_is_idempotent() {
    let cluster = cloud(3).await;
    let request = |key: &str| {
        Request::post(PATH)
            .header("idempotency-key", key)
            .body(Body::from(r#"{"template_id":"t1"}"#))
            .unwrap()
    };
    let (one, two) = tokio::join!(cluster.send(0, request("k")), cluster.send(2, request("k")));
    assert_eq!(one.body(), two.body());
    let other = cluster.send(1, request("l")).await.body();
    assert_ne!(one.body(), other);
    assert_eq!(
        cluster.get(1, PATH).await.body().as_array().unwrap().len(),
        2
    );
    let id = one.body()["request_id"].as_str().unwrap().to_owned();
    has(&cluster, "a1", &[1]).await;
    for n in [1, 2] {
        let delete = cluster.call(n, "DELETE", PATH, json!({"id": id})).await;
        assert_eq!(delete.body(), Value::Null);
    }
    let shown = look(&cluster, 0, &id).await;
    assert_eq!(shown["ended"], true);
    let status = &shown["distribute_status"];
    assert_eq!(status["a1"]["status"], true, "what is there stays");
    assert_eq!(status["a2"]["error"], "cancelled");
    assert_eq!(status["a2"]["progress"], 0.0);
    // The same request again is still the same, and stays cancelled.
    assert_eq!(cluster.send(1, request("k")).await.body(), one.body());
    assert_eq!(look(&cluster, 0, &id).await, shown);
    // The other one goes on for the node that has not fetched it, by its id in the query.
    let other = other["request_id"].as_str().unwrap();
    assert_eq!(look(&cluster, 0, other).await["ended"], false);
    let path = format!("{PATH}?id={other}");
    cluster.call(0, "DELETE", &path, Value::Null).await.body();
    assert_eq!(look(&cluster, 1, other).await["ended"], true);
    cluster.stop().await;
}

#[tokio::test]
async fn nodes_and_tags_that_go_are_not_waited_for() {
    let cluster = cloud(1).await;
    let first = ask(&cluster, 0, json!({"template_id": "t1", "tag": "v1"})).await;
    let second = ask(&cluster, 0, json!({"template_id": "t1", "tag": "v2"})).await;
    let gone = json!({"node_id": "a1"});
    cluster.call(0, "DELETE", "/api/v1/node", gone).await.body();
    // Of the latest tag only.
    let revert = "/api/v1/registry/revert?id=t1";
    cluster.call(0, "DELETE", revert, Value::Null).await.body();
    for (id, of_a2, ended) in [
        (&first, Value::Null, false),
        (&second, json!("the tag was deleted"), true),
    ] {
        let shown = look(&cluster, 0, id).await;
        let status = &shown["distribute_status"];
        assert_eq!(status["a1"]["error"], "the node was removed");
        assert_eq!(status["a2"]["error"], of_a2);
        assert_eq!(shown["ended"], ended);
    }
    let path = "/api/v1/registry/vm?id=t1";
    cluster.call(0, "DELETE", path, Value::Null).await.body();
    let shown = look(&cluster, 0, &first).await;
    assert_eq!(shown["ended"], true);
    assert_eq!(
        shown["distribute_status"]["a2"]["error"],
        "the tag was deleted"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_in_the_dialects_words() {
    let cluster = cloud(1).await;
    for (body, said) in [
        (json!({"template_id": "none"}), "VM not in the registry"),
        (json!({"template_id": "t1", "tag": "v9"}), "No such tag v9"),
        (json!({"template_id": "t1", "version": 9}), "No such tag 9"),
        (
            json!({"template_id": "t1", "node_ids": ["a1", "x"]}),
            "No such node x",
        ),
        (
            json!({"template_id": "t1", "group_id": "x"}),
            "No such group x",
        ),
    ] {
        let answer = cluster.call(0, "POST", PATH, body).await;
        assert_eq!(answer.refusal(), (200, said.to_owned()));
    }
    for body in [
        json!({"tag": "v1"}),
        json!({"template_id": "t1", "node_ids": "a1"}),
        json!({"template_id": "t1", "node_ids": [7]}),
    ] {
        let answer = cluster.call(0, "POST", PATH, body).await;
        assert_eq!(answer.refusal().0, 400);
    }
    for method in ["GET", "DELETE"] {
        let path = format!("{PATH}?id=none");
        let answer = cluster.call(0, method, &path, Value::Null).await;
        assert_eq!(answer.refusal(), (200, "Not found".to_owned()));
    }
    assert_eq!(
        cluster.get(0, PATH).await.body(),
        json!([]),
        "nothing came of it"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn before_every_member_knows_of_it_nothing_is_asked_of_nodes() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    let answer = cluster
        .call(0, "POST", PATH, json!({"template_id": "t1"}))
        .await;
    let (_, why) = answer.refusal();
    assert!(why.contains("feature level 11"), "{why}");
    assert_eq!(cluster.get(0, PATH).await.body(), json!([]));
    cluster.stop().await;
}

#[tokio::test]
async fn a_template_is_removed_from_the_nodes_that_have_it() {
    let cluster = cloud(3).await;
    has(&cluster, "a1", &[0, 1]).await;
    has(&cluster, "n1", &[1]).await;
    let path = "/api/v1/registry/vm/remove";
    let waits = ask(
        &cluster,
        0,
        json!({"template_id": "t1", "node_ids": ["a2"]}),
    )
    .await;
    let remove = async |n: usize, body: Value| cluster.call(n, "DELETE", path, body).await;
    // Named ones only; one that was to fetch it need not.
    let some = remove(0, json!({"id": "t1", "node_ids": ["n1"]})).await;
    let one = json!({"requests_sent": 1, "node_ids": ["n1"]});
    assert_eq!(some.body(), one);
    let request = || {
        Request::delete(format!("{path}?id=t1"))
            .header("idempotency-key", "k")
            .body(Body::empty())
            .unwrap()
    };
    let all = cluster.send(1, request()).await.body();
    let three = json!({"requests_sent": 3, "node_ids": ["a1", "a2", "n1"]});
    assert_eq!(all, three);
    let shown = look(&cluster, 2, &waits).await;
    let why = &shown["distribute_status"]["a2"]["error"];
    assert_eq!(why, "the template was removed from the node");
    // They have done it; a retry gets its first answer all the same, a new request has nobody to ask.
    for node in ["a1", "n1"] {
        has(&cluster, node, &[]).await;
    }
    assert_eq!(cluster.send(2, request()).await.body(), three);
    let none = json!({"requests_sent": 0, "node_ids": []});
    assert_eq!(remove(2, json!({"id": "t1"})).await.body(), none);
    for (body, said) in [
        (json!({"id": "none"}), "Not found"),
        (json!({"id": "t1", "node_ids": ["x"]}), "No such node x"),
    ] {
        assert_eq!(remove(0, body).await.refusal(), (200, said.to_owned()));
    }
    for body in [json!({}), json!({"id": "t1", "node_ids": [1]})] {
        assert_eq!(remove(0, body).await.refusal().0, 400);
    }
    cluster.stop().await;
}
