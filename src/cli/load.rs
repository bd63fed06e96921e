//! A closed-loop load generator and the two things it can drive. See [`super::bench`].

use anyhow::{Context, anyhow, bail};
use bytes::{BufMut, Bytes, BytesMut};
use http::{Method, Request, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How long and how wide.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Concurrent clients.
    pub clients: usize,
    /// Not counted.
    pub warmup: Duration,
    /// Counted.
    pub counted: Duration,
}

/// Something that can be written to and read from by object number.
pub trait Target: Send + Sync + 'static {
    /// One client's connection.
    type Client: Client;
    /// Connect client number `n`.
    fn connect(&self, n: usize) -> impl Future<Output = anyhow::Result<Self::Client>> + Send;
    /// Number of objects.
    fn objects(&self) -> usize;
    /// Requests of the same kind that preparing it took.
    fn prepared(&self) -> u64 {
        0
    }
}

/// One client.
pub trait Client: Send + 'static {
    /// A durable write of object `n`; `turn` makes its value differ.
    fn write(&mut self, n: usize, turn: u64) -> impl Future<Output = anyhow::Result<()>> + Send;
    /// A linearizable read of object `n`.
    fn read(&mut self, n: usize) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Successful requests in the counted time.
    pub done: u64,
    /// Failed ones.
    pub failed: u64,
    /// Successful requests, those before the counted time and those that prepared it included: what
    /// the processor time of a whole run is divided by.
    pub all: u64,
    /// Counted time.
    pub seconds: f64,
    /// Longest time in which no client had a success.
    pub longest_gap: Duration,
    /// Text of the first failure.
    pub first_error: Option<String>,
    /// When the counted time began, in milliseconds of the Unix epoch.
    pub begin_unix_ms: u64,
    /// Every [`SLICE`] of the counted time.
    pub slices: Vec<Slice>,
    sorted_us: Vec<u32>,
}

/// Length of a [`Slice`].
pub const SLICE: Duration = Duration::from_millis(100);

/// The successes that ended in one slice of time.
#[derive(Clone, Debug, Default)]
pub struct Slice {
    latencies_us: Vec<u32>,
}

impl Slice {
    /// Successes, 99th percentile and longest latency in milliseconds.
    pub fn figures(&mut self) -> (usize, f64, f64) {
        self.latencies_us.sort_unstable();
        let ms = |q| quantile_ms(&self.latencies_us, q);
        (self.latencies_us.len(), ms(0.99), ms(1.0))
    }
}

pub(super) fn quantile_ms(sorted_us: &[u32], q: f64) -> f64 {
    let Some(last) = sorted_us.len().checked_sub(1) else {
        return 0.0;
    };
    let at = (last as f64 * q).round() as usize;
    f64::from(sorted_us[at.min(last)]) / 1e3
}

impl Summary {
    /// Successes per second.
    pub fn per_second(&self) -> f64 {
        self.done as f64 / self.seconds
    }
    /// Latency that the fraction `q` of successes stayed within.
    pub fn quantile_ms(&self, q: f64) -> f64 {
        quantile_ms(&self.sorted_us, q)
    }
}

#[derive(Default)]
struct Tally {
    latencies_us: Vec<u32>,
    ends: Vec<Instant>,
    all: u64,
    failed: u64,
    first_error: Option<String>,
}

impl Load {
    /// Run the load to its end.
    pub async fn run<T: Target>(self, target: T, writes: bool) -> anyhow::Result<Summary> {
        let target = Arc::new(target);
        let mut clients = Vec::with_capacity(self.clients);
        for n in 0..self.clients {
            clients.push(target.connect(n).await?);
        }
        let begin = Instant::now() + self.warmup;
        let begin_unix_ms = crate::stamp::now_ms() + u64::try_from(self.warmup.as_millis())?;
        let end = begin + self.counted;
        let prepared = target.prepared();
        let mut tasks = Vec::with_capacity(self.clients);
        for (n, client) in clients.into_iter().enumerate() {
            tasks.push(tokio::spawn(one_client(
                Arc::clone(&target),
                client,
                n,
                writes,
                begin,
                end,
            )));
        }
        let mut tallies = Vec::with_capacity(tasks.len());
        for task in tasks {
            tallies.push(task.await.context("a client task ended early")?);
        }
        let mut summary = summarise(tallies, begin, end);
        summary.all += prepared;
        summary.begin_unix_ms = begin_unix_ms;
        Ok(summary)
    }
}

