//! Instances: list, show, start, change, terminate.

use crate::app::{AppError, Consistency};
use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::instances::{InstanceList, InstanceView};
use crate::http::{ApiState, start};
use axum::extract::State;
use axum::response::Response;
use mainstay_model::command::Command;
use mainstay_model::{InstanceId, Outcome, Refusal};

pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(InstanceId::from);
    let reading = api.read(&call).await?;
    let view = reading.view();
    let response = match id {
        None => envelope::ok(&InstanceList(view)),
        Some(id) => {
            let instance = view.state.instances.get(&id);
            envelope::found(instance.map(|i| InstanceView::new(view, i).explained(view, i)))
        }
    };
    Ok(reading.finish(response))
}

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

/// Save-image requests: none can be made yet, so there are none.
pub(super) async fn saved_images(call: Call) -> Result<Response, ApiError> {
    match call.text("id")? {
        None => Ok(envelope::ok::<[(); 0]>(&[])),
        Some(_) => Err(ApiError::not_found()),
    }
}
