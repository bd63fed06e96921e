//! What a client's WebSocket and a tunnel say to each other. Binary messages are bytes, an empty one ends what its
//! sender sends; of a program, texts are JSON. Knows messages and frames; refuses to know where a VM is.
//!
//! Each direction is a loop of its own that takes from one side only what the other has taken: a slow reader
//! slows its writer, and a frame and a message are all that is held of it.

use crate::agents::tunnels::Tunnel;
use axum::body::{Body, Bytes};
use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use mainstay_agent::tunnel::frame::{self, ALIVE_EVERY, Frame, Kind};
use mainstay_agent::tunnel::held::AnyStream;
use mainstay_agent::wire::{ExecCommand, ExecEnd, TunnelRefusal};
use serde::{Deserialize, Serialize};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{ReadHalf, WriteHalf, split};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use utoipa::ToSchema;

/// Longest message of a client.
pub(super) const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// A client that answers no ping for so long is gone.
const CLIENT_SILENCE_MAX: Duration = Duration::from_secs(120);
/// How often it is pinged.
const PING_EVERY: Duration = Duration::from_secs(20);
/// For the first message of a client that wants to run a program: the agent hears nothing until then.
const REQUEST_MAX: Duration = Duration::from_secs(15);
/// For a client to take the last word.
const GOODBYE_MAX: Duration = Duration::from_secs(5);
/// Marks of what a program writes, before its bytes.
const STDOUT: u8 = 1;
const STDERR: u8 = 2;

type Sink = SplitSink<WebSocket, Message>;
type Client = SplitStream<WebSocket>;

/// The first text of a client that runs a program.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct ExecRequest {
    /// The program, looked up in the guest's path, and its arguments.
    pub argv: Vec<String>,
    /// Standard input follows, as binary messages, the last one empty.
    pub stdin: bool,
    /// Seconds until the program is killed; 0 or absent: never.
    pub timeout: u32,
}

/// The last text to a client that runs a program: how it ended, or why that is not known.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize, ToSchema)]
#[serde(default)]
pub struct ExecAnswer {
    /// Its exit code; 128 and the signal's number if it was killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// It was killed for its time.
    pub timed_out: bool,
    /// It wrote more than the guest agent keeps.
    pub truncated: bool,
    /// Why there is no exit code.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// With `error`: it may have run. Else it has not.
    pub unknown: bool,
}

/// How a session ends, for the client.
struct Ending {
    code: u16,
    /// At most 123 bytes.
    why: String,
}

impl Ending {
    fn new(code: u16, why: impl Into<String>) -> Self {
        let mut why = why.into();
        why.truncate(why.floor_char_boundary(123));
        Self { code, why }
    }
    fn done() -> Self {
        Self::new(close_code::NORMAL, "")
    }
    fn broke(error: &io::Error) -> Self {
        let why = format!("the connection to the node broke: {}", reason(error));
        Self::new(close_code::ERROR, why)
    }
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it was closed".to_owned(),
        io::ErrorKind::TimedOut => "nothing was heard".to_owned(),
        _ => error.to_string(),
    }
}

/// What may end a session besides its two sides.
async fn stopped(mut stop: watch::Receiver<bool>) -> Ending {
    // A dropped sender means that the process ends.
    stop.wait_for(|stop| *stop).await.ok();
    Ending::new(close_code::AWAY, "this member stops: ask another one")
}

/// Carry bytes until both sides have ended; with `whole`, until one has.
pub(super) async fn bridge(socket: WebSocket, tunnel: Tunnel, whole: bool) {
    let (mut sink, mut client) = socket.split();
    let (mut from, mut to) = split(tunnel.stream);
    let ended = AtomicBool::new(false);
    let ending = {
        let up = up(&mut client, &mut to, true, &ended);
        let down = down(&mut sink, &mut from, whole, &ended);
        tokio::select! {
            ending = up => ending,
            ending = down => ending,
            ending = stopped(tunnel.stop) => ending,
        }
    };
    close(sink, ending).await;
}

async fn close(mut sink: Sink, ending: Ending) {
    let frame = CloseFrame {
        code: ending.code,
        reason: ending.why.into(),
    };
    let said = sink.send(Message::Close(Some(frame)));
    timeout(GOODBYE_MAX, said).await.ok();
}

