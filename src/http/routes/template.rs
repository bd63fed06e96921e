//! Templates through the controller: list, show, delete, revert; and the registry's disk.

use crate::http::ApiState;
use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::openapi::{Answer, Done};
use crate::http::requests;
use crate::http::templates::{TemplateList, TemplateView, Templates};
use axum::extract::State;
use axum::response::Response;
use mainstay_model::TemplateId;
use mainstay_model::command::{Command, TagSelector};
use serde::Serialize;
use utoipa::ToSchema;

#[utoipa::path(get, path = "/api/v1/registry/vm", tag = "templates", operation_id = "get_registry_vm",
    summary = "List templates, or show one with its tags",
    params(requests::ReadTemplates),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Templates<'_>>)))]
pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(TemplateId::from);
    let short = call.text("apiVer")?.as_deref() == Some("v1");
    let reading = api.read(&call).await?;
    let state = reading.view().state;
    let response = match id {
        None => envelope::ok(&TemplateList { state, short }),
        Some(id) => {
            let template = state.templates.get(&id);
            envelope::found(template.and_then(|t| TemplateView::new(state, t)))
        }
    };
    Ok(reading.finish(response))
}

#[utoipa::path(delete, path = "/api/v1/registry/vm", tag = "templates", operation_id = "delete_registry_vm",
    summary = "Delete a template with all its tags",
    params(requests::About, requests::Once),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn remove(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let command = Command::DeleteTemplate {
        id: TemplateId::from(call.required("id")?),
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

#[utoipa::path(delete, path = "/api/v1/registry/revert", tag = "templates", operation_id = "delete_registry_revert",
    summary = "Delete a tag and every later one; the latest when none is named",
    params(requests::Tag, requests::Once),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn revert(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = TemplateId::from(call.required("id")?);
    let selector = selector(&call)?;
    api.app
        .submit_as(call.command_id(), Command::RevertTemplate { id, selector })
        .await?;
    Ok(envelope::done())
}

/// One tag and no other: not what `revert` does.
#[utoipa::path(delete, path = "/api/v1/registry/tag", tag = "templates", operation_id = "delete_registry_tag",
    summary = "Delete one tag and no other",
    params(requests::Tag, requests::Once),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn remove_tag(
    State(api): State<ApiState>,
    call: Call,
) -> Result<Response, ApiError> {
    let id = TemplateId::from(call.required("id")?);
    let Some(selector) = selector(&call)? else {
        return Err(ApiError::bad(
            "tag or number is missing: which tag shall go?",
        ));
    };
    api.app
        .submit_as(call.command_id(), Command::DeleteTag { id, selector })
        .await?;
    Ok(envelope::done())
}

/// What is said of a tag.
#[utoipa::path(put, path = "/api/v1/registry/tag", tag = "templates", operation_id = "put_registry_tag",
    summary = "Change what is said of a tag",
    params(requests::Once),
    request_body(content = requests::Words, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn describe(
    State(api): State<ApiState>,
    call: Call,
) -> Result<Response, ApiError> {
    let command = Command::DescribeTag {
        id: TemplateId::from(call.required("id")?),
        selector: selector(&call)?,
        arch: call.text("arch")?,
        description: call.text("description")?,
    };
    if let Command::DescribeTag {
        arch: Some(arch), ..
    } = &command
        && !matches!(arch.as_str(), "amd64" | "arm64")
    {
        return Err(ApiError::bad(format!(
            "arch {arch:?} is not known, amd64 and arm64 are"
        )));
    }
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

/// A tag by `tag`, else by `version` or `number`.
pub(super) fn selector(call: &Call) -> Result<Option<TagSelector>, ApiError> {
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

#[derive(Serialize, ToSchema)]
pub(super) struct Room {
    free: u64,
    total: u64,
}

/// Room for templates on this member's disk.
#[utoipa::path(get, path = "/api/v1/registry/disk", tag = "templates", operation_id = "get_registry_disk",
    summary = "Room for templates on this member's disk, in bytes",
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Room>)))]
pub(super) async fn disk(State(api): State<ApiState>) -> Result<Response, ApiError> {
    match (api.about.disk)() {
        Some(disk) => Ok(envelope::ok(&Room {
            free: disk.free,
            total: disk.total,
        })),
        None => Err(ApiError::fail("the registry's disk does not answer")),
    }
}
