//! Answers and parameters of the registry's dialect: the envelope, lenient parsing, and one place
//! that says which status and text a refusal has.

use crate::app::AppError;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use mainstay_model::Refusal;
use mainstay_raft::GroupError;
use mainstay_storage::StorageError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// Longest JSON body of a request.
const BODY_MAX: usize = 1 << 20;
/// It must arrive within this; tests of slow ones shall not be slow.
const BODY_TIME_MAX: Duration = Duration::from_secs(if cfg!(test) { 6 } else { 30 });

#[derive(Serialize)]
struct Envelope<T> {
    status: &'static str,
    body: Option<T>,
    message: String,
}

fn json<T: Serialize>(status: StatusCode, envelope: &Envelope<T>) -> Response {
    match serde_json::to_vec(envelope) {
        Ok(bytes) => {
            let mut response = (status, bytes).into_response();
            let value = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, value);
            response
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

/// Done, with a result.
pub(super) fn ok<T: Serialize>(body: T) -> Response {
    let message = String::new();
    json(
        StatusCode::OK,
        &Envelope {
            status: "OK",
            body: Some(body),
            message,
        },
    )
}

/// Done, nothing to say: the registry sends `null`.
pub(super) fn done() -> Response {
    let message = String::new();
    json(
        StatusCode::OK,
        &Envelope::<()> {
            status: "OK",
            body: None,
            message,
        },
    )
}

/// Not done: the status and text of the answer.
#[derive(Debug)]
pub(super) struct Refused {
    status: StatusCode,
    message: String,
}

impl Refused {
    /// For those who have a form of their own.
    pub(super) fn message(self) -> String {
        self.message
    }
}

/// What a handler gives.
pub(super) type Answer = Result<Response, Refused>;

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Self { status, message } = self;
        json(
            status,
            &Envelope::<()> {
                status: "FAIL",
                body: None,
                message,
            },
        )
    }
}

/// Not done. Logical failures are status 200 in this dialect.
pub(super) fn fail(status: StatusCode, message: impl Into<String>) -> Refused {
    Refused {
        status,
        message: message.into(),
    }
}

/// The chunks cannot be stored or read: the disk is full or faulty, or their bucket does not answer.
pub(super) fn storage(error: &StorageError) -> Refused {
    let status = match error {
        StorageError::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INSUFFICIENT_STORAGE,
    };
    fail(status, chain(error))
}

/// A request that cannot be understood.
pub(super) fn bad(message: impl Into<String>) -> Refused {
    fail(StatusCode::BAD_REQUEST, message)
}

/// What the state machine or consensus answered instead of a result.
impl From<AppError> for Refused {
    fn from(error: AppError) -> Self {
        match &error {
            AppError::Refused(Refusal::Stale) => fail(
                StatusCode::SERVICE_UNAVAILABLE,
                "others push at the same time: try again",
            ),
            AppError::Refused(refusal) => fail(StatusCode::OK, refusal_text(refusal)),
            AppError::Group(GroupError::Refused(why)) => fail(StatusCode::OK, why.clone()),
            AppError::Group(_) => fail(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
            AppError::Codec(_) => fail(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

fn refusal_text(refusal: &Refusal) -> String {
    match refusal {
        Refusal::TemplateUnknown(_) | Refusal::InstanceUnknown(_) | Refusal::NodeUnknown(_) => {
            "Not found".to_owned()
        }
        Refusal::TagUnknown(tag) => format!("No such tag {tag}"),
        Refusal::TagTaken(tag) => {
            format!("tag {tag} already exists with other content: choose another name or delete it")
        }
        Refusal::Limit(text) | Refusal::Conflict(text) => text.clone(),
        other => format!("{other:?}"),
    }
}

/// The vendor's answer to an unknown route.
pub(super) async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "404 page not found\n").into_response()
}

/// `//registry/vm` is `/registry/vm`: clients concatenate blindly, and a redirect would turn their
/// POST into a GET.
pub(super) fn collapse_slashes(mut request: Request) -> Request {
    let path = request.uri().path();
    if !path.contains("//") {
        return request;
    }
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    if let Some(query) = request.uri().query() {
        out.push('?');
        out.push_str(query);
    }
    // A part of a valid path with a valid query is valid.
    if let Ok(uri) = out.parse::<Uri>() {
        *request.uri_mut() = uri;
    }
    request
}

/// A request's whole body, at most 1 MiB.
pub(super) async fn read_body(body: Body) -> Result<Vec<u8>, Refused> {
    let body = Limited::new(body, BODY_MAX).collect();
    match tokio::time::timeout(BODY_TIME_MAX, body).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes().to_vec()),
        Ok(Err(e)) => Err(bad(format!(
            "the body could not be read (at most {BODY_MAX} bytes): {e}"
        ))),
        Err(_) => Err(fail(StatusCode::REQUEST_TIMEOUT, "the body is too slow")),
    }
}

/// A body that is a JSON object; `what` names it. (An array would be taken for one with its members in
/// order.)
pub(super) async fn read_object<T: DeserializeOwned>(body: Body, what: &str) -> Result<T, Refused> {
    let bytes = read_body(body).await?;
    let value: Value = serde_json::from_str(&String::from_utf8_lossy(&bytes))
        .map_err(|e| bad(format!("not {what}: {e}")))?;
    if !value.is_object() {
        return Err(bad(format!("not {what}: the body must be a JSON object")));
    }
    serde_json::from_value(value).map_err(|e| bad(format!("not {what}: {e}")))
}

/// Parameters from query and JSON body alike; the body wins. Empty and `null` are absent.
#[derive(Debug, Default)]
pub(super) struct Params(BTreeMap<String, String>);

impl Params {
    pub(super) fn from_query(uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        let pairs = form_urlencoded::parse(query.as_bytes()).into_owned();
        Self(pairs.filter(|(_, value)| !value.is_empty()).collect())
    }

    /// Content type and charset do not matter: what is there is JSON, decoded lossily.
    pub(super) async fn read(request: Request) -> Result<Self, Refused> {
        let mut params = Self::from_query(request.uri());
        let bytes = read_body(request.into_body()).await?;
        let text = String::from_utf8_lossy(&bytes);
        if text.trim().is_empty() {
            return Ok(params);
        }
        match serde_json::from_str(&text) {
            Ok(Value::Object(members)) => params.merge(members),
            Ok(Value::Null) => {}
            Ok(_) => return Err(bad("the body must be a JSON object")),
            Err(e) => return Err(bad(format!("the body is not JSON: {e}"))),
        }
        Ok(params)
    }

    fn merge(&mut self, members: serde_json::Map<String, Value>) {
        for (name, value) in members {
            let text = match value {
                Value::String(text) if !text.is_empty() => text,
                Value::Number(number) => number.to_string(),
                Value::Bool(flag) => flag.to_string(),
                _ => continue,
            };
            self.0.insert(name, text);
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A number, also if it was sent as text.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Refused> {
        let parse = |text: &str| {
            text.trim()
                .parse()
                .map_err(|_| bad(format!("{name}: {text:?} is not a number")))
        };
        self.get(name).map(parse).transpose()
    }
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
