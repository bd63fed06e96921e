//! Tunnels: a member asks over the stream of desired sets, the agent dials out to that member and hands it one
//! end of something in a VM. So nothing needs a way to the node. Knows the frames and the driver; nothing of
//! desired sets, nor of who is at the far end.
//!
//! ```text
//! member -> agent   {"tunnel":{"id":SECRET}}                 a line of the stream that the agent holds open
//! agent  -> member  GET /agent/v1/tunnel, Upgrade            names the secret; once
//! member -> agent   Open {instance, kind, port, follow}
//! agent  -> member  Ready, or Refused {message}
//! console, vnc, tcp Data, End both ways
//! log               Data to the member, then End
//! exec              Run {argv, timeout_s}, Data, End to the agent (standard input); then, to the member,
//!                   Data, Stderr, Exit {code}, or Refused {message, unknown}
//! ```
//! * [`frame`]: how all this is cut; [`held`]: streams. `exec`: programs.
//!
//! Nothing is begun before `Open` (of a program: before the end of its input) has come over the tunnel itself: a
//! lost order has done nothing. A tunnel that breaks ends what was at its end: a program that runs is killed.

mod exec;
pub mod frame;
pub mod held;

use crate::driver::{Driver, Plug};
use crate::wire::{Access, TunnelOrder, TunnelRefusal};
use frame::{ALIVE_EVERY, BODY_MAX, Kind};
use held::AnyStream;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Where the agent dials, on the API port; `?node_id=N`.
pub const PATH: &str = "/agent/v1/tunnel";
/// Name of the upgraded protocol.
pub const UPGRADE: &str = "mainstay-tunnel";
/// Carries the tunnel's secret.
pub const ID_HEADER: &str = "x-mainstay-tunnel";

/// Tunnels of one node at once. A member hands out fewer.
const TUNNELS_MAX: usize = 64;
/// Programs at once: each may hold some tens of MiB of output at its end.
const EXECS_MAX: usize = 8;
/// For the member to take the connection, and to say what it wants.
const DIAL_MAX: Duration = Duration::from_secs(5);
/// For the other side to close, once all is said.
const LINGER_MAX: Duration = Duration::from_secs(5);
/// How often a followed console is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(250);

/// Ends of tunnels on this node; cheap to clone. They end with the last clone.
#[derive(Clone)]
pub struct Tunnels {
    inner: Arc<Inner>,
    jobs: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    driver: Arc<dyn Driver>,
    client: reqwest::Client,
    node: String,
    places: Arc<Semaphore>,
    execs: Semaphore,
}

impl Tunnels {
    /// To VMs of `driver`, which runs on node `node`; `client` reaches members.
    pub fn new(driver: Arc<dyn Driver>, client: reqwest::Client, node: &str) -> Self {
        let inner = Inner {
            driver,
            client,
            node: node.to_owned(),
            places: Arc::new(Semaphore::new(TUNNELS_MAX)),
            execs: Semaphore::new(EXECS_MAX),
        };
        Self {
            inner: Arc::new(inner),
            jobs: Arc::default(),
        }
    }

    /// The member at `home` wants a tunnel. Returns at once; what goes wrong the member learns, or runs out of
    /// patience.
    pub fn answer(&self, home: &str, order: TunnelOrder) {
        let (inner, home) = (Arc::clone(&self.inner), home.to_owned());
        let mut jobs = self.jobs.lock();
        while jobs.try_join_next().is_some() {}
        jobs.spawn(async move {
            let Ok(_place) = Arc::clone(&inner.places).try_acquire_owned() else {
                tracing::warn!("too many tunnels: one more is not opened");
                return;
            };
            let dialled = timeout(DIAL_MAX, inner.dial(&home, &order)).await;
            let dialled = dialled.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            let served = match dialled {
                Ok(stream) => inner.serve(stream).await.map_err(|e| e.to_string()),
                Err(why) => Err(why),
            };
            if let Err(why) = served {
                tracing::debug!(controller = %home, why, "a tunnel ended");
            }
        });
    }
}

impl Inner {
    async fn dial(&self, home: &str, order: &TunnelOrder) -> Result<reqwest::Upgraded, String> {
        // The id is a UUID of our own making: nothing in it needs escaping.
        let url = format!("{home}{PATH}?node_id={}", self.node);
        let call = self.client.get(url).header(ID_HEADER, &order.id);
        let call = call
            .header(http::header::CONNECTION, "upgrade")
            .header(http::header::UPGRADE, UPGRADE);
        let answer = call.send().await.map_err(|e| crate::sync::chain(&e))?;
        if answer.status() != http::StatusCode::SWITCHING_PROTOCOLS {
            return Err(format!("it answered {}", answer.status()));
        }
        answer.upgrade().await.map_err(|e| crate::sync::chain(&e))
    }

