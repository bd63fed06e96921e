//! Instances that become tags: ask for that, and see how far it is.

use crate::app::AppError;
use crate::http::ApiState;
use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::images::{ImageList, ImageView, Images};
use crate::http::openapi::Answer;
use crate::http::requests;
use crate::registry::check_name;
use axum::extract::State;
use axum::response::Response;
use mainstay_model::command::Command;
use mainstay_model::save::{SaveRequest, SaveTarget};
use mainstay_model::{Outcome, Refusal, SaveId, TemplateId};
use serde::Serialize;
use utoipa::ToSchema;

#[utoipa::path(get, path = "/api/v1/image", tag = "instances", operation_id = "get_image",
    summary = "List requests to save instances, or show one; an ended one stays for two hours",
    params(requests::Read),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Images<'_>>)))]
pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(SaveId::from);
    let reading = api.read(&call).await?;
    let view = reading.view();
    let response = match id {
        None => envelope::ok(&ImageList(view)),
        Some(id) => {
            let save = view.state.saves.get(&id);
            envelope::found(save.map(|save| ImageView::new(view, save)))
        }
    };
    Ok(reading.finish(response))
}

/// What asking answers.
#[derive(Serialize, ToSchema)]
pub(super) struct Asked {
    request_id: String,
}

/// Answers as soon as it is decided. The same request again, while it is open, is answered the same.
#[utoipa::path(post, path = "/api/v1/image", tag = "instances", operation_id = "post_image",
    summary = "Save a started instance as a tag; it ends when the tag is there",
    params(requests::Once),
    request_body(content = requests::SaveImage, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Asked>)))]
pub(super) async fn save(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let command = Command::SaveInstance {
        id: call.save_id(),
        request: Box::new(request(&call)?),
    };
    match api.app.submit_as(call.command_id(), command).await {
        Ok(Outcome::Saving(id)) => Ok(envelope::ok(&Asked {
            request_id: id.to_string(),
        })),
        Ok(other) => Err(ApiError::internal(format!("a save was answered {other:?}"))),
        Err(AppError::Refused(Refusal::TagTaken(tag))) => {
            Err(ApiError::fail(format!("Tag {tag} already exists")))
        }
        Err(error) => Err(ApiError::of_start(error)),
    }
}

fn request(call: &Call) -> Result<SaveRequest, ApiError> {
    let instance = call.required("id")?.into();
    let tag = name(call, "tag")?.ok_or_else(|| ApiError::bad("tag is required"))?;
    let target = match (call.text("target_vm_id")?, name(call, "new_template_name")?) {
        (Some(id), None) => SaveTarget::Template(TemplateId::from(id)),
        (None, Some(name)) => SaveTarget::New {
            name,
            id: call.template_id(),
        },
        (None, None) => {
            return Err(ApiError::bad(
                "target_vm_id or new_template_name is required",
            ));
        }
        (Some(_), Some(_)) => {
            return Err(ApiError::bad(
                "only one of target_vm_id and new_template_name can be given",
            ));
        }
    };
    let revert = call.flag("revert_before_push")?.unwrap_or(false);
    if revert && matches!(target, SaveTarget::New { .. }) {
        let text = "revert_before_push needs target_vm_id: a new template has nothing to revert";
        return Err(ApiError::bad(text));
    }
    Ok(SaveRequest {
        instance,
        tag,
        target,
        description: call.text("description")?.unwrap_or_default(),
        script: call.base64("script")?.unwrap_or_default(),
        cancel_on_script_failure: call.flag("cancel_on_script_failure")?.unwrap_or(false),
        revert,
        revert_tag: call.text("revert_tag")?.filter(|_| revert),
        suspend: call.flag("suspend")?.unwrap_or(true),
        sanity_test: call.flag("do_suspend_sanity_test")?.unwrap_or(false),
    })
}

/// A name of a tag or template, as a push may give one.
fn name(call: &Call, member: &str) -> Result<Option<String>, ApiError> {
    let Some(name) = call.text(member)? else {
        return Ok(None);
    };
    check_name(member, &name).map_err(ApiError::bad)?;
    Ok(Some(name))
}
