//! A listening port: accepts connections and hands each request to whatever router stands behind the
//! door at that moment. Knows no route.

use crate::peer::dial::tune;
use axum::Router;
use axum::extract::ConnectInfo;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::RwLock;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt;

/// Open connections per port; more wait in the kernel's queue. Clients of a large fleet keep theirs open.
pub const CONNECTIONS_MAX: usize = 8192;
/// An idle connection is kept at least this long (clients reuse them after 100 s), and a request's head
/// must arrive within it.
const IDLE_MAX: Duration = Duration::from_secs(150);

/// What answers requests; can be exchanged while the port is open.
#[derive(Clone)]
pub struct Door(Arc<RwLock<Router>>);

impl Door {
    /// With this router behind it.
    pub fn new(router: Router) -> Self {
        Self(Arc::new(RwLock::new(router)))
    }

    /// From now on `router` answers.
    pub fn set(&self, router: Router) {
        *self.0.write() = router;
    }
}

/// Serve `door` on `listener` until `stop` is true; open requests are finished, the rest is closed.
/// `between_members`: the port speaks to members, whose silence must be noticed soon.
pub async fn serve(
    listener: TcpListener,
    door: Door,
    between_members: bool,
    mut stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stop) => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of file descriptors, most likely: let some connections end first.
                tracing::warn!(error = %e, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(e) = tune(&stream, between_members) {
            tracing::debug!(error = %e, "cannot tune a socket");
        }
        let (door, stop) = (door.clone(), stop.clone());
        tokio::spawn(async move {
            connection(stream, from, door, stop).await;
            drop(permit);
        });
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A dropped sender means the process ends.
    stop.wait_for(|stop| *stop).await.ok();
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    door: Door,
    mut stop: watch::Receiver<bool>,
) {
    let service = hyper::service::service_fn(move |request: http::Request<_>| {
        let router = door.0.read().clone();
        async move {
            let mut request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(ConnectInfo(from));
            let response = router.oneshot(request).await;
            response.map_err(|never: Infallible| never)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(30)));
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        tracing::trace!(error = %e, %from, "connection ended");
    }
}
