//! The OCI interface at its bounds: full states and disks, members that are away or stuck, clients that
//! stand still.

use super::oci::{IMAGE, ask, digest, get, post_blob, put_image, trickle};
use super::*;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use futures::StreamExt;
use futures::future::join_all;
use mainstay_agent::transfer::api::SCRUB;
use mainstay_model::artifact::{ArtifactContent, Blob};
use mainstay_model::command::ArtifactPut;
use mainstay_model::ids::{Digest, Sha256};
use mainstay_model::limits;
use serde_json::{Value, json};
use sha2::Digest as _;
use std::sync::atomic::AtomicUsize;
use tokio::sync::Barrier;

const DOCKER: &str = "application/vnd.docker.distribution.manifest.v2+json";

fn sha(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}

/// Puts artifacts of the largest kind until the state takes no more.
fn fill(cluster: &Cluster) {
    let mut state = cluster.shared.state.lock();
    for number in 0_u32.. {
        let mut name = [7; 32];
        name[..4].copy_from_slice(&number.to_be_bytes());
        let blob = Blob {
            digest: Sha256(name),
            size: 1,
        };
        let content = ArtifactContent {
            digest: Sha256(name),
            size: 1,
            media_type: IMAGE.to_owned(),
            artifact_type: String::new(),
            subject: None,
            blobs: vec![blob; limits::ARTIFACT_BLOBS],
            bundle: Digest(name),
        };
        let put = ArtifactPut {
            repository: "others".to_owned(),
            tags: Vec::new(),
            content,
            template: None,
            holder: MemberId(9),
            copies_needed: 9,
            voters: BTreeSet::new(),
        };
        let outcome = state.apply(&Envelope {
            id: crate::stamp::command_id(),
            stamp_ms: 1,
            command: Command::PutArtifact { put: Box::new(put) },
        });
        if matches!(outcome, Outcome::Refused(_)) {
            return;
        }
    }
}

