//! What the OCI distribution specification (1.1) demands of a registry, rule by rule.

use super::{Answer, Client, IMAGE, INDEX, digest, noise};
use crate::cluster::Cluster;
use crate::turn;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rules_of_the_distribution_specification() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let client = Client::new(&cluster);
    for n in 0..3 {
        let answer = client.send_to(n, "GET", "/v2/", &[], Vec::new()).await;
        answer.is(200);
    }
    nothing_there(&client).await;
    monolithic_uploads(&client).await;
    chunked_uploads(&client).await;
    refused_uploads(&client).await;
    mounts(&client).await;
    manifests(&client).await;
    indexes(&client).await;
    tags(&client).await;
    referrers(&client).await;
    deletions(&client).await;
}

async fn nothing_there(client: &Client<'_>) {
    let unknown = digest(b"nowhere");
    client
        .get(&format!("/v2/no/such/blobs/{unknown}"))
        .await
        .is_error(404, "BLOB_UNKNOWN");
    client
        .get("/v2/no/such/manifests/v1")
        .await
        .is_error(404, "NAME_UNKNOWN");
    client
        .get(&format!("/v2/no/such/manifests/{unknown}"))
        .await
        .is_error(404, "NAME_UNKNOWN");
    client
        .get("/v2/no/such/tags/list")
        .await
        .is_error(404, "NAME_UNKNOWN");
    client
        .get("/v2/no/such/manifests/.INVALID_MANIFEST_NAME")
        .await
        .is_error(404, "MANIFEST_UNKNOWN");
    for path in ["blobs/", "manifests/"] {
        let head = client.head(&format!("/v2/no/such/{path}{unknown}")).await;
        assert!(head.is(404).body.is_empty());
    }
    client
        .get("/v2/Upper/tags/list")
        .await
        .is_error(400, "NAME_INVALID");
    client.get("/v2/a/../../etc/passwd/tags/list").await.is(404);
    client
        .get("/v2/no/such/blobs/sha256:xyz")
        .await
        .is_error(400, "DIGEST_INVALID");
}

/// The same bytes from every member, whole and in parts.
async fn assert_blob(client: &Client<'_>, name: &str, bytes: &[u8]) {
    let digest = digest(bytes);
    let path = format!("/v2/{name}/blobs/{digest}");
    for n in 0..3 {
        let head = client
            .send_to(n, "HEAD", &path, &[], Vec::new())
            .await
            .is(200);
        assert_eq!(head.header("content-length"), bytes.len().to_string());
        assert_eq!(head.header("docker-content-digest"), digest);
        let got = client
            .send_to(n, "GET", &path, &[], Vec::new())
            .await
            .is(200);
        assert!(got.body == bytes, "{} bytes differ", bytes.len());
        assert_eq!(got.header("docker-content-digest"), digest);
        assert_eq!(got.header("content-length"), bytes.len().to_string());
    }
}

async fn part(client: &Client<'_>, path: &str, range: &str) -> Answer {
    client
        .send("GET", path, &[("range", range.to_owned())], &[])
        .await
}

async fn monolithic_uploads(client: &Client<'_>) {
    let sizes = [0, 1, 65_535, 65_536, 65_537, 300_000, 5_000_001];
    for (seed, size) in sizes.into_iter().enumerate() {
        let bytes = noise(seed as u64, size);
        let digest = client.push_blob("rules/mono", &bytes).await;
        assert_blob(client, "rules/mono", &bytes).await;
        // POST, then PUT.
        let location = client.begin("rules/other").await;
        let path = format!("{location}?digest={digest}");
        let put = client.send("PUT", &path, &[], &bytes).await.is(201);
        let blob = format!("/v2/rules/other/blobs/{digest}");
        assert_eq!(put.header("location"), blob);
        // The answer was lost, and the client closes again.
        client.send("PUT", &path, &[], &[]).await.is(201);
        assert_blob(client, "rules/other", &bytes).await;
    }
    let zeros = vec![0; 200_000];
    client.push_blob("rules/mono", &zeros).await;
    assert_blob(client, "rules/mono", &zeros).await;

    let bytes = noise(5, 300_000);
    let path = format!("/v2/rules/mono/blobs/{}", digest(&bytes));
    for (range, want) in [
        ("bytes=0-0", 0..1),
        ("bytes=65535-65536", 65_535..65_537),
        ("bytes=131072-", 131_072..300_000),
        ("bytes=-5", 299_995..300_000),
        ("bytes=299999-400000", 299_999..300_000),
        ("bytes=1-299998", 1..299_999),
    ] {
        let got = part(client, &path, range).await.is(206);
        assert!(got.body == bytes[want.clone()], "{range}");
        let shown = format!("bytes {}-{}/300000", want.start, want.end - 1);
        assert_eq!(got.header("content-range"), shown);
    }
    let beyond = part(client, &path, "bytes=300000-").await;
    assert_eq!(beyond.header("content-range"), "bytes */300000");
    assert_eq!(beyond.status, 416);
    let strange = part(client, &path, "lines=1-2").await.is(200);
    assert_eq!(strange.body.len(), 300_000);
}

