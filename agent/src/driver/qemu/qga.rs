//! The guest agent's socket: one request after the other, each with a deadline. Knows the framing of
//! the protocol, not what requests mean; drives the real `qemu-ga` and our small agent alike.

use super::qmp;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Longest answer: both outputs of a script (the real agent keeps 16 MB of each) as base64.
const ANSWER_BYTES_MAX: u64 = 48 << 20;
/// A guest under load may be slow, but this is only a small program answering.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Why there is no result.
#[derive(Debug)]
pub(super) enum QgaError {
    /// The connection is of no use any more; another one may work.
    Lost(String),
    /// The agent said no.
    Refused(String),
}

impl std::fmt::Display for QgaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            QgaError::Lost(why) => write!(f, "the guest agent is out of reach: {why}"),
            QgaError::Refused(why) => write!(f, "the guest agent refused: {why}"),
        }
    }
}

/// A connection in step with the agent.
pub(super) struct Qga {
    stream: BufReader<UnixStream>,
}

impl Qga {
    /// Connect and get in step. Only once the guest has its port open: what is written before is
    /// answered never, or later, when nobody expects it.
    pub(super) async fn connect(dir: &Path, within: Duration) -> Result<Qga, QgaError> {
        let stream = qmp::connect(dir, "qga.sock")
            .await
            .map_err(QgaError::Lost)?;
        let mut qga = Qga {
            stream: BufReader::new(stream),
        };
        match timeout(within, qga.sync()).await {
            Ok(done) => done.map(|()| qga),
            Err(_) => Err(QgaError::Lost("it does not answer".into())),
        }
    }

    async fn sync(&mut self) -> Result<(), QgaError> {
        let id = u64::from(uuid::Uuid::new_v4().as_fields().0);
        let request = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
        // The first byte makes the agent drop half a request of someone before us.
        let mut bytes = vec![0xff];
        bytes.extend_from_slice(format!("{request}\n").as_bytes());
        self.stream
            .get_mut()
            .write_all(&bytes)
            .await
            .map_err(lost)?;
        loop {
            // Whatever was meant for someone before us ends at the delimiter.
            let mut stale = Vec::new();
            let read = (&mut self.stream)
                .take(ANSWER_BYTES_MAX)
                .read_until(0xff, &mut stale)
                .await;
            if read.map_err(lost)? == 0 {
                return Err(QgaError::Lost("closed".into()));
            }
            let answer = self.line().await?;
            if serde_json::from_slice::<Value>(&answer).is_ok_and(|a| a["return"] == id) {
                return Ok(());
            }
        }
    }

    async fn line(&mut self) -> Result<Vec<u8>, QgaError> {
        let mut line = Vec::new();
        let limit = (&mut self.stream)
            .take(ANSWER_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .await;
        limit.map_err(lost)?;
        if line.last() == Some(&b'\n') {
            Ok(line)
        } else {
            Err(QgaError::Lost("it closed, or it says too much".into()))
        }
    }

    /// One request. After [`QgaError::Lost`] the connection is out of step: drop it.
    pub(super) async fn call(&mut self, name: &str, args: Value) -> Result<Value, QgaError> {
        let request = json!({ "execute": name, "arguments": args });
        let exchange = async {
            let bytes = format!("{request}\n");
            self.stream
                .get_mut()
                .write_all(bytes.as_bytes())
                .await
                .map_err(lost)?;
            self.line().await
        };
        let line = timeout(ANSWER_MAX, exchange)
            .await
            .map_err(|_| QgaError::Lost(format!("{name} is not answered")))??;
        let mut answer: Value = serde_json::from_slice(&line)
            .map_err(|e| QgaError::Lost(format!("{name}: not an answer: {e}")))?;
        if let Some(error) = answer.get("error") {
            let text = error["desc"].as_str().unwrap_or("for no reason");
            return Err(QgaError::Refused(format!("{name}: {text}")));
        }
        Ok(answer["return"].take())
    }

    /// A request that success does not answer.
    pub(super) async fn send(&mut self, name: &str, args: Value) -> Result<(), QgaError> {
        let bytes = format!("{}\n", json!({ "execute": name, "arguments": args }));
        self.stream
            .get_mut()
            .write_all(bytes.as_bytes())
            .await
            .map_err(lost)
    }
}

fn lost(e: std::io::Error) -> QgaError {
    QgaError::Lost(e.to_string())
}