#[tokio::test]
async fn a_cluster_with_too_many_artifacts_says_so() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, false).await;
    fill(&cluster);
    // A little may fit still.
    let mut answers = Vec::new();
    for n in 0..80 {
        let layer = noise(n, 1000);
        post_blob(&member, "a", &layer, &digest(&layer)).await;
        answers.push(put_image(&member, "a", &layer).await);
    }
    let (status, text) = answers.pop().unwrap();
    assert_eq!(status, 409, "{text}");
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(error["errors"][0]["code"], "DENIED");
    assert!(text.contains("delete manifests"), "{text}");
    // Blobs are files, not state.
    assert_eq!(post_blob(&member, "a", b"x", &digest(b"x")).await, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_one_member_renews_the_blob_of_another() {
    let cluster = Cluster::of_artifacts(2).await;
    let members = cluster.serve_all().await;
    let layer = noise(1, 70_000);
    let posted = post_blob(&members[1], "a", &layer, &digest(&layer)).await;
    assert_eq!(posted, 201);
    // A day is nearly over.
    let (names, hour) = (&members[1].service.names, 3_600_000);
    let entry = names.get("a", &sha(&layer)).unwrap();
    let seen_ms = entry.seen_ms - 23 * hour;
    let old = mainstay_storage::blobs::BlobEntry { seen_ms, ..entry };
    names.put("a", sha(&layer), old).unwrap();
    let path = format!("/v2/a/blobs/{}", digest(&layer));
    let head = ask(&members[0], "HEAD", &path, Body::empty()).await;
    assert_eq!(head.status(), 200);
    assert_eq!(names.expire(entry.seen_ms - hour).unwrap(), 0, "forgotten");
    assert_eq!(put_image(&members[0], "a", &layer).await.0, 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_is_deleted_when_every_member_has_said_so() {
    let cluster = Cluster::of_artifacts(3).await;
    let mut members = cluster.serve_all().await;
    let layer = noise(1, 70_000);
    for member in [&members[1], &members[2]] {
        assert_eq!(post_blob(member, "a", &layer, &digest(&layer)).await, 201);
    }
    let path = format!("/v2/a/blobs/{}", digest(&layer));
    drop(members.pop());
    let refused = ask(&members[0], "DELETE", &path, Body::empty()).await;
    assert_eq!(refused.status(), 503);
    let text = axum::body::to_bytes(refused.into_body(), 10_000).await;
    let text = String::from_utf8(text.unwrap().to_vec()).unwrap();
    assert!(
        text.contains("UNAVAILABLE") && text.contains("c3"),
        "{text}"
    );
    members.push(cluster.serve(3, true).await);
    assert_eq!(get(&members[0], &path).await.0, 200, "as was said");
    let deleted = ask(&members[0], "DELETE", &path, Body::empty()).await;
    assert_eq!(deleted.status(), 202);
    for member in &members {
        assert_eq!(get(member, &path).await.0, 404);
    }
    let again = ask(&members[0], "DELETE", &path, Body::empty()).await;
    assert_eq!(again.status(), 404);
}

/// How far an upload is.
async fn range(member: &TestMember, location: &str) -> String {
    let status = ask(member, "GET", location, Body::empty()).await;
    assert_eq!(status.status(), 204);
    status.headers()["range"].to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_fails_for_want_of_room_leaves_its_upload_as_it_was() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, false).await;
    let full = |is: bool| {
        let mut full = cluster.shared.full.lock();
        if is {
            full.insert(1)
        } else {
            full.remove(&1)
        };
    };
    // Where the first PATCH ends: inside a chunk, or behind one; and what is left for the close.
    for (seed, first, rest) in [
        (1, 100_000, 50_000),
        (2, 65_536, 0),
        (3, 9_000_000, 9_000_000),
    ] {
        let bytes = noise(seed, first + rest);
        let begun = ask(&member, "POST", "/v2/a/blobs/uploads/", Body::empty()).await;
        let location = begun.headers()["location"].to_str().unwrap().to_owned();
        let (head, tail) = (bytes[..first].to_vec(), bytes[first..].to_vec());
        full(true);
        let refused = ask(&member, "PATCH", &location, head.clone().into()).await;
        assert_eq!(refused.status(), 507);
        assert_eq!(range(&member, &location).await, "0-0");
        full(false);
        let taken = ask(&member, "PATCH", &location, head.into()).await;
        assert_eq!(taken.status(), 202);
        let close = format!("{location}?digest={}", digest(&bytes));
        // No room for the bytes; then none for the name.
        full(true);
        let refused = ask(&member, "PUT", &close, tail.clone().into()).await;
        assert_eq!(refused.status(), 507);
        full(false);
        let dir = cluster.dir.path().join("blobs-1");
        let away = cluster.dir.path().join("away");
        std::fs::rename(&dir, &away).unwrap();
        let refused = ask(&member, "PUT", &close, tail.clone().into()).await;
        assert_eq!(refused.status(), 507);
        std::fs::rename(&away, &dir).unwrap();
        let at = format!("0-{}", first - 1);
        assert_eq!(range(&member, &location).await, at);
        // The very same request again.
        let closed = ask(&member, "PUT", &close, tail.into()).await;
        assert_eq!(closed.status(), 201, "{first} + {rest}");
        let path = format!("/v2/a/blobs/{}", digest(&bytes));
        assert!(get(&member, &path).await == (200, bytes));
    }
}

#[tokio::test]
async fn a_manifest_is_one_kind_of_thing() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, true).await;
    assert_eq!(post_blob(&member, "a", b"{}", &digest(b"{}")).await, 201);
    let config = json!({"mediaType": "x/y", "digest": digest(b"{}"), "size": 2});
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
    let put = async |tag: &str, kind: &str| {
        let url = format!("{}/v2/a/manifests/{tag}", member.url);
        let request = client().put(url).header("content-type", kind);
        let answer = request.body(manifest.clone()).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert_eq!(put("v1", IMAGE).await.0, 201);
    let (status, text) = put("v2", DOCKER).await;
    assert_eq!(status, 400, "{text}");
    assert!(
        text.contains("MANIFEST_INVALID") && text.contains(IMAGE),
        "{text}"
    );
    assert_eq!(get(&member, "/v2/a/manifests/v2").await.0, 404);
    assert_eq!(put("v2", IMAGE).await.0, 201);
    // In another repository it may be the other, and after it was deleted.
    let of = format!("/v2/a/manifests/{}", digest(manifest.as_bytes()));
    assert_eq!(
        ask(&member, "DELETE", &of, Body::empty()).await.status(),
        202
    );
    assert_eq!(put("v2", DOCKER).await.0, 201);
}

/// An upload that member 2 has, so its name says.
const ELSEWHERE: &str = "/v2/a/blobs/uploads/6ba7b810-9dad-41d1-80b4-00c04fd430c8-0000000000000002";

#[tokio::test(start_paused = true)]
async fn a_body_that_is_passed_on_to_a_stuck_member_is_given_up() {
    let cluster = Cluster::of_artifacts(2).await;
    let member = cluster.serve(1, false).await;
    // Accepts, and never reads.
    let stuck = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", stuck.local_addr().unwrap());
    cluster.shared.urls.lock().insert(MemberId(2), url);
    for body in [Body::from(vec![7; 64 << 20]), Body::from("short")] {
        let before = tokio::time::Instant::now();
        let refused = ask(&member, "PATCH", ELSEWHERE, body).await;
        assert_eq!(refused.status(), 503);
        let took = before.elapsed();
        assert!(took < Duration::from_secs(140), "{took:?}");
    }
}

/// Ten minutes for a body is no matter while it moves.
#[tokio::test(start_paused = true)]
async fn a_body_that_is_passed_on_takes_as_long_as_it_moves() {
    let cluster = Cluster::of_artifacts(2).await;
    let member = cluster.serve(1, false).await;
    let owner = Router::new().fallback(async |body: Body| {
        let bytes = axum::body::to_bytes(body, 1000).await.unwrap();
        (http::StatusCode::ACCEPTED, bytes)
    });
    let (url, _task) = serve_router(owner).await;
    cluster.shared.urls.lock().insert(MemberId(2), url);
    let pieces = trickle(Duration::from_secs(60)).into_data_stream().take(10);
    let before = tokio::time::Instant::now();
    let taken = ask(&member, "PATCH", ELSEWHERE, Body::from_stream(pieces)).await;
    assert_eq!(taken.status(), 202);
    assert!(before.elapsed() >= Duration::from_secs(600));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_of_a_manifest_are_looked_for_side_by_side() {
    let cluster = Cluster::of_artifacts(2).await;
    let members = cluster.serve_all().await;
    // Each question waits until another one is open.
    let pair = Arc::new(Barrier::new(2));
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    let wait = move |request: Request, next: Next| {
        let (pair, open, seen) = (Arc::clone(&pair), Arc::clone(&open), Arc::clone(&seen));
        async move {
            let asks = request.uri().path() == "/registry/mainstay/v1/blob";
            if asks {
                let now = open.fetch_add(1, Ordering::Relaxed) + 1;
                seen.fetch_max(now, Ordering::Relaxed);
                pair.wait().await;
            }
            let answer = next.run(request).await;
            if asks {
                open.fetch_sub(1, Ordering::Relaxed);
            }
            answer
        }
    };
    let router = peer_router(Arc::clone(&members[1].service)).layer(from_fn(wait));
    let (url, _task) = serve_router(router).await;
    cluster.shared.urls.lock().insert(MemberId(2), url);
    let mut layers = Vec::new();
    for n in 0..40_u8 {
        let bytes = [n; 10];
        let pushed = post_blob(&members[1], "a", &bytes, &digest(&bytes)).await;
        assert_eq!(pushed, 201);
        layers.push(json!({"mediaType": "x/z", "digest": digest(&bytes), "size": 10}));
    }
    let config = layers.pop();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": IMAGE, "config": config, "layers": layers,
    });
    let path = "/v2/a/manifests/v1";
    let put = ask(&members[0], "PUT", path, manifest.to_string().into()).await;
    assert_eq!(put.status(), 201);
    let most = most.load(Ordering::Relaxed);
    assert!((2..=16).contains(&most), "{most} at once");
}

