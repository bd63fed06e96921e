//! HTTP/1.1 by hand: a replay sends the bytes that its client sends, and sees what came back and over which
//! connection. Nothing is added and nothing is sent again that the replay did not ask for.

use serde_json::Value;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Largest head of an answer.
const HEAD_MAX: usize = 64 << 10;

/// Requests sent by all replays.
pub(crate) static SENT: AtomicU64 = AtomicU64::new(0);

/// What a request carries.
#[derive(Clone, Debug)]
pub(crate) enum Load {
    /// Nothing, and no length.
    Nothing,
    /// With `Content-Length`.
    Whole(Vec<u8>),
    /// `Transfer-Encoding: chunked`, one chunk each.
    Chunked(Vec<Vec<u8>>),
}

/// Why there is no answer, as far as clients tell the cases apart.
#[derive(Debug)]
pub(crate) enum Broken {
    /// Nobody listens.
    Connect(String),
    /// The connection ended before the answer did.
    Dropped(#[expect(dead_code, reason = "printed when a replay fails")] String),
    /// Not in time.
    Late,
}

/// An answer; its body is unpacked.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) text: String,
    /// It came packed.
    pub(crate) packed: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }
}

/// One client's connection to one address, kept between requests as the client keeps it.
#[derive(Debug)]
pub(crate) struct Wire {
    /// `host:port`, also what `Host` says.
    pub(crate) at: String,
    /// How long a request may take in all.
    pub(crate) limit: Duration,
    /// Is the connection used again?
    pub(crate) keeps: bool,
    /// Headers of every request, after `Host`.
    pub(crate) headers: Vec<(&'static str, &'static str)>,
    idle: Option<TcpStream>,
    /// Requests that went over a connection that an earlier one had used.
    pub(crate) reused: u64,
}

impl Wire {
    pub(crate) fn new(at: &str, limit: Duration, headers: &[(&'static str, &'static str)]) -> Self {
        Self {
            at: at.to_owned(),
            limit,
            keeps: true,
            headers: headers.to_vec(),
            idle: None,
            reused: 0,
        }
    }

    /// The same, with a new connection for each request.
    pub(crate) fn without_memory(self) -> Self {
        Self {
            keeps: false,
            ..self
        }
    }

    /// One request. `target` stands in the request line as it is.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        target: &str,
        more: &[(&str, &str)],
        load: &Load,
    ) -> Result<Answer, Broken> {
        SENT.fetch_add(1, Ordering::Relaxed);
        let mut bytes = format!("{method} {target} HTTP/1.1\r\nHost: {}\r\n", self.at);
        for (name, value) in self.headers.iter().chain(more) {
            bytes.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut bytes = bytes.into_bytes();
        match load {
            Load::Nothing => bytes.extend_from_slice(b"\r\n"),
            Load::Whole(body) => {
                bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).into_bytes());
                bytes.extend_from_slice(body);
            }
            Load::Chunked(parts) => {
                bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                for part in parts {
                    bytes.extend(format!("{:x}\r\n", part.len()).into_bytes());
                    bytes.extend_from_slice(part);
                    bytes.extend_from_slice(b"\r\n");
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
        }
        match timeout(self.limit, self.exchange(&bytes, method)).await {
            Ok(done) => done,
            Err(_) => Err(Broken::Late),
        }
    }

    async fn exchange(&mut self, bytes: &[u8], method: &str) -> Result<Answer, Broken> {
        let mut stream = match self.idle.take() {
            Some(stream) => {
                self.reused += 1;
                stream
            }
            None => TcpStream::connect(&self.at)
                .await
                .map_err(|e| Broken::Connect(e.to_string()))?,
        };
        let dropped = |e: std::io::Error| Broken::Dropped(e.to_string());
        stream.set_nodelay(true).map_err(dropped)?;
        stream.write_all(bytes).await.map_err(dropped)?;
        let (answer, ended) = read(&mut stream, method).await?;
        let last = answer
            .header("connection")
            .is_some_and(|said| said.eq_ignore_ascii_case("close"));
        if self.keeps && !last && !ended {
            self.idle = Some(stream);
        }
        unpacked(answer).await
    }
}

struct Raw {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Raw {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// One answer, and whether the connection ended with it.
async fn read(stream: &mut TcpStream, method: &str) -> Result<(Raw, bool), Broken> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        assert!(bytes.len() < HEAD_MAX, "a head without an end");
        more(stream, &mut bytes).await?;
    };
    let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first.split(' ').nth(1).and_then(|code| code.parse().ok());
    let headers = lines.filter_map(|line| line.split_once(':'));
    let mut raw = Raw {
        status: status.unwrap_or_else(|| panic!("no status in {first:?}")),
        headers: headers
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect(),
        body: bytes.split_off(head + 4),
    };
    let chunked = raw.header("transfer-encoding") == Some("chunked");
    let length = raw.header("content-length").and_then(|n| n.parse().ok());
    let mut ended = false;
    match (chunked, length) {
        _ if method == "HEAD" => {}
        (true, _) => raw.body = chunks(stream, std::mem::take(&mut raw.body)).await?,
        (false, Some(length)) => {
            while raw.body.len() < length {
                more(stream, &mut raw.body).await?;
            }
            assert_eq!(raw.body.len(), length, "more than was announced");
        }
        (false, None) => {
            ended = true;
            while more(stream, &mut raw.body).await.is_ok() {}
        }
    }
    Ok((raw, ended))
}

async fn more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Result<(), Broken> {
    match stream.read_buf(bytes).await {
        Ok(0) => Err(Broken::Dropped("the connection ended".to_owned())),
        Ok(_) => Ok(()),
        Err(e) => Err(Broken::Dropped(e.to_string())),
    }
}

async fn chunks(stream: &mut TcpStream, mut bytes: Vec<u8>) -> Result<Vec<u8>, Broken> {
    let mut body = Vec::new();
    loop {
        let line = loop {
            if let Some(at) = bytes.windows(2).position(|two| two == b"\r\n") {
                break at;
            }
            more(stream, &mut bytes).await?;
        };
        let size = String::from_utf8_lossy(&bytes[..line]).into_owned();
        let size = size.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's length");
        bytes.drain(..line + 2);
        while bytes.len() < size + 2 {
            more(stream, &mut bytes).await?;
        }
        body.extend_from_slice(&bytes[..size]);
        bytes.drain(..size + 2);
        if size == 0 {
            assert!(bytes.is_empty(), "more than the last chunk");
            return Ok(body);
        }
    }
}

async fn unpacked(raw: Raw) -> Result<Answer, Broken> {
    let packed = match raw.header("content-encoding") {
        None => false,
        Some("gzip") => true,
        Some(other) => panic!("packed as {other}, which not every client takes"),
    };
    let body = if packed {
        gunzip(raw.body.clone()).await
    } else {
        raw.body
    };
    Ok(Answer {
        status: raw.status,
        headers: raw.headers,
        text: String::from_utf8(body).expect("text"),
        packed,
    })
}

/// By the system's own tool, which is not what packed it.
async fn gunzip(bytes: Vec<u8>) -> Vec<u8> {
    let mut tool = tokio::process::Command::new("gzip")
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("gzip is there");
    let mut input = tool.stdin.take().unwrap();
    let feed = tokio::spawn(async move { input.write_all(&bytes).await });
    let out = tool.wait_with_output().await.unwrap();
    assert!(out.status.success(), "gzip: {}", out.status);
    feed.await.unwrap().unwrap();
    out.stdout
}
