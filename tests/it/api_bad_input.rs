//! The wire contract, what is refused: in which words, with which status, and with nothing changed.

use crate::cluster::Cluster;
use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::json;

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
