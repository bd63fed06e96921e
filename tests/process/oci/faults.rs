//! OCI pushes and members that die, uploads that are abandoned.

use super::{Client, digest, noise};
use crate::cluster::{Cluster, until};
use crate::{rounds, turn};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_survives_the_member_that_answered() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    let (layer, loose) = (noise(1, 3_000_000), noise(2, 700_000));
    let name = "faults/image";
    let manifest = {
        let client = Client::new(&cluster);
        let image = client.image(name, &[&layer]).await;
        let path = format!("/v2/{name}/blobs/uploads/?digest={}", digest(&loose));
        let answer = client.send_to(2, "POST", &path, &[], loose.clone()).await;
        answer.is(201);
        let path = format!("/v2/{name}/manifests/v1");
        let kind = [("content-type", super::IMAGE.to_owned())];
        let body = image.to_string().into_bytes();
        let answer = client.send_to(2, "PUT", &path, &kind, body.clone()).await;
        answer.is(201);
        body
    };
    cluster.kill(2);
    {
        let client = Client::new(&cluster);
        for n in 0..2 {
            let limit = Duration::from_secs(20);
            let path = format!("/v2/{name}/manifests/v1");
            let got = until("the manifest from the others", limit, || async {
                let got = client.send_to(n, "GET", &path, &[], Vec::new()).await;
                (got.status == 200).then_some(got)
            })
            .await;
            assert!(got.body == manifest);
            let path = format!("/v2/{name}/blobs/{}", digest(&layer));
            let got = client.send_to(n, "GET", &path, &[], Vec::new()).await;
            assert!(got.is(200).body == layer);
        }
    }
    cluster.start(2);
    cluster.wait_ready(&[0, 1, 2]).await;
    let client = Client::new(&cluster);
    for n in 0..3 {
        let path = format!("/v2/{name}/blobs/{}", digest(&loose));
        let got = client.send_to(n, "GET", &path, &[], Vec::new()).await;
        assert!(
            got.is(200).body == loose,
            "an unnamed blob, through member {n}"
        );
    }
    // Named through a member that never saw its bytes.
    let mut image: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    image["layers"][0]["digest"] = digest(&loose).into();
    image["layers"][0]["size"] = loose.len().into();
    let path = format!("/v2/{name}/manifests/v2");
    let kind = [("content-type", super::IMAGE.to_owned())];
    let body = image.to_string().into_bytes();
    client.send_to(0, "PUT", &path, &kind, body).await.is(201);
}

/// `MAINSTAY_ABANDONED=10000` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abandoned_uploads_name_nothing_and_block_nobody() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let client = Client::new(&cluster);
    for seed in 0..rounds("MAINSTAY_ABANDONED", 1200) {
        let location = client.begin("faults/abandoned").await;
        let sent = client
            .send("PATCH", &location, &[], &noise(seed as u64, 100))
            .await;
        sent.is(202);
    }
    for member in &cluster.members {
        let names = std::fs::read_dir(member.data.join("blobs"))
            .unwrap()
            .count();
        assert_eq!(
            names, 0,
            "an upload that was not closed has no name on disk"
        );
    }
    client
        .push_blob("faults/abandoned", &noise(1, 100_000))
        .await;
}