async fn chunked_uploads(client: &Client<'_>) {
    let bytes = noise(77, 5_300_000);
    let mut location = client.begin("rules/chunked").await;
    let cuts = [0, 1, 70_000, 70_001, 4_300_000, 5_200_000];
    for pair in cuts.windows(2) {
        let piece = &bytes[pair[0]..pair[1]];
        let range = format!("{}-{}", pair[0], pair[1] - 1);
        let sent = client
            .send("PATCH", &location, &[("content-range", range)], piece)
            .await
            .is(202);
        assert_eq!(sent.header("range"), format!("0-{}", pair[1] - 1));
        location = sent.header("location").to_owned();
        // Again, or too far: out of order, and told where to go on.
        for wrong in [pair[0], pair[1] + 1] {
            let range = format!("{wrong}-{}", wrong + piece.len() - 1);
            let refused = client
                .send("PATCH", &location, &[("content-range", range)], piece)
                .await;
            refused.is_error(416, "BLOB_UPLOAD_INVALID");
            assert_eq!(refused.header("range"), format!("0-{}", pair[1] - 1));
            assert_eq!(refused.header("location"), location);
        }
        let status = client.get(&location).await.is(204);
        assert_eq!(status.header("range"), format!("0-{}", pair[1] - 1));
        assert_eq!(status.header("location"), location);
    }
    let digest = digest(&bytes);
    let path = format!("{location}?digest={digest}");
    let rest = &bytes[5_200_000..];
    let far = [("content-range", "5200001-5300000".to_owned())];
    let refused = client.send("PUT", &path, &far, rest).await;
    refused.is_error(416, "BLOB_UPLOAD_INVALID");
    let range = [("content-range", "5200000-5299999".to_owned())];
    let closed = client.send("PUT", &path, &range, rest).await.is(201);
    let blob = format!("/v2/rules/chunked/blobs/{digest}");
    assert_eq!(closed.header("location"), blob);
    assert_blob(client, "rules/chunked", &bytes).await;
    client
        .get(&location)
        .await
        .is_error(404, "BLOB_UPLOAD_UNKNOWN");

    // As docker does it: one PATCH without a range, then an empty PUT.
    let bytes = noise(78, 1_000_000);
    let location = client.begin("rules/chunked").await;
    client.send("PATCH", &location, &[], &bytes).await.is(202);
    let path = format!("{location}?digest={}", super::digest(&bytes));
    client.send("PUT", &path, &[], &[]).await.is(201);
    assert_blob(client, "rules/chunked", &bytes).await;
}

async fn refused_uploads(client: &Client<'_>) {
    let bytes = noise(99, 100_000);
    let (wrong, right) = (digest(b"other"), digest(&bytes));
    let path = format!("/v2/rules/refused/blobs/uploads/?digest={wrong}");
    let refused = client.send("POST", &path, &[], &bytes).await;
    refused.is_error(400, "DIGEST_INVALID");
    let location = client.begin("rules/refused").await;
    for bad in ["", "?digest=sha512:abc", "?digest=../../etc/passwd"] {
        let path = format!("{location}{bad}");
        let refused = client.send("PUT", &path, &[], &bytes).await;
        refused.is_error(400, "DIGEST_INVALID");
    }
    let path = format!("{location}?digest={wrong}");
    let refused = client.send("PUT", &path, &[], &bytes).await;
    refused.is_error(400, "DIGEST_INVALID");
    for digest in [&wrong, &right] {
        let path = format!("/v2/rules/refused/blobs/{digest}");
        client.get(&path).await.is_error(404, "BLOB_UNKNOWN");
    }
    let ended = client.send("PATCH", &location, &[], &bytes).await;
    ended.is_error(404, "BLOB_UPLOAD_UNKNOWN");

    let path = "/v2/rules/refused/blobs/uploads/?digest-algorithm=sha512";
    let refused = client.send("POST", path, &[], &[]).await;
    refused.is_error(400, "DIGEST_INVALID");

    // A body longer, or shorter, than its range.
    let location = client.begin("rules/refused").await;
    for range in [
        "0-10",
        "0-200000",
        "10-0",
        "bytes",
        "0-18446744073709551615",
    ] {
        let headers = [("content-range", range.to_owned())];
        let refused = client.send("PATCH", &location, &headers, &bytes).await;
        assert!(refused.status.is_client_error(), "{range}");
    }
    client.send("DELETE", &location, &[], &[]).await.is(204);
    let ended = client.send("PATCH", &location, &[], &bytes).await;
    ended.is_error(404, "BLOB_UPLOAD_UNKNOWN");
    let other = location.replace("rules/refused", "rules/other");
    client
        .get(&other)
        .await
        .is_error(404, "BLOB_UPLOAD_UNKNOWN");
}