/// These bytes, and then nothing for ever.
fn stalls(bytes: Vec<u8>) -> Body {
    let first = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from(bytes))]);
    Body::from_stream(first.chain(futures::stream::pending()))
}

#[tokio::test(start_paused = true)]
async fn bodies_that_stand_still_hold_nobody_up() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, false).await;
    let still = async |bytes: usize| {
        let begun = ask(&member, "POST", "/v2/a/blobs/uploads/", Body::empty()).await;
        let location = begun.headers()["location"].to_str().unwrap().to_owned();
        let before = tokio::time::Instant::now();
        let answer = ask(&member, "PATCH", &location, stalls(vec![7; bytes])).await;
        assert_eq!(answer.status(), 408);
        let took = before.elapsed();
        assert!(took < Duration::from_secs(60), "{took:?}");
        assert_eq!(range(&member, &location).await, format!("0-{}", bytes - 1));
    };
    let crowd = join_all((0..100).map(|n| still(1 + n * 1000)));
    let push = async {
        tokio::time::sleep(Duration::from_secs(11)).await;
        let before = tokio::time::Instant::now();
        let layer = noise(1, 100_000);
        let path = format!("/v2/a/blobs/uploads/?digest={}", digest(&layer));
        let pushed = ask(&member, "POST", &path, layer.into()).await;
        assert_eq!(pushed.status(), 201);
        let took = before.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
    };
    tokio::join!(crowd, push);
}

