//! Ways into an instance's VM: programs, console, screen, ports, what the console said.

use crate::agents::tunnels::TunnelError;
use crate::http::access::{self, ExecAnswer, MESSAGE_BYTES_MAX};
use crate::http::envelope::{Call, wrong};
use crate::http::error::ApiError;
use crate::http::openapi::Done;
use crate::http::{ApiState, requests};
use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, header};
use mainstay_agent::wire::Access;
use mainstay_model::instance::InstanceState;
use mainstay_model::{InstanceId, NodeId};

/// What is sent to a client before it takes it: a message, and its like from the guest.
const WRITE_BYTES_MAX: usize = 512 << 10;
/// What clients of screens call a connection that carries bytes.
const PROTOCOL: &str = "binary";

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

#[utoipa::path(get, path = "/api/v1/vm/exec", tag = "instances", operation_id = "get_vm_exec",
    summary = "Run a program in a started instance's guest, over a WebSocket (docs/rest-dialect.md)",
    params(requests::Way),
    responses(
        (status = 101, description = "First text: ExecRequest; binary: standard input, and the outputs, each after a byte 1 or 2; last text: ExecAnswer", body = ExecAnswer, content_type = "application/octet-stream"),
        (status = 200, description = "FAIL and why", body = Done),
        (status = 403, description = "A page of another origin", body = Done),
        (status = 426, description = "No WebSocket", body = Done)))]
pub(super) async fn exec(
    State(api): State<ApiState>,
    headers: HeaderMap,
    upgrade: Upgrade,
    call: Call,
) -> Result<Response, ApiError> {
    let upgrade = wanted(&api, &headers, upgrade)?;
    let (node, access) = target(&api, &call, "exec").await?;
    let tunnel = open(&api, &node, &access).await?;
    Ok(upgrade.on_upgrade(|socket| access::exec(socket, tunnel)))
}

#[utoipa::path(get, path = "/api/v1/vm/console", tag = "instances", operation_id = "get_vm_console",
    summary = "A VM's serial console, over a WebSocket; one client at a time",
    params(requests::Way),
    responses(
        (status = 101, description = "Bytes in binary messages, both ways", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 200, description = "FAIL and why", body = Done),
        (status = 403, description = "A page of another origin", body = Done),
        (status = 426, description = "No WebSocket", body = Done)))]
pub(super) async fn console(
    State(api): State<ApiState>,
    headers: HeaderMap,
    upgrade: Upgrade,
    call: Call,
) -> Result<Response, ApiError> {
    bytes(&api, &headers, upgrade, &call, "console").await
}

#[utoipa::path(get, path = "/api/v1/vm/vnc", tag = "instances", operation_id = "get_vm_vnc",
    summary = "A VM's screen: RFB over a WebSocket, as noVNC speaks it",
    params(requests::Way),
    responses(
        (status = 101, description = "Bytes in binary messages, both ways", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 200, description = "FAIL and why", body = Done),
        (status = 403, description = "A page of another origin", body = Done),
        (status = 426, description = "No WebSocket", body = Done)))]
pub(super) async fn vnc(
    State(api): State<ApiState>,
    headers: HeaderMap,
    upgrade: Upgrade,
    call: Call,
) -> Result<Response, ApiError> {
    bytes(&api, &headers, upgrade, &call, "vnc").await
}

#[utoipa::path(get, path = "/api/v1/vm/tcp", tag = "instances", operation_id = "get_vm_tcp",
    summary = "A TCP connection to a port of the guest, over a WebSocket",
    params(requests::Way, requests::GuestPort),
    responses(
        (status = 101, description = "Bytes in binary messages, both ways; an empty one ends a direction", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 200, description = "FAIL and why", body = Done),
        (status = 403, description = "A page of another origin", body = Done),
        (status = 426, description = "No WebSocket", body = Done)))]
pub(super) async fn tcp(
    State(api): State<ApiState>,
    headers: HeaderMap,
    upgrade: Upgrade,
    call: Call,
) -> Result<Response, ApiError> {
    bytes(&api, &headers, upgrade, &call, "tcp").await
}

