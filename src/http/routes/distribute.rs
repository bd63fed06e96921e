//! Distributions: request, look, cancel; and their opposite.

use crate::app::AppError;
use crate::http::ApiState;
use crate::http::distributions::{DistributionList, DistributionView, Distributions};
use crate::http::envelope::{self, Call, wrong};
use crate::http::error::ApiError;
use crate::http::openapi::{Answer, Done};
use crate::http::requests;
use axum::extract::State;
use axum::response::Response;
use mainstay_model::command::Command;
use mainstay_model::{DistributionId, GroupId, NodeId, Outcome, Refusal, TemplateId};
use serde::Serialize;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
#[schema(as = AcceptedDistribution)]
pub(super) struct Accepted<'a> {
    request_id: &'a str,
}

/// Every node that is asked for has its entry when this is answered. A retry with the same `Idempotency-Key` is the
/// same request.
#[utoipa::path(post, path = "/api/v1/registry/vm/distribute", tag = "templates",
    operation_id = "post_registry_vm_distribute",
    summary = "Let nodes fetch a tag before an instance needs it",
    params(requests::Once),
    request_body(content = requests::Distribute, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Accepted<'_>>)))]
pub(super) async fn request(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = DistributionId(call.instance_id(0).0);
    let command = Command::Distribute {
        id: id.clone(),
        template: TemplateId::from(call.required("template_id")?),
        selector: super::template::selector(&call)?,
        nodes: nodes(&call)?,
        group: call.text("group_id")?.map(GroupId::from),
    };
    let submitted = api.app.submit_as(call.command_id(), command).await;
    submitted.map_err(ApiError::of_start)?;
    let request_id = id.as_str();
    Ok(envelope::ok(&Accepted { request_id }))
}

/// `node_ids`; empty when absent.
fn nodes(call: &Call) -> Result<Vec<NodeId>, ApiError> {
    let items = call.list("node_ids")?.unwrap_or_default().iter();
    let ids = items.map(|item| item.as_str().map(NodeId::from));
    let ids: Option<Vec<NodeId>> = ids.collect();
    ids.ok_or_else(|| wrong("node_ids", "an array of strings"))
}

#[utoipa::path(get, path = "/api/v1/registry/vm/distribute", tag = "templates",
    operation_id = "get_registry_vm_distribute",
    summary = "List distributions, or show how far one is on each node",
    params(requests::Read),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Distributions<'_>>)))]
pub(super) async fn get(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = call.text("id")?.map(DistributionId::from);
    let reading = api.read(&call).await?;
    let view = reading.view();
    let response = match id {
        None => envelope::ok(&DistributionList(view)),
        Some(id) => {
            let found = view.state.distributions.get(&id);
            envelope::found(found.map(|d| DistributionView::new(view, d)))
        }
    };
    Ok(reading.finish(response))
}

/// Nodes that have not fetched it give it up; what is on others stays. Idempotent.
#[utoipa::path(delete, path = "/api/v1/registry/vm/distribute", tag = "templates",
    operation_id = "delete_registry_vm_distribute",
    summary = "Nodes that have not fetched it need not; idempotent",
    params(requests::About, requests::Once),
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn cancel(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let id = match call.text("request_id")? {
        Some(id) => id,
        None => call.required("id")?,
    };
    let id = DistributionId::from(id);
    api.app
        .submit_as(call.command_id(), Command::CancelDistribution { id })
        .await?;
    Ok(envelope::done())
}

#[derive(Serialize, ToSchema)]
#[schema(as = Evictions)]
pub(super) struct Asked {
    requests_sent: usize,
    node_ids: Vec<String>,
}

/// Answers as soon as it is decided; that a node has done it shows in its `templates`.
#[utoipa::path(delete, path = "/api/v1/registry/vm/remove", tag = "templates",
    operation_id = "delete_registry_vm_remove",
    summary = "Let nodes drop what they have cached of a template; answers those that are asked",
    params(requests::About, requests::Once),
    request_body(content = requests::Evict, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Asked>)))]
pub(super) async fn evict(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let template = TemplateId::from(call.required("id")?);
    let nodes = nodes(&call)?;
    let command = Command::EvictImages { template, nodes };
    match api.app.submit_as(call.command_id(), command).await {
        Ok(Outcome::Asked(nodes)) => Ok(envelope::ok(&Asked {
            requests_sent: nodes.len(),
            node_ids: nodes.iter().map(ToString::to_string).collect(),
        })),
        Ok(other) => Err(ApiError::internal(format!(
            "an eviction was answered {other:?}"
        ))),
        Err(AppError::Refused(Refusal::NodeUnknown(id))) => {
            Err(ApiError::fail(format!("No such node {id}")))
        }
        Err(error) => Err(error.into()),
    }
}
