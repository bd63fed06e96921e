//! A listening port: accepts connections and hands each request to whatever router stands behind the
//! door at that moment. Knows no route.

use crate::peer::dial::tune;
use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::ConnectInfo;
use axum::response::Response;
use futures::StreamExt;
use http::header::CONNECTION;
use http::{HeaderName, HeaderValue, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::RwLock;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tower::ServiceExt;

/// An idle connection is kept at least this long (clients reuse them after 100 s), and a request's head
/// must arrive within it.
const IDLE_MAX: Duration = Duration::from_secs(150);

/// What clients are told of it: less, so that they close first. One that sends into a connection which is just
/// being closed finds it reset, and not all send again.
const IDLE_TOLD: HeaderValue = HeaderValue::from_static("timeout=140");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// When the port closes, connections are kept for so long, and each answer says that it is the last:
/// closed at once, an idle one would be reset under a request that is just on its way.
const LINGER: Duration = Duration::from_millis(500);

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

/// Serve `door` on `listener` until `stop` is true, and then until the last connection has ended: no
/// more are accepted, requests in flight are answered, idle connections are closed. How long that may
/// take is the caller's to say, by dropping this.
/// `between_members`: the port speaks to members, whose silence must be noticed soon. Beyond
/// `connections` open ones, more wait in the kernel's queue.
pub async fn serve(
    listener: TcpListener,
    door: Door,
    between_members: bool,
    connections: usize,
    mut stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(connections));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stop) => break,
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
        spawn(stream, from, permit, &door, &stop);
    }
    empty_queue(listener, &permits, &door, &stop);
    // Every permit is back when every connection has ended.
    let all = u32::try_from(connections).unwrap_or(u32::MAX);
    permits.acquire_many(all).await.ok();
}

fn spawn(
    stream: TcpStream,
    from: SocketAddr,
    permit: OwnedSemaphorePermit,
    door: &Door,
    stop: &watch::Receiver<bool>,
) {
    let (door, stop) = (door.clone(), stop.clone());
    tokio::spawn(async move {
        connection(stream, from, door, stop).await;
        drop(permit);
    });
}

/// Close the port. Clients whose connections the kernel has completed may have sent requests, and
/// would be reset with it: they are served as well.
fn empty_queue(
    listener: TcpListener,
    permits: &Arc<Semaphore>,
    door: &Door,
    stop: &watch::Receiver<bool>,
) {
    let Ok(listener) = listener.into_std() else {
        return;
    };
    while let Ok(permit) = Arc::clone(permits).try_acquire_owned()
        && let Ok((stream, from)) = listener.accept()
    {
        let stream = stream.set_nonblocking(true).map(|()| stream);
        if let Ok(stream) = stream.and_then(TcpStream::from_std) {
            spawn(stream, from, permit, door, stop);
        }
    }
}

/// Answers of `router` whose length nobody knows end when `stop` is true: they would go on for ever.
/// What is cut must be made of wholes, such as lines.
pub fn endless(router: Router, stop: watch::Receiver<bool>) -> Router {
    let end = move |response: Response| {
        let mut stop = stop.clone();
        async move {
            if response.body().size_hint().exact().is_some() {
                return response;
            }
            response.map(|body| {
                let stop = Box::pin(async move { stopped(&mut stop).await });
                Body::from_stream(body.into_data_stream().take_until(stop))
            })
        }
    };
    router.route_layer(axum::middleware::map_response(end))
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
    let stops = stop.clone();
    let service = hyper::service::service_fn(move |request: http::Request<_>| {
        let router = door.0.read().clone();
        let stops = stops.clone();
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(from));
            let version = request.version();
            let mut response = router.oneshot(request).await?;
            let upgrades = response.status() == StatusCode::SWITCHING_PROTOCOLS;
            if version < Version::HTTP_2 && !upgrades {
                if *stops.borrow() {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                } else {
                    response.headers_mut().insert(KEEP_ALIVE, IDLE_TOLD);
                }
            }
            Ok::<_, Infallible>(response)
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
        () = stopped(&mut stop) => match timeout(LINGER, connection.as_mut()).await {
            Ok(ended) => ended,
            Err(_) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        },
    };
    if let Err(e) = ended {
        tracing::trace!(error = %e, %from, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn a_stop_answers_what_is_in_flight_and_ends_what_is_endless() {
        let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let slow = {
            let (asked, go) = (Arc::clone(&asked), Arc::clone(&go));
            async move || {
                asked.notify_one();
                go.notified().await;
                "done"
            }
        };
        let lines = async || {
            let first = futures::stream::iter([Ok::<_, Infallible>("line\n")]);
            Body::from_stream(first.chain(futures::stream::pending()))
        };
        let stop = watch::Sender::new(false);
        let router = Router::new().route("/lines", get(lines));
        let router = endless(router, stop.subscribe()).route("/slow", get(slow));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let closed = Arc::new(AtomicBool::new(false));
        let served = {
            let closed = Arc::clone(&closed);
            let port = serve(listener, Door::new(router), false, 64, stop.subscribe());
            tokio::spawn(async move {
                port.await;
                closed.store(true, Ordering::SeqCst);
            })
        };
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let lines = client.get(format!("{url}/lines")).send().await.unwrap();
        assert_eq!(lines.headers()[KEEP_ALIVE], IDLE_TOLD);
        let slow = tokio::spawn(client.get(format!("{url}/slow")).send());
        asked.notified().await;
        stop.send_replace(true);
        assert_eq!(lines.text().await.unwrap(), "line\n");
        let refused = async {
            while tokio::net::TcpStream::connect(&url["http://".len()..])
                .await
                .is_ok()
            {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), refused).await.unwrap();
        assert!(!closed.load(Ordering::SeqCst), "one is still in flight");
        go.notify_one();
        let answer = slow.await.unwrap().unwrap();
        assert_eq!(answer.headers()[CONNECTION], "close");
        assert!(!answer.headers().contains_key(KEEP_ALIVE));
        assert_eq!(answer.text().await.unwrap(), "done");
        timeout(Duration::from_secs(10), served)
            .await
            .unwrap()
            .unwrap();
    }
}
