//! What a client may get wrong, or try: each row of the table in docs/oci.md as the bytes of a request to
//! a real member, and its answer. Afterwards the disks hold what they held before, and nothing else.

use super::{Client, IMAGE, INDEX, digest, noise};
use crate::cluster::{Cluster, until};
use crate::gc::{asked, pack_files};
use crate::{rounds, turn};
use mainstay_agent::transfer::api::{Collection, CollectionStatus, GC};
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

const NAME: &str = "bad/input";
const DOCUMENTED: &str = include_str!("../../../docs/oci.md");

/// One row: what is sent, and the answer.
struct Row {
    what: &'static str,
    head: String,
    body: Vec<u8>,
    status: u16,
    /// Empty where the request is no HTTP and nobody reads further.
    code: &'static str,
}

fn row(what: &'static str, head: impl Into<String>, status: u16, code: &'static str) -> Row {
    Row {
        what,
        head: head.into(),
        body: Vec::new(),
        status,
        code,
    }
}

impl Row {
    fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// What is wrong with this answer, or with the table.
    fn check(&self, (status, text): &(u16, String)) -> Option<String> {
        let code = serde_json::from_str::<Value>(text).unwrap_or_default();
        let code = code["errors"][0]["code"].as_str().unwrap_or_default();
        eprintln!("{:64} {status} {code}", self.what);
        let answer = match self.code {
            "" => self.status.to_string(),
            code => format!("{} `{code}`", self.status),
        };
        let line = format!("| {} | {answer} |", self.what);
        if !DOCUMENTED.contains(&line) {
            return Some(format!("docs/oci.md lacks: {line}"));
        }
        let shown: String = self.head.chars().take(300).collect();
        let right = (*status, code) == (self.status, self.code);
        (!right).then(|| format!("{line} {shown} was answered with {status} {text}"))
    }
}

