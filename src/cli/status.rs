//! `mainstay status`: one row per member, each asked directly, so that it works without a leader and
//! with members down.

use super::client::{ApiClient, ClientError};
use super::table::{self, Output, Table};
use futures::future::join_all;
use serde::{Deserialize, Serialize};

/// A member as `/api/v1/members` has it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct MemberRow {
    /// Name in the member list.
    pub name: String,
    /// Id.
    pub id: String,
    /// `voter` or `learner`.
    pub role: String,
    /// Leads, as far as the member that was asked knows.
    pub is_leader: bool,
    /// REST API.
    pub api_url: String,
    /// Registry.
    pub registry_url: String,
    /// Members among themselves.
    pub peer_url: String,
    /// Last log index known to be on its disk; the leader knows.
    pub matched: Option<u64>,
    /// How many entries it lacks of the leader's log.
    pub lag: Option<u64>,
    /// It answers: the leader, or, when there is none, us.
    pub answers: Option<bool>,
    /// Its removal is recorded and waits.
    pub leaving: bool,
}

/// A member's own row.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct StatusRow {
    /// Name.
    pub name: String,
    /// Address that was asked.
    pub endpoint: String,
    /// Id.
    pub id: String,
    /// Release.
    pub version: String,
    /// Bytes of the durable state.
    pub db_size: u64,
    /// Free bytes on its disk.
    pub disk_free: u64,
    /// All bytes of its disk.
    pub disk_total: u64,
    /// Leads, by its own word.
    pub is_leader: bool,
    /// Does not vote.
    pub is_learner: bool,
    /// Term.
    pub term: u64,
    /// Last log index.
    pub index: u64,
    /// Applied index.
    pub applied: u64,
    /// What is wrong with it.
    pub errors: Vec<String>,
}

/// Print every member's row.
pub async fn run(endpoints: &[String], output: Output) -> anyhow::Result<()> {
    let rows = collect(endpoints).await?;
    Ok(table::emit(output, &rows, |rows| draw(rows))?)
}

/// Ask one endpoint who the members are, then each member for its row.
pub async fn collect(endpoints: &[String]) -> Result<Vec<StatusRow>, ClientError> {
    let members = members(endpoints).await?;
    let mut rows: Vec<_> = if members.is_empty() {
        // Not part of a cluster yet: each endpoint can still say so itself.
        let each = endpoints.iter().map(|url| row(url, MemberRow::default()));
        join_all(each).await
    } else {
        join_all(
            members
                .into_iter()
                .map(|m| async move { row(&m.api_url.clone(), m).await }),
        )
        .await
    };
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

/// The members, from the first endpoint that knows any. Stale on purpose: no leader is needed.
pub async fn members(endpoints: &[String]) -> Result<Vec<MemberRow>, ClientError> {
    let mut tried = Vec::new();
    let mut answered = false;
    let client = ApiClient::new(endpoints)?;
    for endpoint in client.endpoints() {
        match client
            .get_from::<Vec<MemberRow>>(endpoint, "/api/v1/members")
            .await
        {
            Ok(list) if !list.is_empty() => return Ok(list),
            Ok(_) => answered = true,
            Err(ClientError::Unreachable(mut why)) => tried.append(&mut why),
            Err(other) => tried.push((endpoint.clone(), other.to_string())),
        }
    }
    if answered {
        Ok(Vec::new())
    } else {
        Err(ClientError::Unreachable(tried))
    }
}

/// The same as the leader sees them. Without a leader that answers, each is asked whether it does.
pub async fn members_seen_by_leader(endpoints: &[String]) -> Result<Vec<MemberRow>, ClientError> {
    let mut known = members(endpoints).await?;
    if let Some(leader) = known.iter().find(|m| m.is_leader) {
        let client = ApiClient::new(std::slice::from_ref(&leader.api_url))?;
        let path = "/api/v1/members";
        let asked = client
            .get_from::<Vec<MemberRow>>(&leader.api_url, path)
            .await;
        if let Ok(seen) = asked
            && seen.iter().any(|m| m.answers.is_some())
        {
            return Ok(seen);
        }
    }
    let asked = known.iter().map(|m| row(&m.api_url, m.clone()));
    for (member, row) in known.clone().iter().zip(join_all(asked).await) {
        let answers = row.id == member.id && !row.version.is_empty();
        if let Some(member) = known.iter_mut().find(|m| m.id == member.id) {
            member.answers = Some(answers);
        }
    }
    Ok(known)
}

async fn row(url: &str, member: MemberRow) -> StatusRow {
    let asked = match ApiClient::new(&[url.to_owned()]) {
        Ok(client) => {
            client
                .get_from::<StatusRow>(url, "/api/v1/cluster/status")
                .await
        }
        Err(e) => Err(e),
    };
    let mut row = asked.unwrap_or_else(|error| StatusRow {
        name: member.name.clone(),
        id: member.id.clone(),
        is_learner: member.role == "learner",
        errors: vec![reason(error)],
        ..StatusRow::default()
    });
    if !member.id.is_empty() && row.id != member.id {
        row.errors.push(format!(
            "answers as member {}: not the one in the list",
            row.id
        ));
    }
    url.clone_into(&mut row.endpoint);
    row
}

fn reason(error: ClientError) -> String {
    match error {
        ClientError::Unreachable(tried) => tried
            .into_iter()
            .map(|(_, why)| why)
            .collect::<Vec<_>>()
            .join("; "),
        other => other.to_string(),
    }
}

fn draw(rows: &[StatusRow]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "ENDPOINT",
        "ID",
        "VERSION",
        "DB SIZE",
        "DISK FREE",
        "IS LEADER",
        "IS LEARNER",
        "RAFT TERM",
        "RAFT INDEX",
        "RAFT APPLIED INDEX",
        "ERRORS",
    ])
    .bordered();
    for row in rows {
        table.row([
            row.name.clone(),
            row.endpoint.clone(),
            row.id.clone(),
            row.version.clone(),
            table::bytes(row.db_size),
            table::bytes(row.disk_free),
            row.is_leader.to_string(),
            row.is_learner.to_string(),
            row.term.to_string(),
            row.index.to_string(),
            row.applied.to_string(),
            row.errors.join("; "),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_is_down_still_has_a_row() {
        let rows = vec![
            StatusRow {
                name: "c1".into(),
                is_leader: true,
                term: 3,
                ..StatusRow::default()
            },
            StatusRow {
                name: "c2".into(),
                errors: vec!["cannot connect".into()],
                ..StatusRow::default()
            },
        ];
        let text = draw(&rows).to_string();
        assert!(
            text.lines()
                .any(|l| l.contains("c2") && l.contains("cannot connect"))
        );
        assert!(text.lines().any(|l| l.contains("c1") && l.contains("true")));
    }
}
