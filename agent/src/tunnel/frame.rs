//! What travels in a tunnel: frames, each `kind: u8, length: u32 (big endian), bytes`. Knows how they are cut,
//! that a side which says nothing for long is gone, and how much one frame may hold; not what they mean.

use bytes::Bytes;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Most bytes of one frame, so most that either end holds of a direction.
pub const BODY_MAX: usize = 64 << 10;
/// A side that has nothing to say says [`Kind::Alive`] this often.
pub const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// Who waits for a frame for so long takes the other side for gone.
pub const SILENCE_MAX: Duration = Duration::from_secs(20);

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Nothing: the sender is there.
    Alive = 0,
    /// Member to agent, first: [`crate::wire::Access`].
    Open = 1,
    /// Agent to member: the other end is there.
    Ready = 2,
    /// Bytes; of a program's standard input or output.
    Data = 3,
    /// Bytes of a program's standard error.
    Stderr = 4,
    /// The sender sends no more bytes.
    End = 5,
    /// Member to agent: [`crate::wire::ExecCommand`].
    Run = 6,
    /// Agent to member, last: [`crate::wire::ExecEnd`].
    Exit = 7,
    /// Agent to member, last: [`crate::wire::TunnelRefusal`].
    Refused = 8,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        let all = [
            Self::Alive,
            Self::Open,
            Self::Ready,
            Self::Data,
            Self::Stderr,
            Self::End,
            Self::Run,
            Self::Exit,
            Self::Refused,
        ];
        all.get(usize::from(byte)).copied()
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// At most [`BODY_MAX`] bytes.
    pub body: Bytes,
}

/// The next frame but [`Kind::Alive`]. Errors: `UnexpectedEof` (the connection ended, or broke), `TimedOut` (the
/// other side is silent), `InvalidData` (no frame). Not to be dropped half way: what was read is lost.
pub async fn next<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<Frame> {
    loop {
        let read = tokio::time::timeout(SILENCE_MAX, read(from));
        let frame = read.await.map_err(|_| io::ErrorKind::TimedOut)??;
        if frame.kind != Kind::Alive {
            return Ok(frame);
        }
    }
}

async fn read<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<Frame> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await?;
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let kind = Kind::of(kind).ok_or_else(|| bad(format!("no frame is of kind {kind}")))?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > BODY_MAX {
        return Err(bad(format!("a frame of {length} bytes")));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).await?;
    let body = body.into();
    Ok(Frame { kind, body })
}

/// Send one frame; waits while the other side does not take it.
pub async fn write<W: AsyncWrite + Unpin>(to: &mut W, kind: Kind, body: &[u8]) -> io::Result<()> {
    if body.len() > BODY_MAX {
        let why = format!("a frame of {} bytes", body.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(body.len() + 5);
    bytes.push(kind as u8);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    to.write_all(&bytes).await?;
    to.flush().await
}

/// Send bytes, however many, as frames of a kind.
pub async fn write_all<W: AsyncWrite + Unpin>(
    to: &mut W,
    kind: Kind,
    bytes: &[u8],
) -> io::Result<()> {
    for part in bytes.chunks(BODY_MAX) {
        write(to, kind, part).await?;
    }
    Ok(())
}

/// Send a document as one frame.
pub async fn write_json<W: AsyncWrite + Unpin>(
    to: &mut W,
    kind: Kind,
    value: &impl serde::Serialize,
) -> io::Result<()> {
    let body = serde_json::to_vec(value).map_err(io::Error::other)?;
    write(to, kind, &body).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_arrive_however_the_bytes_are_cut() {
        let mut sent = Vec::new();
        write(&mut sent, Kind::Alive, b"").await.unwrap();
        write(&mut sent, Kind::Data, b"hello").await.unwrap();
        write(&mut sent, Kind::Alive, b"").await.unwrap();
        write(&mut sent, Kind::End, b"").await.unwrap();
        for cut in 1..sent.len() {
            let (mut to, mut from) = tokio::io::duplex(cut);
            let bytes = sent.clone();
            let sender = tokio::spawn(async move { to.write_all(&bytes).await });
            let first = next(&mut from).await.unwrap();
            assert_eq!((first.kind, &first.body[..]), (Kind::Data, &b"hello"[..]));
            assert_eq!(next(&mut from).await.unwrap().kind, Kind::End);
            sender.await.unwrap().unwrap();
            let end = next(&mut from).await.unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused_before_its_bytes_are_read() {
        for bytes in [
            &[9_u8, 0, 0, 0, 0][..],
            &[3, 0, 1, 0, 1],
            &[3, 255, 255, 255, 255],
        ] {
            let mut from = bytes;
            let said = next(&mut from).await.unwrap_err();
            assert_eq!(said.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
        let mut cut = &[3_u8, 0, 0, 0, 9, 1][..];
        let said = next(&mut cut).await.unwrap_err();
        assert_eq!(said.kind(), io::ErrorKind::UnexpectedEof);
        let large = vec![0; BODY_MAX + 1];
        assert!(write(&mut Vec::new(), Kind::Data, &large).await.is_err());
        let mut many = Vec::new();
        write_all(&mut many, Kind::Data, &large).await.unwrap();
        let mut from = &many[..];
        assert_eq!(next(&mut from).await.unwrap().body.len(), BODY_MAX);
        assert_eq!(next(&mut from).await.unwrap().body.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_gone_and_who_says_that_it_lives_is_not() {
        let (mut to, mut from) = tokio::io::duplex(1 << 10);
        let speaks = tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(ALIVE_EVERY).await;
                write(&mut to, Kind::Alive, b"").await.unwrap();
            }
            to
        });
        let begun = tokio::time::Instant::now();
        let said = next(&mut from).await.unwrap_err();
        assert_eq!(said.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), ALIVE_EVERY * 10 + SILENCE_MAX);
        drop(speaks.await.unwrap());
    }
}