async fn mounts(client: &Client<'_>) {
    let bytes = noise(5, 300_000);
    let digest = digest(&bytes);
    let path = format!("/v2/rules/mount/blobs/{digest}");
    client.get(&path).await.is_error(404, "BLOB_UNKNOWN");
    let mount = |from: &str| format!("/v2/rules/mount/blobs/uploads/?mount={digest}&from={from}");
    for elsewhere in ["rules/none", "../rules", "rules%2Fnone"] {
        let begun = client
            .send("POST", &mount(elsewhere), &[], &[])
            .await
            .is(202);
        let location = begun.header("location").to_owned();
        client.send("DELETE", &location, &[], &[]).await.is(204);
    }
    let mounted = client
        .send("POST", &mount("rules/mono"), &[], &[])
        .await
        .is(201);
    assert_eq!(mounted.header("location"), path);
    assert_blob(client, "rules/mount", &bytes).await;
}

/// The same manifest from every member, by tag and by digest.
async fn assert_manifest(
    client: &Client<'_>,
    name: &str,
    references: &[&str],
    bytes: &[u8],
    kind: &str,
) {
    let digest = digest(bytes);
    for reference in references.iter().copied().chain([digest.as_str()]) {
        let path = format!("/v2/{name}/manifests/{reference}");
        for n in 0..3 {
            let head = client
                .send_to(n, "HEAD", &path, &[], Vec::new())
                .await
                .is(200);
            assert_eq!(head.header("content-length"), bytes.len().to_string());
            assert_eq!(head.header("content-type"), kind);
            let got = client
                .send_to(n, "GET", &path, &[], Vec::new())
                .await
                .is(200);
            assert!(got.body == bytes, "not the bytes that were put");
            assert_eq!(got.header("content-type"), kind);
            assert_eq!(got.header("docker-content-digest"), digest);
        }
    }
}

