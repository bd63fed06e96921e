//! The OCI distribution API on `/v2/`: the same chunks, members and commits as every other push, for
//! clients that name bytes by SHA-256. What is supported: docs/oci.md. Refuses to know the transfer
//! protocol of our own clients.
//!
//! * `route`: paths, names, digests, tags.
//! * `error`: refusals as the specification words them; `spare`: bodies that were refused.
//! * `ingest`: bytes of any shape, as they arrive, into chunks.
//! * `uploads`: open uploads; soft, on the member that began them.
//! * `blob`: uploads and blobs over HTTP; `serve`: a blob's bytes out of chunks.
//! * `locate`: where a blob is: uploaded here, named by an artifact, uploaded to another member.
//! * `document`: an OCI manifest's JSON; `manifest`: put, shown, deleted.
//! * `list`: tags, referrers, repositories.
//! * `template`: templates as artifacts, both ways.
//!
//! ```text
//! upload -> chunks durable here -> name durable here (blobs/) -> 201
//! manifest -> everything it names durable here -> PutArtifact -> peers copy -> ReportArtifactHeld -> visible -> 201
//! ```

mod blob;
mod document;
mod error;
pub(super) mod ingest;
mod list;
mod locate;
mod manifest;
mod route;
mod serve;
mod spare;
mod template;
mod uploads;

pub(super) use uploads::Uploads;

use super::RegistryService;
use crate::stamp;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use error::OciError;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use mainstay_agent::transfer::FileEntry;
use mainstay_model::ids::Sha256;
use route::{Route, Target};
use std::sync::Arc;
use std::time::Duration;

/// A blob that no artifact names is kept so long after it was uploaded, mounted or asked for.
const UNNAMED_KEPT: Duration = Duration::from_hours(24);
/// A body that stands still for so long is cut off.
const STILL_MAX: Duration = Duration::from_secs(30);
/// How often what has expired is looked for.
const TIDY_EVERY: Duration = Duration::from_secs(60);

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// What the registry port answers below `/v2`.
pub(super) fn router(service: Arc<RegistryService>) -> Router {
    Router::new()
        .route("/v2", any(serve))
        .route("/v2/", any(serve))
        .route("/v2/{*rest}", any(serve))
        .with_state(service)
}

/// What members ask each other: blobs that no artifact names yet, and uploads that are open elsewhere.
pub(super) fn peer_router(service: Arc<RegistryService>) -> Router {
    Router::new()
        .route(locate::PATH, get(locate::answer).delete(locate::forget))
        .with_state(Arc::clone(&service))
        .merge(router(service))
}

async fn serve(State(service): State<Arc<RegistryService>>, request: Request) -> Response {
    let head = request.method() == Method::HEAD;
    let (request, rest) = spare::keep(request);
    let mut response = match answer(service, request).await {
        Ok(response) => response,
        Err(error) => {
            if !error.is_slow() {
                rest.throw_away().await;
            }
            error.into_response()
        }
    };
    if head && response.status().is_client_error() {
        *response.body_mut() = Body::empty();
    }
    let version = HeaderValue::from_static("registry/2.0");
    response.headers_mut().insert(API_VERSION, version);
    response
}

async fn answer(service: Arc<RegistryService>, request: Request) -> Result<Response, OciError> {
    let Route { name, target } = route::parse(request.uri().path())?;
    let method = request.method().clone();
    let get = matches!(method, Method::GET | Method::HEAD);
    match target {
        Target::Base if get => Ok(json(StatusCode::OK, "{}".into())),
        Target::Catalog if get => service.list_repositories(request.uri()).await,
        Target::Tags if get => service.list_tags(&name, request.uri()).await,
        Target::Referrers(subject) if get => {
            service.list_referrers(&name, &subject, request.uri()).await
        }
        Target::Uploads if method == Method::POST => service.begin_upload(name, request).await,
        Target::Upload(id) => service.upload(&name, &id, request).await,
        Target::Blob(digest) => service.blob(&name, &digest, request).await,
        Target::Manifest(reference) => service.manifest(&name, &reference, request).await,
        _ => Err(error::method_not_allowed()),
    }
}

fn json(status: StatusCode, body: String) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (status, kind, body).into_response()
}

/// A header's value out of digests, names and numbers, none of which holds anything illegal.
fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

/// The name of a blob's file in a bundle or a description of its own.
fn file_name(digest: &Sha256) -> String {
    format!("sha256-{}", hex::encode(digest.0))
}

/// The file of this blob.
fn file_of<'a>(files: &'a [FileEntry], digest: &Sha256) -> Option<&'a FileEntry> {
    let name = file_name(digest);
    files.iter().find(|file| file.name == name)
}

impl RegistryService {
    /// Let uploads and unnamed blobs go whose time is over. Runs until it is dropped; spawn it once.
    pub async fn tidy(self: Arc<Self>) {
        loop {
            tokio::time::sleep(TIDY_EVERY).await;
            self.uploads.expire();
            let kept = u64::try_from(UNNAMED_KEPT.as_millis()).unwrap_or(u64::MAX);
            let before = stamp::now_ms().saturating_sub(kept);
            let names = self.names.clone();
            if let Err(error) = self.forget_sums().await {
                tracing::debug!(?error, "did not look for sums of disks that are gone");
            }
            match tokio::task::spawn_blocking(move || names.expire(before)).await {
                Ok(Ok(0)) => {}
                Ok(Ok(count)) => tracing::info!(count, "forgot blobs that no artifact names"),
                Ok(Err(e)) => {
                    let error = super::answer::chain(&e);
                    tracing::warn!(error, "could not forget blobs that no artifact names");
                }
                Err(_) => return,
            }
        }
    }
}
