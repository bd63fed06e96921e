//! Uploads and blobs over HTTP: begun, continued, ended, mounted, shown, deleted.

use super::error::{
    OciAnswer, OciError, bad_digest, bad_size, full, method_not_allowed, no_blob, no_upload,
    too_many, unavailable,
};
use super::ingest::Ingest;
use super::locate::Located;
use super::uploads::{Upload, UploadId};
use super::{CONTENT_DIGEST, STILL_MAX, route, serve, value};
use crate::registry::RegistryService;
use crate::registry::answer::{self, Params};
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use mainstay_agent::transfer::FileEntry;
use mainstay_model::MemberId;
use mainstay_model::feature::ARTIFACTS;
use mainstay_model::ids::Sha256;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// In each minute at least so much must come: a slow body holds its place no longer.
const MINUTE: Duration = Duration::from_secs(60);
const PER_MINUTE_MIN: u64 = 1 << 20;
/// A body that stands still for so long gives its place to others until it goes on.
const YIELD: Duration = Duration::from_secs(5);
/// Longest wait for a place among the bodies, and for another request of the same upload.
const TURN_MAX: Duration = Duration::from_secs(30);
/// Longest wait for the member that has an upload to answer in full, once it has begun to.
const OWNER_MAX: Duration = Duration::from_secs(300);
/// A request is passed on no longer if nothing of its body went on for so long, nor was answered: longer
/// than the owner itself waits for its turn, for a place and for bytes.
const STUCK_MAX: Duration = Duration::from_secs(120);
/// Longest wait for it to begin to answer a request without a body.
const ASKED_MAX: Duration = Duration::from_secs(30);
/// On a request that another member has passed on: it goes no further.
const PASSED_ON: HeaderName = HeaderName::from_static("x-mainstay-passed-on");
const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");

