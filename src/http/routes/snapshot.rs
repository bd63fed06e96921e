//! The whole state as one file: `GET /api/v1/snapshot`. Not JSON, and no envelope around a success: what
//! comes is the file that `mainstay snapshot verify` reads (docs/formats.md). Its length is announced, so a
//! stream that was cut off is noticed by any client.

use crate::app::REQUEST_DEADLINE;
use crate::backup::export::{self, Export, ExportError, Saver};
use crate::http::ApiState;
use crate::http::error::ApiError;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use http::{HeaderValue, header};
use std::io;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// Pieces between the disk and the connection.
const PIECES: usize = 4;
/// A client that takes nothing for this long is cut off: it holds a file and a thread.
const STALL_MAX: Duration = Duration::from_secs(60);

#[utoipa::path(get, path = "/api/v1/snapshot", tag = "members", operation_id = "get_snapshot",
    summary = "The whole state as one file",
    responses((status = 200, description = "What mainstay snapshot verify reads", body = Vec<u8>, content_type = "application/octet-stream")))]
pub(super) async fn save(State(api): State<ApiState>) -> Result<Response, ApiError> {
    let Ok(permit) = api.saves.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable(
            "overloaded: this member sends as many snapshots as it may; ask another member, or try again",
        ));
    };
    let saver = Saver {
        cluster_id: api.about.cluster_id.clone(),
        name: api.about.name.clone(),
        release: api.about.version.clone(),
    };
    let taken = export::take(api.app.group(), &saver, REQUEST_DEADLINE).await;
    let export = taken.map_err(|error| match error {
        ExportError::Group(error) => error.into(),
        other => ApiError::internal(other.to_string()),
    })?;
    tracing::info!(
        index = export.header.index,
        bytes = export.bytes(),
        "sending a snapshot"
    );
    let length = HeaderValue::from(export.bytes());
    let index = HeaderValue::from(export.header.index);
    let mut response = stream(export, permit).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert("x-mainstay-applied-index", index);
    let binary = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, binary);
    Ok(response)
}

/// A body that is read from disk as fast as it is taken.
fn stream(export: Export, permit: OwnedSemaphorePermit) -> Body {
    let (tx, rx) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let send = |piece: io::Result<Bytes>| {
            let sent = async { tokio::time::timeout(STALL_MAX, tx.send(piece)).await };
            matches!(runtime.block_on(sent), Ok(Ok(())))
        };
        let done = export.pour(|piece| send(Ok(piece.into())));
        match done {
            Ok(true) => {}
            Ok(false) => {
                tracing::debug!("the receiver of a snapshot is gone");
                // Cut off, not ended: what was sent is not the whole.
                send(Err(io::ErrorKind::TimedOut.into()));
            }
            Err(error) => {
                tracing::warn!(%error, "a snapshot could not be sent");
                send(Err(io::Error::other(error)));
            }
        }
        drop(permit);
    });
    let pieces =
        futures::stream::unfold(rx, async |mut rx| rx.recv().await.map(|piece| (piece, rx)));
    // What wraps a body may ask once more after its end.
    Body::from_stream(pieces.fuse())
}
