//! The dialect's envelope and how requests are read: one [`Call`] for query and body, lenient
//! where clients are sloppy, strict where a guess could do harm. Serves the API and the registry
//! port alike; refuses to know any route.
//!
//! The content type is ignored; a body is lossy UTF-8 JSON, an object (or nothing, or `null`);
//! members are looked up in the body, then in the query; `null` is absent; numbers may be strings.

use super::error::ApiError;
use super::intake;
use crate::app::Consistency;
use crate::stamp;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::BodyExt as _;
use mainstay_model::{CommandId, InstanceId, SaveId, TemplateId};
use serde::Serialize;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::time::Duration;

/// Largest request body: room for a 1 MiB script in base64 and all limits of an instance.
pub const REQUEST_BODY_BYTES_MAX: usize = 4 << 20;
/// Of a body over the limit, this much is read and dropped, so that its sender gets to read the answer.
const DISCARD_BYTES_MAX: usize = 64 << 20;
/// Longest time for a body to arrive.
const BODY_DEADLINE: Duration = Duration::from_secs(30);
/// Longest `Idempotency-Key`.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 256;

#[derive(Serialize)]
struct Success<'a, T: ?Sized> {
    status: &'static str,
    message: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a T>,
}

/// `OK` with a body.
pub fn ok<T: Serialize + ?Sized>(body: &T) -> Response {
    json(&Success {
        status: "OK",
        message: "",
        body: Some(body),
    })
}

/// `OK` with what was looked for, or "Not found": an answer like any other, so that a stale one can
/// say how stale it is.
pub fn found<T: Serialize>(body: Option<T>) -> Response {
    body.map_or_else(|| ApiError::not_found().into_response(), |body| ok(&body))
}

/// `OK` without a body.
pub fn done() -> Response {
    json(&Success::<()> {
        status: "OK",
        message: "",
        body: None,
    })
}

/// Any value as a JSON answer.
pub fn json<T: Serialize + ?Sized>(value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let json = HeaderValue::from_static("application/json");
            ([(header::CONTENT_TYPE, json)], bytes).into_response()
        }
        Err(e) => ApiError::internal(format!("cannot encode the answer: {e}")).into_response(),
    }
}

/// A request as the dialect sees it.
#[derive(Clone, Debug)]
pub struct Call {
    query: Map<String, Value>,
    body: Map<String, Value>,
    name: String,
    idempotency: Option<String>,
    /// The body counts as long as this lives.
    _held: intake::Held,
}

impl<S: Send + Sync> FromRequest<S> for Call {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let reads_body = !matches!(parts.method, Method::GET | Method::HEAD);
        let (held, body) = if reads_body {
            let held = match intake::admit(&parts.headers) {
                Ok(held) => held,
                Err(refused) => {
                    discard(body).await;
                    return Err(refused);
                }
            };
            (held, object(&collect(&parts.headers, body).await?)?)
        } else {
            (intake::NONE, Map::new())
        };
        Ok(Self {
            query: query(parts.uri.query().unwrap_or_default()),
            body,
            name: format!("{} {}", parts.method, parts.uri.path()),
            idempotency: idempotency(&parts.headers)?,
            _held: held,
        })
    }
}

impl Call {
    /// A member by name: in the body, else in the query; `null` is absent.
    pub fn get(&self, name: &str) -> Option<&Value> {
        let given = |map: &'_ Map<String, Value>| map.get(name).is_some_and(|v| !v.is_null());
        if given(&self.body) {
            self.body.get(name)
        } else {
            self.query.get(name)
        }
    }
    /// A text; the empty one counts as absent.
    pub fn text(&self, name: &str) -> Result<Option<String>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(wrong(name, "a string")),
        }
    }
    /// A text that must be there.
    pub fn required(&self, name: &str) -> Result<String, ApiError> {
        self.text(name)?
            .ok_or_else(|| ApiError::bad(format!("{name} is required")))
    }
    /// A whole number within `range`, also as a string; the empty string counts as absent.
    pub fn int(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        self.get(name)
            .map_or(Ok(None), |value| int(name, value, range))
    }
    /// A truth value, also as a string.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(Value::String(text)) => match text.as_str() {
                "" => Ok(None),
                "true" => Ok(Some(true)),
                "false" => Ok(Some(false)),
                _ => Err(wrong(name, "true or false")),
            },
            Some(_) => Err(wrong(name, "true or false")),
        }
    }
    /// A truth value that some callers write as a number.
    pub fn flag_or_number(&self, name: &str) -> Result<bool, ApiError> {
        match self.flag(name) {
            Ok(flag) => Ok(flag.unwrap_or(false)),
            Err(_) => Ok(self.int(name, 0..=u64::MAX)?.unwrap_or(0) > 0),
        }
    }
    /// Bytes in standard base64, with or without line breaks. Undecodable is a failure of the
    /// operation, not of the request.
    pub fn base64(&self, name: &str) -> Result<Option<Vec<u8>>, ApiError> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        let packed: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
        let bytes = STANDARD.decode(packed);
        bytes
            .map(Some)
            .map_err(|e| ApiError::fail(format!("{name} is not valid base64: {e}")))
    }
    /// A list.
    pub fn list(&self, name: &str) -> Result<Option<&[Value]>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(wrong(name, "an array")),
        }
    }
    /// An object.
    pub fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(members)),
            Some(_) => Err(wrong(name, "an object")),
        }
    }
    /// How fresh a read must be: `?consistency=stale` is the opt-out.
    pub fn consistency(&self) -> Result<Consistency, ApiError> {
        match self.text("consistency")?.as_deref() {
            None | Some("linearizable") => Ok(Consistency::Linearizable),
            Some("stale") => Ok(Consistency::Stale),
            Some(_) => Err(wrong("consistency", "linearizable or stale")),
        }
    }
    /// The command's id: the same for every request with this method, path and `Idempotency-Key`.
    pub fn command_id(&self) -> CommandId {
        self.derived("command")
            .map_or_else(stamp::command_id, |id| CommandId(u128::from_be_bytes(id)))
    }
    /// The `n`th instance's id; derived like the command's id.
    pub fn instance_id(&self, n: u64) -> InstanceId {
        self.derived(&format!("instance {n}"))
            .map_or_else(stamp::instance_id, |id| InstanceId::from(uuid_text(id)))
    }

    /// The id of a save; derived like the command's id.
    pub fn save_id(&self) -> SaveId {
        let derived = self.derived("save").map(uuid_text);
        derived.map_or_else(stamp::save_id, SaveId::from)
    }
    /// The id of a template that comes of the call; derived like the command's id.
    pub fn template_id(&self) -> TemplateId {
        let derived = self.derived("template").map(uuid_text);
        derived.map_or_else(stamp::template_id, TemplateId::from)
    }

    fn derived(&self, what: &str) -> Option<[u8; 16]> {
        let key = self.idempotency.as_ref()?;
        let mut hasher = blake3::Hasher::new_derive_key("mainstay idempotency key v1");
        for part in [self.name.as_str(), key, what] {
            hasher
                .update(&(part.len() as u64).to_be_bytes())
                .update(part.as_bytes());
        }
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        Some(id)
    }
}

