//! Chunks in a bucket of S3-compatible storage: the address, and the objects behind
//! [`mainstay_storage::chunks::Bucket`]. Alone names `object_store`. Refuses to know what is in an object.

use anyhow::{Context, anyhow, bail};
use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use http_body_util::BodyExt;
use mainstay_storage::StorageError;
use mainstay_storage::chunks::{Bucket, ChunkOptions, ChunkStore, SharedOptions};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::{
    CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, HttpClient, HttpConnector,
    HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService, Signer,
    SigningAlgorithm,
};
use object_store::path::Path as Key;
use object_store::{
    ClientOptions, Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    RetryConfig,
};
use sha2::{Digest, Sha256};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// A request with its repetitions takes no longer than about this.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// One attempt: a pack on a slow line.
const ATTEMPT_MAX: Duration = Duration::from_secs(60);
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Length of a block of SHA-256.
const SHA_BLOCK: usize = 64;

/// Where a bucket is, and what of it is kept here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobStore {
    /// Its name.
    pub bucket: String,
    /// What the names of all objects begin with, without a slash at its ends; may be empty.
    pub prefix: String,
    /// `http://host:port`.
    pub endpoint: String,
    /// Bytes of it that are kept on this member's disk.
    pub cache_bytes: u64,
}

impl BlobStore {
    /// From `s3://bucket/prefix` and an endpoint; a sentence if either is wrong.
    pub fn parse(url: &str, endpoint: Option<String>, cache_bytes: u64) -> Result<Self, String> {
        let form = "give s3://BUCKET/PREFIX, such as s3://chunks/cloud-1";
        let rest = url
            .strip_prefix("s3://")
            .ok_or_else(|| format!("--blob-store {url}: {form}"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let good = !bucket.is_empty()
            && bucket.chars().all(plain)
            && prefix
                .split('/')
                .all(|part| part.chars().all(plain) && part != ".." && part != ".")
            && !prefix.contains("//");
        if !good {
            return Err(format!(
                "--blob-store {url}: {form}; letters, digits, '-', '_' and '.' only"
            ));
        }
        let named = endpoint
            .or_else(|| std::env::var("AWS_ENDPOINT_URL_S3").ok())
            .or_else(|| std::env::var("AWS_ENDPOINT_URL").ok());
        let Some(endpoint) = named else {
            return Err(
                "--blob-store needs --s3-endpoint http://HOST:PORT (or AWS_ENDPOINT_URL)"
                    .to_owned(),
            );
        };
        if !endpoint.starts_with("http://") {
            return Err(format!(
                "--s3-endpoint {endpoint}: this release speaks http only; for https, name a proxy near this member that does"
            ));
        }
        Ok(Self {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint,
            cache_bytes,
        })
    }
}

/// Who may use a bucket.
#[derive(Clone)]
pub struct Access {
    /// Access key.
    pub id: String,
    /// Its secret.
    pub secret: String,
}

impl Access {
    /// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    pub fn from_env() -> anyhow::Result<Self> {
        let value = |name: &str| match std::env::var(name) {
            Ok(value) if !value.is_empty() => Ok(value),
            _ => Err(anyhow!("--blob-store needs {name} in the environment")),
        };
        Ok(Self {
            id: value("AWS_ACCESS_KEY_ID")?,
            secret: value("AWS_SECRET_ACCESS_KEY")?,
        })
    }
}

/// Open the chunks of a member of a cluster in `dir`, on its disk, in packs of about this length, or in a
/// bucket. Blocks, outside of async code.
pub fn open_chunks(
    place: Option<&BlobStore>,
    dir: &Path,
    (member, cluster): (u64, &str),
    (pack_len, grace): (u64, Duration),
    runtime: Handle,
) -> anyhow::Result<ChunkStore> {
    let there = |wanted: &dyn Fn(&str) -> bool| {
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
        names
            .into_iter()
            .any(|entry| entry.file_name().to_str().is_some_and(wanted))
    };
    let Some(place) = place else {
        if there(&|name| name == "index") {
            bail!(
                "{} belongs to a bucket: start with the --blob-store that it was used with, or, once other members hold everything, move it away",
                dir.display()
            );
        }
        let options = ChunkOptions {
            pack_len,
            ..ChunkOptions::default()
        };
        return Ok(ChunkStore::open_with(dir, options)?);
    };
    if there(&|name| name.ends_with(".mspk")) {
        bail!(
            "{} holds chunks on this member's disk: to use --blob-store, move it away once other members hold everything (mainstay template replicas), one member at a time",
            dir.display()
        );
    }
    let bucket = S3Bucket::new(place, &Access::from_env()?, runtime)?;
    let mut options = SharedOptions::new(member, cluster, place.cache_bytes);
    options.settle = options.settle.min(grace);
    let chunks = ChunkStore::open_shared(dir, Arc::new(bucket), &options)?;
    match chunks.greet() {
        Err(error @ StorageError::Foreign(_)) => return Err(error.into()),
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(
                error,
                "the bucket does not answer: until it does, only what is kept here can be read"
            );
        }
        Ok(()) => {}
    }
    Ok(chunks)
}

