//! Opens the Raft stream to another member: TCP, then an HTTP upgrade that names who is meant, so that
//! a wrong member, a stranger or another cluster is refused before a single frame is sent.

use super::auth;
use super::wire::Refused;
use crate::config::split_url;
use async_trait::async_trait;
use axum::http::{Request, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use mainstay_raft::{Dialer, Member, PeerStream};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// Name of the upgraded protocol.
pub const UPGRADE: &str = "mainstay-raft";
/// Path of the upgrade.
pub const RAFT_PATH: &str = "/peer/v1/raft";
/// Longest time for the TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);
/// Longest time for the upgrade.
const UPGRADE_TIMEOUT: Duration = Duration::from_millis(1500);
/// Unacknowledged bytes older than this end the connection: after a partition heals, waiting for TCP's
/// own back-off would cost seconds.
const UNACKED_MAX: Duration = Duration::from_secs(5);
/// Idle time before TCP asks whether the other side is still there.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Most members whose addresses are remembered.
const BOOK_MAX: usize = 64;
/// Longest refusal that is read.
const REFUSAL_MAX: usize = 4096;

/// Set what every socket between members, or from a client, should have.
pub fn tune(stream: &TcpStream, between_members: bool) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    if between_members {
        sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
        sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
        sockopt::set_tcp_keepcnt(stream, 3)?;
        let ms = u32::try_from(UNACKED_MAX.as_millis()).unwrap_or(u32::MAX);
        #[cfg(target_os = "linux")]
        sockopt::set_tcp_user_timeout(stream, ms)?;
    }
    Ok(())
}

/// Where members have answered us, or greeted us from, lately. The group's own list changes only with a
/// majority; when all members move at once, this is how they find each other to make one.
#[derive(Debug, Default)]
pub struct AddressBook(Mutex<BTreeMap<u64, String>>);

impl AddressBook {
    /// Member `id` is at this peer address.
    pub fn note(&self, id: u64, url: &str) {
        let mut all = self.0.lock();
        // As many as anybody has members; a stranger that holds the token must not fill it.
        if url.is_empty() || (all.len() >= BOOK_MAX && !all.contains_key(&id)) {
            return;
        }
        all.insert(id, url.to_owned());
    }

    /// The addresses to try, in this order.
    fn of(&self, id: u64, listed: &str) -> Vec<String> {
        let seen = self.0.lock().get(&id).cloned();
        let seen = seen.filter(|url| url != listed);
        seen.into_iter().chain([listed.to_owned()]).collect()
    }
}

/// [`Dialer`] over the peer ports of one cluster.
pub struct PeerDialer {
    token: String,
    cluster: String,
    from: u64,
    book: Arc<AddressBook>,
    /// Last refusal by member: said once, not at every attempt.
    said: Mutex<BTreeMap<u64, String>>,
}

impl PeerDialer {
    /// For member `from` of this cluster.
    pub fn new(token: &str, cluster_id: &str, from: u64, book: Arc<AddressBook>) -> Self {
        Self {
            token: token.to_owned(),
            cluster: cluster_id.to_owned(),
            from,
            book,
            said: Mutex::default(),
        }
    }

    fn request(&self, id: u64, authority: &str) -> io::Result<Request<Empty<Bytes>>> {
        let mut request = Request::builder()
            .uri(RAFT_PATH)
            .header(header::HOST, authority)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, UPGRADE)
            .header(auth::TO_HEADER, id.to_string())
            .body(Empty::new())
            .map_err(io::Error::other)?;
        request
            .headers_mut()
            .extend(auth::headers(&self.token, &self.cluster, self.from));
        Ok(request)
    }

    async fn upgrade(
        &self,
        id: u64,
        authority: &str,
        stream: TcpStream,
    ) -> io::Result<Box<dyn PeerStream>> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // Ends with the upgrade, or when `sender` is dropped.
        tokio::spawn(connection.with_upgrades());
        let response = sender
            .send_request(self.request(id, authority)?)
            .await
            .map_err(io::Error::other)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.refused(id, response).await);
        }
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(io::Error::other)?;
        self.said.lock().remove(&id);
        Ok(match upgraded.downcast::<TokioIo<TcpStream>>() {
            Ok(parts) if parts.read_buf.is_empty() => Box::new(parts.io.into_inner()),
            Ok(_) => return Err(io::Error::other("bytes before the first frame")),
            Err(upgraded) => Box::new(TokioIo::new(upgraded)),
        })
    }

    async fn refused(&self, id: u64, response: http::Response<hyper::body::Incoming>) -> io::Error {
        let status = response.status();
        let body = Limited::new(response.into_body(), REFUSAL_MAX)
            .collect()
            .await;
        let message = body
            .ok()
            .and_then(|body| serde_json::from_slice::<Refused>(&body.to_bytes()).ok())
            .map_or_else(|| format!("HTTP {status}"), |refused| refused.message);
        // 503: it is starting. Everything else needs an operator.
        if !status.is_server_error()
            && self.said.lock().insert(id, message.clone()).as_ref() != Some(&message)
        {
            tracing::warn!(peer = %format_args!("{id:016x}"), "{message}");
        }
        io::Error::new(io::ErrorKind::ConnectionRefused, message)
    }

    async fn dial_at(&self, id: u64, url: &str) -> io::Result<Box<dyn PeerStream>> {
        let (host, port) = split_url(url).map_err(io::Error::other)?;
        let authority = format!("{host}:{port}");
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&authority))
            .await
            .map_err(|_| io::ErrorKind::TimedOut)??;
        tune(&stream, true)?;
        tokio::time::timeout(UPGRADE_TIMEOUT, self.upgrade(id, &authority, stream))
            .await
            .map_err(|_| io::ErrorKind::TimedOut)?
    }
}

#[async_trait]
impl Dialer for PeerDialer {
    async fn dial(&self, id: u64, member: &Member) -> io::Result<Box<dyn PeerStream>> {
        let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for url in self.book.of(id, &member.peer_url) {
            match self.dial_at(id, &url).await {
                Ok(stream) => return Ok(stream),
                Err(e) => failed = e,
            }
        }
        Err(failed)
    }

    /// The kernel resets what arrives for a port without a listener. A machine that is down, or a
    /// network that drops, says nothing, and is not taken for an ended process; nor is a member that
    /// was seen at another address and may be there.
    async fn gone(&self, id: u64, member: &Member) -> bool {
        for url in self.book.of(id, &member.peer_url) {
            let Ok((host, port)) = split_url(&url) else {
                return false;
            };
            match TcpStream::connect(format!("{host}:{port}")).await {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answered_elsewhere_is_sought_there_first() {
        let book = AddressBook::default();
        assert_eq!(book.of(1, "http://old:1"), ["http://old:1"]);
        book.note(1, "http://new:1");
        book.note(2, "");
        assert_eq!(book.of(1, "http://old:1"), ["http://new:1", "http://old:1"]);
        assert_eq!(book.of(1, "http://new:1"), ["http://new:1"]);
        assert_eq!(book.of(2, "http://b:1"), ["http://b:1"]);
        (10..200).for_each(|id| book.note(id, "http://x:1"));
        assert_eq!(book.0.lock().len(), BOOK_MAX);
        book.note(1, "http://newer:1");
        assert_eq!(book.of(1, "http://old:1")[0], "http://newer:1");
    }
}
