//! A real multi-layer image, made here, in through one member with `skopeo` and out through another.

use super::{Client, digest, noise};
use crate::cluster::Cluster;
use crate::turn;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// Outside of CI a machine without the tool may go without this test, and says so.
fn there_is_skopeo() -> bool {
    let there = Command::new("skopeo").arg("--version").output().is_ok();
    if !there {
        assert!(
            std::env::var_os("CI").is_none(),
            "skopeo is missing: deploy/install-deps.sh installs it"
        );
        eprintln!("NOT TESTED: skopeo is missing; deploy/install-deps.sh installs it");
    }
    there
}

fn run(program: &str, args: &[&str], dir: &Path) -> String {
    let mut command = Command::new(program);
    command.args(args).current_dir(dir);
    let out = tokio::task::block_in_place(|| command.output()).unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// Put bytes into a layout; their descriptor.
fn add(layout: &Path, kind: &str, bytes: &[u8]) -> Value {
    let digest = digest(bytes);
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(&digest["sha256:".len()..]), bytes).unwrap();
    json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
}

/// An OCI layout with one image: layers of files that compress, that do not, and that are empty.
fn make_layout(dir: &Path) {
    let layout = dir.join("made");
    let (mut layers, mut diffs, mut history) = (Vec::new(), Vec::new(), Vec::new());
    for (n, size) in [3_000_000, 0, 700_000, 12_345].into_iter().enumerate() {
        let root = dir.join(format!("root-{n}"));
        std::fs::create_dir_all(root.join("usr/share")).unwrap();
        std::fs::write(root.join("usr/share/noise"), noise(n as u64, size)).unwrap();
        std::fs::write(root.join("usr/share/text"), "the same\n".repeat(size / 9)).unwrap();
        let root = root.to_str().unwrap();
        let tar = format!("{root}.tar");
        run("tar", &["--sort=name", "-C", root, "-cf", &tar, "."], dir);
        diffs.push(json!(digest(&std::fs::read(&tar).unwrap())));
        run("gzip", &["-n", &tar], dir);
        let packed = std::fs::read(format!("{tar}.gz")).unwrap();
        layers.push(add(&layout, LAYER, &packed));
        history.push(json!({"created_by": format!("layer {n}")}));
    }
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": diffs}, "history": history,
    });
    let config = add(&layout, CONFIG, config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": super::IMAGE, "config": config, "layers": layers,
    });
    let mut manifest = add(&layout, super::IMAGE, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "v1"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

/// Digest and bytes of everything in a layout, and of the manifest that its index names.
fn contents(layout: &Path) -> (BTreeMap<String, Vec<u8>>, String) {
    let blobs = std::fs::read_dir(layout.join("blobs/sha256")).unwrap();
    let blobs = blobs.map(|entry| {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        (digest(&bytes), bytes)
    });
    let index = std::fs::read(layout.join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let named = index["manifests"][0]["digest"].as_str().unwrap();
    (blobs.collect(), named.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_copies_an_image_in_through_one_member_and_out_through_another() {
    if !there_is_skopeo() {
        return;
    }
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let dir = cluster.dir.path().join("skopeo");
    std::fs::create_dir_all(&dir).unwrap();
    make_layout(&dir);
    let at = |n: usize, name: &str| format!("docker://{}/{name}", cluster.members[n].registry);
    let copy = |from: &str, to: &str| {
        let flags = ["--insecure-policy", "copy", "--preserve-digests"];
        let plain = ["--src-tls-verify=false", "--dest-tls-verify=false"];
        run("skopeo", &[&flags[..], &plain, &[from, to]].concat(), &dir);
    };
    copy("oci:made:v1", &at(0, "images/app:v1"));
    let (blobs, manifest) = contents(&dir.join("made"));
    let client = Client::new(&cluster);
    for n in 0..3 {
        let path = "/v2/images/app/manifests/v1";
        let got = client
            .send_to(n, "HEAD", path, &[], Vec::new())
            .await
            .is(200);
        assert_eq!(got.header("docker-content-digest"), manifest);
        let out = format!("out-{n}");
        copy(&at(n, "images/app:v1"), &format!("oci:{out}:v1"));
        let (got, named) = contents(&dir.join(out));
        assert_eq!(named, manifest);
        assert!(got == blobs, "member {n} gave other blobs");
    }
    // From one repository to another: skopeo mounts what is there.
    copy(&at(1, "images/app:v1"), &at(2, "images/copy:v2"));
    let shown = run(
        "skopeo",
        &["inspect", "--tls-verify=false", &at(0, "images/copy:v2")],
        &dir,
    );
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["Digest"], json!(manifest));
    assert_eq!(shown["Layers"].as_array().unwrap().len(), 4);
    let listed = run(
        "skopeo",
        &["list-tags", "--tls-verify=false", &at(1, "images/copy")],
        &dir,
    );
    assert_eq!(
        serde_json::from_str::<Value>(&listed).unwrap()["Tags"],
        json!(["v2"])
    );
    run(
        "skopeo",
        &["delete", "--tls-verify=false", &at(0, "images/copy:v2")],
        &dir,
    );
    let gone = client.get("/v2/images/copy/manifests/v2").await;
    assert_eq!(gone.status, 404);
}
