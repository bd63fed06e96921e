//! One long-lived connection to one member for one lane: requests go out in the order they are
//! started, answers come back by correlation id. Dials when needed, backs off when it fails.
//! Knows no message but the greeting and the claims behind it.
//!
//! ```text
//!  idle ──start──► connecting ──ok──► up ──error, or silence with work outstanding──┐
//!   ▲                  │ error                                                      │
//!   └── backoff over ◄─┴──────────────────────── down (requests fail at once) ◄─────┘
//! ```

use super::frame::{Frame, Frames};
use super::wire::{Hello, Lane, kind};
use super::witness::Witness;
use super::{Dialer, Member, PeerStream};
use crate::codec;
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio_util::codec::{Encoder, Framed, FramedRead};
use tokio_util::sync::CancellationToken;

/// Dialing and the exchange of greetings take no longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Work outstanding and nothing heard for this long: the connection is dead, whatever TCP thinks.
/// Well above one bad fsync on the other side.
const SILENCE_MAX: Duration = Duration::from_secs(3);
const SILENCE_CHECK: Duration = Duration::from_millis(250);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Requests outstanding on one link.
const OUTSTANDING_MAX: usize = 16 << 10;
/// Bytes of frames waiting to be written on one link.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Frames are gathered into one write of about this size.
const WRITE_BYTES: usize = 256 << 10;

/// Why a request got no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// It never left this process.
    #[error("not sent: {0}")]
    NotSent(String),
    /// The connection was lost after it may have left.
    #[error("lost: {0}")]
    Lost(String),
    /// The other member could not serve it.
    #[error("the other member says: {0}")]
    Failed(String),
    /// No answer in time.
    #[error("no answer in {0:?}")]
    Timeout(Duration),
}

type Answer = oneshot::Sender<Result<Bytes, LinkError>>;

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Connecting,
    Up,
    Down(String),
}

#[derive(Default)]
struct Inner {
    state: State,
    next_id: u64,
    queue: VecDeque<Frame>,
    queued_bytes: usize,
    /// `true` once written.
    pending: HashMap<u64, (bool, Answer)>,
    /// Since when something was sent and nothing was heard.
    silent_since: Option<Instant>,
}

struct Shared {
    inner: Mutex<Inner>,
    wake: Notify,
    closed: CancellationToken,
}

/// Whom a link leads to.
pub(crate) struct Target {
    pub(crate) id: u64,
    pub(crate) member: Member,
    pub(crate) lane: Lane,
    pub(crate) from: u64,
    pub(crate) cluster_id: String,
    pub(crate) dialer: Arc<dyn Dialer>,
    pub(crate) witness: Arc<Witness>,
}

/// See the module. Dropping it closes the connection.
pub(crate) struct Link {
    shared: Arc<Shared>,
}

/// An outstanding request; dropping it forgets the answer.
pub(crate) struct Ticket {
    id: u64,
    shared: Arc<Shared>,
    answer: oneshot::Receiver<Result<Bytes, LinkError>>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.inner.lock().pending.remove(&self.id);
    }
}

impl Ticket {
    pub(crate) async fn wait(mut self, limit: Duration) -> Result<Bytes, LinkError> {
        match tokio::time::timeout(limit, &mut self.answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(LinkError::Lost("the link was closed".into())),
            Err(_) => Err(LinkError::Timeout(limit)),
        }
    }
}

