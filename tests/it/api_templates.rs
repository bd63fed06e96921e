//! The wire contract, templates: which tag is meant.

use crate::cluster::Cluster;
use serde_json::{Value, json};

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
async fn one_tag_goes_and_the_later_ones_stay() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v0", "v1", "v2", "v3"]).await;
    let tag = "/api/v1/registry/tag";
    let tags = || async {
        let shown = cluster.get(0, "/api/v1/registry/vm?id=t1").await.body();
        let versions = shown["versions"].as_array().unwrap().clone();
        let names = versions
            .iter()
            .map(|v| v["tag"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    let delete = |body: Value| cluster.call(0, "DELETE", tag, body);
    delete(json!({"id": "t1", "tag": "v1"})).await.body();
    assert_eq!(tags().await, ["v0", "v2", "v3"]);
    delete(json!({"id": "t1", "version": "0"})).await.body();
    assert_eq!(
        tags().await,
        ["v2", "v3"],
        "the first one has no followers here"
    );
    for (body, answer) in [
        (
            json!({"id": "t1"}),
            (400, "tag or number is missing: which tag shall go?"),
        ),
        (json!({"id": "t1", "tag": "v1"}), (200, "No such tag v1")),
        (json!({"id": "t9", "tag": "v1"}), (200, "Not found")),
    ] {
        let refusal = delete(body).await.refusal();
        assert_eq!((refusal.0, refusal.1.as_str()), answer);
    }
    assert_eq!(tags().await, ["v2", "v3"]);
    let vax = cluster
        .call(0, "PUT", tag, json!({"id": "t1", "arch": "vax"}))
        .await;
    assert_eq!(vax.refusal().0, 400);
    cluster.stop().await;
}
