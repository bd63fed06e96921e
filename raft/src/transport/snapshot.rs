//! A snapshot file over a connection of its own: begin, data, end, then the receiver's verdict.
//! Limits are on progress, not on the whole: a large snapshot over a thin line is fine as long as
//! it moves.
//!
//! The sender cannot see what is between it and the receiver: megabytes of buffers take minutes to drain on
//! a thin line. So the receiver says every second that something arrived, and the sender counts that, as
//! well as every portion that it could hand on, as progress.

use super::frame::Frame;
use super::server::Greeted;
use super::wire::{SnapshotBegin, kind};
use crate::codec;
use bytes::{Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt};
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

/// Bytes per frame. One must pass within [`IDLE_MAX`]: 2 KB/s are enough.
const PORTION: usize = 64 << 10;
/// Nothing moved for this long: give up.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// The receiver says this often that it is still receiving or installing.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

fn frame(kind: u8, payload: impl Into<Bytes>) -> Frame {
    Frame {
        kind,
        id: 0,
        payload: payload.into(),
    }
}

fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

async fn in_time<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(IDLE_MAX, step)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn next(stream: &mut Greeted) -> io::Result<Frame> {
    in_time(async { stream.next().await.ok_or(io::ErrorKind::UnexpectedEof)? }).await
}

/// When something last moved.
struct Moved(Mutex<Instant>);

impl Moved {
    fn now(&self) {
        *self.0.lock() = Instant::now();
    }

    /// Returns when nothing has moved for too long.
    async fn stalled(&self) {
        loop {
            let due = *self.0.lock() + IDLE_MAX;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// Send a file and wait for the verdict: the receiver's answer, encoded by it.
pub(crate) async fn send(
    stream: Greeted,
    begin: &SnapshotBegin,
    file: std::fs::File,
) -> io::Result<Bytes> {
    let (sink, answers) = stream.split();
    let moved = Moved(Mutex::new(Instant::now()));
    let sending = pour(sink, begin, File::from_std(file), &moved);
    tokio::select! {
        outcome = exchange(sending, answers, &moved) => outcome,
        () = moved.stalled() => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn pour(
    mut sink: impl Sink<Frame, Error = io::Error> + Unpin,
    begin: &SnapshotBegin,
    mut file: File,
    moved: &Moved,
) -> io::Result<()> {
    sink.send(frame(kind::SNAPSHOT_BEGIN, codec::encode(begin)))
        .await?;
    loop {
        let mut portion = BytesMut::with_capacity(PORTION);
        let mut limited = (&mut file).take(PORTION as u64);
        while limited.read_buf(&mut portion).await? > 0 {}
        moved.now();
        if portion.is_empty() {
            return sink.send(frame(kind::SNAPSHOT_END, Bytes::new())).await;
        }
        sink.send(frame(kind::SNAPSHOT_DATA, portion.freeze()))
            .await?;
    }
}

/// Listen while sending: a receiver that cannot use the snapshot says so at once.
async fn exchange(
    sending: impl Future<Output = io::Result<()>>,
    mut answers: impl Stream<Item = io::Result<Frame>> + Unpin,
    moved: &Moved,
) -> io::Result<Bytes> {
    tokio::pin!(sending);
    let mut sent = false;
    loop {
        let answer = tokio::select! {
            // What the receiver says comes first: a refusal breaks the sending as well.
            biased;
            answer = answers.next() => answer.ok_or(io::ErrorKind::UnexpectedEof)??,
            done = &mut sending, if !sent => {
                done?;
                sent = true;
                continue;
            }
        };
        moved.now();
        match answer.kind {
            kind::PROGRESS => {}
            kind::ANSWER => return Ok(answer.payload),
            _ => {
                let why = String::from_utf8_lossy(&answer.payload).into_owned();
                return Err(io::Error::other(why));
            }
        }
    }
}

/// Receive the first frame.
pub(crate) async fn begin(stream: &mut Greeted) -> io::Result<SnapshotBegin> {
    let first = next(stream).await?;
    if first.kind != kind::SNAPSHOT_BEGIN {
        return Err(protocol("a snapshot does not begin with its header"));
    }
    codec::decode(&first.payload)
}

/// Receive the file's bytes into `path`; complete, but neither verified nor synced.
pub(crate) async fn receive(stream: &mut Greeted, bytes: u64, path: &Path) -> io::Result<()> {
    let mut file = File::create(path).await?;
    let mut missing = bytes;
    let mut said = Instant::now();
    loop {
        let part = next(stream).await?;
        if said.elapsed() >= PROGRESS_EVERY {
            in_time(stream.send(frame(kind::PROGRESS, Bytes::new()))).await?;
            said = Instant::now();
        }
        match part.kind {
            kind::SNAPSHOT_DATA => {
                missing = missing
                    .checked_sub(part.payload.len() as u64)
                    .ok_or_else(|| protocol("a snapshot is longer than announced"))?;
                file.write_all(&part.payload).await?;
            }
            kind::SNAPSHOT_END if missing == 0 => break,
            kind::SNAPSHOT_END => return Err(protocol("a snapshot is shorter than announced")),
            _ => return Err(protocol("a snapshot is interrupted by another message")),
        }
    }
    file.flush().await
}

/// Wait for `work`, saying regularly that we are still at it, then send its outcome.
pub(crate) async fn conclude(
    stream: &mut Greeted,
    work: impl Future<Output = Result<Bytes, String>>,
) -> io::Result<()> {
    tokio::pin!(work);
    let outcome = loop {
        match tokio::time::timeout(PROGRESS_EVERY, &mut work).await {
            Ok(outcome) => break outcome,
            Err(_) => in_time(stream.send(frame(kind::PROGRESS, Bytes::new()))).await?,
        }
    };
    match outcome {
        Ok(payload) => in_time(stream.send(frame(kind::ANSWER, payload))).await,
        Err(why) => in_time(stream.send(frame(kind::FAILED, why.into_bytes()))).await,
    }
}

/// Removes a received file when dropped; an adopted one was renamed away before.
pub(crate) struct Partial(PathBuf);

impl Partial {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Best effort: what stays behind is removed when the directory is opened next.
        let _ = std::fs::remove_file(&self.0);
    }
}

// Frames of this module fit: checked where they are built.
const _: () = assert!(PORTION < super::frame::PAYLOAD_MAX);
