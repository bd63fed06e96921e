//! Instances: list, show, start, change, restart, terminate.

use crate::app::{AppError, Consistency};
use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::instances::{InstanceView, Instances};
use crate::http::openapi::{Answer, Done};
use crate::http::requests;
use crate::http::{ApiState, listing, start};
use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use mainstay_model::command::Command;
use mainstay_model::{InstanceId, Outcome, Refusal};

#[utoipa::path(get, path = "/api/v1/vm", tag = "instances", operation_id = "get_vm",
    summary = "List instances, or show one",
    params(requests::Read),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Instances<'_>>)))]
pub(super) async fn get(
    State(api): State<ApiState>,
    headers: HeaderMap,
    call: Call,
) -> Result<Response, ApiError> {
    let Some(id) = call.text("id")?.map(InstanceId::from) else {
        return api
            .list_instances(&call, listing::takes_gzip(&headers))
            .await;
    };
    let reading = api.read(&call).await?;
    let view = reading.view();
    let instance = view.state.instances.get(&id);
    let response = envelope::found(instance.map(|i| InstanceView::new(view, i).explained(view, i)));
    Ok(reading.finish(response))
}

#[utoipa::path(post, path = "/api/v1/vm", tag = "instances", operation_id = "post_vm",
    summary = "Start instances of a template, all or none; answers their ids",
    params(requests::Once),
    request_body(content = requests::Start, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Vec<String>>)))]
pub(super) async fn start(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let (command, ids) = start::command(&call)?;
    match api.app.submit_as(call.command_id(), command).await {
        Ok(Outcome::Started(ids)) => Ok(envelope::ok(&ids)),
        Ok(other) => Err(ApiError::internal(format!(
            "a start was answered {other:?}"
        ))),
        Err(AppError::Refused(Refusal::Conflict(_))) if started(&api, &ids).await? => {
            Ok(envelope::ok(&ids))
        }
        Err(error) => Err(ApiError::of_start(error)),
    }
}

/// A retry that comes so late that its command is forgotten still finds the instances: their ids
/// are the same.
async fn started(api: &ApiState, ids: &[InstanceId]) -> Result<bool, ApiError> {
    let state = api.app.read(Consistency::Linearizable).await?;
    Ok(ids.iter().any(|id| state.instances.contains_key(id)))
}

#[utoipa::path(put, path = "/api/v1/vm", tag = "instances", operation_id = "put_vm",
    summary = "Change name, external id, metadata",
    params(requests::About, requests::Once),
    request_body(content = requests::Change, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn update(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let command = Command::UpdateInstance {
        id: InstanceId::from(call.required("id")?),
        name: call.text("name")?,
        external_id: call.text("external_id")?,
        metadata: start::metadata(&call)?,
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

#[utoipa::path(delete, path = "/api/v1/vm", tag = "instances", operation_id = "delete_vm",
    summary = "Terminate an instance; idempotent",
    params(requests::Once),
    request_body(content = requests::Id, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn terminate(
    State(api): State<ApiState>,
    call: Call,
) -> Result<Response, ApiError> {
    let command = Command::TerminateInstance {
        id: InstanceId::from(call.required("id")?),
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

/// Answers as soon as it is decided; that it is done shows in `start_date`.
#[utoipa::path(post, path = "/api/v1/rpc/vm/restart", tag = "instances", operation_id = "post_rpc_vm_restart",
    summary = "End a VM at once and start it again on its disk",
    params(requests::Once),
    request_body(content = requests::Restart, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn restart(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call
        .text("instance_id")?
        .map_or_else(|| call.required("id"), Ok);
    let id = id.map_err(|_| ApiError::bad("instance_id is required"))?;
    start::refuse(&call, &["usb_device", "vnc_password"])?;
    let command = Command::RestartInstance { id: id.into() };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}
