//! `mainstay instance exec|console|vnc|tcp|ssh|logs`: ways into an instance's VM through any member. Knows the
//! messages of docs/rest-dialect.md ("Ways into a VM") and the terminal; nothing of nodes.

use super::client::{ApiClient, ClientError, Socket, query};
use super::instance::text;
use crate::http::{ExecAnswer, ExecRequest};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Args;
use futures::{SinkExt as _, StreamExt as _};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use serde_json::Value;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

/// Bytes of one message that we send.
const PIECE: usize = 64 << 10;
/// Ends a console session, as in telnet: Ctrl and `]`.
const ESCAPE: u8 = 0x1d;
/// Exit code where a program's end is not known, or it was not run.
const NO_CODE: u8 = 125;
/// Exit code where it was killed for its time, as of `timeout`.
const OUT_OF_TIME: u8 = 124;

/// The command line ends with this code, after this sentence (none if it is empty).
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Exit {
    /// Exit code.
    pub code: u8,
    /// What is said on standard error.
    pub message: String,
}

/// Run a program in a started instance's guest; exits with its exit code
#[derive(Args, Debug)]
pub(super) struct ExecArgs {
    /// Instance id
    id: String,
    /// Give it our standard input, at most 1 MiB, whole before it starts
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Seconds until it is killed, then exits with 124; 0: never
    #[arg(long, default_value_t = 0)]
    timeout: u32,
    /// The program and its arguments, after `--`
    #[arg(required = true, last = true)]
    argv: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct TcpArgs {
    /// Instance id
    id: String,
    /// Port of the guest; it need not be forwarded
    port: u16,
    /// Take connections here, instead of one on standard input and output
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
}

#[derive(Args, Debug)]
pub(super) struct VncArgs {
    /// Instance id
    id: String,
    /// Where a VNC viewer finds the screen
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:5901")]
    listen: SocketAddr,
}

#[derive(Args, Debug)]
pub(super) struct SshArgs {
    /// Instance id
    id: String,
    /// User in the guest
    #[arg(short = 'l', long)]
    user: Option<String>,
    /// Port of the guest's SSH server
    #[arg(short = 'p', long, default_value_t = 22)]
    port: u16,
    /// Options and command for `ssh`, after `--`
    #[arg(last = true)]
    rest: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct LogsArgs {
    /// Instance id
    id: String,
    /// Go on with what the console says, until the VM is gone
    #[arg(short, long)]
    follow: bool,
}

/// Run a program in the guest.
pub(super) async fn exec(client: &ApiClient, args: &ExecArgs) -> anyhow::Result<()> {
    let path = format!("/api/v1/vm/exec{}", query(&[("id", &args.id)]));
    let no_code = |e: anyhow::Error| {
        let message = format!("{e:#}");
        anyhow::Error::new(Exit {
            code: NO_CODE,
            message,
        })
    };
    let socket = client.socket(&path).await;
    let socket = socket.map_err(|e| no_code(at(&args.id, e)))?;
    let answer = run(socket, args).await.map_err(no_code)?;
    if answer.truncated {
        say("the outputs are not whole: the guest agent keeps only so much");
    }
    let (code, message) = match answer.exit_code {
        _ if answer.timed_out => {
            let message = format!("the program was killed after {} s", args.timeout);
            (OUT_OF_TIME, message)
        }
        Some(0) => return Ok(()),
        Some(code) => (u8::try_from(code & 0xff).unwrap_or(NO_CODE), String::new()),
        None => (NO_CODE, answer.error),
    };
    Err(Exit { code, message }.into())
}

async fn run(mut socket: Socket, args: &ExecArgs) -> anyhow::Result<ExecAnswer> {
    let request = ExecRequest {
        argv: args.argv.clone(),
        stdin: args.stdin,
        timeout: args.timeout,
    };
    let request = serde_json::to_string(&request)?;
    socket.send(Message::Text(request.into())).await?;
    let (mut sink, mut source) = socket.split();
    let input = async {
        if args.stdin {
            let mut stdin = local(std::io::stdin())?;
            let mut buffer = vec![0; PIECE];
            loop {
                let n = stdin.read(&mut buffer).await.context("standard input")?;
                let bytes = Bytes::copy_from_slice(&buffer[..n]);
                sink.send(Message::Binary(bytes)).await?;
                if n == 0 {
                    break;
                }
            }
        }
        std::future::pending::<anyhow::Result<ExecAnswer>>().await
    };
    let output = async {
        let mut why = "the member closed the connection".to_owned();
        while let Some(message) = source.next().await {
            match message {
                Ok(Message::Binary(bytes)) => match bytes.split_first() {
                    Some((1, bytes)) => std::io::stdout().lock().write_all(bytes)?,
                    Some((2, bytes)) => std::io::stderr().lock().write_all(bytes)?,
                    _ => {}
                },
                Ok(Message::Text(text)) => {
                    std::io::stdout().lock().flush()?;
                    return Ok(serde_json::from_str(&text)?);
                }
                Ok(Message::Close(Some(frame))) if !frame.reason.is_empty() => {
                    why = frame.reason.to_string();
                }
                Ok(_) => {}
                Err(e) => {
                    why = e.to_string();
                    break;
                }
            }
        }
        bail!("{why}: whether the program ran, and how it ended, is unknown")
    };
    tokio::pin!(input, output);
    tokio::select! {
        // Where the input cannot go on, the other side says why.
        failed = &mut input => match tokio::time::timeout(LAST_WORD, output).await {
            Ok(Ok(answer)) => Ok(answer),
            _ => failed,
        },
        answer = &mut output => answer,
    }
}

/// For a reason that is under way.
const LAST_WORD: std::time::Duration = std::time::Duration::from_secs(2);

/// Be at the serial console until `Ctrl-]`, or until the VM is gone.
pub(super) async fn console(client: &ApiClient, id: &str) -> anyhow::Result<()> {
    let path = format!("/api/v1/vm/console{}", query(&[("id", id)]));
    let socket = client.socket(&path).await.map_err(|e| at(id, e))?;
    let stdin = std::io::stdin();
    let raw = if isatty(&stdin) {
        say("connected; Ctrl-] ends");
        Some(Raw::enter(&stdin)?)
    } else {
        None
    };
    let (from, to) = (local(&stdin)?, local(std::io::stdout())?);
    let done = pump(
        socket,
        from,
        to,
        raw.is_some().then_some(ESCAPE),
        Rest::Stay,
    )
    .await;
    drop(raw);
    done
}

/// Connect to a port of the guest, once or for whoever connects here.
pub(super) async fn tcp(client: &ApiClient, args: &TcpArgs) -> anyhow::Result<()> {
    let port = args.port.to_string();
    let path = format!(
        "/api/v1/vm/tcp{}",
        query(&[("id", &args.id), ("port", &port)])
    );
    if let Some(at) = args.listen {
        return listen(client, &args.id, &path, at, Rest::Tell).await;
    }
    let socket = client.socket(&path).await.map_err(|e| at(&args.id, e))?;
    let (from, to) = (local(std::io::stdin())?, local(std::io::stdout())?);
    pump(socket, from, to, None, Rest::Pipe).await
}

/// Show the screen to VNC viewers that connect here.
pub(super) async fn vnc(client: &ApiClient, args: &VncArgs) -> anyhow::Result<()> {
    let path = format!("/api/v1/vm/vnc{}", query(&[("id", &args.id)]));
    listen(client, &args.id, &path, args.listen, Rest::Leave).await
}

/// For ever: a way for each connection.
async fn listen(
    client: &ApiClient,
    id: &str,
    path: &str,
    address: SocketAddr,
    rest: Rest,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    say(&format!("listening on {}", listener.local_addr()?));
    let mut ways = futures::stream::FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                stream.set_nodelay(true)?;
                ways.push(async move {
                    let socket = client.socket(path).await.map_err(|e| at(id, e))?;
                    let (from, to) = stream.into_split();
                    pump(socket, from, to, None, rest).await
                });
            }
            Some(done) = ways.next() => {
                if let Err(e) = done {
                    say(&format!("{e:#}"));
                }
            }
        }
    }
}

