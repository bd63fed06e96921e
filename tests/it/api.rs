//! The wire contract's conformance list against the real router, consensus and state machine.

use crate::cluster::Cluster;
use axum::body::{Body, Bytes};
use futures::StreamExt as _;
use http::{Request, StatusCode};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

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
async fn starts_that_are_refused() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    let cases = [
        (json!({"vmid": "nope"}), 200, "VM not in the registry"),
        (json!({"vmid": "t1", "tag": "v9"}), 200, "No such tag v9"),
        (json!({"vmid": "t1", "version": "9"}), 200, "No such tag 9"),
        (
            json!({"vmid": "t1", "node_id": "n9"}),
            200,
            "No such node n9",
        ),
        (
            json!({"vmid": "t1", "group_id": "g9"}),
            200,
            "No such group g9",
        ),
        (
            json!({"vmid": "t1", "disk": {"size": "9G"}}),
            200,
            "disk is not supported; leave it out",
        ),
        (json!({"tag": "v1"}), 400, "vmid is required"),
        (json!({"vmid": ["t1"]}), 400, "vmid must be a string"),
        (
            json!({"vmid": "t1", "count": 1001}),
            400,
            "count must be a whole number from 1 to 1000",
        ),
    ];
    for (body, status, text) in cases {
        let answer = cluster.call(0, "POST", "/api/v1/vm", body.clone()).await;
        assert_eq!(answer.refusal(), (status, text.to_owned()), "{body}");
    }
    assert_eq!(
        cluster.get(0, "/api/v1/vm").await.body(),
        json!([]),
        "nothing was started"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn bad_input_is_answered_and_changes_nothing() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    let huge = vec![b' '; (4 << 20) + 1];
    let cases: Vec<(&str, &str, Vec<u8>, u16, &str)> = vec![
        (
            "POST",
            "/api/v1/vm",
            b"{".to_vec(),
            400,
            "the request body is not valid JSON",
        ),
        (
            "POST",
            "/api/v1/vm",
            b"vmid=t1".to_vec(),
            400,
            "the request body is not valid JSON",
        ),
        (
            "POST",
            "/api/v1/vm",
            b"[]".to_vec(),
            400,
            "the request body must be a JSON object",
        ),
        (
            "POST",
            "/api/v1/vm",
            vec![0xff; 9],
            400,
            "the request body is not valid JSON",
        ),
        (
            "POST",
            "/api/v1/vm",
            vec![0; 9],
            400,
            "the request body is not valid JSON",
        ),
        ("POST", "/api/v1/vm", vec![], 400, "vmid is required"),
        (
            "POST",
            "/api/v1/vm",
            huge,
            413,
            "request body is larger than 4194304 bytes",
        ),
        ("PUT", "/api/v1/vm", b"{}".to_vec(), 400, "id is required"),
        (
            "PUT",
            "/api/v1/vm?id=x",
            b"{\"metadata\":3}".to_vec(),
            400,
            "metadata must be an object",
        ),
        ("PUT", "/api/v1/vm?id=x", b"{}".to_vec(), 200, "Not found"),
        (
            "DELETE",
            "/api/v1/vm",
            b"{}".to_vec(),
            400,
            "id is required",
        ),
        (
            "DELETE",
            "/api/v1/vm",
            b"{\"id\":7}".to_vec(),
            400,
            "id must be a string",
        ),
        ("DELETE", "/api/v1/vm?id=x", vec![], 200, "Not found"),
        (
            "DELETE",
            "/api/v1/node",
            b"{\"node_id\":\"x\"}".to_vec(),
            200,
            "Not found",
        ),
        (
            "DELETE",
            "/api/v1/node",
            b"{}".to_vec(),
            400,
            "node_id is required",
        ),
        (
            "POST",
            "/api/v1/node/config",
            b"{\"node_id\":\"x\"}".to_vec(),
            200,
            "Not found",
        ),
        (
            "POST",
            "/api/v1/node/config",
            b"{\"node_id\":\"x\",\"capacity_mode\":\"weight\"}".to_vec(),
            400,
            "capacity_mode must be number or resource",
        ),
        (
            "POST",
            "/api/v1/group",
            b"{}".to_vec(),
            400,
            "name is required",
        ),
        (
            "POST",
            "/api/v1/node/group",
            b"{}".to_vec(),
            400,
            "node_ids is required",
        ),
        (
            "DELETE",
            "/api/v1/registry/vm?id=x",
            vec![],
            200,
            "Not found",
        ),
        (
            "DELETE",
            "/api/v1/registry/revert",
            vec![],
            400,
            "id is required",
        ),
        (
            "DELETE",
            "/api/v1/registry/revert?id=x",
            vec![],
            200,
            "Not found",
        ),
        (
            "DELETE",
            "/api/v1/registry/revert?id=t1&tag=no",
            vec![],
            200,
            "No such tag no",
        ),
        (
            "DELETE",
            "/api/v1/registry/revert?id=t1&number=-1",
            vec![],
            400,
            "number must be a whole",
        ),
        ("PATCH", "/api/v1/vm", vec![], 405, "method not allowed"),
        ("POST", "/api/v1/status", vec![], 405, "method not allowed"),
        (
            "GET",
            "/api/v1/node/config",
            vec![],
            405,
            "method not allowed",
        ),
        (
            "BREW",
            "/api/v1/registry/revert",
            vec![],
            405,
            "method not allowed",
        ),
        (
            "GET",
            "/api/v1/vm?consistency=maybe",
            vec![],
            400,
            "consistency must be linearizable or stale",
        ),
        (
            "GET",
            "/api/v1/vm?id=%00%ff%2e%2e",
            vec![],
            200,
            "Not found",
        ),
    ];
    for (method, path, body, status, text) in cases {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::from(body))
            .unwrap();
        let (code, message) = cluster.send(0, request).await.refusal();
        assert_eq!(code, status, "{method} {path}: {message}");
        assert!(message.starts_with(text), "{method} {path}: {message}");
    }
    for path in [
        "/",
        "/api",
        "/api/v1",
        "/api/v1/nodes",
        "/api/v1/vm/",
        "/api/v1/../v1/vm",
        "/%61pi/v1/vm",
    ] {
        let answer = cluster.get(0, path).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(answer.text().trim_end(), "404 page not found", "{path}");
    }
    let templates = cluster.get(0, "/api/v1/registry/vm?id=t1").await.body();
    assert_eq!(templates["versions"].as_array().unwrap().len(), 1);
    assert_eq!(cluster.get(0, "/api/v1/vm").await.body(), json!([]));
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
async fn an_instance_from_start_to_change() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1", "v2"]).await;
    let body =
        json!({"vmid": "t1", "count": "2", "external_id": "http://ci/job/1", "unknown": {"x": 1}});
    let ids = cluster.call(0, "POST", "/api/v1/vm", body).await.body();
    assert_eq!(ids.as_array().unwrap().len(), 2);
    let id = ids[0].as_str().unwrap();
    let path = format!("/api/v1/vm?id={id}");
    let shown = cluster.get(0, &path).await.body();
    assert_eq!(
        (&shown["instance_state"], &shown["tag"]),
        (&json!("Scheduling"), &json!("v2"))
    );
    assert_eq!(
        (&shown["external_id"], &shown["arch"]),
        (&json!("http://ci/job/1"), &json!("amd64"))
    );
    assert_eq!(shown["waiting_for"], "no node has joined");
    for absent in [
        "vminfo",
        "message",
        "startup_script",
        "node_id",
        "metadata",
        "name",
        "version",
    ] {
        assert!(shown.get(absent).is_none(), "{absent}: {shown}");
    }
    let patch = json!({"metadata": {"jenkins-job-id": "7"}, "name": null});
    assert_eq!(
        cluster.call(0, "PUT", &path, patch).await.text(),
        r#"{"status":"OK","message":""}"#
    );
    let more = json!({"id": id, "metadata": {"n": 1}, "name": "renamed"});
    cluster.call(0, "PUT", "/api/v1/vm", more).await.body();
    let list = cluster.get(0, "/api/v1/vm").await.body();
    let mine = list
        .as_array()
        .unwrap()
        .iter()
        .find(|w| w["instance_id"] == id)
        .unwrap();
    assert_eq!(mine["name"], "renamed");
    assert_eq!(
        mine["vm"]["metadata"],
        json!({"jenkins-job-id": "7", "n": 1})
    );
    let stats = cluster.get(0, "/api/v1/stats").await.body();
    assert_eq!(stats["instances"], json!({"Scheduling": 2}));
    assert!(stats["tasks_per_second"].as_f64().unwrap() > 0.0);
    cluster.stop().await;
}

