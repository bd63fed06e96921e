//! Changes of the group on the API port: what an operator asks for, checked against what it would cost.
//! Knows the membership, and which copies of tags would be lost; refuses to know how the group decides.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `POST /api/v1/member/add` | `{"name", "learner"?}` | `command` to run on the new machine, `note`; changes nothing |
//! | `POST /api/v1/member/promote` | `{"name"}` | a sentence |
//! | `POST /api/v1/member/update` | `{"name", "peer_url"?, "api_url"?, "registry_url"?, "force"?}` | a sentence |
//! | `POST /api/v1/member/replace` | `{"name", "id"?, "force"?}` | a sentence: what to do next |
//! | `POST /api/v1/member/remove` | `{"name", "id"?, "force"?}` | a sentence: what is left, what is lost |
//! | `POST /api/v1/member/transfer-leader` | `{"name"?}` | a sentence |
//!
//! # Once, however often it is asked
//!
//! A removal is recorded in the replicated state (`RetireMember`) before the group changes; if whoever
//! carries it out dies in between, the leader finishes it (`reconcile`). `id` says which identity is meant,
//! so that a repetition that comes late never hits the one that has taken the name since.

use super::ApiState;
use super::envelope::{self, Call};
use super::error::ApiError;
use super::openapi::Answer;
use super::requests;
use crate::app::{Consistency, REQUEST_DEADLINE};
use crate::config;
use axum::extract::State;
use axum::response::Response;
use mainstay_model::{Command, MemberId, State as Cloud};
use mainstay_raft::{GroupError, MemberStatus, Role, Status};
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Duration;
use utoipa::ToSchema;

/// A member that answers within this time counts as alive.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most tags that a sentence names.
const NAMED_MAX: usize = 5;

/// The newest membership.
async fn newest(api: &ApiState) -> Result<Status, ApiError> {
    api.app.group().read_barrier(REQUEST_DEADLINE).await?;
    Ok(api.app.group().status())
}

fn names(status: &Status, role: Option<Role>) -> Vec<&str> {
    let wanted = status
        .members
        .values()
        .filter(|m| role.is_none_or(|r| m.role == r));
    let mut names: Vec<_> = wanted.map(|m| m.member.name.as_str()).collect();
    names.sort_unstable();
    names
}

/// The member called `name`, or with this id.
fn find(status: &Status, name: &str) -> Result<(u64, MemberStatus), ApiError> {
    let mut members = status.members.iter();
    let found =
        members.find(|(id, at)| at.member.name == name || MemberId(**id).to_string() == name);
    found.map(|(id, at)| (*id, at.clone())).ok_or_else(|| {
        ApiError::fail(format!(
            "No such member {name}: the members are {}",
            names(status, None).join(", ")
        ))
    })
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

/// What the voters that are left can bear.
fn strength(status: &Status, without: Option<u64>) -> String {
    let voters = status.members.iter();
    let voters = voters.filter(|(id, m)| m.role == Role::Voter && Some(**id) != without);
    let mut names: Vec<_> = voters.map(|(_, m)| m.member.name.as_str()).collect();
    names.sort_unstable();
    let bears = match (names.len().max(1) - 1) / 2 {
        0 => "none of them may fail".to_owned(),
        1 => "one of them may fail".to_owned(),
        n => format!("{n} of them may fail"),
    };
    match names.len() {
        1 => format!("1 voter ({}): it must not fail", names.join(", ")),
        n => format!("{n} voters ({}): {bears}", names.join(", ")),
    }
}

/// Tags whose bytes only this member has, of those that are members now.
fn only_there(state: &Cloud, status: &Status, id: u64) -> Vec<String> {
    let mut lost = Vec::new();
    for template in state.templates.values() {
        for tag in template.tags.values() {
            let elsewhere = |h: &MemberId| h.0 != id && status.members.contains_key(&h.0);
            if tag.holders.contains(&MemberId(id)) && !tag.holders.iter().any(elsewhere) {
                lost.push(format!("{} {}", template.name, tag.name));
            }
        }
    }
    for (name, repository) in &state.repositories {
        for artifact in repository.artifacts.values() {
            let elsewhere = |h: &MemberId| h.0 != id && status.members.contains_key(&h.0);
            let held = artifact.holders.contains(&MemberId(id));
            if held && !artifact.holders.iter().any(elsewhere) {
                lost.push(format!("{name}@{}", artifact.content.digest));
            }
        }
    }
    lost
}

fn some(tags: &[String]) -> String {
    let named = tags[..tags.len().min(NAMED_MAX)].join(", ");
    match tags.len() - tags.len().min(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Which identity is to go; `Err(Ok(name))`: it has gone already.
async fn leaving(
    api: &ApiState,
    call: &Call,
    status: &Status,
) -> Result<(u64, MemberStatus), Result<String, ApiError>> {
    let name = call.required("name").map_err(Err)?;
    let wanted = call.text("id").map_err(Err)?;
    let key = wanted.as_deref().unwrap_or(&name);
    let missing = match find(status, key) {
        Ok(found) => return Ok(found),
        Err(missing) => missing,
    };
    let state = api.app.read(Consistency::Stale).await;
    let state = state.map_err(|e| Err(e.into()))?;
    let mut gone = state.retired.iter();
    match gone.find(|(id, retired)| id.to_string() == key || retired.name == key) {
        Some((_, retired)) => Err(Ok(retired.name.clone())),
        None => Err(Err(missing)),
    }
}

/// Record that this identity goes, let it go, and tell its process.
async fn take_out(
    api: &ApiState,
    status: &Status,
    id: u64,
    at: &MemberStatus,
) -> Result<(), ApiError> {
    let name = at.member.name.clone();
    let voters = status.members.iter();
    let voters = voters.filter(|(v, m)| **v != id && m.role == Role::Voter);
    let voters: BTreeSet<MemberId> = voters.map(|(v, _)| MemberId(*v)).collect();
    let command = Command::RetireMember {
        id: MemberId(id),
        name: name.clone(),
        voters,
    };
    // While releases are mixed, some members know no such record: the group changes without it.
    let recorded = if api.app.supports(command.needs()) {
        api.app.submit(command).await?;
        format!("the removal of member {name} is recorded, and the leader carries it out")
    } else {
        format!("member {name} was not removed, and may be later: ask again")
    };
    match api.app.group().remove(id).await {
        Ok(()) => {}
        Err(GroupError::Refused(why)) => {
            return Err(ApiError::fail(format!("{recorded} ({why})")));
        }
        Err(e) => {
            return Err(ApiError::unavailable(format!(
                "{recorded}: {e}; look with `mainstay member list`"
            )));
        }
    }
    tracing::info!(member = %name, id = %MemberId(id), "taken out of the group");
    if let Some(peers) = &api.peers {
        peers.tell_to_look(&at.member.peer_url, id).await.ok();
    }
    Ok(())
}

#[utoipa::path(post, path = "/api/v1/member/replace", tag = "members", operation_id = "post_member_replace",
    summary = "Take out the old identity of a member that has lost its disk",
    request_body(content = requests::LeavingMember, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<String>)))]
