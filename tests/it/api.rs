//! The wire contract against the real router, consensus and state machine: what is asked of the cloud as a
//! whole, of nodes and groups, and bodies as real clients send them. Instances, templates and bad input:
//! the files beside this one.

use crate::cluster::Cluster;
use axum::body::{Body, Bytes};
use http::{Request, StatusCode};
use serde_json::{Value, json};

#[tokio::test]
async fn an_empty_cloud() {
    let cluster = Cluster::start(1).await;
    for list in [
        "vm",
        "node",
        "group",
        "image",
        "registry/vm",
        "registry/vm?apiVer=v1",
    ] {
        let answer = cluster.get(0, &format!("/api/v1/{list}")).await;
        assert_eq!(
            answer.text(),
            r#"{"status":"OK","message":"","body":[]}"#,
            "{list}"
        );
        assert_eq!(answer.headers["content-type"], "application/json");
    }
    for by_id in [
        "vm?id=x",
        "node?id=x",
        "group?id=x",
        "image?id=x",
        "registry/vm?id=x",
    ] {
        let answer = cluster.get(0, &format!("/api/v1/{by_id}")).await;
        assert_eq!(
            answer.text(),
            r#"{"status":"FAIL","message":"Not found"}"#,
            "{by_id}"
        );
        assert_eq!(answer.status, StatusCode::OK);
    }
    let auth = cluster.get(0, "/config/v1/auth").await;
    assert_eq!(auth.text(), r#"{"status":"OK","message":"","body":{}}"#);
    for probe in ["/livez", "/readyz"] {
        assert_eq!(cluster.get(0, probe).await.status, StatusCode::OK);
    }
    let disk = cluster.get(0, "/api/v1/registry/disk").await;
    assert_eq!(
        disk.text(),
        r#"{"status":"OK","message":"","body":{"free":40,"total":100}}"#
    );
    let stats = cluster.get(0, "/api/v1/stats").await.body();
    let expected = json!({
        "average_queue_time": 0.0, "tasks_per_second": 0.0, "instances": {}, "nodes": 0, "templates": 0,
        "chunks": 3, "chunk_bytes": 30,
    });
    assert_eq!(stats, expected);
    cluster.stop().await;
}

#[tokio::test]
async fn status_and_double_slashes() {
    let cluster = Cluster::start(1).await;
    let body = json!({
        "status": "Running", "version": "0.1.0-abcdef12", "registry_address": "http://c1:8089",
        "registry_status": "Running", "license": "enterprise plus",
    });
    for path in [
        "/api/v1/status",
        "//api/v1/status",
        "//api//v1///status?x=//",
    ] {
        let answer = cluster.get(0, path).await;
        assert_eq!(answer.body(), body, "{path}");
        assert_eq!(answer.headers["cache-control"], "no-store");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn bodies_as_real_clients_send_them() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    let post = |kind: Option<&str>, body: Body| {
        let request = Request::post("/api/v1/vm");
        match kind {
            Some(kind) => request.header("content-type", kind).body(body).unwrap(),
            None => request.body(body).unwrap(),
        }
    };
    let latin1 = b"{\"vmid\":\"t1\",\"name\":\"caf\xe9\"}".to_vec();
    for kind in [
        None,
        Some("application/x-www-form-urlencoded"),
        Some("text/plain; charset=x"),
    ] {
        let ids = cluster
            .send(0, post(kind, Body::from(latin1.clone())))
            .await
            .body();
        assert_eq!(ids.as_array().unwrap().len(), 1);
    }
    let list = cluster.get(0, "/api/v1/vm").await.body();
    assert_eq!(list[0]["name"], "caf\u{fffd}");
    // DELETE with a chunked body: two frames, no length.
    let id = list[0]["instance_id"].as_str().unwrap();
    let (a, b) = (
        Bytes::from_static(b"{\"id\":\""),
        Bytes::from(format!("{id}\"}}")),
    );
    let chunks = futures::stream::iter([a, b].map(Ok::<_, std::io::Error>));
    let request = Request::delete("/api/v1/vm")
        .body(Body::from_stream(chunks))
        .unwrap();
    assert_eq!(
        cluster.send(0, request).await.text(),
        r#"{"status":"OK","message":""}"#
    );
    let path = format!("/api/v1/vm?id={id}");
    assert_eq!(
        cluster.get(0, &path).await.body()["instance_state"],
        "Terminating"
    );
    // Again: idempotent; and by query.
    let again = cluster.call(0, "DELETE", &path, Value::Null).await;
    assert_eq!(again.body(), Value::Null);
    cluster.stop().await;
}

#[tokio::test]
async fn nodes_and_groups() {
    let cluster = Cluster::start(1).await;
    cluster.node().await;
    let node = || async { cluster.get(0, "/api/v1/node?id=n1").await.body() };
    let shown = node().await;
    assert_eq!(shown.as_array().unwrap().len(), 1, "an array with one node");
    assert_eq!(
        (&shown[0]["state"], &shown[0]["host_arch"]),
        (&json!("Active"), &json!("arm64"))
    );
    assert_eq!(
        (&shown[0]["groups"], &shown[0]["templates"]),
        (&json!([]), &json!([]))
    );
    let config = json!({"node_id": "n1", "drain_mode": true, "max_vm_count": "5", "host": "ci.example",
        "capacity_mode": "resource", "disable_central_logging": true});
    assert_eq!(
        cluster
            .call(0, "POST", "/api/v1/node/config", config)
            .await
            .body(),
        Value::Null
    );
    let shown = node().await;
    assert_eq!(
        (&shown[0]["state"], &shown[0]["capacity"]),
        (&json!("Drain Mode"), &json!(5))
    );
    assert_eq!(
        (&shown[0]["ip_address"], &shown[0]["capacity_mode"]),
        (&json!("ci.example"), &json!("resource"))
    );

    let made = cluster
        .call(0, "POST", "/api/v1/group", json!({"name": "ios"}))
        .await
        .body();
    let id = made["id"].as_str().unwrap();
    let expected = json!({"id": id, "name": "ios", "description": "", "fallback_group_id": null});
    assert_eq!(made, expected);
    assert_eq!(
        cluster.get(0, "/api/v1/group").await.body(),
        json!([expected])
    );
    let join = json!({"group_ids": [id], "node_ids": ["n1"]});
    cluster
        .call(0, "POST", "/api/v1/node/group", join.clone())
        .await
        .body();
    assert_eq!(node().await[0]["groups"], json!([expected]));
    let path = format!("/api/v1/group?id={id}");
    cluster
        .call(0, "PUT", &path, json!({"description": "phones"}))
        .await
        .body();
    assert_eq!(cluster.get(0, &path).await.body()["description"], "phones");
    let clear = json!({"description": ""});
    cluster.call(0, "PUT", &path, clear).await.body();
    assert_eq!(cluster.get(0, &path).await.body(), expected);
    cluster
        .call(0, "DELETE", "/api/v1/node/group", join)
        .await
        .body();
    assert_eq!(node().await[0]["groups"], json!([]));
    cluster.call(0, "DELETE", &path, Value::Null).await.body();
    assert_eq!(cluster.get(0, "/api/v1/group").await.body(), json!([]));

    cluster
        .call(0, "DELETE", "/api/v1/node", json!({"node_id": "n1"}))
        .await
        .body();
    assert_eq!(
        cluster.get(0, "/api/v1/node?id=n1").await.refusal(),
        (200, "Not found".into())
    );
    cluster.stop().await;
}
