//! The wire contract, instances: from the request to the last change, requests that come twice, and
//! lists of thousands.

use crate::cluster::Cluster;
use axum::body::Body;
use futures::StreamExt as _;
use http::Request;
use serde_json::json;
use std::time::{Duration, Instant};

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
    let failed = forget.iter().find(|outcome| outcome.is_err());
    assert!(failed.is_none(), "{failed:?}");
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