#[tokio::test(start_paused = true)]
async fn manifests_together_take_no_more_memory_than_that() {
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, false).await;
    let put = async |body: Body| {
        let answer = ask(&member, "PUT", "/v2/a/manifests/v1", body).await;
        answer.status().as_u16()
    };
    let long = vec![b' '; (4 << 20) - 1];
    // Whatever these come to, what they sent is all there is room for.
    let crowd = join_all((0..16).map(|_| put(stalls(long.clone()))));
    let one_more = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(put(long.clone().into()).await, 429);
    };
    let (answers, ()) = tokio::join!(crowd, one_more);
    assert_eq!(answers, [408; 16]);
    // Those that send nothing at all hold nothing.
    let silent = join_all((0..100).map(|_| put(trickle(Duration::from_secs(3600)))));
    let next = put(long.clone().into());
    let (answers, next) = tokio::join!(silent, next);
    assert_eq!(answers, [408; 100]);
    assert_eq!(next, 400, "read, and no manifest");
}

#[tokio::test]
async fn names_that_cannot_be_read_are_shown() {
    let cluster = Cluster::of_artifacts(1).await;
    let dir = cluster.dir.path().join("blobs-1");
    std::fs::create_dir_all(&dir).unwrap();
    let mut later = b"MSTBLOB\0".to_vec();
    later.extend_from_slice(&9_u32.to_le_bytes());
    std::fs::write(dir.join("later"), &later).unwrap();
    std::fs::write(dir.join("torn"), b"MSTB").unwrap();
    let member = cluster.serve(1, false).await;
    let (status, shown) = get(&member, SCRUB).await;
    let shown = String::from_utf8(shown).unwrap();
    assert_eq!(status, 200);
    for what in ["blobs/later: of format 9", "blobs/torn.damaged: damaged"] {
        assert!(shown.contains(what), "{shown}");
    }
    assert_eq!(std::fs::read(dir.join("later")).unwrap(), later);
}