/// From the client to the agent, until the client is gone; `input`: it may send bytes at all.
async fn up(
    client: &mut Client,
    to: &mut WriteHalf<AnyStream>,
    input: bool,
    ended: &AtomicBool,
) -> Ending {
    let mut beat = interval(ALIVE_EVERY);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        let message = tokio::select! {
            message = client.next() => message,
            _ = beat.tick() => {
                if heard.elapsed() > CLIENT_SILENCE_MAX {
                    return Ending::new(close_code::POLICY, "the client answers no pings");
                }
                if let Err(e) = frame::write(to, Kind::Alive, b"").await {
                    return Ending::broke(&e);
                }
                continue;
            }
        };
        heard = Instant::now();
        let sent = match message {
            None | Some(Ok(Message::Close(_))) => return Ending::done(),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(()),
            Some(Ok(Message::Binary(_))) if !input || ended.load(Ordering::Relaxed) => {
                return Ending::new(close_code::POLICY, "bytes after the end of them");
            }
            Some(Ok(Message::Binary(bytes))) if bytes.is_empty() => {
                ended.store(true, Ordering::Relaxed);
                frame::write(to, Kind::End, b"").await
            }
            Some(Ok(Message::Binary(bytes))) => frame::write_all(to, Kind::Data, &bytes).await,
            Some(Ok(Message::Text(_))) => {
                return Ending::new(close_code::UNSUPPORTED, "bytes travel in binary messages");
            }
            Some(Err(e)) => return misread(&e),
        };
        if let Err(e) = sent {
            return Ending::broke(&e);
        }
    }
}

/// A message that cannot be read, or is too long.
fn misread(error: &axum::Error) -> Ending {
    // Its type is the library's own affair; its words are for people.
    let said = error.to_string();
    if said.contains("too long") || said.contains("too big") || said.contains("capacity") {
        let why = format!("a message has at most {MESSAGE_BYTES_MAX} bytes");
        return Ending::new(close_code::SIZE, why);
    }
    Ending::new(close_code::PROTOCOL, said)
}

/// The next frame; meanwhile the client is asked whether it is there.
async fn next(sink: &mut Sink, from: &mut ReadHalf<AnyStream>) -> Result<io::Result<Frame>, ()> {
    let mut next = pin!(frame::next(from));
    let mut beat = interval(PING_EVERY);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat.tick().await;
    loop {
        tokio::select! {
            frame = &mut next => return Ok(frame),
            _ = beat.tick() => {
                let ping = sink.send(Message::Ping(Bytes::new()));
                ping.await.map_err(|_| ())?;
            }
        }
    }
}

/// From the agent to the client.
async fn down(
    sink: &mut Sink,
    from: &mut ReadHalf<AnyStream>,
    whole: bool,
    ended: &AtomicBool,
) -> Ending {
    loop {
        let frame = match next(sink, from).await {
            Ok(Ok(frame)) => frame,
            Ok(Err(e)) => return Ending::broke(&e),
            Err(()) => return Ending::done(),
        };
        let bytes = match frame.kind {
            Kind::Data => frame.body,
            Kind::End if whole || ended.load(Ordering::Relaxed) => return Ending::done(),
            Kind::End => Bytes::new(),
            other => return Ending::new(close_code::ERROR, format!("the agent said {other:?}")),
        };
        let last = frame.kind == Kind::End;
        if sink.send(Message::Binary(bytes)).await.is_err() {
            return Ending::done();
        }
        if last {
            // What the client still has to say goes on; when it has ended too, or is gone, so does all.
            return match next(sink, from).await {
                Ok(Err(e)) if e.kind() != io::ErrorKind::UnexpectedEof => Ending::broke(&e),
                _ => Ending::done(),
            };
        }
    }
}

/// Run a program: its request, its input, its outputs, its end.
pub(super) async fn exec(socket: WebSocket, tunnel: Tunnel) {
    let (mut sink, mut client) = socket.split();
    let (mut from, mut to) = split(tunnel.stream);
    let input = match request(&mut client, &mut to).await {
        Ok(input) => input,
        Err(error) => {
            let answer = ExecAnswer {
                error,
                ..ExecAnswer::default()
            };
            return last_word(sink, &answer).await;
        }
    };
    // From here on it may run, unless its input is still to come.
    let ended = AtomicBool::new(!input);
    let broke = |why: String| {
        let unknown = ended.load(Ordering::Relaxed);
        let what = if unknown {
            "whether the program ran, and how it ended, is unknown"
        } else {
            "the program was not run"
        };
        let error = format!("{why}: {what}");
        ExecAnswer {
            error,
            unknown,
            ..ExecAnswer::default()
        }
    };
    let answer = {
        let up = up(&mut client, &mut to, input, &ended);
        let down = output(&mut sink, &mut from);
        tokio::select! {
            ending = up => match ending.code {
                close_code::NORMAL => None,
                _ => Some(broke(ending.why)),
            },
            answer = down => match answer {
                Ok(answer) => answer,
                Err(e) => Some(broke(Ending::broke(&e).why)),
            },
            ending = stopped(tunnel.stop) => Some(broke(ending.why)),
        }
    };
    match answer {
        Some(answer) => last_word(sink, &answer).await,
        None => close(sink, Ending::done()).await,
    }
}

