//! Templates through the OCI interface: a pushed template is an artifact, an artifact of our type is a
//! template, and what is deleted on one side is gone on the other.

use super::{Client, IMAGE, digest, noise};
use crate::cluster::Cluster;
use crate::push::template_id;
use crate::turn;
use serde_json::{Value, json};

const TEMPLATE: &str = "application/vnd.mainstay.template.v1";
const CONFIG: &str = "application/vnd.mainstay.template.config.v1+json";
const RAW: &str = "application/vnd.mainstay.disk.v1.raw";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn templates_are_artifacts_and_artifacts_of_our_type_are_templates() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let client = Client::new(&cluster);
    pushed_template_is_an_artifact(&client).await;
    artifact_is_a_template(&client).await;
    a_suspended_template_has_three_layers(&client).await;
}

/// With holes and a last chunk that is not full.
fn disk(seed: u64) -> Vec<u8> {
    let mut bytes = noise(seed, 1_000_000);
    bytes.resize(3_000_000, 0);
    bytes.extend(noise(seed + 1, 77_777));
    bytes
}

async fn pushed_template_is_an_artifact(client: &Client<'_>) {
    let (cluster, disk) = (client.cluster, disk(5));
    let path = cluster.dir.path().join("disk.img");
    std::fs::write(&path, &disk).unwrap();
    for tag in ["v1", "v2"] {
        let mut args = vec!["template", "push", "debian", "--tag", tag];
        args.extend(["--arch", "arm64", "--forward", "ssh:22"]);
        args.extend(["--disk", path.to_str().unwrap()]);
        cluster.cli_ok(&args);
    }
    let mut digests = std::collections::BTreeSet::new();
    for n in 0..3 {
        let path = "/v2/debian/manifests/v1";
        let got = client
            .send_to(n, "GET", path, &[], Vec::new())
            .await
            .is(200);
        assert_eq!(got.header("content-type"), IMAGE);
        assert_eq!(got.header("docker-content-digest"), digest(&got.body));
        digests.insert(digest(&got.body));
        let manifest = got.json();
        assert_eq!(manifest["artifactType"], TEMPLATE);
        assert_eq!(manifest["layers"][0]["mediaType"], RAW);
        assert_eq!(manifest["layers"][0]["size"], disk.len());
        let config = manifest["config"]["digest"].as_str().unwrap();
        let config = client.get(&format!("/v2/debian/blobs/{config}")).await;
        let config = config.is(200).json();
        assert_eq!(config["architecture"], "arm64");
        assert_eq!(config["forwards"][0]["guest_port"], 22);
        let layer = manifest["layers"][0]["digest"].as_str().unwrap();
        let layer = client.get(&format!("/v2/debian/blobs/{layer}")).await;
        assert!(layer.is(200).body == disk);
    }
    assert_eq!(digests.len(), 1, "the same bytes on every member");
    let own = digests.first().unwrap();
    let by_digest = format!("/v2/debian/manifests/{own}");
    client.get(&by_digest).await.is(200);
    let tags = client.get("/v2/debian/tags/list").await.is(200).json();
    assert_eq!(tags["tags"], json!(["v1", "v2"]));
    let deleted = client.send("DELETE", "/v2/debian/manifests/v1", &[], &[]);
    deleted.await.is(202);
    let gone = client.get("/v2/debian/manifests/v1").await;
    gone.is_error(404, "MANIFEST_UNKNOWN");
    assert_eq!(tags_of(client, "debian").await, ["v2"]);
    let again = client.send("DELETE", "/v2/debian/manifests/v1", &[], &[]);
    assert_eq!(again.await.status, 404);
}

/// Tags of a template as the REST dialect shows them.
async fn tags_of(client: &Client<'_>, name: &str) -> Vec<String> {
    let Some(id) = template_id(client.cluster, name).await else {
        return Vec::new();
    };
    let path = format!("/api/v1/registry/vm?id={id}");
    let shown = client.cluster.call(client.turn(), "GET", &path, None).await;
    let shown = shown.unwrap();
    let tags = shown["versions"].as_array().unwrap().iter();
    tags.map(|v| v["tag"].as_str().unwrap().to_owned())
        .collect()
}

async fn put(client: &Client<'_>, tag: &str, disk: &[u8]) -> super::Answer {
    let config = json!({
        "architecture": "amd64", "description": "from outside",
        "forwards": [{"name": "ssh", "guest_port": 22}],
    });
    let config = config.to_string();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": IMAGE, "artifactType": TEMPLATE,
        "config": {
            "mediaType": CONFIG, "size": config.len(),
            "digest": client.push_blob("tools/base", config.as_bytes()).await,
        },
        "layers": [{
            "mediaType": RAW, "size": disk.len(),
            "digest": client.push_blob("tools/base", disk).await,
            "annotations": {"org.opencontainers.image.title": "base.img"},
        }],
    });
    client.put_manifest("tools/base", tag, &manifest).await
}

