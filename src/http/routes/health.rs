//! Is this member alive, ready, and what does it say of itself; figures of the whole.

use crate::app::{Consistency, STATUS_DEADLINE};
use crate::http::ApiState;
use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::openapi::Answer;
use crate::http::requests::Fresh;
use crate::stamp;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, header};
use mainstay_model::State as Cloud;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use utoipa::ToSchema;

/// A probe must not wait longer for a quorum.
const READY_DEADLINE: Duration = Duration::from_secs(2);
/// `tasks_per_second` counts requests accepted in this time.
const RATE_WINDOW_MS: u64 = 60_000;

/// 200 unless this member has stopped for good.
#[utoipa::path(get, path = "/livez", tag = "health", operation_id = "get_livez",
    summary = "Is this process alive?",
    responses((status = 200, description = "Alive", body = String, content_type = "text/plain")))]
pub(super) async fn alive(State(api): State<ApiState>) -> Result<Response, ApiError> {
    match api.app.group().status().fault {
        None => Ok("ok".into_response()),
        Some(why) => Err(ApiError::unavailable(format!(
            "this member has stopped: {why}"
        ))),
    }
}

/// 200 once reads here see every acknowledged write.
#[utoipa::path(get, path = "/readyz", tag = "health", operation_id = "get_readyz",
    summary = "Do reads here see every acknowledged write?",
    responses((status = 200, description = "Ready", body = String, content_type = "text/plain")))]
pub(super) async fn ready(State(api): State<ApiState>) -> Result<Response, ApiError> {
    api.barrier(READY_DEADLINE).await?;
    Ok("ok".into_response())
}

#[derive(Serialize, ToSchema)]
#[schema(as = Status)]
pub(super) struct StatusBody<'a> {
    status: &'static str,
    version: &'a str,
    registry_address: &'a str,
    registry_status: &'static str,
    license: &'static str,
}

/// Clients take any answer for "the cloud is up", so it waits for a quorum.
#[utoipa::path(get, path = "/api/v1/status", tag = "health", operation_id = "get_status",
    summary = "What runs here, with a quorum behind it",
    params(Fresh),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<StatusBody<'_>>)))]
pub(super) async fn status(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    if call.consistency()? == Consistency::Linearizable {
        api.barrier(STATUS_DEADLINE).await?;
    }
    let mut response = envelope::ok(&StatusBody {
        status: "Running",
        version: &api.about.version,
        registry_address: &api.about.registry_address,
        registry_status: if (api.about.disk)().is_some() {
            "Running"
        } else {
            "FAIL"
        },
        license: "enterprise plus",
    });
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// No login method has to be set up: an object without members.
#[utoipa::path(get, path = "/config/v1/auth", tag = "health", operation_id = "get_config_auth",
    summary = "Login methods that are set up: none",
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<BTreeMap<String, String>>)))]
pub(super) async fn login_methods() -> Response {
    envelope::ok(&BTreeMap::<&str, ()>::new())
}

#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub(super) struct Stats {
    average_queue_time: f64,
    tasks_per_second: f64,
    /// By state
    #[schema(value_type = BTreeMap<String, u64>)]
    instances: BTreeMap<&'static str, u64>,
    nodes: u64,
    templates: u64,
    chunks: u64,
    chunk_bytes: u64,
}

#[utoipa::path(get, path = "/api/v1/stats", tag = "health", operation_id = "get_stats",
    summary = "Figures of the whole",
    params(Fresh),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Stats>)))]
pub(super) async fn stats(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let chunks = (api.about.registry)().chunks;
    let reading = api.read(&call).await?;
    let mut stats = figures(reading.view().state, stamp::now_ms());
    stats.chunks = chunks.chunks;
    stats.chunk_bytes = chunks.stored_bytes;
    let response = envelope::ok(&stats);
    Ok(reading.finish(response))
}

/// `average_queue_time` is the mean age in seconds of the requests that wait for a node.
fn figures(cloud: &Cloud, now_ms: u64) -> Stats {
    let mut instances = BTreeMap::new();
    let (mut waiting, mut waited_ms, mut recent) = (0_u64, 0_u64, 0_u64);
    for instance in cloud.instances.values() {
        *instances.entry(instance.state.as_str()).or_default() += 1;
        let age_ms = now_ms.saturating_sub(instance.created_ms);
        recent += u64::from(age_ms < RATE_WINDOW_MS);
        if instance.waits() {
            waiting += 1;
            waited_ms = waited_ms.saturating_add(age_ms);
        }
    }
    Stats {
        average_queue_time: waited_ms as f64 / 1000.0 / waiting.max(1) as f64,
        tasks_per_second: recent as f64 * 1000.0 / RATE_WINDOW_MS as f64,
        instances,
        nodes: cloud.nodes.len() as u64,
        templates: cloud
            .templates
            .values()
            .filter(|t| t.latest().is_some())
            .count() as u64,
        chunks: 0,
        chunk_bytes: 0,
    }
}