fn uuid_text(id: [u8; 16]) -> String {
    uuid::Builder::from_random_bytes(id).into_uuid().to_string()
}

/// A whole number within `range`, also as a string; the empty string counts as absent.
pub fn int(name: &str, value: &Value, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
    let number = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) if text.is_empty() => return Ok(None),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    number
        .filter(|n| range.contains(n))
        .map(Some)
        .ok_or_else(|| {
            wrong(
                name,
                &format!("a whole number from {} to {}", range.start(), range.end()),
            )
        })
}

/// A 400 that names the member and what it should be.
pub fn wrong(name: &str, expected: &str) -> ApiError {
    ApiError::bad(format!("{name} must be {expected}"))
}

/// Query members; the first of a name counts. Form rules: `+` is a space.
fn query(text: &str) -> Map<String, Value> {
    let mut members = Map::new();
    for (name, value) in form_urlencoded::parse(text.as_bytes()) {
        members
            .entry(name)
            .or_insert_with(|| Value::String(value.into_owned()));
    }
    members
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if bytes.trim_ascii().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(&String::from_utf8_lossy(bytes)) {
        Ok(Value::Object(members)) => Ok(members),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err(wrong("the request body", "a JSON object")),
        Err(e) => Err(ApiError::bad(format!(
            "the request body is not valid JSON: {e}"
        ))),
    }
}

fn idempotency(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok("") => Ok(None),
        Ok(key) if key.len() <= IDEMPOTENCY_KEY_BYTES_MAX => Ok(Some(key.to_owned())),
        _ => Err(wrong(
            "Idempotency-Key",
            &format!("printable ASCII of at most {IDEMPOTENCY_KEY_BYTES_MAX} bytes"),
        )),
    }
}

async fn collect(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse().ok());
    if declared.is_some_and(|n: usize| n > DISCARD_BYTES_MAX) {
        return Err(ApiError::too_large(REQUEST_BODY_BYTES_MAX));
    }
    match tokio::time::timeout(BODY_DEADLINE, take(body)).await {
        Ok(done) => done,
        Err(_) => Err(ApiError::bad(format!(
            "the request body did not arrive within {} s",
            BODY_DEADLINE.as_secs()
        ))),
    }
}

/// Read and drop a body that nobody wants, or its sender would find the connection reset and not the answer.
async fn discard(mut body: Body) {
    let rest = async {
        let mut seen = 0;
        while let Some(Ok(frame)) = body.frame().await {
            seen += frame.data_ref().map_or(0, Bytes::len);
            if seen > DISCARD_BYTES_MAX {
                return;
            }
        }
    };
    // Late or not, the answer is the same.
    let _ = tokio::time::timeout(BODY_DEADLINE, rest).await;
}

async fn take(mut body: Body) -> Result<Bytes, ApiError> {
    let (mut bytes, mut seen) = (Vec::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| ApiError::bad(format!("cannot read the request body: {e}")))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        seen = seen.saturating_add(data.len());
        if seen > DISCARD_BYTES_MAX {
            break;
        }
        if seen <= REQUEST_BODY_BYTES_MAX {
            bytes.extend_from_slice(&data);
        } else {
            bytes = Vec::new();
        }
    }
    if seen > REQUEST_BODY_BYTES_MAX {
        return Err(ApiError::too_large(REQUEST_BODY_BYTES_MAX));
    }
    Ok(bytes.into())
}

#[cfg(test)]
#[path = "envelope_tests.rs"]
mod tests;
