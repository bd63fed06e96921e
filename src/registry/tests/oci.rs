//! The OCI interface inside one process: what a client cannot see, and members that lie.

use super::*;
use crate::registry::oci::ingest::Ingest;
use futures::FutureExt;
use mainstay_model::feature;
use serde_json::{Value, json};
use sha2::Digest as _;

pub(super) const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";

pub(super) fn digest(bytes: &[u8]) -> String {
    let hash: [u8; 32] = sha2::Sha256::digest(bytes).into();
    format!("sha256:{}", hex::encode(hash))
}

impl Cluster {
    /// With everything switched on.
    pub(super) async fn of_artifacts(size: u64) -> Self {
        let cluster = Self::new(size);
        let level = feature::SUPPORTED;
        let catalog = Fake(Arc::clone(&cluster.shared));
        let on = catalog.submit(crate::stamp::command_id(), Command::SetFeatures { level });
        on.await.unwrap();
        cluster
    }
}

pub(super) async fn post_blob(member: &TestMember, name: &str, bytes: &[u8], digest: &str) -> u16 {
    let url = format!("{}/v2/{name}/blobs/uploads/?digest={digest}", member.url);
    let request = client().post(url).body(bytes.to_vec());
    request.send().await.unwrap().status().as_u16()
}

pub(super) async fn put_image(member: &TestMember, name: &str, layer: &[u8]) -> (u16, String) {
    let config = digest(b"{}");
    assert_eq!(post_blob(member, name, b"{}", &config).await, 201);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": IMAGE,
        "config": {"mediaType": "x/y", "digest": config, "size": 2},
        "layers": [{"mediaType": "x/z", "digest": digest(layer), "size": layer.len()}],
    });
    let request = client()
        .put(format!("{}/v2/{name}/manifests/v1", member.url))
        .header("content-type", IMAGE)
        .body(manifest.to_string());
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

pub(super) async fn get(member: &TestMember, path: &str) -> (u16, Vec<u8>) {
    let url = format!("{}{path}", member.url);
    let answer = client().get(url).send().await.unwrap();
    let status = answer.status().as_u16();
    (
        status,
        answer
            .bytes()
            .await
            .map_or_else(|_| Vec::new(), |b| b.to_vec()),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_waits_for_a_majority_and_the_last_member_copies_later() {
    let cluster = Cluster::of_artifacts(3).await;
    let first = cluster.serve(1, true).await;
    let layer = noise(1, 3 << 20);
    assert_eq!(post_blob(&first, "a/b", &layer, &digest(&layer)).await, 201);
    let held = |cluster: &Cluster| {
        let state = cluster.shared.state.lock();
        let artifacts = state.repositories.get("a/b").map(|r| &r.artifacts);
        let first = artifacts.and_then(|a| a.values().next());
        first.map_or(0, |a| a.holders.len())
    };
    let put = put_image(&first, "a/b", &layer);
    tokio::pin!(put);
    let alone = async {
        eventually("it is committed", || held(&cluster) == 1).await;
    };
    tokio::select! {
        answer = &mut put => panic!("answered with one copy: {answer:?}"),
        () = alone => {}
    }
    assert_eq!(get(&first, "/v2/a/b/manifests/v1").await.0, 404);
    let _second = cluster.serve(2, true).await;
    assert_eq!(put.await.0, 201);
    // The third serves what it does not have, verified, and comes to hold it.
    let third = cluster.serve(3, false).await;
    let path = format!("/v2/a/b/blobs/{}", digest(&layer));
    assert!(get(&third, &path).await == (200, layer.clone()));
    drop(third);
    let third = cluster.serve(3, true).await;
    eventually("all hold it", || held(&cluster) == 3).await;
    assert_eq!(get(&third, "/v2/a/b/manifests/v1").await.0, 200);
}

#[tokio::test]
async fn a_full_member_refuses_before_and_while_it_takes() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, true).await;
    cluster.shared.full.lock().insert(1);
    let layer = noise(1, 100_000);
    assert_eq!(post_blob(&member, "a", &layer, &digest(&layer)).await, 507);
    cluster.shared.full.lock().clear();
    assert_eq!(post_blob(&member, "a", &layer, &digest(&layer)).await, 201);
}

/// An older release is among the members.
#[tokio::test]
async fn nothing_is_taken_before_all_know_artifacts() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    assert_eq!(post_blob(&member, "a", b"x", &digest(b"x")).await, 405);
    assert!(member.service.chunks().stats().chunks == 0);
}

#[tokio::test]
async fn wrong_bytes_leave_no_name() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, true).await;
    let layer = noise(1, 100_000);
    assert_eq!(post_blob(&member, "a", &layer, &digest(b"x")).await, 400);
    assert_eq!(cluster.names(1), 0);
    assert_eq!(post_blob(&member, "a", &layer, &digest(&layer)).await, 201);
    assert_eq!(cluster.names(1), 1);
}

impl Cluster {
    /// Files in a member's directory of blob names.
    fn names(&self, id: u64) -> usize {
        let dir = self.dir.path().join(format!("blobs-{id}"));
        std::fs::read_dir(dir).unwrap().count()
    }
}