#[tokio::test]
async fn one_idempotency_key_is_one_request() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    let start = |key: &str| {
        Request::post("/api/v1/vm")
            .header("idempotency-key", key)
            .body(Body::from(r#"{"vmid":"t1","count":3}"#))
            .unwrap()
    };
    let first = cluster.send(0, start("a")).await.body();
    assert_eq!(cluster.send(0, start("a")).await.body(), first);
    assert_ne!(cluster.send(0, start("b")).await.body(), first);
    assert_eq!(
        cluster
            .get(0, "/api/v1/vm")
            .await
            .body()
            .as_array()
            .unwrap()
            .len(),
        6
    );
    // A retry that comes after its command was forgotten: the instances are still there.
    let noop = || mainstay_model::Command::Noop;
    let app = &cluster.members[0].app;
    let commands = mainstay_model::limits::RECENT_COMMANDS;
    let forget = futures::stream::iter((0..commands).map(|_| app.submit(noop())));
    let forget: Vec<_> = forget.buffer_unordered(1024).collect().await;
    assert!(forget.iter().all(Result::is_ok));
    assert_eq!(cluster.send(0, start("a")).await.body(), first);
    assert_eq!(
        cluster
            .get(0, "/api/v1/vm")
            .await
            .body()
            .as_array()
            .unwrap()
            .len(),
        6
    );
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

#[tokio::test]
async fn reverts_by_every_selector() {
    let cluster = Cluster::start(1).await;
    let revert = "/api/v1/registry/revert";
    let tags = || async {
        let answer = cluster.get(0, "/api/v1/registry/vm?id=t1").await;
        let versions = answer.json()["body"]["versions"].clone();
        let names = versions
            .as_array()
            .into_iter()
            .flatten()
            .map(|v| v["tag"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    cluster.template(&["v0", "v1+a:b", "v2", "v3", "v4"]).await;
    cluster
        .call(0, "DELETE", &format!("{revert}?id=t1"), Value::Null)
        .await
        .body();
    assert_eq!(tags().await, ["v0", "v1+a:b", "v2", "v3"]);
    cluster
        .call(0, "DELETE", revert, json!({"id": "t1", "version": "3"}))
        .await
        .body();
    assert_eq!(tags().await, ["v0", "v1+a:b", "v2"]);
    cluster
        .call(
            0,
            "DELETE",
            &format!("{revert}?id=t1&number=2"),
            Value::Null,
        )
        .await
        .body();
    assert_eq!(tags().await, ["v0", "v1+a:b"]);
    let plus = cluster
        .call(
            0,
            "DELETE",
            &format!("{revert}?id=t1&tag=v1+a:b"),
            Value::Null,
        )
        .await;
    assert_eq!(
        plus.refusal(),
        (200, "No such tag v1 a:b".into()),
        "a bare plus is a space"
    );
    cluster
        .call(
            0,
            "DELETE",
            &format!("{revert}?id=t1&tag=v1%2Ba%3Ab"),
            Value::Null,
        )
        .await
        .body();
    assert_eq!(tags().await, ["v0"]);
    cluster
        .call(0, "DELETE", revert, json!({"id": "t1", "number": 0}))
        .await
        .body();
    assert_eq!(
        cluster.get(0, "/api/v1/registry/vm").await.body(),
        json!([]),
        "tag 0 takes all along"
    );
    cluster.template(&["again"]).await;
    cluster
        .call(0, "DELETE", "/api/v1/registry/vm?id=t1", Value::Null)
        .await
        .body();
    assert_eq!(
        cluster.get(0, "/api/v1/registry/vm?id=t1").await.refusal(),
        (200, "Not found".into())
    );
    cluster.stop().await;
}

#[tokio::test]
async fn five_thousand_instances_are_listed_fast_and_compressed() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    for _ in 0..5 {
        cluster
            .call(
                0,
                "POST",
                "/api/v1/vm",
                json!({"vmid": "t1", "count": 1000}),
            )
            .await
            .body();
    }
    let begin = Instant::now();
    let plain = cluster.get(0, "/api/v1/vm").await;
    let request = Request::get("/api/v1/vm").header("accept-encoding", "gzip, deflate");
    let packed = cluster.send(0, request.body(Body::empty()).unwrap()).await;
    let took = begin.elapsed();
    assert_eq!(plain.body().as_array().unwrap().len(), 5000);
    assert_eq!(packed.headers["content-encoding"], "gzip");
    assert_eq!(packed.bytes[..2], [0x1f, 0x8b]);
    assert!(packed.bytes.len() * 5 < plain.bytes.len());
    assert!(took < Duration::from_secs(1), "{took:?}");
    cluster.stop().await;
}
