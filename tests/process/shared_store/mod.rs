//! Chunks in a bucket of a real S3 server: what members that share one rely on, and a cluster of three on
//! one bucket, members and the S3 server killed.

mod server;

use crate::cluster::{Cluster, until};
use crate::push::noise_file;
use crate::sharing::{self, Cloud};
use crate::{rounds, turn};
use mainstay_agent::transfer::api::{CHUNKS, CollectionStatus, Durability, GC};
use mainstay_agent::transfer::{PushSpec, TransferError, WireRecord, pull_file, push_file};
use mainstay_storage::chunks::Bucket;
use serde_json::Value;
use server::S3Server;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn members_rely_on_a_real_bucket() {
    let _turn = turn().await;
    let server = S3Server::ready().await;
    let dir = tempfile::tempdir().unwrap();
    let steps = rounds("MAINSTAY_BUCKET_STEPS", 60);
    for (name, seed) in [("one", 5), ("two", 77)] {
        let cloud = Cloud::new(server.bucket(name), &dir.path().join(name));
        let lives = tokio::task::spawn_blocking(move || sharing::random_lives(&cloud, steps, seed));
        eprintln!("{}", lives.await.unwrap());
    }
    let cloud = Cloud::new(server.bucket("three"), &dir.path().join("three"));
    let shared = tokio::task::spawn_blocking(move || sharing::sharing(&cloud));
    eprintln!("{}", shared.await.unwrap());
}

fn spec(template: &str) -> PushSpec {
    PushSpec {
        template: template.to_owned(),
        tag: "v1".to_owned(),
        description: String::new(),
        arch: String::new(),
        format: Some("raw".to_owned()),
        beside: Vec::new(),
        forwards: Vec::new(),
        durability: Durability::All,
        wait: Duration::from_secs(30),
        save: String::new(),
    }
}

fn registry(cluster: &Cluster, n: usize) -> Vec<String> {
    vec![format!("http://{}", cluster.members[n].registry)]
}

async fn push(
    cluster: &Cluster,
    n: usize,
    file: &Path,
    template: &str,
) -> Result<String, TransferError> {
    let urls = registry(cluster, n);
    let pushed = push_file(&cluster.client, &urls, file, &spec(template), &|_, _| ()).await?;
    assert!(pushed.tag.visible, "{:?}", pushed.tag);
    Ok(pushed.tag.manifest)
}

async fn pull_equals(cluster: &Cluster, n: usize, manifest: &str, file: &Path) {
    let dest = cluster.dir.path().join("pulled");
    let urls = registry(cluster, n);
    let pulled = pull_file(&cluster.client, &urls, manifest, 0, &dest, &|_, _| ()).await;
    pulled.unwrap_or_else(|e| panic!("{}: {e}", cluster.members[n].name));
    assert!(
        std::fs::read(&dest).unwrap() == std::fs::read(file).unwrap(),
        "other bytes"
    );
    std::fs::remove_file(dest).unwrap();
}

/// Packs in the bucket, and their bytes.
async fn stored(bucket: &Arc<dyn Bucket>) -> (usize, u64) {
    let bucket = Arc::clone(bucket);
    let list = move || bucket.list("packs/", None).unwrap();
    let packs = tokio::task::spawn_blocking(list).await.unwrap();
    (packs.len(), packs.iter().map(|(_, size)| size).sum())
}

/// One collection on a member, to its end.
async fn collect(cluster: &Cluster, n: usize) {
    let url = format!("{}{GC}", registry(cluster, n)[0]);
    let body = |answer: Value| -> CollectionStatus {
        serde_json::from_value(answer["body"].clone()).unwrap()
    };
    let asked = cluster.client.post(&url).send().await.unwrap();
    let asked = body(asked.json().await.unwrap()).asked;
    until("a collection ends", Duration::from_secs(60), || async {
        let answer = cluster.client.get(&url).send().await.ok()?;
        let status = body(answer.json().await.ok()?);
        (status.done >= asked).then_some(())
    })
    .await;
}