async fn manifests(client: &Client<'_>) {
    let name = "rules/image";
    let image = client
        .image(name, &[&noise(1, 100_000), &noise(2, 70_000)])
        .await;
    let bytes = image.to_string().into_bytes();
    let own = digest(&bytes);
    let put = client.put_manifest(name, "v1", &image).await.is(201);
    assert_eq!(
        put.header("location"),
        format!("/v2/{name}/manifests/{own}")
    );
    assert_eq!(put.header("docker-content-digest"), own);
    assert_eq!(put.header("oci-subject"), "");
    assert_manifest(client, name, &["v1"], &bytes, IMAGE).await;
    // Twice is once; by digest; with tags in the query; white space is kept.
    client.put_manifest(name, "v1", &image).await.is(201);
    client.put_manifest(name, &own, &image).await.is(201);
    let many = format!("{own}?tag=a&tag=b.c");
    let tagged = client.put_manifest(name, &many, &image).await.is(201);
    assert_eq!(tagged.header("oci-tag"), "a, b.c");
    let pretty = serde_json::to_vec_pretty(&image).unwrap();
    let kind = [("content-type", format!("{IMAGE}; charset=utf-8"))];
    let path = format!("/v2/{name}/manifests/pretty");
    client.send("PUT", &path, &kind, &pretty).await.is(201);
    assert_manifest(client, name, &["pretty"], &pretty, IMAGE).await;
    assert_manifest(client, name, &["a", "b.c"], &bytes, IMAGE).await;
    // A tag moves.
    client.put_manifest(name, "pretty", &image).await.is(201);
    assert_manifest(client, name, &["pretty"], &bytes, IMAGE).await;

    // Blobs that are not there, or have another length.
    let mut lacking = image.clone();
    lacking["layers"][0]["digest"] = json!(digest(b"nowhere"));
    let refused = client.put_manifest(name, "bad", &lacking).await;
    refused.is_error(404, "MANIFEST_BLOB_UNKNOWN");
    let refused = client.put_manifest("rules/empty", "bad", &image).await;
    refused.is_error(404, "MANIFEST_BLOB_UNKNOWN");
    let mut longer = image.clone();
    longer["layers"][0]["size"] = json!(100_001);
    let refused = client.put_manifest(name, "bad", &longer).await;
    refused.is_error(400, "MANIFEST_INVALID");
    let refused = client.put_manifest(name, &digest(b"x"), &image).await;
    refused.is_error(400, "DIGEST_INVALID");
    let refused = client.put_manifest(name, ".bad", &image).await;
    refused.is_error(400, "MANIFEST_INVALID");
    client
        .get(&format!("/v2/{name}/manifests/bad"))
        .await
        .is_error(404, "MANIFEST_UNKNOWN");

    // As long as it may be, and a byte longer.
    let mut long = image;
    long["annotations"] = json!({"x": ""});
    let rest = (4 << 20) - long.to_string().len();
    long["annotations"]["x"] = json!("y".repeat(rest));
    client.put_manifest(name, "long", &long).await.is(201);
    assert_manifest(client, name, &["long"], long.to_string().as_bytes(), IMAGE).await;
    long["annotations"]["x"] = json!("y".repeat(rest + 1));
    let refused = client.put_manifest(name, "longer", &long).await;
    refused.is_error(413, "SIZE_INVALID");
}

async fn indexes(client: &Client<'_>) {
    let name = "rules/index";
    let image = client.image(name, &[&noise(3, 1000)]).await;
    let own = digest(image.to_string().as_bytes());
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{
            "mediaType": IMAGE, "digest": own, "size": image.to_string().len(),
            "platform": {"architecture": "amd64", "os": "linux"},
        }],
    });
    let refused = client.put_manifest(name, "all", &index).await;
    refused.is_error(404, "MANIFEST_BLOB_UNKNOWN");
    client.put_manifest(name, &own, &image).await.is(201);
    client.put_manifest(name, "all", &index).await.is(201);
    assert_manifest(client, name, &["all"], index.to_string().as_bytes(), INDEX).await;
}

async fn tags(client: &Client<'_>) {
    let name = "rules/tags";
    let image = client.image(name, &[]).await;
    let names = ["B", "a", "b", "c1", "c10", "c2"];
    for tag in names.iter().rev() {
        client.put_manifest(name, tag, &image).await.is(201);
    }
    let list = format!("/v2/{name}/tags/list");
    let all = client.get(&list).await.is(200);
    assert_eq!(all.json(), json!({"name": name, "tags": names}));
    let none = client.get(&format!("{list}?n=0")).await.is(200);
    assert_eq!(none.json()["tags"], json!([]));
    assert_eq!(none.header("link"), "");
    let mut seen: Vec<Value> = Vec::new();
    let mut next = format!("{list}?n=4");
    while !next.is_empty() {
        let page = client.get(&next).await.is(200);
        seen.extend(page.json()["tags"].as_array().unwrap().clone());
        let link = page.header("link").to_owned();
        next = link
            .strip_prefix('<')
            .and_then(|l| l.strip_suffix(">; rel=\"next\""))
            .unwrap_or_default()
            .to_owned();
    }
    assert_eq!(seen, names);
    let after = client.get(&format!("{list}?last=b&n=2")).await.is(200);
    assert_eq!(after.json()["tags"], json!(["c1", "c10"]));
    let catalog = client.get("/v2/_catalog?n=100").await.is(200).json();
    let known = catalog["repositories"].as_array().unwrap();
    assert!(known.contains(&json!(name)), "{known:?}");
}