impl RegistryService {
    /// `POST uploads/`: open one, or with `digest` take the whole blob, or with `mount` take one that
    /// is in another repository.
    pub(super) async fn begin_upload(
        self: &Arc<Self>,
        name: String,
        request: Request,
    ) -> OciAnswer {
        let params = Params::from_query(request.uri());
        (self.room)().map_err(full)?;
        let ready = |state: &mainstay_model::State| state.features >= ARTIFACTS;
        let stale = crate::app::Consistency::Stale;
        if !self.catalog.take(stale, ready).await? {
            let text = "not yet: every member must run a release that knows OCI artifacts first";
            return Err(OciError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "UNSUPPORTED",
                text,
            ));
        }
        if let Some(algorithm) = params.get("digest-algorithm").filter(|a| *a != "sha256") {
            return Err(bad_digest(format!(
                "{algorithm} is not supported, sha256 is"
            )));
        }
        if let (Some(digest), Some(from)) = (params.get("mount"), params.get("from")) {
            let digest = route::digest(digest)?;
            if route::is_name(from) && self.mount(&name, from, &digest).await? {
                return Ok(created(&name, &digest));
            }
        } else if let Some(digest) = params.get("digest") {
            let digest = route::digest(digest)?;
            let (mut ingest, mut place) = (Ingest::default(), None);
            let body = request.into_body();
            self.absorb(&mut ingest, body, None, &mut place, &|_| ())
                .await?;
            return self.close(&name, &mut ingest, &digest).await;
        }
        let upload = UploadId {
            id: self.uploads.begin(name.clone()),
            member: self.member,
        };
        Ok(progress(StatusCode::ACCEPTED, &name, &upload, 0))
    }

    /// Name a blob of another repository here as well, once all of it is on this disk.
    async fn mount(
        self: &Arc<Self>,
        name: &str,
        from: &str,
        digest: &Sha256,
    ) -> Result<bool, OciError> {
        let Some(found) = self.locate(from, digest).await? else {
            return Ok(false);
        };
        match self.adopt(name, digest, found).await {
            Ok(()) => Ok(true),
            Err(why) => {
                tracing::warn!(why, %digest, from, "could not mount a blob; its client uploads it");
                Ok(false)
            }
        }
    }

    /// Requests to an open upload.
    pub(super) async fn upload(
        self: &Arc<Self>,
        name: &str,
        id: &str,
        request: Request,
    ) -> OciAnswer {
        let id = UploadId::parse(id).ok_or_else(no_upload)?;
        if id.member != self.member {
            return self.pass_on(id.member, request).await;
        }
        let found = self.uploads.find(name, &id.id);
        let method = request.method().clone();
        let Some(upload) = found else {
            return match method {
                Method::PUT => self.closed_before(name, request.uri()).await,
                _ => Err(no_upload()),
            };
        };
        match method {
            Method::GET | Method::HEAD => {
                Ok(progress(StatusCode::NO_CONTENT, name, &id, upload.taken()))
            }
            Method::DELETE => {
                self.uploads.end(&id.id);
                Ok(StatusCode::NO_CONTENT.into_response())
            }
            Method::PATCH | Method::PUT => {
                // To its end, whatever becomes of the client: what came is on disk then, not in memory.
                let (service, name) = (Arc::clone(self), name.to_owned());
                let run =
                    async move { service.continue_upload(&name, &id, &upload, request).await };
                let ended = tokio::spawn(run).await;
                ended.map_err(|_| unavailable("this member is stopping"))?
            }
            _ => Err(method_not_allowed()),
        }
    }

    /// The answer to a close may have been lost: closed twice is closed.
    async fn closed_before(self: &Arc<Self>, name: &str, uri: &Uri) -> OciAnswer {
        let params = Params::from_query(uri);
        let digest = route::digest(params.get("digest").unwrap_or_default())?;
        match self.locate(name, &digest).await? {
            Some(_) => Ok(created(name, &digest)),
            None => Err(no_upload()),
        }
    }

    async fn continue_upload(
        self: &Arc<Self>,
        name: &str,
        id: &UploadId,
        upload: &Arc<Upload>,
        request: Request,
    ) -> OciAnswer {
        let closing = request.method() == Method::PUT;
        let digest = match closing {
            true => {
                let params = Params::from_query(request.uri());
                Some(route::digest(params.get("digest").unwrap_or_default())?)
            }
            false => None,
        };
        let turn = tokio::time::timeout(TURN_MAX, upload.ingest.lock()).await;
        let mut guard = turn.map_err(|_| {
            let text = "another request of this upload is under way";
            OciError::new(StatusCode::CONFLICT, "BLOB_UPLOAD_INVALID", text)
        })?;
        let ingest = guard.as_mut().ok_or_else(no_upload)?;
        let expected = expected_len(request.headers(), ingest.len()).map_err(|error| {
            let at = progress(StatusCode::OK, name, id, ingest.len());
            [header::LOCATION, header::RANGE]
                .into_iter()
                .fold(error, |error, h| {
                    let value = at.headers().get(&h).cloned();
                    error.header(h, value.unwrap_or(HeaderValue::from_static("")))
                })
        })?;
        let body = request.into_body();
        ingest.begin().await;
        let mut place = None;
        let taken = |len| upload.taken.store(len, Ordering::Relaxed);
        let absorbed = self.absorb(ingest, body, expected, &mut place, &taken);
        let mut done = absorbed.await;
        if done.is_err() || digest.is_none() {
            let paused = ingest.pause(self).await;
            done = done.and(paused);
        }
        let closed = match (&done, &digest) {
            (Ok(()), Some(digest)) => Some(self.close(name, ingest, digest).await),
            _ => None,
        };
        upload.touch();
        match closed {
            // The member could not: the client may try again, as if it had not yet.
            Some(Err(error)) if error.is_ours() => done = Err(error),
            // Right or wrong, it has ended.
            Some(closed) => {
                *guard = None;
                self.uploads.end(&id.id);
                return closed;
            }
            None => {}
        }
        if ingest.broken() || done.as_ref().is_err_and(OciError::is_ours) {
            ingest.back();
        }
        ingest.end();
        taken(ingest.len());
        done?;
        Ok(progress(StatusCode::ACCEPTED, name, id, ingest.len()))
    }

    /// One of the places for bodies.
    async fn place(&self) -> Result<OwnedSemaphorePermit, OciError> {
        let bodies = Arc::clone(&self.uploads.bodies);
        let turn = tokio::time::timeout(TURN_MAX, bodies.acquire_owned()).await;
        let turn = turn.map_err(|_| too_many("too many uploads at once: try again", 5))?;
        turn.map_err(|_| unavailable("this member is stopping"))
    }

    /// Take in a body, of exactly `expected` bytes if that is known. It has a place while it moves, and
    /// leaves it in `place` for what is to be done with its end.
    async fn absorb(
        self: &Arc<Self>,
        ingest: &mut Ingest,
        body: Body,
        expected: Option<u64>,
        place: &mut Option<OwnedSemaphorePermit>,
        taken: &(dyn Fn(u64) + Sync),
    ) -> Result<(), OciError> {
        let slow = || {
            let text = "the body is too slow, or stalled; what came was kept";
            OciError::new(StatusCode::REQUEST_TIMEOUT, "BLOB_UPLOAD_INVALID", text)
        };
        let begin = ingest.len();
        let mut moved = Instant::now();
        let mut window = (moved + MINUTE, begin + PER_MINUTE_MIN);
        let mut stream = body.into_data_stream();
        loop {
            let patience = if place.is_some() { YIELD } else { STILL_MAX };
            let until = (moved + patience).min(window.0);
            let piece = match tokio::time::timeout_at(until, stream.next()).await {
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(e))) => {
                    let why = format!("the body was cut off: {}", answer::chain(&e));
                    let code = "BLOB_UPLOAD_INVALID";
                    return Err(OciError::new(StatusCode::BAD_REQUEST, code, why));
                }
                Ok(None) => break,
                Err(_) if place.is_some() && Instant::now() < window.0 => {
                    ingest.pause(self).await?;
                    *place = None;
                    continue;
                }
                Err(_) => return Err(slow()),
            };
            if place.is_none() {
                let asked = Instant::now();
                *place = Some(self.place().await?);
                window.0 += asked.elapsed();
            }
            moved = Instant::now();
            let came = ingest.len() - begin + piece.len() as u64;
            if expected.is_some_and(|expected| came > expected) {
                return Err(bad_size("the body is longer than its range"));
            }
            ingest.append(self, &piece).await?;
            taken(ingest.len());
            if ingest.len() >= window.1 {
                window = (Instant::now() + MINUTE, ingest.len() + PER_MINUTE_MIN);
            }
        }
        match expected {
            Some(expected) if ingest.len() - begin != expected => {
                Err(bad_size("the body is shorter than its range"))
            }
            _ => Ok(()),
        }
    }

    /// Everything durable, and its name; or nothing, if it is not what it was said to be.
    async fn close(
        self: &Arc<Self>,
        name: &str,
        ingest: &mut Ingest,
        digest: &Sha256,
    ) -> OciAnswer {
        let (found, file) = ingest.finish(self).await?;
        if found != *digest {
            let text = format!("the bytes are {found}, not {digest}: nothing was kept");
            return Err(bad_digest(text));
        }
        self.name_blob(name, digest, file).await?;
        Ok(created(name, digest))
    }

    /// An upload that another member began.
    async fn pass_on(&self, owner: MemberId, request: Request) -> OciAnswer {
        let (head, body) = request.into_parts();
        if head.headers.contains_key(&PASSED_ON) {
            return Err(no_upload());
        }
        let path = head.uri.path_and_query();
        let path = path.map_or_else(|| head.uri.path(), |p| p.as_str());
        let sends = matches!(head.method, Method::PATCH | Method::PUT);
        let asked = self.peers.request(head.method, owner, path);
        let mut asked = asked.ok_or_else(no_upload)?.header(PASSED_ON, "1");
        for name in [
            header::CONTENT_LENGTH,
            header::CONTENT_RANGE,
            header::CONTENT_TYPE,
        ] {
            if let Some(value) = head.headers.get(&name) {
                asked = asked.header(name, value);
            }
        }
        let moved = Arc::new(Mutex::new(Instant::now()));
        if sends {
            let moves = Arc::clone(&moved);
            let pieces = body.into_data_stream();
            let pieces = pieces.inspect(move |_| *moves.lock() = Instant::now());
            asked = asked.body(reqwest::Body::wrap_stream(pieces));
        }
        let stuck = async {
            loop {
                let until = *moved.lock() + STUCK_MAX;
                if until <= Instant::now() {
                    return;
                }
                tokio::time::sleep_until(until).await;
            }
        };
        let gone = |e: &dyn std::error::Error| {
            let why = answer::chain(e);
            unavailable(format!(
                "the member that has this upload does not answer: {why}"
            ))
        };
        // A body takes as long as its client, while it moves; a question without one is answered at once.
        let answered = match sends {
            true => tokio::select! {
                answered = asked.send() => answered,
                () = stuck => {
                    let text = "the member that has this upload takes nothing and says nothing: try again";
                    return Err(unavailable(text));
                }
            },
            false => tokio::time::timeout(ASKED_MAX, asked.send())
                .await
                .map_err(|e| gone(&e))?,
        };
        let answered = answered.map_err(|e| gone(&e))?;
        let (status, headers) = (answered.status(), answered.headers().clone());
        let bytes = tokio::time::timeout(OWNER_MAX, answered.bytes()).await;
        let bytes = bytes.map_err(|e| gone(&e))?.map_err(|e| gone(&e))?;
        let mut response = (status, bytes).into_response();
        for name in [
            header::LOCATION,
            header::RANGE,
            header::CONTENT_TYPE,
            header::RETRY_AFTER,
            CONTENT_DIGEST,
            UPLOAD_UUID,
        ] {
            if let Some(value) = headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        Ok(response)
    }

    /// Requests to a blob.
    pub(super) async fn blob(
        self: &Arc<Self>,
        name: &str,
        digest: &str,
        request: Request,
    ) -> OciAnswer {
        let digest = route::digest(digest)?;
        match *request.method() {
            Method::GET | Method::HEAD => {
                let found = self.locate(name, &digest).await?;
                let found = found.ok_or_else(|| no_blob(digest))?;
                let renewed = self.renew(name, &digest, &found).await;
                if matches!(renewed, Ok(false)) {
                    return Err(no_blob(digest));
                }
                if request.method() == Method::HEAD {
                    // Who asks with HEAD is about to push, and relies on it.
                    renewed?;
                    return Ok(head(&digest, &found.file));
                }
                self.send_blob(&digest, found, request.headers()).await
            }
            Method::DELETE => self.delete_blob(name, &digest).await,
            _ => Err(method_not_allowed()),
        }
    }

    async fn send_blob(
        self: &Arc<Self>,
        digest: &Sha256,
        found: Located,
        headers: &HeaderMap,
    ) -> OciAnswer {
        let size = found.file.size;
        let asked = headers.get(header::RANGE).and_then(|v| v.to_str().ok());
        let range = match asked.map(|text| serve::range(text, size)) {
            Some(Some(Err(()))) => {
                let code = "BLOB_UNKNOWN";
                let text = format!("the blob has {size} bytes");
                let error = OciError::new(StatusCode::RANGE_NOT_SATISFIABLE, code, text);
                return Err(error.header(header::CONTENT_RANGE, value(&format!("bytes */{size}"))));
            }
            Some(Some(Ok(range))) => Some(range),
            None | Some(None) => None,
        };
        let whole = 0..size;
        let part = range.clone().unwrap_or(whole);
        let body = serve::stream(Arc::clone(self), found.file, found.holders, part.clone());
        let body = body.await.map_err(unavailable)?;
        let mut response = Response::new(body);
        if range.is_some() {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let shown = format!("bytes {}-{}/{size}", part.start, part.end - 1);
            response
                .headers_mut()
                .insert(header::CONTENT_RANGE, value(&shown));
        }
        set_blob_headers(&mut response, digest, part.end - part.start);
        Ok(response)
    }

    async fn delete_blob(self: &Arc<Self>, name: &str, digest: &Sha256) -> OciAnswer {
        let linear = crate::app::Consistency::Linearizable;
        let named = |state: &mainstay_model::State| {
            let repository = state.repositories.get(name)?;
            let mut artifacts = repository.artifacts.values();
            let names = |a: &&mainstay_model::artifact::Artifact| {
                a.content.digest == *digest || a.content.blobs.iter().any(|b| b.digest == *digest)
            };
            artifacts.find(names).map(|a| a.content.digest)
        };
        if let Some(artifact) = self.catalog.take(linear, named).await? {
            let text = format!("manifest {artifact} names it: delete that, and it goes by itself");
            let code = "UNSUPPORTED";
            return Err(OciError::new(StatusCode::METHOD_NOT_ALLOWED, code, text));
        }
        if self.forget_everywhere(name, digest).await? {
            return Ok(StatusCode::ACCEPTED.into_response());
        }
        Err(no_blob(digest))
    }
}

