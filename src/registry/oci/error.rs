//! Refusals of the OCI API: `{"errors":[{"code","message","detail"}]}` with the specification's codes.

use crate::app::AppError;
use crate::registry::answer;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use mainstay_model::Refusal;
use mainstay_raft::GroupError;
use mainstay_storage::StorageError;
use serde_json::{Value, json};

/// What went wrong, as far as the client is told.
#[derive(Debug)]
pub(in crate::registry) struct OciError {
    status: StatusCode,
    code: &'static str,
    message: String,
    detail: Value,
    headers: Box<HeaderMap>,
}

pub(super) type OciAnswer = Result<Response, OciError>;

impl OciError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            detail: Value::Null,
            headers: Box::default(),
        }
    }

    /// What was asked for is not there.
    pub(super) fn is_unknown(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    /// The request was good, this member could not: nothing of it was kept.
    pub(super) fn is_ours(&self) -> bool {
        self.status.is_server_error()
    }

    /// It is known that the rest of the body does not come.
    pub(super) fn is_slow(&self) -> bool {
        self.status == StatusCode::REQUEST_TIMEOUT
    }

    pub(super) fn detail(mut self, detail: Value) -> Self {
        self.detail = detail;
        self
    }

    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }
}

impl IntoResponse for OciError {
    fn into_response(self) -> Response {
        let error = json!({"code": self.code, "message": self.message, "detail": self.detail});
        let body = json!({"errors": [error]}).to_string();
        let mut response = super::json(self.status, body);
        response.headers_mut().extend(*self.headers);
        response
    }
}

pub(super) fn method_not_allowed() -> OciError {
    let text = "this path knows no such method";
    OciError::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", text)
}

pub(super) fn bad_digest(message: impl Into<String>) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
}

pub(super) fn bad_manifest(message: impl Into<String>) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
}

pub(super) fn bad_size(message: impl Into<String>) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "SIZE_INVALID", message)
}

pub(super) fn no_blob(digest: impl ToString) -> OciError {
    let text = "blob unknown to registry";
    OciError::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", text)
        .detail(json!({"digest": digest.to_string()}))
}

pub(super) fn no_manifest(reference: impl ToString) -> OciError {
    let text = "manifest unknown to registry";
    OciError::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", text)
        .detail(json!({"reference": reference.to_string()}))
}

pub(super) fn no_repository(name: &str) -> OciError {
    let text = "repository name not known to registry";
    OciError::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", text).detail(json!({"name": name}))
}

pub(super) fn no_upload() -> OciError {
    let text = "no such upload here: it has ended, or its time was over; begin another";
    OciError::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", text)
}

/// Not now: nothing is wrong with the request.
pub(super) fn unavailable(message: impl Into<String>) -> OciError {
    OciError::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", message)
        .header(header::RETRY_AFTER, HeaderValue::from_static("1"))
}

/// As many as this member serves at once; worth another try after `seconds`.
pub(super) fn too_many(message: &'static str, seconds: u64) -> OciError {
    OciError::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
        .header(header::RETRY_AFTER, seconds.into())
}

/// Understood, and not allowed.
pub(super) fn denied(why: String) -> OciError {
    OciError::new(StatusCode::FORBIDDEN, "DENIED", why)
}

pub(super) fn full(why: String) -> OciError {
    OciError::new(StatusCode::INSUFFICIENT_STORAGE, "DENIED", why)
}

impl From<AppError> for OciError {
    fn from(error: AppError) -> Self {
        let conflict = |text: String| Self::new(StatusCode::CONFLICT, "DENIED", text);
        match error {
            AppError::Refused(refusal) => match refusal {
                Refusal::RepositoryUnknown(name) => no_repository(&name),
                Refusal::TemplateUnknown(id) => no_repository(&id),
                Refusal::ArtifactUnknown(digest) => no_manifest(digest),
                Refusal::TagUnknown(tag) => no_manifest(tag),
                Refusal::TagTaken(tag) => conflict(format!(
                    "template tag {tag} has other content: choose another name or delete it"
                )),
                Refusal::Limit(text) | Refusal::Conflict(text) => conflict(text),
                Refusal::Stale => unavailable("others push at the same time: try again"),
                other => conflict(format!("{other:?}")),
            },
            AppError::Group(GroupError::Refused(why)) => {
                Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", why)
            }
            AppError::Group(e) => unavailable(answer::chain(&e)),
            AppError::Codec(e) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "UNKNOWN",
                answer::chain(&e),
            ),
        }
    }
}

impl From<StorageError> for OciError {
    fn from(error: StorageError) -> Self {
        let why = answer::chain(&error);
        tracing::error!(why, "the OCI interface could not store or read");
        match error {
            StorageError::Unavailable { .. } => unavailable(why),
            _ => full(why),
        }
    }
}