async fn referrers(client: &Client<'_>) {
    let name = "rules/referrers";
    let subject = client.image(name, &[&noise(8, 500)]).await;
    let about = digest(subject.to_string().as_bytes());
    let path = format!("/v2/{name}/referrers/{about}");
    let none = client.get(&path).await.is(200);
    assert_eq!(none.header("content-type"), INDEX);
    assert_eq!(none.json()["manifests"], json!([]));
    client
        .get(&format!("/v2/{name}/referrers/sha256:x"))
        .await
        .is_error(400, "DIGEST_INVALID");
    // The subject need not be there.
    let descriptor = json!({
        "mediaType": IMAGE, "digest": about, "size": subject.to_string().len(),
    });
    let plain = client.image(name, &[]).await;
    let mut wanted = Vec::new();
    for (kind, note) in [("application/x.sbom", "one"), ("", "two")] {
        let mut manifest = plain.clone();
        manifest["subject"] = descriptor.clone();
        manifest["annotations"] = json!({"note": note});
        if !kind.is_empty() {
            manifest["artifactType"] = json!(kind);
        }
        let own = digest(manifest.to_string().as_bytes());
        let put = client.put_manifest(name, &own, &manifest).await.is(201);
        assert_eq!(put.header("oci-subject"), about);
        let config = plain["config"]["mediaType"].as_str().unwrap();
        wanted.push(json!({
            "mediaType": IMAGE, "digest": own, "size": manifest.to_string().len(),
            "artifactType": if kind.is_empty() { config } else { kind },
            "annotations": {"note": note},
        }));
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX, "manifests": [], "subject": descriptor,
    });
    let own = digest(index.to_string().as_bytes());
    let put = client.put_manifest(name, "index", &index).await.is(201);
    assert_eq!(put.header("oci-subject"), about);
    wanted.push(json!({"mediaType": INDEX, "digest": own, "size": index.to_string().len()}));
    client.put_manifest(name, "subject", &subject).await.is(201);
    wanted.sort_by_key(|w| w["digest"].as_str().unwrap().to_owned());
    for _ in 0..3 {
        let all = client.get(&path).await.is(200);
        assert_eq!(all.json()["manifests"], json!(wanted));
        assert_eq!(all.json()["mediaType"], INDEX);
        assert_eq!(all.header("oci-filters-applied"), "");
        let some = format!("{path}?artifactType=application/x.sbom");
        let some = client.get(&some).await.is(200);
        assert_eq!(some.header("oci-filters-applied"), "artifactType");
        let some = some.json()["manifests"].clone();
        assert_eq!(some.as_array().unwrap().len(), 1);
        assert_eq!(some[0]["annotations"]["note"], "one");
    }
}

async fn deletions(client: &Client<'_>) {
    let name = "rules/delete";
    let layer = noise(21, 90_000);
    let image = client.image(name, &[&layer]).await;
    let own = digest(image.to_string().as_bytes());
    for tag in ["one", "two"] {
        client.put_manifest(name, tag, &image).await.is(201);
    }
    let of = |reference: &str| format!("/v2/{name}/manifests/{reference}");
    client.send("DELETE", &of("one"), &[], &[]).await.is(202);
    for n in 0..3 {
        let gone = client.send_to(n, "GET", &of("one"), &[], Vec::new()).await;
        gone.is_error(404, "MANIFEST_UNKNOWN");
    }
    client.get(&of("two")).await.is(200);
    let again = client.send("DELETE", &of("one"), &[], &[]).await;
    again.is_error(404, "MANIFEST_UNKNOWN");
    let blob = format!("/v2/{name}/blobs/{}", digest(&layer));
    let named = client.send("DELETE", &blob, &[], &[]).await;
    named.is_error(405, "UNSUPPORTED");
    client.send("DELETE", &of(&own), &[], &[]).await.is(202);
    for n in 0..3 {
        for reference in ["two", &own] {
            let gone = client
                .send_to(n, "GET", &of(reference), &[], Vec::new())
                .await;
            assert_eq!(gone.status, 404);
        }
    }
    client.send("DELETE", &blob, &[], &[]).await.is(202);
    for n in 0..3 {
        let gone = client.send_to(n, "GET", &blob, &[], Vec::new()).await;
        gone.is_error(404, "BLOB_UNKNOWN");
    }
    client
        .send("DELETE", &blob, &[], &[])
        .await
        .is_error(404, "BLOB_UNKNOWN");
    let unknown = client.send("DELETE", &of(&own), &[], &[]).await;
    assert_eq!(unknown.status, 404);
    client
        .send("POST", &blob, &[], &[])
        .await
        .is_error(405, "UNSUPPORTED");
}
