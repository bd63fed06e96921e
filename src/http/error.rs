//! The only status table: every refusal and fault of the API and registry ports becomes a status
//! and a text here. Knows the wire contract's texts; refuses to decide anything else.
//!
//! | what | status | body |
//! | --- | --- | --- |
//! | the cloud said no (unknown id, limit, conflict) | 200 | `FAIL` and the text |
//! | the request cannot be read or is out of range | 400 | `FAIL` and the text |
//! | a page of another origin wants a WebSocket | 403 | `FAIL` |
//! | unknown route | 404 | plain `404 page not found` |
//! | known route, wrong method | 405 | `FAIL` |
//! | request body over its limit | 413 | `FAIL`, names the limit |
//! | no WebSocket where one is needed | 426 | `FAIL` |
//! | a bug, or bytes of another release | 500 | `FAIL` |
//! | no leader in time, outcome unknown, overloaded, stopped | 503 + `Retry-After` | `FAIL` and what is known |

use crate::app::AppError;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use mainstay_model::Refusal;
use mainstay_raft::GroupError;
use serde::Serialize;

/// Text for an object that is not there; clients compare it.
pub const NOT_FOUND: &str = "Not found";
/// Text for a start with an unknown template; clients compare it.
pub const VM_NOT_IN_REGISTRY: &str = "VM not in the registry";
/// Seconds after which a client may try again: elections take less.
const RETRY_AFTER: &str = "1";

/// An answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// The envelope's message.
    pub message: String,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }
    /// A logical failure: the request was understood, the answer is no.
    pub fn fail(message: impl Into<String>) -> Self {
        Self::new(StatusCode::OK, message)
    }
    /// The object is not there.
    pub fn not_found() -> Self {
        Self::fail(NOT_FOUND)
    }
    /// The request cannot be read, or a value is out of range.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }
    /// The request body is over its limit.
    pub fn too_large(limit: usize) -> Self {
        let text = format!("request body is larger than {limit} bytes (request_body_bytes_max)");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, text)
    }
    /// The route exists, but not with this method.
    pub fn method() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method not allowed on this path",
        )
    }
    /// A browser's page that is not ours.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }
    /// The path takes WebSockets.
    pub fn no_websocket(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UPGRADE_REQUIRED, message)
    }
    /// Not now; try again, here or at another member.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }
    /// Ours to repair.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
    /// A refusal of a start request: an unknown template has a text of its own there.
    pub fn of_start(error: AppError) -> Self {
        match error {
            AppError::Refused(Refusal::TemplateUnknown(_)) => Self::fail(VM_NOT_IN_REGISTRY),
            AppError::Refused(Refusal::NodeUnknown(id)) => Self::fail(format!("No such node {id}")),
            AppError::Refused(Refusal::GroupUnknown(id)) => {
                Self::fail(format!("No such group {id}"))
            }
            other => other.into(),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::TemplateUnknown(_)
            | Refusal::InstanceUnknown(_)
            | Refusal::NodeUnknown(_)
            | Refusal::GroupUnknown(_)
            | Refusal::RepositoryUnknown(_)
            | Refusal::ArtifactUnknown(_)
            | Refusal::DistributionUnknown(_) => Self::not_found(),
            Refusal::TagUnknown(tag) => Self::fail(format!("No such tag {tag}")),
            Refusal::TagTaken(tag) => {
                Self::fail(format!("Tag {tag} already exists with other content"))
            }
            Refusal::Limit(text) | Refusal::Conflict(text) => Self::fail(text),
            Refusal::Stale => Self::fail("others changed it meanwhile: try again"),
        }
    }
}

impl From<GroupError> for ApiError {
    fn from(error: GroupError) -> Self {
        match error {
            GroupError::NoLeader => Self::unavailable(
                "no leader within the deadline: nothing was changed; try again, or see `mainstay status`",
            ),
            GroupError::Unknown => Self::unavailable(
                "no answer within the deadline: the outcome is unknown, the request may have taken \
                 effect; look before you repeat it, or repeat it with the same Idempotency-Key",
            ),
            GroupError::Overloaded(why) => {
                Self::unavailable(format!("overloaded: {why}; nothing was changed, try again"))
            }
            GroupError::Stopped(why) => Self::unavailable(format!(
                "this member has stopped: {why}; try another member"
            )),
            GroupError::Diverged(why) => Self::unavailable(format!("{why}; try another member")),
            GroupError::Refused(why) => Self::fail(why),
        }
    }
}

impl From<AppError> for ApiError {
    fn from(error: AppError) -> Self {
        match error {
            AppError::Refused(refusal) => refusal.into(),
            AppError::Group(error) => error.into(),
            AppError::Codec(error) => Self::internal(format!("undecodable outcome: {error}")),
        }
    }
}

#[derive(Serialize)]
struct Fail<'a> {
    status: &'static str,
    message: &'a str,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(status = self.status.as_u16(), message = %self.message, "request failed");
        }
        let mut response = super::envelope::json(&Fail {
            status: "FAIL",
            message: &self.message,
        });
        *response.status_mut() = self.status;
        if self.status == StatusCode::UPGRADE_REQUIRED {
            let websocket = HeaderValue::from_static("websocket");
            response.headers_mut().insert(header::UPGRADE, websocket);
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            let wait = HeaderValue::from_static(RETRY_AFTER);
            response.headers_mut().insert(header::RETRY_AFTER, wait);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_clients_compare() {
        let start = |r| ApiError::of_start(AppError::Refused(r));
        assert_eq!(
            start(Refusal::TemplateUnknown("x".into())),
            ApiError::fail("VM not in the registry")
        );
        assert_eq!(
            start(Refusal::TagUnknown("v9".into())),
            ApiError::fail("No such tag v9")
        );
        assert_eq!(
            ApiError::from(Refusal::TemplateUnknown("x".into())),
            ApiError::not_found()
        );
        assert_eq!(ApiError::not_found().message, "Not found");
        assert_eq!(ApiError::not_found().status, StatusCode::OK);
    }

    #[test]
    fn an_unknown_outcome_says_so_and_asks_to_wait() {
        let error = ApiError::from(GroupError::Unknown);
        assert!(error.message.contains("outcome is unknown"));
        let response = error.into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    }
}