async fn artifact_is_a_template(client: &Client<'_>) {
    let (cluster, first) = (client.cluster, disk(9));
    put(client, "v1", &first).await.is(201);
    put(client, "v1", &first).await.is(201);
    let id = template_id(cluster, "tools/base")
        .await
        .expect("a template");
    let path = format!("/api/v1/registry/vm?id={id}");
    let shown: Value = cluster.call(2, "GET", &path, None).await.unwrap();
    let tag = &shown["versions"][0];
    assert_eq!(tag["description"], "from outside");
    assert_eq!(tag["arch"], "amd64");
    assert_eq!(tag["images"], json!(["base.img"]));
    let copy = cluster.dir.path().join("copy.img");
    let mut args = vec!["template", "pull", id.as_str(), "--tag", "v1"];
    args.extend(["--disk", copy.to_str().unwrap()]);
    cluster.cli_ok(&args);
    assert!(std::fs::read(&copy).unwrap() == first);

    // A template's tag does not move, and is one thing with the artifact.
    put(client, "v1", &disk(10)).await.is_error(409, "DENIED");
    put(client, "v2", &disk(10)).await.is(201);
    assert_eq!(tags_of(client, "tools/base").await, ["v1", "v2"]);
    let path = "/v2/tools/base/manifests/v1";
    client.send("DELETE", path, &[], &[]).await.is(202);
    assert_eq!(tags_of(client, "tools/base").await, ["v2"]);
    let path = format!("/api/v1/registry/vm?id={id}");
    let deleted = cluster.call(client.turn(), "DELETE", &path, None).await;
    deleted.unwrap();
    let gone = client.get("/v2/tools/base/tags/list").await;
    gone.is_error(404, "NAME_UNKNOWN");
}

const FLAGS: [&str; 3] = ["--disk", "--state", "--machine"];

/// Memory and machine go out and come in again like the disk.
async fn a_suspended_template_has_three_layers(client: &Client<'_>) {
    let cluster = client.cluster;
    let parts = [disk(21), disk(31), b"{\"version\":1}".to_vec()];
    let mut push: Vec<String> = ["template", "push", "frozen", "--tag", "v1"]
        .map(str::to_owned)
        .to_vec();
    for (flag, part) in FLAGS.iter().zip(&parts) {
        let path = cluster.dir.path().join(format!("frozen{flag}"));
        std::fs::write(&path, part).unwrap();
        push.extend([(*flag).to_owned(), path.display().to_string()]);
    }
    let push: Vec<&str> = push.iter().map(String::as_str).collect();
    crate::suspended::push(cluster, &push).await;
    let mut seen = std::collections::BTreeSet::new();
    for n in 0..3 {
        let got = client.send_to(n, "GET", "/v2/frozen/manifests/v1", &[], Vec::new());
        seen.insert(got.await.is(200).body);
    }
    assert_eq!(seen.len(), 1, "the same bytes on every member");
    let manifest: Value = serde_json::from_slice(seen.first().unwrap()).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 3);
    for ((layer, part), kind) in
        layers
            .iter()
            .zip(&parts)
            .zip(["disk.v1.raw", "memory.v1", "machine.v1+json"])
    {
        assert_eq!(
            layer["mediaType"],
            format!("application/vnd.mainstay.{kind}")
        );
        let path = format!("/v2/frozen/blobs/{}", layer["digest"].as_str().unwrap());
        assert!(client.get(&path).await.is(200).body == *part);
        client.push_blob("tools/frozen", part).await;
    }
    let config = manifest["config"]["digest"].as_str().unwrap();
    let config = client
        .get(&format!("/v2/frozen/blobs/{config}"))
        .await
        .is(200);
    client.push_blob("tools/frozen", &config.body).await;
    client
        .put_manifest("tools/frozen", "v1", &manifest)
        .await
        .is(201);
    what_came_in_again_is_what_went_out(cluster, &parts).await;
    // Half of it is nothing.
    let mut half = manifest.clone();
    half["layers"].as_array_mut().unwrap().pop();
    client
        .put_manifest("tools/frozen", "v2", &half)
        .await
        .is_error(400, "MANIFEST_INVALID");
}

async fn what_came_in_again_is_what_went_out(cluster: &Cluster, parts: &[Vec<u8>; 3]) {
    let mut tags = Vec::new();
    for name in ["frozen", "tools/frozen"] {
        let id = template_id(cluster, name).await.unwrap();
        let path = format!("/api/v1/registry/vm?id={id}");
        let shown: Value = cluster.call(1, "GET", &path, None).await.unwrap();
        tags.push((id, shown["versions"][0].clone()));
    }
    let (id, tag) = &tags[1];
    assert!(tag["manifest"].is_string());
    assert_eq!(
        tag["manifest"], tags[0].1["manifest"],
        "the same chunks, so that the disk is the memory's own"
    );
    assert_eq!(tag["images"], json!(["disk.img"]));
    assert_eq!(tag["state_files"], json!(["memory.state"]));
    assert_eq!(tag["state_file"], "memory.state");
    assert_eq!(tag["size"], parts.iter().map(Vec::len).sum::<usize>());
    let mut pull: Vec<String> = ["template", "pull", id.as_str()]
        .map(str::to_owned)
        .to_vec();
    let copies = FLAGS.map(|flag| cluster.dir.path().join(format!("copy{flag}")));
    for (flag, copy) in FLAGS.iter().zip(&copies) {
        pull.extend([(*flag).to_owned(), copy.display().to_string()]);
    }
    let pull: Vec<&str> = pull.iter().map(String::as_str).collect();
    cluster.cli_ok(&pull);
    for (copy, part) in copies.iter().zip(parts) {
        assert!(std::fs::read(copy).unwrap() == *part);
    }
}
