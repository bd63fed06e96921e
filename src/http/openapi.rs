//! What the API port says of itself: `GET /openapi.json`, an OpenAPI 3.1 document made from the handlers'
//! own descriptions, so that no route is served that is not in it. Knows how answers are wrapped and which
//! failures every call can have; refuses to know any route.

use super::error::ApiError;
use axum::body::Bytes;
use http::StatusCode;
use serde::Serialize;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::{OpenApi, RefOr};
use utoipa::{PartialSchema as _, ToSchema};

/// Where the document is.
pub const PATH: &str = "/openapi.json";

/// Did it work? A call that was understood and refused says `FAIL` with the status 200.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Done.
    Ok,
    /// Refused; `message` says why, and there is no body.
    Fail,
}

/// The envelope around every answer.
#[derive(Serialize, ToSchema)]
pub struct Answer<T: ToSchema> {
    status: Verdict,
    /// Empty on success.
    message: String,
    /// Only on success.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<T>,
}

/// The envelope of an answer without a result.
#[derive(Serialize, ToSchema)]
pub struct Done {
    status: Verdict,
    /// Empty on success.
    message: String,
}

/// What every call can be answered besides what its handler describes. One row a status of
/// [`ApiError`]'s table that a route can reach.
const FAILURES: [(StatusCode, &str, bool); 4] = [
    (
        StatusCode::BAD_REQUEST,
        "The request cannot be read, or a member is missing, of a wrong type or out of range; nothing was changed",
        true,
    ),
    (
        StatusCode::PAYLOAD_TOO_LARGE,
        "The body is over 4 MiB; nothing was changed",
        true,
    ),
    (
        StatusCode::INTERNAL_SERVER_ERROR,
        "A bug, or bytes of another release",
        false,
    ),
    (
        StatusCode::SERVICE_UNAVAILABLE,
        "No leader or no answer in time, or overloaded; the message says whether anything can have happened",
        false,
    ),
];

/// The document of all routes, with the failures that they share.
pub(super) fn finish(mut document: OpenApi) -> OpenApi {
    document.info.title = "Mainstay".to_owned();
    document.info.description = Some(
        "The REST dialect of the API port. Any member answers. Content types of requests are ignored; members \
         are looked up in the body, then in the query; `null` and empty texts are absent; numbers and truth \
         values may be strings; unknown members are ignored."
            .to_owned(),
    );
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            let reads_body = operation.request_body.is_some();
            for (status, text, of_request) in FAILURES {
                let code = status.as_u16().to_string();
                let fits = !of_request || reads_body || status == StatusCode::BAD_REQUEST;
                if fits && !operation.responses.responses.contains_key(&code) {
                    let failure = RefOr::T(failure(status, text));
                    operation.responses.responses.insert(code, failure);
                }
            }
        }
    }
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let all = [
        &mut item.get,
        &mut item.post,
        &mut item.put,
        &mut item.delete,
    ];
    all.into_iter().filter_map(Option::as_mut)
}

fn failure(status: StatusCode, text: &str) -> Response {
    let body = ContentBuilder::new().schema(Some(Done::schema())).build();
    let response = ResponseBuilder::new()
        .description(text)
        .content("application/json", body);
    match status {
        StatusCode::SERVICE_UNAVAILABLE => {
            let seconds = HeaderBuilder::new()
                .schema(Some(u32::schema()))
                .description(Some("Seconds after which to try again"));
            response.header("Retry-After", seconds.build()).build()
        }
        _ => response.build(),
    }
}

/// The document as it is sent.
pub(super) fn encode(document: OpenApi) -> Result<Bytes, ApiError> {
    let text = document.to_json().map(Bytes::from);
    text.map_err(|e| ApiError::internal(format!("cannot encode the document: {e}")))
}
