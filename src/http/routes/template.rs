//! Templates through the controller: list, show, delete, revert; and the registry's disk.

use crate::http::ApiState;
use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::templates::{TemplateList, TemplateView};
use axum::extract::State;
use axum::response::Response;
use mainstay_model::TemplateId;
use mainstay_model::command::{Command, TagSelector};
use serde::Serialize;

pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(TemplateId::from);
    let short = call.text("apiVer")?.as_deref() == Some("v1");
    let reading = api.read(&call).await?;
    let state = reading.view().state;
    let response = match id {
        None => envelope::ok(&TemplateList { state, short }),
        Some(id) => envelope::found(state.templates.get(&id).and_then(TemplateView::new)),
    };
    Ok(reading.finish(response))
}

pub(super) async fn remove(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let command = Command::DeleteTemplate {
        id: TemplateId::from(call.required("id")?),
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

pub(super) async fn revert(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = TemplateId::from(call.required("id")?);
    let selector = selector(&call)?;
    api.app
        .submit_as(call.command_id(), Command::RevertTemplate { id, selector })
        .await?;
    Ok(envelope::done())
}

/// A tag by `tag`, else by `version` or `number`.
fn selector(call: &Call) -> Result<Option<TagSelector>, ApiError> {
    if let Some(name) = call.text("tag")? {
        return Ok(Some(TagSelector::Name(name)));
    }
    let number = |name| call.int(name, 0..=u64::from(u32::MAX));
    let number = match number("version")? {
        None => number("number")?,
        some => some,
    };
    Ok(number
        .and_then(|n| u32::try_from(n).ok())
        .map(TagSelector::Number))
}

#[derive(Serialize)]
struct Room {
    free: u64,
    total: u64,
}

/// Room for templates on this member's disk.
pub(super) async fn disk(State(api): State<ApiState>) -> Result<Response, ApiError> {
    match (api.about.disk)() {
        Some(disk) => Ok(envelope::ok(&Room {
            free: disk.free,
            total: disk.total,
        })),
        None => Err(ApiError::fail("the registry's disk does not answer")),
    }
}
