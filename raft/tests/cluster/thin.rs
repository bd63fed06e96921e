//! Lines that pass so many bytes a second: every stream that is dialed over one is slowed down.

use async_trait::async_trait;
use mainstay_raft::{Dialer, Member, PeerStream};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Carried at once.
const PIECE: usize = 8 << 10;

/// Dials through another dialer; what comes of it is slow towards the other member.
pub(crate) struct Thin {
    pub(crate) through: Arc<dyn Dialer>,
    pub(crate) bytes_per_s: u64,
}

#[async_trait]
impl Dialer for Thin {
    async fn dial(&self, id: u64, member: &Member) -> io::Result<Box<dyn PeerStream>> {
        let far = self.through.dial(id, member).await?;
        let (near, relay) = tokio::io::duplex(64 << 10);
        let (relay_read, relay_write) = tokio::io::split(relay);
        let (far_read, far_write) = tokio::io::split(far);
        let rate = self.bytes_per_s;
        tokio::spawn(async move {
            // Whichever direction ends, ends the connection.
            tokio::select! {
                () = carry(relay_read, far_write, Some(rate)) => {}
                () = carry(far_read, relay_write, None) => {}
            }
        });
        Ok(Box::new(near))
    }
}

async fn carry(
    mut read: impl AsyncRead + Unpin,
    mut write: impl AsyncWrite + Unpin,
    bytes_per_s: Option<u64>,
) {
    let mut piece = vec![0; PIECE];
    loop {
        let n = read.read(&mut piece).await.unwrap_or(0);
        if let Some(rate) = bytes_per_s {
            tokio::time::sleep(Duration::from_secs_f64(n as f64 / rate as f64)).await;
        }
        if n == 0 || write.write_all(&piece[..n]).await.is_err() {
            return;
        }
    }
}