async fn one_client<T: Target>(
    target: Arc<T>,
    mut client: T::Client,
    n: usize,
    writes: bool,
    begin: Instant,
    end: Instant,
) -> Tally {
    let mut tally = Tally::default();
    let objects = target.objects();
    let mut turn = 0_u64;
    loop {
        let start = Instant::now();
        if start >= end {
            return tally;
        }
        // A walk with a stride coprime to most sizes: clients do not march in step.
        let object = (n * 7919 + usize::try_from(turn).unwrap_or(0) * 31) % objects;
        turn += 1;
        let result = if writes {
            client.write(object, turn).await
        } else {
            client.read(object).await
        };
        let now = Instant::now();
        tally.all += u64::from(result.is_ok());
        match result {
            Ok(()) if start >= begin && now <= end => {
                let micros = now.duration_since(start).as_micros();
                tally
                    .latencies_us
                    .push(u32::try_from(micros).unwrap_or(u32::MAX));
                tally.ends.push(now);
            }
            Ok(()) => {}
            Err(error) => {
                tally.failed += 1;
                tally
                    .first_error
                    .get_or_insert_with(|| format!("{error:#}"));
                match target.connect(n).await {
                    Ok(fresh) => client = fresh,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        }
    }
}

fn summarise(tallies: Vec<Tally>, begin: Instant, end: Instant) -> Summary {
    let mut summary = Summary {
        seconds: (end - begin).as_secs_f64(),
        ..Summary::default()
    };
    let mut ends = Vec::new();
    let slice = |at: Instant| ((at - begin).as_micros() / SLICE.as_micros()) as usize;
    summary.slices = vec![Slice::default(); slice(end).max(1)];
    let newest = summary.slices.len() - 1;
    for tally in tallies {
        for (&at, &us) in tally.ends.iter().zip(&tally.latencies_us) {
            summary.slices[slice(at).min(newest)].latencies_us.push(us);
        }
        summary.all += tally.all;
        summary.failed += tally.failed;
        summary.first_error = summary.first_error.or(tally.first_error);
        summary.sorted_us.extend(tally.latencies_us);
        ends.extend(tally.ends);
    }
    summary.done = summary.sorted_us.len() as u64;
    summary.sorted_us.sort_unstable();
    ends.sort_unstable();
    let mut last = begin;
    for at in ends.into_iter().chain([end]) {
        summary.longest_gap = summary.longest_gap.max(at.saturating_duration_since(last));
        last = at;
    }
    summary
}

pub(super) fn host_of(endpoint: &str) -> anyhow::Result<String> {
    let rest = endpoint
        .strip_prefix("http://")
        .ok_or_else(|| anyhow!("endpoint {endpoint} must begin with http://"))?;
    Ok(rest.trim_end_matches('/').to_owned())
}

async fn dial(host: &str) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(host)
        .await
        .with_context(|| format!("connect to {host}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

// ---- Mainstay over REST -------------------------------------------------------------------------

/// A Mainstay cluster: objects are instances, a write is a metadata update.
#[derive(Debug)]
pub struct Rest {
    hosts: Vec<String>,
    ids: Vec<String>,
    value_bytes: usize,
}

/// One client of a Mainstay cluster.
#[derive(Debug)]
pub struct RestClient {
    link: Link,
    ids: Arc<[String]>,
    value_bytes: usize,
}

/// One kept-alive HTTP connection to a member: one request at a time.
#[derive(Debug)]
pub(super) struct Link {
    host: String,
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Rest {
    /// Start `objects` instances of `template`, or use those of an earlier run.
    pub async fn prepare(
        endpoints: &[String],
        template: &str,
        objects: usize,
        value_bytes: usize,
    ) -> anyhow::Result<Self> {
        let hosts = endpoints
            .iter()
            .map(|e| host_of(e))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut client = Link::open(&hosts[0]).await?;
        let id = client.template(template).await?;
        let listed = client.call(Method::GET, "/api/v1/vm", None).await?;
        let mut ids: Vec<String> = listed
            .as_array()
            .into_iter()
            .flatten()
            .filter(|w| w["external_id"] == "bench")
            .filter_map(|w| w["instance_id"].as_str().map(str::to_owned))
            .collect();
        while ids.len() < objects {
            let count = (objects - ids.len()).min(100);
            let body = json!({"vmid": id, "count": count, "external_id": "bench"});
            let made = client.call(Method::POST, "/api/v1/vm", Some(body)).await?;
            ids.extend(
                made.as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|v| v.as_str().map(str::to_owned)),
            );
        }
        ids.truncate(objects);
        Ok(Self {
            hosts,
            ids,
            value_bytes,
        })
    }
}

impl Target for Rest {
    type Client = RestClient;
    async fn connect(&self, n: usize) -> anyhow::Result<RestClient> {
        let host = &self.hosts[n % self.hosts.len()];
        RestClient::connect(host, Arc::from(self.ids.clone()), self.value_bytes).await
    }
    fn objects(&self) -> usize {
        self.ids.len()
    }
}

impl RestClient {
    async fn connect(host: &str, ids: Arc<[String]>, value_bytes: usize) -> anyhow::Result<Self> {
        Ok(Self {
            link: Link::open(host).await?,
            ids,
            value_bytes,
        })
    }
}

impl Link {
    /// `host` is `HOST:PORT`.
    pub(super) async fn open(host: &str) -> anyhow::Result<Self> {
        let (sender, connection) = http1::handshake(TokioIo::new(dial(host).await?)).await?;
        tokio::spawn(connection);
        let host = host.to_owned();
        Ok(Self { host, sender })
    }

    /// The head of the answer, which is an error unless the status is a good one; its body is still to come.
    pub(super) async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        self.request(request).await
    }

    /// The same for a request that is whole.
    pub(super) async fn request(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> anyhow::Result<Incoming> {
        self.sender.ready().await?;
        let answer = self.sender.send_request(request).await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer.into_body());
        }
        let said = answer.into_body().collect().await?.to_bytes();
        bail!("{status}: {}", String::from_utf8_lossy(&said));
    }

    /// A whole answer.
    pub(super) async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<Bytes> {
        let answer = self.ask(method, path, body.unwrap_or_default()).await?;
        Ok(answer.collect().await?.to_bytes())
    }

    /// The body of an envelope that says `OK`.
    pub(super) async fn call(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        let bytes = self
            .send(method, path, body.map(|b| b.to_string().into_bytes()))
            .await?;
        let mut envelope: Value = serde_json::from_slice(&bytes)?;
        if envelope["status"] != "OK" {
            bail!("{}", envelope["message"]);
        }
        Ok(envelope["body"].take())
    }

    /// Id of the template of that name.
    pub(super) async fn template(&mut self, name: &str) -> anyhow::Result<String> {
        let templates = self
            .call(Method::GET, "/api/v1/registry/vm?apiVer=v1", None)
            .await?;
        let mut templates = templates.as_array().into_iter().flatten();
        templates
            .find(|t| t["name"] == name)
            .and_then(|t| t["id"].as_str().map(str::to_owned))
            .ok_or_else(|| anyhow!("no template {name:?}: push one first"))
    }
}

fn expect_ok(bytes: &[u8]) -> anyhow::Result<()> {
    // Cheap on purpose: the generator shares its cores with what it measures.
    if bytes
        .windows(13)
        .take(64)
        .any(|w| w == b"\"status\":\"OK\"")
    {
        return Ok(());
    }
    bail!("{}", String::from_utf8_lossy(bytes))
}

impl Client for RestClient {
    async fn write(&mut self, n: usize, turn: u64) -> anyhow::Result<()> {
        let path = format!("/api/v1/vm?id={}", self.ids[n]);
        let body = format!(
            "{{\"metadata\":{{\"bench\":\"{turn:0width$}\"}}}}",
            width = self.value_bytes
        );
        expect_ok(
            &self
                .link
                .send(Method::PUT, &path, Some(body.into_bytes()))
                .await?,
        )
    }
    async fn read(&mut self, n: usize) -> anyhow::Result<()> {
        let path = format!("/api/v1/vm?id={}", self.ids[n]);
        expect_ok(&self.link.send(Method::GET, &path, None).await?)
    }
}

// ---- etcd over gRPC -----------------------------------------------------------------------------

/// An etcd cluster: objects are keys, a write is a put, a read is a (linearizable) range.
#[derive(Debug)]
pub struct Etcd {
    hosts: Vec<String>,
    objects: usize,
    value_bytes: usize,
}

/// One HTTP/2 connection that speaks just enough gRPC for Put and Range.
#[derive(Debug)]
pub struct EtcdClient {
    host: String,
    value_bytes: usize,
    sender: http2::SendRequest<Full<Bytes>>,
}

impl Etcd {
    /// Write every key once.
    pub async fn prepare(
        endpoints: &[String],
        objects: usize,
        value_bytes: usize,
    ) -> anyhow::Result<Self> {
        let hosts = endpoints
            .iter()
            .map(|e| host_of(e))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let target = Self {
            hosts,
            objects,
            value_bytes,
        };
        let mut client = target.connect(0).await?;
        for n in 0..objects {
            client.write(n, 0).await?;
        }
        Ok(target)
    }
}

impl Target for Etcd {
    type Client = EtcdClient;
    async fn connect(&self, n: usize) -> anyhow::Result<EtcdClient> {
        let host = self.hosts[n % self.hosts.len()].clone();
        let io = TokioIo::new(dial(&host).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        Ok(EtcdClient {
            host,
            value_bytes: self.value_bytes,
            sender,
        })
    }
    fn objects(&self) -> usize {
        self.objects
    }
    fn prepared(&self) -> u64 {
        self.objects as u64
    }
}

impl EtcdClient {
    async fn unary(&mut self, method: &str, message: &[u8]) -> anyhow::Result<()> {
        // gRPC: one byte "not compressed", four bytes of length, the protobuf message.
        let mut body = BytesMut::with_capacity(message.len() + 5);
        body.put_u8(0);
        body.put_u32(u32::try_from(message.len())?);
        body.put_slice(message);
        let request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("http://{}/etcdserverpb.KV/{method}", self.host))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(body.freeze()))?;
        self.sender.ready().await?;
        let answer = self.sender.send_request(request).await?;
        let early = answer.headers().get("grpc-status").cloned();
        let body = answer.into_body().collect().await?;
        let status = body
            .trailers()
            .and_then(|t| t.get("grpc-status"))
            .cloned()
            .or(early);
        match status {
            Some(code) if code == "0" => Ok(()),
            other => bail!("etcd answered grpc-status {other:?}"),
        }
    }
}

/// A length-delimited protobuf field.
fn put_field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    let mut len = bytes.len();
    while len >= 0x80 {
        out.push(u8::try_from(len & 0x7f).unwrap_or(0) | 0x80);
        len >>= 7;
    }
    out.push(u8::try_from(len).unwrap_or(0));
    out.extend_from_slice(bytes);
}

