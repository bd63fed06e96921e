//! The members, as this one sees them. Answers without a leader and without a quorum: it is what
//! one looks at when those are missing.

use crate::http::ApiState;
use crate::http::envelope;
use crate::http::openapi::Answer;
use axum::extract::State;
use axum::response::Response;
use mainstay_model::MemberId;
use mainstay_model::feature::SUPPORTED;
use mainstay_raft::{Agreement, MemberStatus, Role, Status};
use serde::Serialize;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
#[schema(as = Member)]
pub(super) struct MemberView<'a> {
    id: String,
    name: &'a str,
    api_url: &'a str,
    registry_url: &'a str,
    peer_url: &'a str,
    role: &'static str,
    is_leader: bool,
    /// Last log index known to be on its disk, how far that is behind, and whether it answers: known to
    /// the leader only.
    matched: Option<u64>,
    lag: Option<u64>,
    answers: Option<bool>,
    /// Its removal is recorded, and waits to be carried out.
    leaving: bool,
}

impl<'a> MemberView<'a> {
    fn new(id: u64, at: &'a MemberStatus, status: &Status) -> Self {
        let role = match at.role {
            Role::Voter => "voter",
            Role::Learner => "learner",
        };
        Self {
            id: MemberId(id).to_string(),
            name: &at.member.name,
            api_url: &at.member.api_url,
            registry_url: &at.member.registry_url,
            peer_url: &at.member.peer_url,
            role,
            is_leader: status.leader == Some(id),
            matched: at.matched,
            lag: at.matched.map(|m| status.last_log.saturating_sub(m)),
            answers: None,
            leaving: false,
        }
    }
}

#[utoipa::path(get, path = "/api/v1/members", tag = "members", operation_id = "get_members",
    summary = "The members as this one knows them; answers without a quorum",
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Vec<MemberView<'_>>>)))]
pub(super) async fn members(State(api): State<ApiState>) -> Response {
    let status = api.app.group().status();
    let all = status.members.iter();
    let answering = status.is_leader().then(|| api.app.group().answering());
    let retired = api.app.retired();
    let all: Vec<_> = all
        .map(|(&id, at)| MemberView {
            answers: answering.as_ref().map(|all| all.contains(&id)),
            leaving: retired.contains(&MemberId(id)),
            ..MemberView::new(id, at, &status)
        })
        .collect();
    envelope::ok(&all)
}

#[derive(Serialize, ToSchema)]
#[schema(as = MemberStatus)]
pub(super) struct StatusRow<'a> {
    name: &'a str,
    id: String,
    cluster_id: &'a str,
    version: &'a str,
    db_size: u64,
    disk_free: u64,
    disk_total: u64,
    is_leader: bool,
    is_learner: bool,
    leader: Option<String>,
    term: u64,
    index: u64,
    applied: u64,
    /// Feature level that this member supports.
    features: u32,
    errors: Vec<String>,
}

/// This member's row of `mainstay status`.
#[utoipa::path(get, path = "/api/v1/cluster/status", tag = "members", operation_id = "get_cluster_status",
    summary = "How this member is; answers without a quorum",
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<StatusRow<'_>>)))]
pub(super) async fn status(State(api): State<ApiState>) -> Response {
    let status = api.app.group().status();
    let me = status.members.get(&status.id);
    let name = me
        .map(|at| at.member.name.as_str())
        .filter(|name| !name.is_empty());
    let disk = (api.about.disk)().unwrap_or_default();
    let mut errors = errors(&status, &api.app.group().agreement().borrow());
    errors.extend((api.about.complaint)());
    envelope::ok(&StatusRow {
        name: name.unwrap_or(&api.about.name),
        id: MemberId(status.id).to_string(),
        cluster_id: &api.about.cluster_id,
        version: &api.about.version,
        db_size: (api.about.db_size)(),
        disk_free: disk.free,
        disk_total: disk.total,
        is_leader: status.is_leader(),
        is_learner: me.is_some_and(|at| at.role == Role::Learner),
        leader: status.leader.map(|id| MemberId(id).to_string()),
        term: status.term,
        index: status.last_log,
        applied: status.applied,
        features: SUPPORTED,
        errors,
    })
}

fn errors(status: &Status, agreement: &Agreement) -> Vec<String> {
    let mut errors = Vec::new();
    let name = |id: &u64| {
        let at = status.members.get(id);
        at.map_or_else(|| MemberId(*id).to_string(), |at| at.member.name.clone())
    };
    if agreement.diverged {
        errors.push(
            "diverged: this member's state is not that of the others; it answers nothing from it: \
             stop it and run `mainstay member repair`"
                .to_owned(),
        );
    } else if !agreement.differing.is_empty() {
        let names: Vec<_> = agreement.differing.keys().map(name).collect();
        errors.push(format!(
            "members hold another state than this one: {}",
            names.join(", ")
        ));
    }
    if let Some(fault) = &status.fault {
        errors.push(format!("stopped: {fault}"));
    } else if status.members.is_empty() {
        errors.push("not yet a member of a cluster".to_owned());
    } else if !status.members.contains_key(&status.id) {
        errors.push("removed from the cluster".to_owned());
    } else if status.leader.is_none() {
        errors.push("no leader".to_owned());
    }
    if status.fault.is_none() {
        errors.extend(status.unfit.iter().map(|why| unfit(status, why)));
    }
    errors
}

fn unfit(status: &Status, why: &str) -> String {
    if status.is_leader() {
        format!("leads although it should not: {why}; it hands over as soon as a fit voter answers")
    } else {
        format!("does not take the lead: {why}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfit_member_says_why() {
        let agreed = Agreement::default();
        let mut status = Status {
            id: 1,
            leader: Some(2),
            unfit: vec!["its disk is slow".to_owned()],
            ..Status::default()
        };
        let at = MemberStatus {
            member: mainstay_raft::Member::default(),
            role: Role::Voter,
            matched: None,
        };
        status.members.insert(1, at);
        assert_eq!(
            errors(&status, &agreed),
            ["does not take the lead: its disk is slow"]
        );
        status.leader = Some(1);
        let said = errors(&status, &agreed).join("");
        assert!(said.contains("leads although"), "{said}");
        status.fault = Some("x".to_owned());
        assert_eq!(errors(&status, &agreed), ["stopped: x"]);
    }
}