/// Sends a chunk that nobody has.
async fn put_status(cluster: &Cluster, n: usize, seed: u64) -> u16 {
    let record = sharing::record(1000 + seed);
    let wire = WireRecord {
        id: record.id.0,
        codec: record.codec as u8,
        raw_len: record.raw_len,
        data: record.data,
    };
    let url = format!("{}{CHUNKS}", registry(cluster, n)[0]);
    let put = reqwest::Client::new()
        .put(url)
        .body(WireRecord::frame_all(&[wire]));
    put.send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_members_on_one_bucket() {
    const LEN: usize = 12 << 20;
    let _turn = turn().await;
    let mut s3 = S3Server::ready().await;
    let bucket = s3.bucket("cloud");
    let mut cluster = Cluster::new(3);
    cluster.flags = vec!["--gc-grace", "1s", "--gc-every", "never"];
    cluster.environment = vec![
        ("MAINSTAY_BLOB_STORE", "s3://chunks/cloud".to_owned()),
        ("MAINSTAY_S3_ENDPOINT", s3.endpoint()),
        ("AWS_ACCESS_KEY_ID", server::KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", server::SECRET.to_owned()),
    ];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let file = |name: &str| cluster.dir.path().join(name);
    let (first, second, third) = (file("first"), file("second"), file("third"));
    noise_file(&first, LEN, 1);
    noise_file(&second, LEN / 2, 2);
    noise_file(&third, LEN / 2, 3);

    // Pushed to one, held by all; stored once.
    let begin = Instant::now();
    let manifest = push(&cluster, 0, &first, "first").await.unwrap();
    eprintln!(
        "12 MiB pushed, held by three members after {:?}",
        begin.elapsed()
    );
    for n in [1, 2] {
        pull_equals(&cluster, n, &manifest, &first).await;
    }
    let (packs, bytes) = stored(&bucket).await;
    assert!(packs <= 12, "{packs} packs");
    let once = LEN as u64 + (LEN as u64 / 50);
    assert!(
        (LEN as u64..once).contains(&bytes),
        "{bytes} bytes for one image of {LEN}"
    );
    let again = push(&cluster, 1, &first, "first-again").await.unwrap();
    assert_eq!(again, manifest);
    assert_eq!(
        stored(&bucket).await,
        (packs, bytes),
        "the same again costs nothing"
    );

    // Members die; others have what they wrote.
    cluster.kill(0);
    let urls = registry(&cluster, 1);
    let majority = PushSpec {
        durability: Durability::Majority,
        ..spec("second")
    };
    let v2 = push_file(&cluster.client, &urls, &second, &majority, &|_, _| ())
        .await
        .unwrap();
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    cluster.kill(1);
    pull_equals(&cluster, 0, &v2.tag.manifest, &second).await;
    cluster.start(1);
    cluster.wait_ready(&[1]).await;

    // The S3 server dies: what is kept here is read, nothing is taken, consensus goes on, a member starts.
    s3.kill();
    pull_equals(&cluster, 0, &v2.tag.manifest, &second).await;
    assert_eq!(put_status(&cluster, 2, 1).await, 503);
    cluster.kill(2);
    cluster.start(2);
    cluster.wait_ready(&[0, 1, 2]).await;
    pull_equals(&cluster, 2, &manifest, &first).await;
    s3.start().await;
    assert_eq!(put_status(&cluster, 2, 2).await, 200);
    let v3 = push(&cluster, 2, &third, "third").await.unwrap();
    for n in 0..3 {
        pull_equals(&cluster, n, &v3, &third).await;
    }

    // What nothing needs any more goes from the bucket, what something needs stays.
    let (_, before) = stored(&bucket).await;
    for template in ["first", "first-again", "third"] {
        cluster.cli_ok(&["template", "delete", template]);
    }
    let live = LEN as u64 / 2;
    let begin = Instant::now();
    loop {
        for n in 0..3 {
            collect(&cluster, n).await;
        }
        let (packs, bytes) = stored(&bucket).await;
        if bytes < live * 4 / 3 {
            eprintln!(
                "{before} bytes in the bucket became {bytes} in {packs} packs, {:?}",
                begin.elapsed()
            );
            break;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(90),
            "{bytes} of {before} bytes are left"
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    for n in 0..3 {
        pull_equals(&cluster, n, &v2.tag.manifest, &second).await;
    }

    // Not by accident on the disk again.
    cluster.kill(2);
    cluster
        .environment
        .retain(|(name, _)| !name.starts_with("MAINSTAY_"));
    cluster.start(2);
    let begin = Instant::now();
    while cluster.exited(2).is_none() {
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "it does not refuse to start"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = cluster.log("c3");
    assert!(log.contains("belongs to a bucket"), "{log}");
    cluster.reap(2);
}