async fn last_word(mut sink: Sink, answer: &ExecAnswer) {
    let text = serde_json::to_string(answer).unwrap_or_default();
    timeout(GOODBYE_MAX, sink.send(Message::Text(text.into())))
        .await
        .ok();
    close(sink, Ending::done()).await;
}

/// Read what shall be run and send it on; does it have input?
async fn request(client: &mut Client, to: &mut WriteHalf<AnyStream>) -> Result<bool, String> {
    let lost = |e: io::Error| format!("{}: the program was not run", Ending::broke(&e).why);
    let first = timeout(REQUEST_MAX, async {
        loop {
            match client.next().await {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => return other,
            }
        }
    });
    let text = match first.await {
        Ok(Some(Ok(Message::Text(text)))) => text,
        Ok(Some(Err(e))) => return Err(misread(&e).why),
        Ok(_) => return Err("the first message is a text: what to run".to_owned()),
        Err(_) => return Err("nothing was asked for in time".to_owned()),
    };
    let asked: ExecRequest =
        serde_json::from_str(&text).map_err(|e| format!("what to run cannot be read: {e}"))?;
    if asked.argv.first().is_none_or(String::is_empty) {
        return Err("argv names no program".to_owned());
    }
    let command = ExecCommand {
        argv: asked.argv,
        timeout_s: asked.timeout,
    };
    let body = serde_json::to_vec(&command).map_err(|e| e.to_string())?;
    if body.len() > frame::BODY_MAX {
        let max = frame::BODY_MAX;
        return Err(format!("program and arguments have more than {max} bytes"));
    }
    frame::write(to, Kind::Run, &body).await.map_err(lost)?;
    if !asked.stdin {
        frame::write(to, Kind::End, b"").await.map_err(lost)?;
    }
    Ok(asked.stdin)
}

/// The outputs as they come, then the end; `None`: the client is gone.
async fn output(sink: &mut Sink, from: &mut ReadHalf<AnyStream>) -> io::Result<Option<ExecAnswer>> {
    loop {
        let Ok(frame) = next(sink, from).await else {
            return Ok(None);
        };
        let frame = frame?;
        let mark = match frame.kind {
            Kind::Data => STDOUT,
            Kind::Stderr => STDERR,
            Kind::Exit => {
                let end: ExecEnd = serde_json::from_slice(&frame.body)?;
                return Ok(Some(ExecAnswer {
                    exit_code: Some(end.code),
                    timed_out: end.did_timeout,
                    truncated: end.truncated,
                    ..ExecAnswer::default()
                }));
            }
            Kind::Refused => {
                let refusal: TunnelRefusal = serde_json::from_slice(&frame.body)?;
                return Ok(Some(ExecAnswer {
                    error: refusal.message,
                    unknown: refusal.unknown,
                    ..ExecAnswer::default()
                }));
            }
            other => return Err(io::Error::other(format!("the agent said {other:?}"))),
        };
        let mut bytes = Vec::with_capacity(frame.body.len() + 1);
        bytes.push(mark);
        bytes.extend_from_slice(&frame.body);
        if sink.send(Message::Binary(bytes.into())).await.is_err() {
            return Ok(None);
        }
    }
}

/// A body of what a console says. It breaks off, instead of ending, when the tunnel does.
pub(super) fn log(tunnel: Tunnel) -> Body {
    let (from, mut to) = split(tunnel.stream);
    // The agent hears that somebody is there for as long as the body is read.
    let beats = async move {
        loop {
            tokio::time::sleep(ALIVE_EVERY).await;
            if frame::write(&mut to, Kind::Alive, b"").await.is_err() {
                return;
            }
        }
    };
    let beating = AbortOnDrop(tokio::spawn(beats));
    let stop = stopped(tunnel.stop);
    let pieces = futures::stream::unfold(Some((from, beating, Box::pin(stop))), async |held| {
        let (mut from, beating, mut stop) = held?;
        let frame = tokio::select! {
            frame = frame::next(&mut from) => frame,
            ending = &mut stop => Err(io::Error::other(ending.why)),
        };
        match frame {
            Ok(frame) if frame.kind == Kind::Data => {
                Some((Ok(frame.body), Some((from, beating, stop))))
            }
            Ok(frame) if frame.kind == Kind::End => None,
            Ok(frame) => {
                let why = format!("the agent said {:?}", frame.kind);
                Some((Err(io::Error::other(why)), None))
            }
            Err(e) => Some((Err(e), None)),
        }
    });
    // What wraps a body may ask once more after its end.
    Body::from_stream(pieces.fuse())
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