/// Run the system's `ssh` through a tunnel.
pub(super) async fn ssh(args: &SshArgs, endpoints: &[String]) -> anyhow::Result<()> {
    let ours = std::env::current_exe().context("where is this program?")?;
    let words = [
        ours.to_string_lossy().into_owned(),
        "--endpoints".to_owned(),
        endpoints.join(","),
        "instance".to_owned(),
        "tcp".to_owned(),
        args.id.clone(),
        args.port.to_string(),
    ];
    let proxy: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let mut ssh = tokio::process::Command::new("ssh");
    // Each instance is a machine of its own to the list of known hosts, whatever its ports.
    ssh.args(["-o", &format!("ProxyCommand={}", proxy.join(" "))])
        .args(["-o", &format!("HostKeyAlias=mainstay-{}", args.id)]);
    if let Some(user) = &args.user {
        ssh.args(["-l", user]);
    }
    let (options, command) = options_first(&args.rest);
    ssh.args(options).arg("--").arg(&args.id).args(command);
    let ended = ssh.status().await.context("cannot run ssh")?;
    if ended.success() {
        return Ok(());
    }
    let code = ended.code().and_then(|code| u8::try_from(code).ok());
    Err(Exit {
        code: code.unwrap_or(255),
        message: String::new(),
    }
    .into())
}

/// What stands before the first word that is no option goes to `ssh`, the rest is the command. (Options that take
/// a value must hold it: `-oX=Y`.)
fn options_first(rest: &[String]) -> (&[String], &[String]) {
    let first = rest.iter().position(|word| !word.starts_with('-'));
    rest.split_at(first.unwrap_or(rest.len()))
}

/// A word for the shell that `ssh` gives its proxy command to; `%` is its own.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''").replace('%', "%%"))
}

