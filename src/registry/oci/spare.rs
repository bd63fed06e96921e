//! What is left of a body that nobody wanted. A client that still sends when the connection closes may
//! lose the refusal with it: a reasonable rest is read and thrown away first.

use axum::body::{Body, Bytes};
use axum::extract::Request;
use futures::{Stream, StreamExt};
use http::header;
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// More than this is not waited for.
const REST_MAX: usize = 16 << 20;
/// Nor longer.
const WAIT_MAX: Duration = Duration::from_secs(10);

type Pieces = axum::body::BodyDataStream;

/// A body that can be read to its end after its owner has dropped it.
#[derive(Clone)]
struct Shared(Arc<Mutex<Pieces>>);

impl Stream for Shared {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.lock().poll_next_unpin(context)
    }
}

/// The rest of a request's body.
pub(super) struct Rest(Option<Shared>);

/// The same request, and the rest of its body for later.
pub(super) fn keep(request: Request) -> (Request, Rest) {
    // Who asked whether to send at all has not begun to.
    if request.headers().contains_key(header::EXPECT) {
        return (request, Rest(None));
    }
    let (head, body) = request.into_parts();
    let shared = Shared(Arc::new(Mutex::new(body.into_data_stream())));
    let body = Body::from_stream(shared.clone());
    (Request::from_parts(head, body), Rest(Some(shared)))
}

impl Rest {
    /// Read what still comes, within reason.
    pub(super) async fn throw_away(self) {
        let Some(mut rest) = self.0 else { return };
        let read = async {
            let mut left = REST_MAX;
            while let Some(Ok(piece)) = rest.next().await {
                match left.checked_sub(piece.len()) {
                    Some(less) => left = less,
                    None => return,
                }
            }
        };
        // Slower than that: its loss.
        let _ = tokio::time::timeout(WAIT_MAX, read).await;
    }
}