/// A bucket behind HTTP. Calls block: not for threads that run async code.
#[derive(Debug)]
pub struct S3Bucket {
    store: AmazonS3,
    prefix: String,
    runtime: Handle,
}

impl S3Bucket {
    /// What else there is to say comes from the environment, such as `AWS_REGION`. Asks nothing yet.
    pub fn new(place: &BlobStore, access: &Access, runtime: Handle) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_MAX)
            .timeout(ATTEMPT_MAX)
            .build()
            .context("cannot make a client for --s3-endpoint")?;
        let retry = RetryConfig {
            max_retries: 4,
            retry_timeout: ANSWER_MAX,
            ..RetryConfig::default()
        };
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(&place.bucket)
            .with_endpoint(&place.endpoint)
            .with_access_key_id(&access.id)
            .with_secret_access_key(&access.secret)
            .with_virtual_hosted_style_request(false)
            .with_allow_http(true)
            .with_http_connector(Line(client))
            .with_retry(retry)
            .with_disable_bulk_delete(true)
            .with_crypto_provider(Arc::new(Sha))
            .build()
            .context("cannot use --blob-store")?;
        Ok(Self {
            store,
            prefix: place.prefix.clone(),
            runtime,
        })
    }

    fn key(&self, name: &str) -> Key {
        match self.prefix.is_empty() {
            true => Key::from(name),
            false => Key::from(format!("{}/{name}", self.prefix)),
        }
    }

    fn ask<T>(&self, answer: impl Future<Output = Result<T, Error>>) -> io::Result<T> {
        self.runtime.block_on(answer).map_err(|error| {
            let kind = match &error {
                // A bucket that is not there says nothing about an object.
                Error::NotFound { .. } if !format!("{error:?}").contains("NoSuchBucket") => {
                    io::ErrorKind::NotFound
                }
                _ => io::ErrorKind::Other,
            };
            io::Error::new(kind, error)
        })
    }
}

impl Bucket for S3Bucket {
    fn put(&self, key: &str, body: Bytes) -> io::Result<()> {
        self.ask(self.store.put(&self.key(key), body.into()))
            .map(drop)
    }

