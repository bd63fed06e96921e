//! QEMU's control socket: requests with a deadline, and a running picture of what QEMU tells by itself.

use super::args::GUEST_CHARDEV;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

/// QEMU answers at once unless its main loop is stuck.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What QEMU told.
#[derive(Clone, Debug, Default)]
pub(super) struct Picture {
    /// The guest's agent has its port open.
    pub(super) guest_open: bool,
    /// Why the machine ended, in QEMU's words.
    pub(super) shutdown: Option<String>,
    /// QEMU has closed the socket: it is gone, or about to go.
    pub(super) closed: bool,
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>;

/// A connection.
pub(super) struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Waiting,
    picture: watch::Receiver<Picture>,
    next: AtomicU64,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Connect, and learn whether the guest's agent is there already.
    pub(super) async fn connect(dir: &Path) -> Result<Qmp, String> {
        let (read, write) = connect(dir, "qmp.sock").await?.into_split();
        let mut lines = BufReader::new(read);
        let mut greeting = String::new();
        // QEMU serves one client at a time and lets others wait.
        timeout(ANSWER_MAX, lines.read_line(&mut greeting))
            .await
            .map_err(|_| "QEMU does not greet".to_string())?
            .map_err(|e| e.to_string())?;
        let (tell, picture) = watch::channel(Picture::default());
        let waiting = Waiting::default();
        let reader = tokio::spawn(read_all(lines, waiting.clone(), tell));
        let writer = tokio::sync::Mutex::new(write);
        let qmp = Qmp {
            writer,
            waiting,
            picture,
            next: AtomicU64::new(1),
            reader,
        };
        qmp.call("qmp_capabilities", json!({})).await?;
        qmp.call("query-chardev", json!({})).await?;
        Ok(qmp)
    }

    /// One request.
    pub(super) async fn call(&self, name: &str, args: Value) -> Result<Value, String> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tell, answer) = oneshot::channel();
        self.waiting.lock().insert(id, tell);
        let mut line = json!({ "execute": name, "arguments": args, "id": id }).to_string();
        line.push('\n');
        let exchange = async {
            let sent = self.writer.lock().await.write_all(line.as_bytes()).await;
            sent.map_err(|e| format!("{name}: {e}"))?;
            answer
                .await
                .unwrap_or_else(|_| Err(format!("{name}: QEMU is gone")))
        };
        let answer = timeout(ANSWER_MAX, exchange).await;
        self.waiting.lock().remove(&id);
        answer.unwrap_or_else(|_| Err(format!("{name}: QEMU does not answer")))
    }

    /// A command of the human monitor; its errors come back as text, too.
    pub(super) async fn human(&self, line: &str) -> Result<String, String> {
        let answer = self
            .call("human-monitor-command", json!({ "command-line": line }))
            .await?;
        Ok(answer.as_str().unwrap_or_default().to_string())
    }

    /// The machine's state in QEMU's words: `running`, `paused`, `internal-error`, ...
    pub(super) async fn status(&self) -> Result<String, String> {
        let answer = self.call("query-status", json!({})).await?;
        Ok(answer["status"].as_str().unwrap_or("unknown").to_string())
    }

    pub(super) fn picture(&self) -> watch::Receiver<Picture> {
        self.picture.clone()
    }

    pub(super) fn closed(&self) -> bool {
        self.picture.borrow().closed
    }
}

/// Connect to a socket in `dir`, however long the folder's name is.
pub(super) async fn connect(dir: &Path, name: &str) -> Result<UnixStream, String> {
    use std::os::fd::AsRawFd as _;
    let held = std::fs::File::open(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let short = format!("/proc/self/fd/{}/{name}", held.as_raw_fd());
    UnixStream::connect(&short)
        .await
        .map_err(|e| format!("{name}: {e}"))
}

async fn read_all(
    mut lines: BufReader<OwnedReadHalf>,
    waiting: Waiting,
    tell: watch::Sender<Picture>,
) {
    let mut line = String::new();
    while let Ok(1..) = lines.read_line(&mut line).await {
        if let Ok(message) = serde_json::from_str::<Value>(&line) {
            take(&message, &waiting, &tell);
        }
        line.clear();
    }
    tell.send_modify(|picture| {
        picture.closed = true;
        picture.guest_open = false;
    });
    // Whoever waits for an answer learns that there will be none.
    waiting.lock().clear();
}

/// In the order of the stream, so that an old answer never overrides a newer event.
fn take(message: &Value, waiting: &Waiting, tell: &watch::Sender<Picture>) {
    match message["event"].as_str() {
        Some("VSERPORT_CHANGE") => {
            let open = message["data"]["open"] == true;
            tell.send_modify(|picture| picture.guest_open = open);
        }
        Some("SHUTDOWN") => {
            let reason = message["data"]["reason"]
                .as_str()
                .unwrap_or("unknown")
                .to_string();
            tell.send_modify(|picture| picture.shutdown = Some(reason));
        }
        Some(_) => {}
        None => {
            let chardevs = message["return"].as_array().map_or(&[][..], Vec::as_slice);
            if let Some(guest) = chardevs.iter().find(|c| c["label"] == GUEST_CHARDEV) {
                let open = guest["frontend-open"] == true;
                tell.send_modify(|picture| picture.guest_open = open);
            }
            let waiter = message["id"]
                .as_u64()
                .and_then(|id| waiting.lock().remove(&id));
            if let Some(waiter) = waiter {
                let _ = waiter.send(match message.get("error") {
                    Some(error) => Err(error["desc"].as_str().unwrap_or("refused").to_string()),
                    None => Ok(message["return"].clone()),
                });
            }
        }
    }
}