/// What the console said, then what the startup script did.
pub(super) async fn logs(client: &ApiClient, args: &LogsArgs) -> anyhow::Result<()> {
    let follow = if args.follow { "true" } else { "false" };
    let path = format!(
        "/api/v1/vm/logs{}",
        query(&[("id", &args.id), ("follow", follow)])
    );
    let shown = format!("/api/v1/vm{}", query(&[("id", &args.id)]));
    let instance: Value = client.get(&shown).await.map_err(|e| at(&args.id, e))?;
    let mut out = std::io::stdout();
    // Without a node, or with one that is away, what the controllers know is still to be had.
    let console = client.stream(&path).await.map_err(|e| at(&args.id, e));
    let missed = match console {
        Ok(console) => {
            let mut pieces = console.bytes_stream();
            while let Some(piece) = pieces.next().await {
                out.write_all(&piece.context("the log broke off")?)?;
                out.flush()?;
            }
            None
        }
        Err(e) => Some(e),
    };
    let script = &instance["startup_script"];
    for (name, stream) in [("standard output", "stdout"), ("standard error", "stderr")] {
        let said = text(&script[stream]);
        if !said.is_empty() {
            writeln!(out, "--- startup script, {name}:")?;
            out.write_all(said.as_bytes())?;
        }
    }
    let message = text(&instance["message"]);
    if !message.is_empty() {
        writeln!(out, "--- {}: {message}", text(&instance["instance_state"]))?;
    }
    missed.map_or(Ok(()), Err)
}

fn at(id: &str, error: ClientError) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("instance {id}"))
}

/// A word to the person at the terminal. Whoever reads standard error is gone: nobody is left to tell.
fn say(text: &str) {
    writeln!(std::io::stderr().lock(), "{text}").ok();
}

/// What becomes of a connection when our own side has said all.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// The far side is told, and may go on; so may we, when it is the first.
    Tell,
    /// The far side is told, and may go on; when it has said all, it is over. (A closed pipe cannot be told from here:
    /// whoever reads it waits for our own end.)
    Pipe,
    /// It may go on.
    Stay,
    /// It ends.
    Leave,
}

/// Bytes both ways. Ends when the far side does, or with `escape` in what is read.
async fn pump(
    socket: Socket,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    escape: Option<u8>,
    rest: Rest,
) -> anyhow::Result<()> {
    let (mut sink, mut source) = socket.split();
    let up = async {
        let mut buffer = vec![0; PIECE];
        loop {
            // A reset is an end, too.
            let n = from.read(&mut buffer).await.unwrap_or(0);
            let escaped = escape.and_then(|e| buffer[..n].iter().position(|b| *b == e));
            let bytes = Bytes::copy_from_slice(&buffer[..escaped.unwrap_or(n)]);
            let tells = matches!(rest, Rest::Tell | Rest::Pipe);
            if (tells || !bytes.is_empty()) && sink.send(Message::Binary(bytes)).await.is_err() {
                break;
            }
            if escaped.is_some() {
                sink.send(Message::Close(None)).await.ok();
                return;
            }
            if n == 0 {
                match rest {
                    Rest::Leave => return,
                    Rest::Tell | Rest::Pipe | Rest::Stay => break,
                }
            }
        }
        std::future::pending().await
    };
    let down = async {
        while let Some(message) = source.next().await {
            match message {
                Ok(Message::Binary(bytes)) if bytes.is_empty() => match rest {
                    Rest::Pipe => return Ok(()),
                    _ => to.shutdown().await?,
                },
                Ok(Message::Binary(bytes)) => {
                    to.write_all(&bytes).await?;
                    to.flush().await?;
                }
                Ok(Message::Close(Some(frame))) if frame.code != CloseCode::Normal => {
                    bail!("{}", frame.reason);
                }
                Ok(Message::Close(_)) => return Ok(()),
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
        }
        bail!("the connection to the member was lost")
    };
    tokio::select! {
        () = up => Ok(()),
        done = down => done,
    }
}

/// One of our own standard streams, for waiting on without holding up anything else.
fn local(stream: impl AsFd) -> anyhow::Result<tokio::fs::File> {
    let owned = stream.as_fd().try_clone_to_owned()?;
    Ok(tokio::fs::File::from_std(std::fs::File::from(owned)))
}

/// A terminal that hands every key through; as it was before, when this goes.
struct Raw {
    terminal: std::os::fd::OwnedFd,
    before: Termios,
}

impl Raw {
    fn enter(terminal: impl AsFd) -> anyhow::Result<Self> {
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        tcsetattr(&self.terminal, OptionalActions::Now, &self.before).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_proxy_command_as_they_are() {
        assert_eq!(quoted("http://a:1,http://b:2"), "'http://a:1,http://b:2'");
        assert_eq!(quoted("it's 100%"), r"'it'\''s 100%%'");
        let rest: Vec<String> = ["-v", "-oX=Y", "ls", "-l"].map(str::to_owned).to_vec();
        let (options, command) = options_first(&rest);
        assert_eq!((options.len(), command.len()), (2, 2));
        assert_eq!(options_first(&rest[..2]).1.len(), 0);
    }
}