impl Link {
    pub(crate) fn new(target: Target, runtime: &Handle) -> Self {
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner::default()),
            wake: Notify::new(),
            closed: CancellationToken::new(),
        });
        let task = shared.clone();
        runtime.spawn(async move {
            let closed = task.closed.clone();
            closed.run_until_cancelled(run(&task, &target)).await;
            task.fail_all("the link was closed", State::Down("closed".into()));
        });
        Self { shared }
    }

    /// Queue a request; the order of calls is the order on the wire.
    pub(crate) fn start(&self, kind: u8, payload: Bytes) -> Result<Ticket, LinkError> {
        let (tx, answer) = oneshot::channel();
        let id = {
            let mut inner = self.shared.inner.lock();
            if let State::Down(why) = &inner.state {
                return Err(LinkError::NotSent(why.clone()));
            }
            if inner.pending.len() >= OUTSTANDING_MAX || inner.queued_bytes >= QUEUE_BYTES_MAX {
                return Err(LinkError::NotSent(
                    "too much is waiting on this connection".into(),
                ));
            }
            inner.next_id += 1;
            let id = inner.next_id;
            inner.queued_bytes += payload.len();
            inner.queue.push_back(Frame { kind, id, payload });
            inner.pending.insert(id, (false, tx));
            id
        };
        self.shared.wake.notify_one();
        Ok(Ticket {
            id,
            shared: self.shared.clone(),
            answer,
        })
    }

    /// Request and answer.
    pub(crate) async fn call(
        &self,
        kind: u8,
        payload: Bytes,
        limit: Duration,
    ) -> Result<Bytes, LinkError> {
        self.start(kind, payload)?.wait(limit).await
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

impl Shared {
    fn fail_all(&self, why: &str, next: State) {
        let pending = {
            let mut inner = self.inner.lock();
            inner.state = next;
            inner.queue.clear();
            inner.queued_bytes = 0;
            inner.silent_since = None;
            std::mem::take(&mut inner.pending)
        };
        for (written, answer) in pending.into_values() {
            let why = why.to_string();
            let error = if written {
                LinkError::Lost(why)
            } else {
                LinkError::NotSent(why)
            };
            // The asker may have given up.
            let _ = answer.send(Err(error));
        }
    }

    fn has_work(&self) -> bool {
        !self.inner.lock().queue.is_empty()
    }

    /// Move queued frames into `out`; requests nobody waits for any more are not sent.
    fn gather(&self, out: &mut BytesMut) {
        let mut inner = self.inner.lock();
        while out.len() < WRITE_BYTES {
            let Some(frame) = inner.queue.pop_front() else {
                break;
            };
            inner.queued_bytes -= frame.payload.len();
            let Some((written, _)) = inner.pending.get_mut(&frame.id) else {
                continue;
            };
            *written = true;
            let id = frame.id;
            if let Err(e) = Frames.encode(frame, out)
                && let Some((_, answer)) = inner.pending.remove(&id)
            {
                // The asker may have given up.
                let _ = answer.send(Err(LinkError::NotSent(e.to_string())));
            }
        }
        if !out.is_empty() {
            inner.silent_since.get_or_insert_with(Instant::now);
        }
    }

    fn heard(&self, frame: Frame) {
        let answer = {
            let mut inner = self.inner.lock();
            let pending = inner.pending.remove(&frame.id);
            inner.silent_since = (!inner.pending.is_empty()).then(Instant::now);
            pending
        };
        let Some((_, answer)) = answer else { return };
        let outcome = match frame.kind {
            kind::ANSWER => Ok(frame.payload),
            _ => Err(LinkError::Failed(
                String::from_utf8_lossy(&frame.payload).into_owned(),
            )),
        };
        // The asker may have given up.
        let _ = answer.send(outcome);
    }

    fn silent(&self) -> bool {
        self.inner
            .lock()
            .silent_since
            .is_some_and(|at| at.elapsed() > SILENCE_MAX)
    }
}

async fn run(shared: &Shared, target: &Target) {
    let mut backoff = BACKOFF.0;
    loop {
        while !shared.has_work() {
            shared.wake.notified().await;
        }
        shared.inner.lock().state = State::Connecting;
        let why = match connect(target).await {
            Ok(stream) => {
                backoff = BACKOFF.0;
                shared.inner.lock().state = State::Up;
                tracing::debug!(peer = target.id, lane = ?target.lane, "peer connected");
                let error = converse(shared, stream).await;
                tracing::info!(peer = target.id, lane = ?target.lane, %error, "peer connection lost");
                error.to_string()
            }
            Err(error) => {
                tracing::debug!(peer = target.id, lane = ?target.lane, %error, "peer not reached");
                error.to_string()
            }
        };
        shared.fail_all(&why, State::Down(why.clone()));
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF.1);
        shared.inner.lock().state = State::Idle;
    }
}

