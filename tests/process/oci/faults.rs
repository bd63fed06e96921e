//! OCI pushes and members that die, uploads that are abandoned.

use super::{Client, digest, noise};
use crate::cluster::{Cluster, until};
use crate::{rounds, turn};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
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

/// Raw bytes to a registry port, and what came back before the connection ended or went quiet.
fn raw(cluster: &Cluster, n: usize, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(&cluster.members[n].registry).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream.write_all(request).unwrap();
    let mut answer = vec![0; 4096];
    let len = stream.read(&mut answer).unwrap_or(0);
    String::from_utf8_lossy(&answer[..len]).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_upload_goes_on_where_it_was_and_tricks_are_refused() {
    let _turn = turn().await;
    let cluster = Cluster::ready().await;
    let client = Client::new(&cluster);
    // The client dies in the middle of a PATCH, at the owner and at a member that passes it on.
    let bytes = noise(4, 9_000_000);
    for n in 0..3 {
        let location = client.begin("faults/cut").await;
        let head = format!(
            "PATCH {location} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            bytes.len()
        );
        let mut stream = TcpStream::connect(&cluster.members[n].registry).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&bytes[..5_000_000]).unwrap();
        drop(stream);
        let limit = Duration::from_secs(20);
        let came = until("what came before the cut", limit, || async {
            let status = client.get(&location).await.is(204);
            let end = status
                .header("range")
                .strip_prefix("0-")
                .unwrap()
                .to_owned();
            let came = end.parse::<usize>().unwrap() + 1;
            (came > 1_000_000).then_some(came)
        })
        .await;
        assert!(came <= 5_000_000);
        // It may still be coming in: a client asks until nothing changes, or is told by a 416.
        let mut from = came;
        let closed = loop {
            let range = format!("{from}-{}", bytes.len() - 1);
            let path = format!("{location}?digest={}", digest(&bytes));
            let rest = &bytes[from..];
            let headers = [("content-range", range)];
            let answer = client.send("PUT", &path, &headers, rest).await;
            if answer.status != 416 {
                break answer;
            }
            let end = answer
                .header("range")
                .strip_prefix("0-")
                .unwrap()
                .to_owned();
            from = end.parse::<usize>().unwrap() + 1;
        };
        closed.is(201);
        let path = format!("/v2/faults/cut/blobs/{}", digest(&bytes));
        assert!(client.get(&path).await.is(200).body == bytes);
        client.send("DELETE", &path, &[], &[]).await.is(202);
    }
    for path in [
        "/v2/../../../../etc/passwd/tags/list",
        "/v2/a/..%2f..%2fetc/tags/list",
        "/v2/%2e%2e/tags/list",
        "/v2/a/manifests/..",
        "/v2/a/manifests/%2e%2e%2fidentity",
        "/v2/a/blobs/..%2f..%2fidentity",
        "/v2/a/blobs/sha256:../../../identity",
        "/v2/a/blobs/uploads/../../identity",
        "/v2/a\\b/tags/list",
        "/v2/a\u{0}b/tags/list",
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let answer = raw(&cluster, 0, request.as_bytes());
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(matches!(status, "400" | "404" | "405"), "{path}: {answer}");
    }
}
