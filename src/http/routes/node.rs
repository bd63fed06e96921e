//! Nodes: list, show, configure, remove.

use crate::http::ApiState;
use crate::http::envelope::{self, Call, wrong};
use crate::http::error::ApiError;
use crate::http::nodes::{NodeList, NodeView};
use crate::http::openapi::{Answer, Done};
use crate::http::requests;
use axum::extract::State;
use axum::response::Response;
use mainstay_model::NodeId;
use mainstay_model::command::Command;
use mainstay_model::node::{CapacityMode, NodeConfig};

/// Largest override that is taken for meant: vCPUs, or GB of memory.
const OVERRIDE_MAX: u64 = 1 << 20;

#[utoipa::path(get, path = "/api/v1/node", tag = "nodes", operation_id = "get_node",
    summary = "List nodes, or an array of the one asked for",
    params(requests::Read),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Vec<NodeView<'_>>>)))]
pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(NodeId::from);
    let reading = api.read(&call).await?;
    let view = reading.view();
    let response = match id {
        None => envelope::ok(&NodeList { view, only: None }),
        Some(id) => {
            let only = view.state.nodes.get(&id);
            envelope::found(only.map(|_| NodeList { view, only }))
        }
    };
    Ok(reading.finish(response))
}

#[utoipa::path(post, path = "/api/v1/node/config", tag = "nodes", operation_id = "post_node_config",
    summary = "Configure a node",
    params(requests::Once),
    request_body(content = requests::NodeConfig, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn configure(
    State(api): State<ApiState>,
    call: Call,
) -> Result<Response, ApiError> {
    let command = Command::ConfigureNode {
        id: NodeId::from(call.required("node_id")?),
        config: config(&call)?,
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

fn config(call: &Call) -> Result<NodeConfig, ApiError> {
    let capacity_mode = match call.text("capacity_mode")?.as_deref() {
        None => None,
        Some("number") => Some(CapacityMode::Number),
        Some("resource") => Some(CapacityMode::Resource),
        Some(_) => return Err(wrong("capacity_mode", "number or resource")),
    };
    // Agents send nothing to the central log; the member is read so that a wrong type is still named.
    call.flag("disable_central_logging")?;
    let small = |name| -> Result<Option<u32>, ApiError> {
        Ok(call
            .int(name, 0..=OVERRIDE_MAX)?
            .and_then(|n| u32::try_from(n).ok()))
    };
    Ok(NodeConfig {
        capacity: small("max_vm_count")?,
        name: call.text("name")?,
        host: call.text("host")?,
        capacity_mode,
        vcpu_override: small("vcpu_override")?,
        ram_override_mb: call
            .int("ram_override", 0..=OVERRIDE_MAX)?
            .map(|gb| gb * 1024),
        drain: call.flag("drain_mode")?,
    })
}

#[utoipa::path(delete, path = "/api/v1/node", tag = "nodes", operation_id = "delete_node",
    summary = "Remove a node that is gone; its live instances become Error",
    params(requests::Once),
    request_body(content = requests::NodeId, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn remove(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = match call.text("node_id")? {
        Some(id) => id,
        None => call
            .text("id")?
            .ok_or_else(|| ApiError::bad("node_id is required"))?,
    };
    let command = Command::RemoveNode {
        id: NodeId::from(id),
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}
