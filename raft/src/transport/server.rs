//! The accepting end of a peer connection: greeting, then requests to the [`Service`] and answers
//! back. Appends are handed on in the order they came and answered in that order. Knows no message
//! but the greeting.

use super::PeerStream;
use super::frame::{Frame, Frames};
use super::wire::{Hello, Lane, kind};
use crate::codec;
use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, Either, ready};
use futures::stream::{FuturesOrdered, FuturesUnordered};
use futures::{FutureExt, SinkExt, StreamExt};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio_util::codec::{Encoder, Framed, FramedRead};

/// The greeting must arrive in this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests being served on one connection; beyond it, reading stops.
const SERVING_MAX: usize = 4096;
/// The other side takes silence for death: say that we are still at it.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// A peer that takes no byte for this long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// The bytes of an answer, or why there is none.
pub(crate) type Served = Result<Bytes, String>;

/// A framed connection that has been greeted.
pub(crate) type Greeted = Framed<Box<dyn PeerStream>, Frames>;

/// What stands behind the connection.
pub(crate) trait Service: Send + Sync + 'static {
    /// Lives as long as a stream of requests.
    type Open: Send;
    /// Refuse a peer by its greeting, in words.
    fn admit(&self, hello: &Hello) -> Result<(), String>;
    /// A stream of requests from this member begins.
    fn opened(&self, from: u64) -> Self::Open;
    /// Serve one request. The first poll must hand appends on, so that they keep their order.
    fn request(self: Arc<Self>, kind: u8, payload: Bytes) -> BoxFuture<'static, Served>;
    /// Receive a snapshot over a connection of its own.
    fn snapshot(self: Arc<Self>, from: u64, stream: Greeted) -> BoxFuture<'static, io::Result<()>>;
}

/// Serve an accepted stream until it ends.
pub(crate) async fn serve<S: Service>(service: Arc<S>, stream: Box<dyn PeerStream>) {
    let mut framed = Framed::new(stream, Frames);
    let hello = match greet(&*service, &mut framed).await {
        Ok(hello) => hello,
        Err(error) => {
            tracing::warn!(%error, "peer refused");
            return;
        }
    };
    let outcome = match hello.lane {
        Lane::Snapshot => service.snapshot(hello.from, framed).await,
        Lane::Control | Lane::Data => {
            let _open = service.opened(hello.from);
            converse(service, framed).await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(peer = hello.from, lane = ?hello.lane, %error, "peer connection ended");
    }
}

async fn greet<S: Service>(service: &S, framed: &mut Greeted) -> io::Result<Hello> {
    let next = tokio::time::timeout(HELLO_TIMEOUT, framed.next()).await;
    let first = next.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
    let verdict = match first {
        None => return Err(io::ErrorKind::UnexpectedEof.into()),
        Some(Err(e)) => Err(e.to_string()),
        Some(Ok(frame)) if frame.kind != kind::HELLO => {
            Err("the first frame is no greeting".into())
        }
        Some(Ok(frame)) => codec::decode::<Hello>(&frame.payload)
            .map_err(|e| e.to_string())
            .and_then(|hello| service.admit(&hello).map(|()| hello)),
    };
    match verdict {
        Ok(hello) => {
            framed
                .send(Frame {
                    kind: kind::ANSWER,
                    id: 0,
                    payload: Bytes::new(),
                })
                .await?;
            Ok(hello)
        }
        Err(why) => {
            let payload = Bytes::from(why.clone().into_bytes());
            framed
                .send(Frame {
                    kind: kind::FAILED,
                    id: 0,
                    payload,
                })
                .await?;
            Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
        }
    }
}

type Job = BoxFuture<'static, Frame>;

/// Requests in work: appends in order, the rest as they finish.
#[derive(Default)]
struct InWork {
    ordered: FuturesOrdered<Either<futures::future::Ready<Frame>, Job>>,
    others: FuturesUnordered<Job>,
}

impl InWork {
    fn len(&self) -> usize {
        self.ordered.len() + self.others.len()
    }

    async fn accept<S: Service>(&mut self, service: &Arc<S>, frame: Frame) {
        let Frame { kind, id, payload } = frame;
        let served = service.clone().request(kind, payload);
        let mut job: Job = async move { answer(id, served.await) }.boxed();
        if kind != self::kind::APPEND {
            self.others.push(job);
            return;
        }
        // Polled once here, so that it is queued in the core before the next one is.
        match futures::poll!(&mut job) {
            std::task::Poll::Ready(frame) => self.ordered.push_back(Either::Left(ready(frame))),
            std::task::Poll::Pending => self.ordered.push_back(Either::Right(job)),
        }
    }

    /// The next answer; never without work.
    async fn next(&mut self) -> Frame {
        tokio::select! {
            Some(frame) = self.ordered.next(), if !self.ordered.is_empty() => frame,
            Some(frame) = self.others.next(), if !self.others.is_empty() => frame,
            else => std::future::pending().await,
        }
    }
}

fn answer(id: u64, served: Served) -> Frame {
    match served {
        Ok(payload) => Frame {
            kind: kind::ANSWER,
            id,
            payload,
        },
        Err(why) => Frame {
            kind: kind::FAILED,
            id,
            payload: why.into_bytes().into(),
        },
    }
}

async fn converse<S: Service>(service: Arc<S>, framed: Greeted) -> io::Result<()> {
    let parts = framed.into_parts();
    let (read, mut write) = tokio::io::split(parts.io);
    let mut reader: FramedRead<ReadHalf<_>, _> = FramedRead::with_capacity(read, Frames, 64 << 10);
    reader.read_buffer_mut().extend_from_slice(&parts.read_buf);
    let mut work = InWork::default();
    let mut out = BytesMut::new();
    let mut progress = tokio::time::interval(PROGRESS_EVERY);
    loop {
        tokio::select! {
            frame = reader.next(), if work.len() < SERVING_MAX => match frame {
                None => return Ok(()),
                Some(frame) => work.accept(&service, frame?).await,
            },
            frame = work.next() => Frames.encode(frame, &mut out)?,
            _ = progress.tick() => if work.len() > 0 {
                Frames.encode(Frame { kind: kind::PROGRESS, id: 0, payload: Bytes::new() }, &mut out)?;
            },
        }
        // Everything that is there already goes along: fewer and larger writes.
        while work.len() < SERVING_MAX {
            match reader.next().now_or_never() {
                Some(Some(frame)) => work.accept(&service, frame?).await,
                _ => break,
            }
        }
        while let Some(frame) = work.next().now_or_never() {
            Frames.encode(frame, &mut out)?;
        }
        write_out(&mut write, &mut out).await?;
    }
}

async fn write_out(
    write: &mut WriteHalf<Box<dyn PeerStream>>,
    out: &mut BytesMut,
) -> io::Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let all = async {
        write.write_all(out).await?;
        write.flush().await
    };
    tokio::time::timeout(WRITE_TIMEOUT, all)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    out.clear();
    Ok(())
}
