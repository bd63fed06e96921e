//! Node groups: list, show, create, change, delete; and which nodes are in them.

use crate::app::Consistency;
use crate::http::ApiState;
use crate::http::envelope::{self, Call, wrong};
use crate::http::error::ApiError;
use crate::http::nodes::GroupView;
use crate::http::openapi::{Answer, Done};
use crate::http::requests;
use axum::extract::State;
use axum::response::Response;
use mainstay_model::command::Command;
use mainstay_model::group::Group;
use mainstay_model::{GroupId, NodeId};
use serde::Serialize;
use utoipa::ToSchema;

/// What a read shows.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only described")]
pub(super) enum Groups<'a> {
    /// Without an id.
    All(Vec<GroupView<'a>>),
    /// With an id.
    One(GroupView<'a>),
}

#[utoipa::path(get, path = "/api/v1/group", tag = "groups", operation_id = "get_group",
    summary = "List node groups, or show one",
    params(requests::Read),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Groups<'_>>)))]
pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(GroupId::from);
    let reading = api.read(&call).await?;
    let groups = &reading.view().state.groups;
    let response = match id {
        None => envelope::ok(&groups.values().map(GroupView::new).collect::<Vec<_>>()),
        Some(id) => envelope::found(groups.get(&id).map(GroupView::new)),
    };
    Ok(reading.finish(response))
}

/// Answers the group. A retry with the same `Idempotency-Key` names the same group.
#[utoipa::path(post, path = "/api/v1/group", tag = "groups", operation_id = "post_group",
    summary = "Create a node group; answers it",
    params(requests::Once),
    request_body(content = requests::NewGroup, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<GroupView<'_>>)))]
pub(super) async fn create(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let group = Group {
        id: GroupId(call.instance_id(0).0),
        name: call.required("name")?,
        description: call.text("description")?.unwrap_or_default(),
        fallback: call.text("fallback_group_id")?.map(GroupId::from),
    };
    let response = envelope::ok(&GroupView::new(&group));
    api.app
        .submit_as(call.command_id(), Command::PutGroup { group })
        .await?;
    Ok(response)
}

/// What is not given stays as it is; an explicitly empty description or fallback ends it.
#[utoipa::path(put, path = "/api/v1/group", tag = "groups", operation_id = "put_group",
    summary = "Change a node group",
    params(requests::About, requests::Once),
    request_body(content = requests::GroupChange, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn update(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = GroupId::from(call.required("id")?);
    let name = call.text("name")?;
    let described = call.text("description")?.unwrap_or_default();
    let description = call.get("description").map(|_| described);
    let fallback = match (
        call.get("fallback_group_id"),
        call.text("fallback_group_id")?,
    ) {
        (None, _) => None,
        (Some(_), given) => Some(given.map(GroupId::from)),
    };
    let old = {
        let state = api.app.read(Consistency::Linearizable).await?;
        state
            .groups
            .get(&id)
            .cloned()
            .ok_or_else(ApiError::not_found)?
    };
    let group = Group {
        id,
        name: name.unwrap_or(old.name),
        description: description.unwrap_or(old.description),
        fallback: fallback.unwrap_or(old.fallback),
    };
    api.app
        .submit_as(call.command_id(), Command::PutGroup { group })
        .await?;
    Ok(envelope::done())
}

#[utoipa::path(delete, path = "/api/v1/group", tag = "groups", operation_id = "delete_group",
    summary = "Delete a node group: nodes leave it, fallbacks to it end",
    params(requests::About, requests::Once),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn remove(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = GroupId::from(call.required("id")?);
    api.app
        .submit_as(call.command_id(), Command::DeleteGroup { id })
        .await?;
    Ok(envelope::done())
}

#[utoipa::path(post, path = "/api/v1/node/group", tag = "groups", operation_id = "post_node_group",
    summary = "Put nodes into groups",
    params(requests::Once),
    request_body(content = requests::NodeGroups, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn join(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    change(&api, &call, true).await
}

#[utoipa::path(delete, path = "/api/v1/node/group", tag = "groups", operation_id = "delete_node_group",
    summary = "Take nodes out of groups",
    params(requests::Once),
    request_body(content = requests::NodeGroups, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn leave(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    change(&api, &call, false).await
}

async fn change(api: &ApiState, call: &Call, member: bool) -> Result<Response, ApiError> {
    let nodes = ids(call, "node_ids")?
        .into_iter()
        .map(NodeId::from)
        .collect();
    let groups = ids(call, "group_ids")?
        .into_iter()
        .map(GroupId::from)
        .collect();
    let command = Command::ChangeNodeGroups {
        nodes,
        groups,
        member,
    };
    api.app.submit_as(call.command_id(), command).await?;
    Ok(envelope::done())
}

fn ids(call: &Call, name: &str) -> Result<Vec<String>, ApiError> {
    let items = call
        .list(name)?
        .ok_or_else(|| ApiError::bad(format!("{name} is required")))?;
    let texts = items.iter().map(|item| item.as_str().map(str::to_owned));
    texts
        .collect::<Option<_>>()
        .ok_or_else(|| wrong(name, "an array of strings"))
}