pub(super) async fn replace(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let next = |name: &str| {
        format!(
            "the old identity of member {name} was removed: start {name} with an empty data directory (or leave it running if it already is) and it joins"
        )
    };
    let status = newest(&api).await?;
    let (id, at) = match leaving(&api, &call, &status).await {
        Ok(found) => found,
        Err(gone) => return Ok(envelope::ok(&next(&gone?))),
    };
    let name = &at.member.name;
    if !call.flag("force")?.unwrap_or(false) && alive(&api, id, &at).await {
        return Err(ApiError::fail(format!(
            "member {name} is alive with the identity that would be removed; stop it first, or use --force"
        )));
    }
    api.app.group().may_remove(id).await?;
    let lost = only_there(&*api.app.read(Consistency::Stale).await?, &status, id);
    take_out(&api, &status, id, &at).await?;
    let mut text = next(name);
    if !lost.is_empty() {
        text.push_str(&format!(
            "; no other member holds the bytes of {}: push these again",
            some(&lost)
        ));
    }
    Ok(envelope::ok(&text))
}

#[utoipa::path(post, path = "/api/v1/member/remove", tag = "members", operation_id = "post_member_remove",
    summary = "Take a member out for good",
    request_body(content = requests::LeavingMember, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<String>)))]
pub(super) async fn remove(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let force = call.flag("force")?.unwrap_or(false);
    let status = newest(&api).await?;
    let (id, at) = match leaving(&api, &call, &status).await {
        Ok(found) => found,
        Err(gone) => {
            let text = format!("member {} has been removed already", gone?);
            return Ok(envelope::ok(&text));
        }
    };
    let name = &at.member.name;
    api.app.group().may_remove(id).await?;
    let lost = only_there(&*api.app.read(Consistency::Stale).await?, &status, id);
    if !lost.is_empty() && !force {
        return Err(ApiError::fail(format!(
            "only member {name} holds the bytes of {}: wait until another does (`mainstay template replicas`), delete them, or lose them with --force",
            some(&lost)
        )));
    }
    take_out(&api, &status, id, &at).await?;
    let mut text = format!(
        "member {name} was removed; its process serves nobody any more: stop it. Left are {}",
        strength(&status, Some(id))
    );
    if !lost.is_empty() {
        text.push_str(&format!(
            ". Lost with it, for no other member holds their bytes: {}",
            some(&lost)
        ));
    }
    Ok(envelope::ok(&text))
}

#[derive(Serialize, ToSchema)]
struct Added {
    command: String,
    note: String,
}

/// Nothing has to be known of a member before it comes: this checks that it can, and says how.
#[utoipa::path(post, path = "/api/v1/member/add", tag = "members", operation_id = "post_member_add",
    summary = "Check that a member can be added, and say how; changes nothing",
    request_body(content = requests::AddMember, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Added>)))]