#[utoipa::path(get, path = "/api/v1/vm/logs", tag = "instances", operation_id = "get_vm_logs",
    summary = "What an instance's serial console said: its last MiB, not in an envelope",
    params(requests::Way, requests::Follow),
    responses(
        (status = 200, description = "The bytes; or FAIL and why, as application/json", content(
            (Vec<u8> = "application/octet-stream"), (Done = "application/json")))))]
pub(super) async fn logs(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let (node, mut access) = target(&api, &call, "log").await?;
    access.follow = call.flag("follow")?.unwrap_or(false);
    let tunnel = open(&api, &node, &access).await?;
    let mut response = access::log(tunnel).into_response();
    let binary = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, binary);
    Ok(response)
}

async fn bytes(
    api: &ApiState,
    headers: &HeaderMap,
    upgrade: Upgrade,
    call: &Call,
    kind: &str,
) -> Result<Response, ApiError> {
    let upgrade = wanted(api, headers, upgrade)?;
    let (node, mut access) = target(api, call, kind).await?;
    // A screen or a console that closed is closed; a connection has two directions.
    let whole = kind != "tcp";
    if !whole {
        let port = call.int("port", 1..=u64::from(u16::MAX))?;
        let port = port.and_then(|port| u16::try_from(port).ok());
        access.port = port.ok_or_else(|| wrong("port", "a port of the guest"))?;
    }
    let tunnel = open(api, &node, &access).await?;
    Ok(upgrade.on_upgrade(move |socket| access::bridge(socket, tunnel, whole)))
}

/// A WebSocket of a client, or of a page that this member may trust: browsers let any page open any.
fn wanted(
    api: &ApiState,
    headers: &HeaderMap,
    upgrade: Upgrade,
) -> Result<WebSocketUpgrade, ApiError> {
    let upgrade = upgrade.map_err(|e| {
        let why = e.body_text();
        ApiError::no_websocket(format!("this path takes WebSocket connections only: {why}"))
    })?;
    let text = |name| {
        headers
            .get(name)
            .and_then(|v: &HeaderValue| v.to_str().ok())
    };
    if let Some(origin) = text(header::ORIGIN)
        && !api.about.allow_cors
    {
        let page = origin.split_once("://").map(|(_, host)| host);
        if page.is_none() || page != text(header::HOST) {
            return Err(ApiError::forbidden(format!(
                "a page of {origin} may not open this: members would have to run with --allow-cors"
            )));
        }
    }
    Ok(upgrade
        .protocols([PROTOCOL])
        .max_message_size(MESSAGE_BYTES_MAX)
        .max_frame_size(MESSAGE_BYTES_MAX)
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_BYTES_MAX))
}

/// Which VM, on which node; whether it can be is the node's to say.
async fn target(api: &ApiState, call: &Call, kind: &str) -> Result<(NodeId, Access), ApiError> {
    let id = InstanceId::from(call.required("id")?);
    let reading = api.read(call).await?;
    let instance = reading.state.instances.get(&id);
    let instance = instance.ok_or_else(ApiError::not_found)?;
    let state = instance.state;
    if kind == "exec" && state != InstanceState::Started {
        let state = state.as_str();
        return Err(ApiError::fail(format!(
            "instance {id} is {state}: programs are run in started ones"
        )));
    }
    let Some(node) = instance.node.clone() else {
        let state = state.as_str();
        return Err(ApiError::fail(format!(
            "instance {id} is {state}: it has no VM on any node"
        )));
    };
    // No agent will come: why wait for it?
    if reading
        .state
        .nodes
        .get(&node)
        .is_none_or(|n| n.lost || !n.reachable)
    {
        return Err(ApiError::unavailable(format!(
            "node {node} of instance {id} is not reachable: nothing was done; try again when it is back"
        )));
    }
    let access = Access {
        instance: id.to_string(),
        kind: kind.to_owned(),
        ..Access::default()
    };
    Ok((node, access))
}

async fn open(
    api: &ApiState,
    node: &NodeId,
    access: &Access,
) -> Result<crate::agents::tunnels::Tunnel, ApiError> {
    let Some(tunnels) = &api.tunnels else {
        return Err(ApiError::unavailable("this member has no way to nodes"));
    };
    tunnels.open(node, access).await.map_err(|e| match e {
        TunnelError::Refused(why) => ApiError::fail(why),
        TunnelError::Unavailable(why) => ApiError::unavailable(why),
    })
}