    /// From the first frame to the end.
    async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Send + Unpin) -> io::Result<()> {
        let (mut from, mut to) = tokio::io::split(stream);
        let served = self.serve_halves(&mut from, &mut to).await;
        // What was said last shall arrive: a socket that is closed on unread bytes takes it back.
        to.shutdown().await.ok();
        let mut rest = vec![0; 4 << 10];
        let read_on = async { while let Ok(1..) = from.read(&mut rest).await {} };
        timeout(LINGER_MAX, read_on).await.ok();
        served
    }

    async fn serve_halves<R, W>(&self, from: &mut R, to: &mut W) -> io::Result<()>
    where
        R: AsyncRead + Send + Unpin,
        W: AsyncWrite + Send + Unpin,
    {
        let first = timeout(DIAL_MAX, frame::next(from)).await;
        let first = first.map_err(|_| io::ErrorKind::TimedOut)??;
        let access = match first.kind {
            Kind::Open => serde_json::from_slice::<Access>(&first.body).map_err(|e| e.to_string()),
            other => Err(format!("{other:?} before Open")),
        };
        let access = match access {
            Ok(access) => access,
            Err(why) => return refuse(to, why, false).await,
        };
        tracing::info!(instance = %access.instance, kind = %access.kind, "tunnel");
        let plug = match access.kind.as_str() {
            "exec" => return self.exec(&access.instance, from, to).await,
            "log" => return self.log(&access, from, to).await,
            "console" => Plug::Console,
            "vnc" => Plug::Vnc,
            "tcp" => Plug::Tcp(access.port),
            other => {
                let why = format!("this agent knows no tunnels of kind {other:?}: update it");
                return refuse(to, why, false).await;
            }
        };
        match self.driver.connect(&access.instance, plug).await {
            Ok(stream) => join(stream, from, to).await,
            Err(e) => refuse(to, e.to_string(), false).await,
        }
    }

    /// What the console said, and with `follow` what it goes on to say.
    async fn log<R, W>(&self, access: &Access, from: &mut R, to: &mut W) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let id = access.instance.as_str();
        let (bytes, mut at) = match self.driver.console_log(id, None).await {
            Ok(log) => log,
            Err(e) => return refuse(to, e.to_string(), false).await,
        };
        frame::write(to, Kind::Ready, b"").await?;
        frame::write_all(to, Kind::Data, &bytes).await?;
        drop(bytes);
        let gone = async { while frame::next(from).await.is_ok() {} };
        let follow = async {
            let mut quiet = Duration::ZERO;
            loop {
                if !access.follow {
                    break;
                }
                sleep(FOLLOW_EVERY).await;
                let Ok((more, next)) = self.driver.console_log(id, Some(at)).await else {
                    break;
                };
                at = next;
                quiet += FOLLOW_EVERY;
                if !more.is_empty() {
                    frame::write_all(to, Kind::Data, &more).await?;
                    quiet = Duration::ZERO;
                } else if quiet >= ALIVE_EVERY {
                    frame::write(to, Kind::Alive, b"").await?;
                    quiet = Duration::ZERO;
                }
            }
            frame::write(to, Kind::End, b"").await
        };
        tokio::select! {
            done = follow => done,
            () = gone => Ok(()),
        }
    }
}

async fn refuse<W: AsyncWrite + Unpin>(
    to: &mut W,
    message: String,
    unknown: bool,
) -> io::Result<()> {
    let refusal = TunnelRefusal { message, unknown };
    frame::write_json(to, Kind::Refused, &refusal).await
}

/// Carries bytes until both sides have ended, or one is gone.
async fn join<R, W>(stream: AnyStream, from: &mut R, to: &mut W) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    frame::write(to, Kind::Ready, b"").await?;
    let (mut read, mut write) = tokio::io::split(stream);
    let (tell, mut ended) = watch::channel(false);
    let up = async {
        let mut buffer = vec![0; BODY_MAX];
        loop {
            match timeout(ALIVE_EVERY, read.read(&mut buffer)).await {
                Err(_) => frame::write(to, Kind::Alive, b"").await?,
                // A reset is an end: what was sent before it has arrived.
                Ok(Ok(0) | Err(_)) => break,
                Ok(Ok(n)) => frame::write(to, Kind::Data, &buffer[..n]).await?,
            }
        }
        frame::write(to, Kind::End, b"").await?;
        while timeout(ALIVE_EVERY, ended.wait_for(|ended| *ended))
            .await
            .is_err()
        {
            frame::write(to, Kind::Alive, b"").await?;
        }
        Ok(())
    };
    let down = async {
        loop {
            let frame = frame::next(from).await?;
            match frame.kind {
                // One that takes nothing any more may still have something to say.
                Kind::Data if write.write_all(&frame.body).await.is_err() => {}
                Kind::End => {
                    write.shutdown().await.ok();
                    tell.send_replace(true);
                }
                _ => {}
            }
        }
    };
    tokio::select! {
        done = up => done,
        gone = down => gone,
    }
}
