//! Changes of the group on the API port: replace, remove, hand over the lead. Knows the membership;
//! refuses to know what the group replicates.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `POST /api/v1/member/replace` | `{"name", "force"}` | a sentence: what to do next |
//! | `POST /api/v1/member/remove` | `{"name", "force"}` | a sentence |
//! | `POST /api/v1/member/transfer-leader` | `{"name"?}` | a sentence |

use super::ApiState;
use super::envelope::{self, Call};
use super::error::ApiError;
use crate::app::REQUEST_DEADLINE;
use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use mainstay_model::MemberId;
use mainstay_raft::{MemberStatus, Role, Status};
use std::time::Duration;

/// A member that answers within this time counts as alive.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// The routes.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/api/v1/member/replace", post(replace))
        .route("/api/v1/member/remove", post(remove))
        .route("/api/v1/member/transfer-leader", post(transfer))
}

/// The newest membership, and the member called `name` in it.
async fn find(api: &ApiState, name: &str) -> Result<(Status, u64, MemberStatus), ApiError> {
    api.app.group().read_barrier(REQUEST_DEADLINE).await?;
    let status = api.app.group().status();
    let found = status
        .members
        .iter()
        .find(|(id, at)| at.member.name == name || MemberId(**id).to_string() == name)
        .map(|(id, at)| (*id, at.clone()));
    match found {
        Some((id, at)) => Ok((status, id, at)),
        None => {
            let names: Vec<_> = status
                .members
                .values()
                .map(|m| m.member.name.as_str())
                .collect();
            Err(ApiError::fail(format!(
                "No such member {name}: the members are {}",
                names.join(", ")
            )))
        }
    }
}

/// Does the process with this very identity still answer?
async fn alive(api: &ApiState, id: u64, at: &MemberStatus) -> bool {
    if id == api.app.group().status().id {
        return true;
    }
    // Its API port names the identity; the peer port of a wiped member would answer for another.
    let url = format!("{}/api/v1/cluster/status", at.member.api_url);
    let asked = async {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(ALIVE_TIMEOUT)
            .build()?;
        http.get(&url)
            .send()
            .await?
            .json::<serde_json::Value>()
            .await
    };
    asked
        .await
        .is_ok_and(|row| row["body"]["id"] == MemberId(id).to_string())
}

/// Refuse what would leave the group without a majority that answers.
async fn removable(
    api: &ApiState,
    status: &Status,
    id: u64,
    force: bool,
    at: &MemberStatus,
) -> Result<(), ApiError> {
    let name = &at.member.name;
    if !force && alive(api, id, at).await {
        return Err(ApiError::fail(format!(
            "member {name} is alive with the identity that would be removed; stop it first, or use --force"
        )));
    }
    let voters = status
        .members
        .values()
        .filter(|m| m.role == Role::Voter)
        .count();
    if at.role == Role::Voter && voters == 1 {
        return Err(ApiError::fail(format!(
            "member {name} is the only voter: without it nothing is left"
        )));
    }
    Ok(())
}

async fn take_out(api: &ApiState, call: &Call) -> Result<String, ApiError> {
    let name = call.required("name")?;
    let force = call.flag("force")?.unwrap_or(false);
    let (status, id, at) = find(api, &name).await?;
    removable(api, &status, id, force, &at).await?;
    api.app.group().remove(id).await?;
    tracing::info!(member = %at.member.name, id = %MemberId(id), "removed from the group");
    Ok(at.member.name)
}

async fn replace(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let name = take_out(&api, &call).await?;
    Ok(envelope::ok(&format!(
        "the old identity of member {name} was removed: start {name} with an empty data directory (or leave it running if it already is) and it joins"
    )))
}

async fn remove(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let name = take_out(&api, &call).await?;
    Ok(envelope::ok(&format!(
        "member {name} was removed: stop its process"
    )))
}

async fn transfer(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let to = match call.text("name")? {
        None => None,
        Some(name) => Some(find(&api, &name).await?.1),
    };
    api.app.group().transfer_leader(to).await?;
    Ok(envelope::ok("leadership was handed over"))
}
