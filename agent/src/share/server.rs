//! The port at which other nodes get chunks: one call of the transfer protocol, for those who show the cluster's key.
//! Bounded in connections, in answers at once and in time, so that the node's VMs do not suffer from greedy or
//! stalled peers.

use super::{Files, Shares};
use crate::transfer::api::{CHUNKS_GET, HELD, NODE_IDS_MAX};
use crate::transfer::{Id, WireRecord};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

/// Open connections.
const CONNECTIONS_MAX: usize = 256;
/// Answers that are read and sent at once.
const ANSWERS_MAX: usize = 16;
/// A request's head and body, and each piece of an answer, must move within this.
const STALL_MAX: Duration = Duration::from_secs(20);
/// Chunks that are read and sent together.
const SEND_CHUNKS: usize = 32;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What nodes of one cluster show each other. Empty until a controller has told it: then nobody is served.
#[derive(Clone, Debug, Default)]
pub struct Key(Arc<RwLock<String>>);

impl Key {
    /// A controller told it.
    pub fn set(&self, key: &str) {
        if *self.0.read() != key {
            key.clone_into(&mut self.0.write());
        }
    }

    /// As told last.
    pub fn get(&self) -> String {
        self.0.read().clone()
    }

    /// Compared by digest: how long it takes says nothing of the key.
    fn admits(&self, shown: Option<&str>) -> bool {
        let key = self.0.read();
        let digest = |text: &str| blake3::hash(text.as_bytes());
        !key.is_empty() && shown.is_some_and(|shown| digest(shown) == digest(&key))
    }
}

/// The port to share on. One that was asked for must be free; of the usual one, any other will do.
pub async fn bind(asked: Option<SocketAddr>, usual: SocketAddr) -> std::io::Result<TcpListener> {
    match asked {
        Some(at) => TcpListener::bind(at).await,
        None => match TcpListener::bind(usual).await {
            Ok(listener) => Ok(listener),
            Err(_) => TcpListener::bind((usual.ip(), 0)).await,
        },
    }
}

#[derive(Clone)]
struct Port {
    shares: Arc<Shares>,
    key: Key,
    answers: Arc<Semaphore>,
}

/// Serve for ever.
pub async fn serve(listener: TcpListener, shares: Arc<Shares>, key: Key) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let port = Port {
        shares,
        key,
        answers: Arc::new(Semaphore::new(ANSWERS_MAX)),
    };
    let mut open = tokio::task::JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let port = port.clone();
                // Ends with the port, as with the agent.
                open.spawn(async move {
                    connection(stream, port).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of another node");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, port: Port) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let port = port.clone();
        async move { Ok::<_, Infallible>(port.answer(request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(STALL_MAX * 3)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection of another node broke");
    }
}

impl Port {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        if path != CHUNKS_GET {
            return say(StatusCode::NOT_FOUND, "a node answers one call only");
        }
        if request.method() != Method::POST {
            return say(StatusCode::METHOD_NOT_ALLOWED, "POST it");
        }
        let shown = request.headers().get(header::AUTHORIZATION);
        let shown = shown.and_then(|h| h.to_str().ok()?.strip_prefix("Bearer "));
        if !self.key.admits(shown) {
            return say(StatusCode::UNAUTHORIZED, "not a node of this cluster");
        }
        let query = request.uri().query().unwrap_or_default();
        let manifest = query.split('&').find_map(|q| q.strip_prefix("manifest="));
        let Some(manifest) = manifest.map(str::to_owned) else {
            return say(StatusCode::BAD_REQUEST, "manifest is missing");
        };
        let body = Limited::new(request.into_body(), NODE_IDS_MAX * 32).collect();
        let bytes = match timeout(STALL_MAX, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return say(StatusCode::BAD_REQUEST, "too many chunk names at once"),
            Err(_) => return say(StatusCode::REQUEST_TIMEOUT, "the body stalled"),
        };
        let (ids, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return say(StatusCode::BAD_REQUEST, "chunk names are 32 bytes each");
        }
        let shares = Arc::clone(&self.shares);
        let found = tokio::task::spawn_blocking(move || shares.find(&manifest)).await;
        match found.ok().flatten() {
            Some(files) => self.send(files, ids.to_vec()),
            None => say(StatusCode::NOT_FOUND, "this node has nothing of that image"),
        }
    }

    fn send(&self, files: Files, ids: Vec<Id>) -> Response<Body> {
        let held: u64 = files.iter().map(|file| file.held()).sum();
        let (sender, receiver) = mpsc::channel(1);
        let answers = Arc::clone(&self.answers);
        tokio::spawn(async move {
            let Ok(_turn) = answers.acquire_owned().await else {
                return;
            };
            for wanted in ids.chunks(SEND_CHUNKS) {
                let (files, wanted) = (files.clone(), wanted.to_vec());
                let read = move || WireRecord::frame_all(&records(&files, &wanted));
                let piece = tokio::task::spawn_blocking(read).await;
                let piece = piece.map_err(std::io::Error::other);
                // A peer that takes nothing for so long has gone.
                let sent = timeout(STALL_MAX, sender.send(piece)).await;
                if !matches!(sent, Ok(Ok(()))) {
                    return;
                }
            }
        });
        let pieces = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|piece| (piece, receiver))
        });
        let body = StreamBody::new(pieces.fuse().map(|piece| piece.map(Frame::data)));
        let mut response = Response::new(BodyExt::boxed_unsync(body));
        response.headers_mut().insert(HELD, held.into());
        response
    }
}

/// Those of these chunks that are here, each once. Blocks.
fn records(files: &Files, ids: &[Id]) -> Vec<WireRecord> {
    let mut out = Vec::with_capacity(ids.len());
    let mut lacking = ids.to_vec();
    for file in files {
        let found = file.records(&lacking);
        lacking.retain(|id| !found.iter().any(|record| record.id == *id));
        out.extend(found);
    }
    out
}

fn say(status: StatusCode, text: &'static str) -> Response<Body> {
    let body = Full::new(Bytes::from_static(text.as_bytes()));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response
}