/// A request of these very bytes; status and body. With `stalls` one byte of the body is held back.
fn exchange(registry: &str, row: &Row, stalls: bool) -> (u16, String) {
    let mut stream = TcpStream::connect(registry).unwrap();
    let limit = Some(Duration::from_secs(90));
    stream.set_read_timeout(limit).unwrap();
    let chunked = row.head.contains("transfer-encoding");
    let length = match chunked {
        true => String::new(),
        false => format!("content-length: {}\r\n", row.body.len()),
    };
    let mut bytes = row.head.replacen("\r\n", " HTTP/1.1\r\n", 1).into_bytes();
    if !row.head.contains("\r\n") {
        bytes.extend_from_slice(b" HTTP/1.1");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(b"host: x\r\nconnection: close\r\n");
    bytes.extend_from_slice(length.as_bytes());
    bytes.extend_from_slice(b"\r\n");
    if chunked {
        bytes.extend_from_slice(format!("{:x}\r\n", row.body.len()).as_bytes());
    }
    bytes.extend_from_slice(&row.body);
    if chunked {
        bytes.extend_from_slice(b"\r\n0\r\n\r\n");
    }
    if stalls {
        bytes.pop();
    }
    // It may have answered, and closed, before it was told everything.
    let _ = stream.write_all(&bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.unwrap_or(0), body.to_owned())
}

fn path_tricks() -> Vec<Row> {
    let get = |what, path: &str, status, code| row(what, format!("GET {path}"), status, code);
    vec![
        get(
            "a name that climbs",
            "/v2/../../../../etc/passwd/tags/list",
            400,
            "NAME_INVALID",
        ),
        get(
            "a name that climbs, escaped",
            "/v2/a/..%2f..%2fetc/tags/list",
            400,
            "NAME_INVALID",
        ),
        get("dots, escaped", "/v2/%2e%2e/tags/list", 400, "NAME_INVALID"),
        get(
            "a name in capitals",
            "/v2/Upper/tags/list",
            400,
            "NAME_INVALID",
        ),
        get(
            "a tag that climbs",
            "/v2/a/manifests/..",
            404,
            "MANIFEST_UNKNOWN",
        ),
        get(
            "a tag that climbs, escaped",
            "/v2/a/manifests/%2e%2e%2fidentity",
            404,
            "MANIFEST_UNKNOWN",
        ),
        get(
            "a digest that climbs",
            "/v2/a/blobs/..%2f..%2fidentity",
            400,
            "DIGEST_INVALID",
        ),
        get(
            "a digest with a path",
            "/v2/a/blobs/sha256:../../../identity",
            404,
            "UNSUPPORTED",
        ),
        get(
            "an upload that climbs",
            "/v2/a/blobs/uploads/../../identity",
            404,
            "UNSUPPORTED",
        ),
        get(
            "an upload that climbs, escaped",
            "/v2/a/blobs/uploads/..%2f..%2fidentity",
            404,
            "BLOB_UPLOAD_UNKNOWN",
        ),
        get("a zero byte in the path", "/v2/a\u{0}b/tags/list", 400, ""),
        get(
            "a page of -1 names",
            "/v2/_catalog?n=-1",
            400,
            "UNSUPPORTED",
        ),
    ]
}

fn wrong_digests(upload: &str) -> Vec<Row> {
    let other = digest(b"other");
    let post = |query: &str| format!("POST /v2/{NAME}/blobs/uploads/?{query}");
    let bytes = noise(1, 3_000_000);
    let upper = other.to_uppercase().replace("SHA256", "sha256");
    vec![
        row(
            "bytes that are not what they are called",
            post(&format!("digest={other}")),
            400,
            "DIGEST_INVALID",
        )
        .body(bytes.clone()),
        row(
            "a digest that is not SHA-256",
            post("digest=sha512:abc"),
            400,
            "DIGEST_INVALID",
        )
        .body("x"),
        row(
            "a digest in capitals",
            post(&format!("digest={upper}")),
            400,
            "DIGEST_INVALID",
        )
        .body("x"),
        row(
            "a digest that is too short",
            post("digest=sha256:00"),
            400,
            "DIGEST_INVALID",
        )
        .body("x"),
        row(
            "a close without a digest",
            format!("PUT {upload}"),
            400,
            "DIGEST_INVALID",
        ),
        row(
            "a blob that is not there",
            format!("GET /v2/{NAME}/blobs/{other}"),
            404,
            "BLOB_UNKNOWN",
        ),
        row(
            "a close with the wrong digest: the upload has ended",
            format!("PUT {upload}?digest={other}"),
            400,
            "DIGEST_INVALID",
        )
        .body(bytes),
        row(
            "more for an upload that has ended",
            format!("PATCH {upload}"),
            404,
            "BLOB_UPLOAD_UNKNOWN",
        )
        .body("x"),
        row(
            "an upload that never was",
            format!("GET /v2/{NAME}/blobs/uploads/none"),
            404,
            "BLOB_UPLOAD_UNKNOWN",
        ),
    ]
}

fn wrong_ranges(upload: &str, blob: &str) -> Vec<Row> {
    let patch = |range: &str| format!("PATCH {upload}\r\ncontent-range: {range}");
    let get = |range: &str| format!("GET {blob}\r\nrange: bytes={range}");
    vec![
        row(
            "a range behind the blob",
            get("9000000-"),
            416,
            "BLOB_UNKNOWN",
        ),
        row(
            "a range of an upload that leaves a hole",
            patch("5-9"),
            416,
            "BLOB_UPLOAD_INVALID",
        )
        .body("12345"),
        row(
            "a range that ends before it begins",
            patch("9-0"),
            416,
            "BLOB_UPLOAD_INVALID",
        )
        .body("12345"),
        row(
            "a range that is none",
            patch("bytes"),
            416,
            "BLOB_UPLOAD_INVALID",
        )
        .body("12345"),
        row(
            "a range of all that there can be",
            patch("0-18446744073709551615"),
            416,
            "BLOB_UPLOAD_INVALID",
        )
        .body("12345"),
        row(
            "a body shorter than its range: what came is kept",
            patch("0-9"),
            400,
            "SIZE_INVALID",
        )
        .body("12345"),
        row(
            "the same range again",
            patch("0-4"),
            416,
            "BLOB_UPLOAD_INVALID",
        )
        .body("12345"),
        row(
            "a body longer than its range",
            patch("5-6"),
            400,
            "SIZE_INVALID",
        )
        .body("12345"),
    ]
}

fn bad_manifests(image: &Value) -> Vec<Row> {
    let put =
        |to: &str, kind: &str| format!("PUT /v2/{NAME}/manifests/{to}\r\ncontent-type: {kind}");
    let with = |name: &str, value: Value| {
        let mut image = image.clone();
        image[name] = value;
        image.to_string()
    };
    let layer =
        |digest: &str, size: u64| json!([{"mediaType": "x/y", "digest": digest, "size": size}]);
    let many: Vec<Value> = (0..1001)
        .map(|n: u32| layer(&digest(&n.to_be_bytes()), 4)[0].clone())
        .collect();
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{"mediaType": IMAGE, "digest": digest(b"none"), "size": 4}],
    });
    let chunked = format!("{}\r\ntransfer-encoding: chunked", put("v9", IMAGE));
    let config = digest(b"{}");
    vec![
        row(
            "a manifest of 4 MiB and a byte",
            put("v9", IMAGE),
            413,
            "SIZE_INVALID",
        )
        .body(vec![b' '; (4 << 20) + 1]),
        row(
            "a manifest of 4 MiB and a byte, chunked",
            chunked,
            413,
            "SIZE_INVALID",
        )
        .body(vec![b' '; (4 << 20) + 1]),
        row(
            "a manifest that is no JSON",
            put("v9", IMAGE),
            400,
            "MANIFEST_INVALID",
        )
        .body("{"),
        row(
            "a manifest of schema version 1",
            put("v9", IMAGE),
            400,
            "MANIFEST_INVALID",
        )
        .body(with("schemaVersion", json!(1))),
        row(
            "a manifest with another Content-Type than its mediaType",
            put("v9", INDEX),
            400,
            "MANIFEST_INVALID",
        )
        .body(image.to_string()),
        row(
            "a manifest of a media type that is not supported",
            put("v9", "text/html"),
            400,
            "MANIFEST_INVALID",
        )
        .body(with("mediaType", json!("text/html"))),
        row(
            "a manifest of more than 1000 blobs",
            put("v9", IMAGE),
            400,
            "MANIFEST_INVALID",
        )
        .body(with("layers", json!(many))),
        row(
            "a manifest of a blob that is not there",
            put("v9", IMAGE),
            404,
            "MANIFEST_BLOB_UNKNOWN",
        )
        .body(with("layers", layer(&digest(b"none"), 4))),
        row(
            "a manifest of a blob that has another length",
            put("v9", IMAGE),
            400,
            "MANIFEST_INVALID",
        )
        .body(with("layers", layer(&config, 3))),
        row(
            "a manifest with a digest that climbs",
            put("v9", IMAGE),
            400,
            "MANIFEST_INVALID",
        )
        .body(with("layers", layer("../../x", 3))),
        row(
            "an index of what is not there",
            put("v9", INDEX),
            404,
            "MANIFEST_BLOB_UNKNOWN",
        )
        .body(index.to_string()),
        row(
            "a manifest under a tag that is none",
            put(".v9", IMAGE),
            400,
            "MANIFEST_INVALID",
        )
        .body(image.to_string()),
        row(
            "a manifest under another digest",
            put(&digest(b"x"), IMAGE),
            400,
            "DIGEST_INVALID",
        )
        .body(image.to_string()),
        row(
            "a known manifest as another media type",
            put("v9", "application/vnd.docker.distribution.manifest.v2+json"),
            400,
            "MANIFEST_INVALID",
        )
        .body(bare(image)),
        row(
            "a blob that a manifest names is not deleted",
            format!("DELETE /v2/{NAME}/blobs/{config}"),
            405,
            "UNSUPPORTED",
        ),
        row(
            "a method that is none",
            format!("POST /v2/{NAME}/manifests/v1"),
            405,
            "UNSUPPORTED",
        ),
    ]
}