/// Dial and exchange greetings.
pub(crate) async fn connect(target: &Target) -> io::Result<Framed<Box<dyn PeerStream>, Frames>> {
    let greet = async {
        let stream = target.dialer.dial(target.id, &target.member).await?;
        let mut framed = Framed::new(stream, Frames);
        let hello = Hello {
            cluster_id: target.cluster_id.clone(),
            from: target.from,
            to: target.id,
            lane: target.lane,
        };
        let payload = codec::encode(&hello).into();
        framed
            .send(Frame {
                kind: kind::HELLO,
                id: 0,
                payload,
            })
            .await?;
        let answer = framed.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
        if answer.kind != kind::ANSWER {
            let why = String::from_utf8_lossy(&answer.payload);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        // A snapshot goes to those only with whom entries were exchanged before.
        if target.lane != Lane::Snapshot {
            claim(&mut framed, &target.witness).await?;
        }
        Ok(framed)
    };
    tokio::time::timeout(CONNECT_TIMEOUT, greet)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Both sides say how far their disks go, before anything else is said.
async fn claim(
    framed: &mut Framed<Box<dyn PeerStream>, Frames>,
    witness: &Witness,
) -> io::Result<()> {
    let claim = Frame {
        kind: kind::CLAIM,
        id: 0,
        payload: codec::encode(&witness.claim()).into(),
    };
    framed.send(claim).await?;
    loop {
        let answer = framed.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
        match answer.kind {
            kind::PROGRESS => {}
            kind::ANSWER => {
                let verdict = codec::decode(&answer.payload)?;
                let heard = witness.heard(&verdict);
                return heard.map_err(|why| io::Error::new(io::ErrorKind::PermissionDenied, why));
            }
            // A member of a release that knows no claims.
            _ => return Ok(()),
        }
    }
}

async fn converse(shared: &Shared, stream: Framed<Box<dyn PeerStream>, Frames>) -> io::Error {
    let parts = stream.into_parts();
    let (read, write) = tokio::io::split(parts.io);
    let mut reader = FramedRead::with_capacity(read, Frames, 64 << 10);
    reader.read_buffer_mut().extend_from_slice(&parts.read_buf);
    tokio::select! {
        e = read_loop(shared, reader) => e,
        e = write_loop(shared, write) => e,
        e = watchdog(shared) => e,
    }
}

async fn read_loop(
    shared: &Shared,
    mut reader: FramedRead<ReadHalf<Box<dyn PeerStream>>, Frames>,
) -> io::Error {
    loop {
        match reader.next().await {
            Some(Ok(frame)) => shared.heard(frame),
            Some(Err(e)) => return e,
            None => return io::ErrorKind::UnexpectedEof.into(),
        }
    }
}

async fn write_loop(shared: &Shared, mut write: WriteHalf<Box<dyn PeerStream>>) -> io::Error {
    let mut out = BytesMut::with_capacity(WRITE_BYTES);
    loop {
        shared.gather(&mut out);
        if out.is_empty() {
            shared.wake.notified().await;
            continue;
        }
        if let Err(e) = write.write_all(&out).await {
            return e;
        }
        if let Err(e) = write.flush().await {
            return e;
        }
        out.clear();
    }
}

async fn watchdog(shared: &Shared) -> io::Error {
    loop {
        tokio::time::sleep(SILENCE_CHECK).await;
        if shared.silent() {
            return io::Error::new(io::ErrorKind::TimedOut, "no answer from the other side");
        }
    }
}