impl Client for EtcdClient {
    async fn write(&mut self, n: usize, turn: u64) -> anyhow::Result<()> {
        let mut message = Vec::with_capacity(self.value_bytes + 64);
        put_field(&mut message, 1, format!("bench/{n}").as_bytes());
        put_field(
            &mut message,
            2,
            format!("{turn:0width$}", width = self.value_bytes).as_bytes(),
        );
        self.unary("Put", &message).await
    }
    async fn read(&mut self, n: usize) -> anyhow::Result<()> {
        let mut message = Vec::with_capacity(64);
        put_field(&mut message, 1, format!("bench/{n}").as_bytes());
        self.unary("Range", &message).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_lengths_over_127_take_two_bytes() {
        let mut out = Vec::new();
        put_field(&mut out, 2, &[7; 300]);
        assert_eq!(&out[..3], &[0x12, 0xac, 0x02]);
        assert_eq!(out.len(), 303);
    }

    #[test]
    fn the_longest_gap_counts_silence_at_both_ends() {
        let begin = Instant::now();
        let end = begin + Duration::from_secs(10);
        let tally = Tally {
            all: 3,
            latencies_us: vec![1000, 2000],
            ends: vec![
                begin + Duration::from_secs(1),
                begin + Duration::from_secs(8),
            ],
            ..Tally::default()
        };
        let mut summary = summarise(vec![tally], begin, end);
        assert_eq!(summary.longest_gap, Duration::from_secs(7));
        assert_eq!((summary.done, summary.all), (2, 3));
        let done: Vec<usize> = (summary.slices.iter_mut().map(|s| s.figures().0)).collect();
        assert_eq!((done.len(), done[10], done[80], done[81]), (100, 1, 1, 0));
        assert!((summary.quantile_ms(1.0) - 2.0).abs() < 1e-9);
    }
}