/// Without a media type of its own.
fn bare(image: &Value) -> String {
    let mut bare = image.clone();
    bare.as_object_mut().unwrap().remove("mediaType");
    bare.to_string()
}

/// What a member's disk holds once everything that nobody needs has gone from it.
#[derive(Debug, PartialEq)]
struct Held {
    chunks: u64,
    bytes: u64,
    names: usize,
}

async fn settled(cluster: &Cluster, n: usize, wanted: Option<&Held>) -> Held {
    let what = format!("member {n} holds what it needs, and no more: {wanted:?}");
    let (held, last) = until(&what, Duration::from_secs(60), || async {
        let status: CollectionStatus = asked(cluster, n, GC).await?;
        let last: Collection = status.last.filter(|l| l.refused.is_empty())?;
        let names = std::fs::read_dir(cluster.members[n].data.join("blobs"));
        let held = Held {
            chunks: last.live_chunks,
            bytes: last.live_bytes,
            names: names.unwrap().count(),
        };
        // What is dead in a pack that is worth no copying stays: the waste that is bounded below.
        let clean = last.waiting_chunks == 0 && last.reclaimable_bytes == 0;
        let right = wanted.is_none_or(|wanted| *wanted == held);
        (clean && right).then_some((held, last))
    })
    .await;
    let on_disk: u64 = pack_files(&cluster.members[n].data)
        .iter()
        .map(|p| p.metadata().unwrap().len())
        .sum();
    // A quarter of a pack may be waste, or 1 MiB.
    let bound = held.bytes * 4 / 3 + last.packs * ((1 << 20) + 8192);
    assert!(on_disk <= bound, "member {n}: {on_disk} bytes for {held:?}");
    eprintln!(
        "member {n}: {on_disk} bytes in {} packs for {held:?}",
        last.packs
    );
    held
}