pub(super) async fn add(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let name = call.required("name")?;
    let learner = call.flag("learner")?.unwrap_or(false);
    config::check_name(&name).map_err(|e| ApiError::fail(e.0))?;
    let status = newest(&api).await?;
    if let Ok((_, at)) = find(&status, &name) {
        let role = match at.role {
            Role::Voter => "a voter",
            Role::Learner => "a learner",
        };
        return Err(ApiError::fail(format!(
            "member {name} is in the cluster already, as {role}: choose another name, or run `mainstay member replace {name}` if it has lost its data directory"
        )));
    }
    let members = status.members.values();
    let peers: Vec<_> = members.map(|m| m.member.peer_url.as_str()).collect();
    let wants = if learner { " --learner" } else { "" };
    let command = format!(
        "mainstay server --name {name} --data-dir /var/lib/mainstay --advertise-host HOST --cluster-token-file /etc/mainstay.token --join {}{wants}",
        peers.join(",")
    );
    let voters = names(&status, Some(Role::Voter)).len();
    let note = match (learner, voters + 1) {
        (true, _) => format!(
            "it holds a copy of everything and has no vote; `mainstay member promote {name}` gives it one"
        ),
        (false, n) if n % 2 == 0 => format!(
            "{n} voters bear no more failures than {}: add another one after it",
            n - 1
        ),
        (false, n) => format!("{n} voters bear {} failures", (n - 1) / 2),
    };
    Ok(envelope::ok(&Added { command, note }))
}

#[utoipa::path(post, path = "/api/v1/member/promote", tag = "members", operation_id = "post_member_promote",
    summary = "Give a learner its vote",
    request_body(content = requests::MemberName, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<String>)))]
pub(super) async fn promote(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let status = newest(&api).await?;
    let (id, at) = find(&status, &call.required("name")?)?;
    let name = &at.member.name;
    let retired = api.app.retired().contains(&MemberId(id));
    if retired {
        return Err(ApiError::fail(format!("member {name} is being removed")));
    }
    api.app.group().promote(id).await?;
    let status = api.app.group().status();
    Ok(envelope::ok(&format!(
        "member {name} is a voter: {}",
        strength(&status, None)
    )))
}

#[utoipa::path(post, path = "/api/v1/member/update", tag = "members", operation_id = "post_member_update",
    summary = "Tell all where a member is",
    request_body(content = requests::MemberAddress, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<String>)))]
pub(super) async fn update(State(api): State<ApiState>, call: Call) -> Result<Response, ApiError> {
    let given = |name: &str, port| {
        let text = call.text(name)?;
        let url = text.map(|text| config::plain_url(&text, port)).transpose();
        url.map_err(|e| ApiError::fail(format!("{name}: {e}")))
    };
    let (peer, api_url, registry) = (
        given("peer_url", config::PEER_PORT)?,
        given("api_url", config::API_PORT)?,
        given("registry_url", config::REGISTRY_PORT)?,
    );
    if peer.is_none() && api_url.is_none() && registry.is_none() {
        return Err(ApiError::fail(
            "nothing to change: give --peer-url, --api-url or --registry-url",
        ));
    }
    let status = newest(&api).await?;
    let (id, at) = find(&status, &call.required("name")?)?;
    let mut member = at.member;
    if let Some(url) = peer.filter(|url| *url != member.peer_url) {
        let force = call.flag("force")?.unwrap_or(false);
        if let (Some(peers), false) = (&api.peers, force)
            && let Err(why) = peers.tell_to_look(&url, id).await
        {
            return Err(ApiError::fail(format!(
                "member {} does not answer at {url}, so that the others would lose it ({why}): start it there first, or use --force",
                member.name
            )));
        }
        member.peer_url = url;
    }
    member.api_url = api_url.unwrap_or(member.api_url);
    member.registry_url = registry.unwrap_or(member.registry_url);
    api.app.group().update(id, member.clone()).await?;
    Ok(envelope::ok(&format!(
        "member {} is known at {} (members), {} (API), {} (registry), until it is started with other flags",
        member.name, member.peer_url, member.api_url, member.registry_url
    )))
}

#[utoipa::path(post, path = "/api/v1/member/transfer-leader", tag = "members", operation_id = "post_member_transfer_leader",
    summary = "Hand leadership over",
    request_body(content = requests::MemberName, content_type = "application/json"),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<String>)))]
pub(super) async fn transfer(
    State(api): State<ApiState>,
    call: Call,
) -> Result<Response, ApiError> {
    let to = match call.text("name")? {
        None => None,
        Some(name) => Some(find(&newest(&api).await?, &name)?.0),
    };
    api.app.group().transfer_leader(to).await?;
    let status = api.app.group().status();
    let leader = status.leader.and_then(|id| status.members.get(&id));
    Ok(envelope::ok(&match leader {
        Some(leader) => format!(
            "leadership was handed over to member {}",
            leader.member.name
        ),
        None => "leadership was handed over".to_owned(),
    }))
}
