//! OCI pushes and members that die, uploads that are cut off.

use super::{Client, digest, noise};
use crate::cluster::{Cluster, until};
use crate::turn;
use std::io::Write as _;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_upload_goes_on_where_it_was() {
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
}