/// `MAINSTAY_ABANDONED=10000` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_and_abandoned_uploads_are_answered_and_leave_nothing() {
    let _turn = turn().await;
    let mut cluster = Cluster::new(3);
    cluster.flags = vec!["--gc-grace", "1s", "--gc-every", "1s"];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let client = Client::new(&cluster);
    let layer = noise(9, 300_000);
    let image = client.image(NAME, &[&layer]).await;
    let kind = [("content-type", IMAGE.to_owned())];
    for (tag, body) in [("v1", image.to_string()), ("v2", bare(&image))] {
        let path = format!("/v2/{NAME}/manifests/{tag}");
        client
            .send("PUT", &path, &kind, body.as_bytes())
            .await
            .is(201);
    }
    // Manifests, bundles, layer and configuration, whole.
    let mut before = Vec::new();
    for n in 0..3 {
        let whole = until("all hold the images", Duration::from_secs(30), || async {
            let held = settled(&cluster, n, None).await;
            (held.chunks >= 14).then_some(held)
        });
        before.push(whole.await);
    }

    // Bodies that stand still are cut off while all this goes on.
    let (cut, stalled) = (client.begin(NAME).await, client.turn());
    let slow = [
        row(
            "an upload that stands still: what came is kept",
            format!("PATCH {cut}"),
            408,
            "BLOB_UPLOAD_INVALID",
        )
        .body(noise(2, 200_000)),
        row(
            "a manifest that stands still",
            format!("PUT /v2/{NAME}/manifests/v9\r\ncontent-type: {IMAGE}"),
            408,
            "MANIFEST_INVALID",
        )
        .body(image.to_string()),
    ];
    let registry = cluster.members[stalled].registry.clone();
    let slow = slow.map(|row| {
        let registry = registry.clone();
        tokio::task::spawn_blocking(move || (exchange(&registry, &row, true), row))
    });

    let (closed, ranged) = (client.begin(NAME).await, client.begin(NAME).await);
    let blob = format!("/v2/{NAME}/blobs/{}", digest(&layer));
    let rows = path_tricks()
        .into_iter()
        .chain(wrong_digests(&closed))
        .chain(wrong_ranges(&ranged, &blob))
        .chain(bad_manifests(&image));
    let mut wrong = Vec::new();
    for row in rows {
        let registry = cluster.members[client.turn()].registry.clone();
        let answer = tokio::task::block_in_place(|| exchange(&registry, &row, false));
        wrong.extend(row.check(&answer));
    }
    let tags = client.get(&format!("/v2/{NAME}/tags/list")).await.is(200);
    assert_eq!(tags.json()["tags"], json!(["v1", "v2"]));

    let count = rounds("MAINSTAY_ABANDONED", 1200);
    let (first, mut last) = (client.begin("bad/abandoned").await, String::new());
    for seed in 0..count {
        last = client.begin("bad/abandoned").await;
        let bytes = noise(seed as u64, 100);
        client.send("PATCH", &last, &[], &bytes).await.is(202);
    }
    client.get(&last).await.is(204);
    // Each member keeps 1024.
    let ended = client.get(&first).await.status == 404;
    assert_eq!(ended, count > 3 * 1100);
    eprintln!("{count} uploads of 100 bytes begun and abandoned");

    for slow in slow {
        let (answer, row) = slow.await.unwrap();
        wrong.extend(row.check(&answer));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let came = client.get(&cut).await;
    assert!(came.status == 404 || came.header("range") == "0-199998");
    for upload in [&cut, &ranged] {
        client.send("DELETE", upload, &[], &[]).await;
    }
    for (n, before) in before.iter().enumerate() {
        settled(&cluster, n, Some(before)).await;
    }
    client.push_blob("bad/abandoned", &layer).await;
}