/// How long a body with this `Content-Range` must be, if it goes on where the upload is.
fn expected_len(headers: &HeaderMap, at: u64) -> Result<Option<u64>, OciError> {
    let Some(range) = headers.get(header::CONTENT_RANGE) else {
        return Ok(None);
    };
    let invalid = || {
        let text = "the range is not START-END of what comes next: see Range of this answer";
        OciError::new(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "BLOB_UPLOAD_INVALID",
            text,
        )
    };
    let text = range.to_str().unwrap_or_default().trim();
    let number = |text: &str| text.parse::<u64>().ok();
    let parsed = text.split_once('-');
    let parsed = parsed.and_then(|(start, end)| Some((number(start)?, number(end)?)));
    match parsed {
        Some((start, end)) if start == at && end >= start && end < u64::MAX => {
            Ok(Some(end - start + 1))
        }
        _ => Err(invalid()),
    }
}

/// Where an upload is.
fn progress(status: StatusCode, name: &str, id: &UploadId, len: u64) -> Response {
    let headers = [
        (
            header::LOCATION,
            value(&format!("/v2/{name}/blobs/uploads/{id}")),
        ),
        (
            header::RANGE,
            value(&format!("0-{}", len.saturating_sub(1))),
        ),
        (UPLOAD_UUID, value(&id.id.to_string())),
    ];
    (status, headers).into_response()
}

fn created(name: &str, digest: &Sha256) -> Response {
    let headers = [
        (
            header::LOCATION,
            value(&format!("/v2/{name}/blobs/{digest}")),
        ),
        (CONTENT_DIGEST, value(&digest.to_string())),
    ];
    (StatusCode::CREATED, headers).into_response()
}

fn head(digest: &Sha256, file: &FileEntry) -> Response {
    let mut response = Response::new(Body::empty());
    set_blob_headers(&mut response, digest, file.size);
    response
}

fn set_blob_headers(response: &mut Response, digest: &Sha256, len: u64) {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, len.into());
    headers.insert(CONTENT_DIGEST, value(&digest.to_string()));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
}