/// What a member says of a blob that it alone knows is checked by its SHA-256.
#[tokio::test]
async fn a_member_that_lies_about_a_blob_is_not_believed() {
    let cluster = Cluster::of_artifacts(2).await;
    let honest = cluster.serve(1, false).await;
    let liar = cluster.serve(2, false).await;
    let (layer, other) = (noise(1, 70_000), noise(2, 70_000));
    assert_eq!(post_blob(&liar, "a", &other, &digest(&other)).await, 201);
    let service = &liar.service;
    let known = |bytes: &[u8]| -> [u8; 32] { sha2::Sha256::digest(bytes).into() };
    let entry = service.names.get("a", &known(&other)).unwrap();
    // A description that calls the other bytes by this digest.
    let description = service.chunks.get(&entry.chunk).unwrap().unwrap();
    let description = String::from_utf8(description.to_vec()).unwrap();
    let bent = description.replace(&digest(&other)[7..], &digest(&layer)[7..]);
    let record = mainstay_storage::chunks::Record::encode(bent.as_bytes()).unwrap();
    let chunk = record.id;
    service.chunks.put(vec![record]).unwrap();
    let bent = mainstay_storage::blobs::BlobEntry { chunk, ..entry };
    service.names.put("a", known(&layer), bent).unwrap();

    let (status, text) = put_image(&honest, "a", &layer).await;
    assert_eq!(status, 404, "{text}");
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(error["errors"][0]["code"], "MANIFEST_BLOB_UNKNOWN");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_healed_while_a_blob_is_read() {
    let cluster = Cluster::of_artifacts(2).await;
    let members = cluster.serve_all().await;
    let layer = noise(1, 2 << 20);
    assert_eq!(
        post_blob(&members[0], "a", &layer, &digest(&layer)).await,
        201
    );
    assert_eq!(put_image(&members[0], "a", &layer).await.0, 201);
    eventually("both hold it", || {
        let state = cluster.shared.state.lock();
        let mut artifacts = state.repositories["a"].artifacts.values();
        artifacts.all(|a| a.holders.len() == 2)
    })
    .await;
    let damaged = mainstay_storage::chunks::ChunkId::of(&layer[65536..131_072]);
    super::collect::spoil(&cluster, 2, &[damaged.0]);
    let path = format!("/v2/a/blobs/{}", digest(&layer));
    assert!(get(&members[1], &path).await == (200, layer.clone()));
    assert!(members[1].service.chunks().contains(&damaged));
}

/// One request without a socket, so that time can be the test's.
pub(super) async fn ask(
    member: &TestMember,
    method: &str,
    path: &str,
    body: axum::body::Body,
) -> http::Response<axum::body::Body> {
    let request = http::Request::builder().method(method).uri(path).body(body);
    let router = registry_router(Arc::clone(&member.service));
    tower::ServiceExt::oneshot(router, request.unwrap())
        .await
        .unwrap()
}

/// A byte each `pause`, for ever.
pub(super) fn trickle(pause: Duration) -> axum::body::Body {
    let bytes = futures::stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok::<_, std::io::Error>(bytes::Bytes::from_static(b"x")), ()))
    });
    axum::body::Body::from_stream(bytes)
}

#[tokio::test(start_paused = true)]
async fn a_slow_body_is_given_up_and_what_came_is_kept() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, false).await;
    let empty = axum::body::Body::empty;
    for pause in [Duration::from_secs(1), Duration::from_secs(3600)] {
        let begun = ask(&member, "POST", "/v2/a/blobs/uploads/", empty()).await;
        let location = begun.headers()["location"].to_str().unwrap().to_owned();
        let before = tokio::time::Instant::now();
        let slow = ask(&member, "PATCH", &location, trickle(pause)).await;
        assert_eq!(slow.status(), 408);
        let took = before.elapsed();
        assert!(took < Duration::from_secs(100), "{took:?}");
        let status = ask(&member, "GET", &location, empty()).await;
        assert_eq!(status.status(), 204);
        let came = if pause.as_secs() == 1 { "0-59" } else { "0-0" };
        assert_eq!(status.headers()["range"], came);
    }
    let slow = ask(
        &member,
        "PUT",
        "/v2/a/manifests/v1",
        trickle(Duration::from_secs(1)),
    )
    .await;
    assert_eq!(slow.status(), 408);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_close_was_cut_off_takes_no_more_and_can_be_closed() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, false).await;
    let bytes = noise(7, 100 << 10);
    let mut ingest = Ingest::default();
    for piece in [&bytes[..70_000], &bytes[70_000..]] {
        ingest.append(&member.service, piece).await.unwrap();
        ingest.pause(&member.service).await.unwrap();
    }
    // Its client goes away while the short last chunk is stored.
    let closed = ingest.finish(&member.service).now_or_never();
    assert!(closed.is_none(), "closed without a wait");
    let more = ingest.append(&member.service, b"more").await;
    assert!(more.is_err(), "a short chunk would lie in the middle");
    let (found, file) = ingest.finish(&member.service).await.unwrap();
    assert_eq!(found.to_string(), digest(&bytes));
    assert_eq!((file.size, file.segments.len()), (100 << 10, 1));
}
