//! OCI pushes while members are killed: what was answered with 201 is whole on every member afterwards,
//! and a push that was not can be made again through any of them.

use super::{Client, IMAGE, digest, noise};
use crate::cluster::{Cluster, until};
use crate::{Dice, rounds, turn};
use serde_json::json;
use std::time::Duration;

/// One push through one member, as a client does it: blobs, then the manifest. What was put, and
/// whether it was answered with 201.
async fn push(registry: String, tag: String, layer: Vec<u8>) -> (Vec<u8>, bool) {
    let config = json!({"pushed": tag}).to_string();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": IMAGE,
        "config": {"mediaType": "x/y", "digest": digest(config.as_bytes()), "size": config.len()},
        "layers": [{"mediaType": "x/z", "digest": digest(&layer), "size": layer.len()}],
    });
    let manifest = manifest.to_string();
    let base = format!("http://{registry}/v2/kills/image");
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let answered = async {
        for blob in [config.as_bytes(), &layer[..]] {
            let url = format!("{base}/blobs/uploads/?digest={}", digest(blob));
            let sent = http.post(url).body(blob.to_vec()).send().await.ok()?;
            (sent.status() == 201).then_some(())?;
        }
        let put = http.put(format!("{base}/manifests/{tag}"));
        let put = put.header("content-type", IMAGE).body(manifest.clone());
        (put.send().await.ok()?.status() == 201).then_some(())
    };
    let answered = answered.await.is_some();
    (manifest.into_bytes(), answered)
}

/// `MAINSTAY_OCI_KILLS=100` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_that_were_answered_survive_kills_of_any_member() {
    let _turn = turn().await;
    let mut dice = Dice::new("OCI kills");
    let mut cluster = Cluster::ready().await;
    let (kills, mut whole, mut again) = (rounds("MAINSTAY_OCI_KILLS", 4), Vec::new(), 0);
    for kill in 0..kills {
        let layer = noise(dice.below(u64::MAX), 6_000_000);
        let (tag, through) = (format!("t{kill}"), dice.below(3) as usize);
        let registry = cluster.members[through].registry.clone();
        let client = tokio::spawn(push(registry, tag.clone(), layer.clone()));
        // When the kill comes is the random input of this test.
        tokio::time::sleep(Duration::from_millis(dice.below(600))).await;
        let victim = dice.below(3) as usize;
        cluster.kill(victim);
        let (mut manifest, mut answered) = client.await.unwrap();
        let mut next = victim;
        while !answered {
            next = (next + 1) % 3;
            if !cluster.running(next) {
                continue;
            }
            again += 1;
            assert!(again < 20 * (kill + 1), "nothing can be pushed any more");
            let registry = cluster.members[next].registry.clone();
            (manifest, answered) = push(registry, tag.clone(), layer.clone()).await;
        }
        whole.push((tag, manifest, digest(&layer)));
        cluster.start(victim);
        cluster.wait_ready(&[victim]).await;
    }
    let client = Client::new(&cluster);
    for (tag, manifest, layer) in &whole {
        for n in 0..3 {
            let path = format!("/v2/kills/image/manifests/{tag}");
            let limit = Duration::from_secs(20);
            let got = until("the manifest", limit, || async {
                let got = client.send_to(n, "GET", &path, &[], Vec::new()).await;
                (got.status == 200).then_some(got)
            });
            assert!(got.await.body == *manifest, "{tag} through member {n}");
            let path = format!("/v2/kills/image/blobs/{layer}");
            let got = client.send_to(n, "GET", &path, &[], Vec::new()).await;
            assert_eq!(digest(&got.is(200).body), *layer, "{tag}, member {n}");
        }
    }
    eprintln!("{kills} kills during OCI pushes, {again} pushed again, all whole on all members");
}
