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

#[cfg(test)]
mod tests {
    use super::super::frame::Frames;
    use super::*;
    use crate::codec::VoteV1;
    use crate::transport::PeerStream;
    use tokio_util::codec::Framed;

    const LEN: usize = 2 << 20;
    const PIECE: usize = 16 << 10;
    const PIECE_TAKES: Duration = Duration::from_millis(500);

    fn greeted(stream: impl PeerStream) -> Greeted {
        Framed::new(Box::new(stream), Frames)
    }

    /// Two ends of a line that takes everything at once and lets it out at 32 KB/s, up to `passes` bytes.
    fn line(passes: usize) -> (Greeted, Greeted) {
        let (near, mut near_relay) = tokio::io::duplex(2 * LEN);
        let (far, mut far_relay) = tokio::io::duplex(PIECE);
        tokio::spawn(async move {
            let (mut forth, mut piece) = (0, vec![0; PIECE]);
            let mut back = vec![0; PIECE];
            loop {
                tokio::select! {
                    n = near_relay.read(&mut piece), if forth < passes => {
                        let n = n.unwrap_or(0);
                        tokio::time::sleep(PIECE_TAKES).await;
                        if n == 0 || far_relay.write_all(&piece[..n]).await.is_err() {
                            return;
                        }
                        forth += n;
                    }
                    n = far_relay.read(&mut back) => {
                        let n = n.unwrap_or(0);
                        if n == 0 || near_relay.write_all(&back[..n]).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        (greeted(near), greeted(far))
    }

    fn announced() -> SnapshotBegin {
        SnapshotBegin {
            vote: VoteV1 {
                term: 1,
                member: 1,
                committed: true,
            },
            name: "s".into(),
            bytes: LEN as u64,
        }
    }

    /// Send a file over a line; what both ends say, and how long it took.
    async fn pass(passes: usize) -> (io::Result<Bytes>, io::Result<Vec<u8>>, Duration) {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let content: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
        std::fs::write(&from, &content).unwrap();
        let (near, mut far) = line(passes);
        let began = Instant::now();
        let receiving = async {
            let begin = begin(&mut far).await?;
            receive(&mut far, begin.bytes, &to).await?;
            conclude(&mut far, async { Ok(Bytes::from("taken")) }).await?;
            std::fs::read(&to)
        };
        let announced = announced();
        let file = std::fs::File::open(&from).unwrap();
        let (sent, received) = tokio::join!(send(near, &announced, file), receiving);
        (sent, received, began.elapsed())
    }

    /// The sender is done in a moment and then hears nothing of its own for a minute.
    #[tokio::test(start_paused = true)]
    async fn buffers_that_take_a_minute_to_drain_are_no_stall() {
        let (sent, received, took) = pass(usize::MAX).await;
        assert_eq!(sent.unwrap(), "taken");
        assert_eq!(received.unwrap().len(), LEN);
        assert!(took > 2 * IDLE_MAX, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_move_is_given_up_by_both() {
        let (sent, received, took) = pass(LEN / 4).await;
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(received.is_err());
        assert!(took < 4 * IDLE_MAX, "{took:?}");
    }
}
