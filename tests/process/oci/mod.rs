//! The OCI distribution API of a real cluster. Every request goes to the next member in turn: what one
//! has begun, another continues, and all must agree at once.

mod bad_input;
mod conformance;
mod faults;
mod kills;
mod skopeo;
mod templates;

use crate::cluster::Cluster;
use reqwest::header::{HeaderMap, HeaderName};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::Digest as _;
use std::cell::Cell;

pub(super) const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A client of all registry ports.
pub(super) struct Client<'c> {
    pub(super) cluster: &'c Cluster,
    http: reqwest::Client,
    next: Cell<usize>,
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> &str {
        let name: HeaderName = name.parse().unwrap();
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The specification's form of an error, with this code.
    pub(super) fn is_error(&self, status: u16, code: &str) {
        let text = String::from_utf8_lossy(&self.body).into_owned();
        assert_eq!(self.status, status, "{text}");
        let errors = self.json()["errors"].clone();
        assert_eq!(errors[0]["code"], code, "{text}");
        assert!(errors[0]["message"].is_string(), "{text}");
        assert_eq!(self.header("content-type"), "application/json");
    }

    pub(super) fn is(self, status: u16) -> Self {
        let text = String::from_utf8_lossy(&self.body).into_owned();
        assert_eq!(self.status, status, "{text}");
        self
    }
}

impl<'c> Client<'c> {
    pub(super) fn new(cluster: &'c Cluster) -> Self {
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .unwrap();
        let next = Cell::new(0);
        Self {
            cluster,
            http,
            next,
        }
    }

    /// The member whose turn it is, of those that run.
    pub(super) fn turn(&self) -> usize {
        let count = self.cluster.members.len();
        loop {
            let n = self.next.get();
            self.next.set((n + 1) % count);
            if self.cluster.running(n) {
                return n;
            }
        }
    }

    pub(super) async fn send_to(
        &self,
        n: usize,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        body: Vec<u8>,
    ) -> Answer {
        let url = format!("http://{}{path}", self.cluster.members[n].registry);
        let method: Method = method.parse().unwrap();
        let mut request = self.http.request(method.clone(), url);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if !matches!(method, Method::GET | Method::HEAD) {
            request = request.body(body);
        }
        let response = request.send().await.unwrap();
        Answer {
            status: response.status(),
            headers: response.headers().clone(),
            body: response.bytes().await.unwrap().to_vec(),
        }
    }

    pub(super) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        body: &[u8],
    ) -> Answer {
        let n = self.turn();
        self.send_to(n, method, path, headers, body.to_vec()).await
    }

    pub(super) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], &[]).await
    }

    pub(super) async fn head(&self, path: &str) -> Answer {
        self.send("HEAD", path, &[], &[]).await
    }

    /// Begin an upload; its location.
    pub(super) async fn begin(&self, name: &str) -> String {
        let path = format!("/v2/{name}/blobs/uploads/");
        let begun = self.send("POST", &path, &[], &[]).await.is(202);
        let location = begun.header("location").to_owned();
        assert!(location.starts_with(&path), "{location}");
        location
    }

    /// Push a blob in one request; its digest.
    pub(super) async fn push_blob(&self, name: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let path = format!("/v2/{name}/blobs/uploads/?digest={digest}");
        let pushed = self.send("POST", &path, &[], bytes).await.is(201);
        assert_eq!(
            pushed.header("location"),
            format!("/v2/{name}/blobs/{digest}")
        );
        digest
    }

    pub(super) async fn put_manifest(
        &self,
        name: &str,
        reference: &str,
        manifest: &Value,
    ) -> Answer {
        let kind = manifest["mediaType"].as_str().unwrap().to_owned();
        let path = format!("/v2/{name}/manifests/{reference}");
        let body = manifest.to_string().into_bytes();
        self.send("PUT", &path, &[("content-type", kind)], &body)
            .await
    }

    /// A pushed image of these layers; its manifest.
    pub(super) async fn image(&self, name: &str, layers: &[&[u8]]) -> Value {
        let config = self.push_blob(name, b"{}").await;
        let mut described = Vec::new();
        for layer in layers {
            let digest = self.push_blob(name, layer).await;
            described.push(json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": digest, "size": layer.len(),
            }));
        }
        json!({
            "schemaVersion": 2, "mediaType": IMAGE,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config, "size": 2,
            },
            "layers": described,
        })
    }
}

pub(super) fn digest(bytes: &[u8]) -> String {
    let hash: [u8; 32] = sha2::Sha256::digest(bytes).into();
    format!("sha256:{}", hex::encode(hash))
}

/// Bytes that do not compress.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