    fn create(&self, key: &str, body: Bytes) -> io::Result<bool> {
        let options = PutOptions::from(PutMode::Create);
        let key = self.key(key);
        self.ask(async {
            match self.store.put_opts(&key, body.into(), options).await {
                Ok(_) => Ok(true),
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        })
    }

    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Bytes> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            ..GetOptions::default()
        };
        let key = self.key(key);
        self.ask(async { self.store.get_opts(&key, options).await?.bytes().await })
    }

    fn size(&self, key: &str) -> io::Result<u64> {
        self.ask(self.store.head(&self.key(key)))
            .map(|meta| meta.size)
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> io::Result<Vec<(String, u64)>> {
        let prefix = self.key(prefix.trim_end_matches('/'));
        let listed = match after {
            None => self.store.list(Some(&prefix)),
            Some(after) => self.store.list_with_offset(Some(&prefix), &self.key(after)),
        };
        let found: Vec<object_store::ObjectMeta> = self.ask(listed.try_collect())?;
        let skip = if self.prefix.is_empty() {
            0
        } else {
            self.prefix.len() + 1
        };
        let mut named: Vec<(String, u64)> = found
            .into_iter()
            .filter_map(|meta| Some((meta.location.as_ref().get(skip..)?.to_owned(), meta.size)))
            .collect();
        named.sort();
        Ok(named)
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        match self.ask(self.store.delete(&self.key(key))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// The way to the bucket: the HTTP client that this program has anyway.
#[derive(Clone, Debug)]
struct Line(reqwest::Client);

impl HttpConnector for Line {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Line {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string();
        let body = body.collect().await?.to_bytes();
        let request = self.0.request(parts.method, url).headers(parts.headers);
        let response = request.body(body).send().await.map_err(failed)?;
        let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
        let body = HttpResponseBody::new(body.map_err(failed));
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// What may be tried again says so.
fn failed(error: reqwest::Error) -> HttpError {
    let kind = if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_connect() {
        HttpErrorKind::Connect
    } else if error.is_request() || error.is_body() {
        HttpErrorKind::Interrupted
    } else {
        HttpErrorKind::Unknown
    };
    HttpError::new(kind, error.without_url())
}

/// What requests are signed with: the SHA-256 that this program has anyway.
#[derive(Debug)]
struct Sha;

impl CryptoProvider for Sha {
    fn digest(&self, algorithm: DigestAlgorithm) -> object_store::Result<Box<dyn DigestContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => Ok(Box::new(Sum::default())),
            _ => Err(unknown()),
        }
    }

    fn hmac(
        &self,
        algorithm: DigestAlgorithm,
        secret: &[u8],
    ) -> object_store::Result<Box<dyn HmacContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => Ok(Box::new(Hmac::new(secret))),
            _ => Err(unknown()),
        }
    }

    fn sign(&self, _: SigningAlgorithm, _: &[u8]) -> object_store::Result<Box<dyn Signer>> {
        Err(unknown())
    }
}

fn unknown() -> Error {
    Error::NotSupported {
        source: "only SHA-256 is there".into(),
    }
}

#[derive(Default)]
struct Sum {
    sha: Sha256,
    out: [u8; 32],
}

impl DigestContext for Sum {
    fn update(&mut self, data: &[u8]) {
        self.sha.update(data);
    }

    fn finish(&mut self) -> object_store::Result<&[u8]> {
        self.out = std::mem::take(&mut self.sha).finalize().into();
        Ok(&self.out)
    }
}

/// HMAC-SHA-256 (RFC 2104).
struct Hmac {
    inner: Sha256,
    outer: Sha256,
    out: [u8; 32],
}

impl Hmac {
    fn new(secret: &[u8]) -> Self {
        let mut key = [0; SHA_BLOCK];
        match key.get_mut(..secret.len()) {
            Some(start) => start.copy_from_slice(secret),
            None => key[..32].copy_from_slice(&Sha256::digest(secret)),
        }
        Self {
            inner: Sha256::new_with_prefix(key.map(|b| b ^ 0x36)),
            outer: Sha256::new_with_prefix(key.map(|b| b ^ 0x5c)),
            out: [0; 32],
        }
    }
}

impl HmacContext for Hmac {
    fn update(&mut self, data: &[u8]) {
        self.inner.update(data);
    }

    fn finish(&mut self) -> object_store::Result<&[u8]> {
        let inner = std::mem::take(&mut self.inner).finalize();
        self.outer.update(inner);
        self.out = std::mem::take(&mut self.outer).finalize().into();
        Ok(&self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        let parse = |url: &str, endpoint: Option<&str>| {
            BlobStore::parse(url, endpoint.map(str::to_owned), 1)
        };
        let http = Some("http://127.0.0.1:9000");
        let good = parse("s3://chunks/cloud/1/", http).unwrap();
        assert_eq!(
            (good.bucket.as_str(), good.prefix.as_str()),
            ("chunks", "cloud/1")
        );
        assert_eq!(parse("s3://chunks", http).unwrap().prefix, "");
        for bad in [
            "chunks",
            "s3://",
            "s3:///x",
            "s3://a b/c",
            "s3://a/../b",
            "s3://a/b//c",
        ] {
            let refused = parse(bad, http).unwrap_err();
            assert!(refused.contains("s3://BUCKET/PREFIX"), "{bad}: {refused}");
        }
        let refused = parse("s3://chunks", Some("https://s3.example.com")).unwrap_err();
        assert!(refused.contains("http only"), "{refused}");
    }

    /// RFC 4231, test cases 2 and 6.
    #[test]
    fn signatures_are_the_standards() {
        let hmac = |key: &[u8], data: &[u8]| {
            let mut hmac = Hmac::new(key);
            hmac.update(data);
            hex::encode(hmac.finish().unwrap())
        };
        assert_eq!(
            hmac(b"Jefe", b"what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert_eq!(
            hmac(
                &[0xaa; 131],
                b"Test Using Larger Than Block-Size Key - Hash Key First"
            ),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }
}
