//! Instances: list, show, start, change, terminate.

use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::instances::{InstanceList, InstanceView};
use crate::http::{ApiState, start};
use axum::extract::State;
use axum::response::Response;
use mainstay_model::command::Command;
use mainstay_model::{InstanceId, Outcome};

pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(InstanceId);
    let reading = api.read(&call).await?;
    let view = reading.view();
    let response = match id {
        None => envelope::ok(&InstanceList(view)),
        Some(id) => {
            let instance = view
                .state
                .instances
                .get(&id)
                .ok_or_else(ApiError::not_found)?;
            envelope::ok(&InstanceView::new(view, instance))
        }
    };
    Ok(reading.finish(response))
}

pub(super) async fn start(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let command = start::command(&call)?;
    match api
        .app
        .submit_as(call.command_id(), command)
        .await
        .map_err(ApiError::of_start)?
    {
        Outcome::Started(ids) => Ok(envelope::ok(&ids)),
        other => Err(ApiError::internal(format!(
            "a start was answered {other:?}"
        ))),
    }
}

pub(super) async fn update(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let command = Command::UpdateInstance {
        id: InstanceId(call.required("id")?),
        name: call.text("name")?,
        external_id: call.text("external_id")?,
        metadata: start::metadata(&call)?,
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

pub(super) async fn terminate(
    State(api): State<ApiState>,
    call: Call,
) -> Result<Response, ApiError> {
    let command = Command::TerminateInstance {
        id: InstanceId(call.required("id")?),
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

/// Save-image requests: none can be made yet, so there are none.
pub(super) async fn saved_images(call: Call) -> Result<Response, ApiError> {
    match call.text("id")? {
        None => Ok(envelope::ok::<[(); 0]>(&[])),
        Some(_) => Err(ApiError::not_found()),
    }
}
