//! A damaged data directory joins the living members again. It must not vote under its old identity: a vote
//! or an entry that it acknowledged may be gone. So the living members take the old identity out, the damaged
//! log and state go, and the directory gets a new identity of the same cluster; the chunks stay, are checked
//! by their names at the next start, and are not fetched again.
//!
//! ```text
//! mark -> old identity removed (by the living) -> log, state, snapshots emptied -> new identity -> mark removed
//! ```
//! Each step may be repeated. Before the living have agreed, nothing here is touched.

use super::{Stores, attach, known};
use crate::cli;
use crate::cli::client::{ApiClient, ClientError};
use crate::cli::status::MemberRow;
use crate::stamp;
use anyhow::{Context as _, bail};
use mainstay_model::MemberId;
use mainstay_raft::offline::examine;
use mainstay_storage::datadir::{DataDir, Identity};
use mainstay_storage::snapshot;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;

/// How the command begins that runs this.
pub const VERB: &str = "mainstay member repair";

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Repaired {
    /// The member's name.
    pub name: String,
    /// The cluster.
    pub cluster_id: String,
    /// The identity that was removed, if it could be read or was known to the others.
    pub old_id: Option<String>,
    /// The one that it has now.
    pub new_id: String,
    /// What was found damaged.
    pub damage: Vec<String>,
}

/// What to repair.
#[derive(Clone, Debug)]
pub struct Request {
    /// The data directory.
    pub root: PathBuf,
    /// API addresses of living members; those that the directory remembers are asked as well.
    pub endpoints: Vec<String>,
    /// The member's name; needed only if the identity itself is damaged.
    pub name: Option<String>,
    /// Also if nothing is damaged.
    pub force: bool,
    /// What runs this.
    pub command: String,
}

/// Who the directory belongs to, as far as it can be read.
struct Owner {
    name: String,
    id: Option<u64>,
    cluster_id: Option<String>,
}

/// The living members' word.
struct Living {
    client: ApiClient,
    cluster_id: String,
    members: Vec<MemberRow>,
}

/// Repair a directory.
pub async fn repair(request: Request) -> anyhow::Result<Repaired> {
    let dir = attach(&request.root, VERB)?;
    let owner = owner(&dir, request.name.as_deref())?;
    let began = dir.unfinished()?.is_some();
    let (dir, damage) = tokio::task::spawn_blocking(move || {
        let damage = damage(&dir);
        (dir, damage)
    })
    .await?;
    if damage.is_empty() && !request.force && !began {
        bail!(
            "nothing is damaged in {}: start the member; or add --force to make it join anew all the same",
            request.root.display()
        );
    }
    let living = living(&request, &owner).await?;
    let old_id = old_identity(&owner, &living)?;
    dir.begin(&request.command)?;
    if let Some(id) = &old_id
        && let Err(error) = take_out(&living, id).await
    {
        if !began {
            // Nothing was changed here: it is what it was.
            dir.done()?;
        }
        return Err(error);
    }
    let new_id = stamp::member_id();
    let identity = Identity {
        member_id: new_id,
        name: owner.name.clone(),
        cluster_id: Some(living.cluster_id.clone()),
        created_by: cli::VERSION.to_owned(),
        founding: None,
    };
    tokio::task::spawn_blocking(move || {
        dir.empty()?;
        dir.save(&identity)?;
        dir.done()
    })
    .await??;
    Ok(Repaired {
        name: owner.name,
        cluster_id: living.cluster_id,
        old_id: owner.id.map(|id| MemberId(id).to_string()).or(old_id),
        new_id: MemberId(new_id).to_string(),
        damage,
    })
}

fn owner(dir: &DataDir, name: Option<&str>) -> anyhow::Result<Owner> {
    match (dir.identity(), name) {
        (Ok(Some(identity)), given) => {
            if given.is_some_and(|given| given != identity.name) {
                bail!(
                    "the directory belongs to member {}, not to {}",
                    identity.name,
                    given.unwrap_or_default()
                );
            }
            Ok(Owner {
                name: identity.name,
                id: Some(identity.member_id),
                cluster_id: identity.cluster_id,
            })
        }
        (_, Some(name)) => Ok(Owner {
            name: name.to_owned(),
            id: None,
            cluster_id: None,
        }),
        (Ok(None), None) => {
            bail!("the identity is missing: say whose directory this is with --name")
        }
        (Err(e), None) => {
            Err(e).context("the identity cannot be read: say whose directory this is with --name")
        }
    }
}

/// Everything that is wrong with the directory. Blocks.
fn damage(dir: &DataDir) -> Vec<String> {
    let mut found = Vec::new();
    if let Err(e) = dir.identity() {
        found.push(e.to_string());
    }
    match Stores::open(dir) {
        Err(e) => found.push(e.to_string()),
        Ok(stores) => {
            if let Err(e) = examine(&stores.log, &stores.engine, &stores.snapshots) {
                found.push(e.to_string());
            }
            match stores.snapshots.current() {
                Ok(Some((path, _))) => {
                    found.extend(snapshot::verify(&path).err().map(|e| e.to_string()))
                }
                Ok(None) => {}
                Err(e) => found.push(e.to_string()),
            }
        }
    }
    found
}

#[derive(Deserialize)]
struct Row {
    id: String,
    #[serde(default)]
    cluster_id: String,
}

/// The first member that answers, is of our cluster and is another one than ours.
async fn living(request: &Request, owner: &Owner) -> anyhow::Result<Living> {
    let mut endpoints = request.endpoints.clone();
    let own = owner.id.map(|id| MemberId(id).to_string());
    for member in known::members(&request.root) {
        if Some(&member.id) != own.as_ref() && !endpoints.contains(&member.api_url) {
            endpoints.push(member.api_url);
        }
    }
    let mut tried = Vec::new();
    for endpoint in &endpoints {
        let client = ApiClient::new(std::slice::from_ref(endpoint))?;
        let row: Row = match client.get_from(endpoint, "/api/v1/cluster/status").await {
            Ok(row) => row,
            Err(e) => {
                tried.push((endpoint.clone(), e.to_string()));
                continue;
            }
        };
        if owner
            .cluster_id
            .as_ref()
            .is_some_and(|ours| *ours != row.cluster_id)
        {
            bail!(
                "{endpoint} is a member of cluster {}, and the directory belongs to cluster {}: name members of that one with --endpoints",
                row.cluster_id,
                owner.cluster_id.as_deref().unwrap_or_default()
            );
        }
        if Some(&row.id) == own.as_ref() {
            bail!(
                "member {} still runs, at {endpoint}: stop it first",
                owner.name
            );
        }
        let members = client.get_from(endpoint, "/api/v1/members").await?;
        return Ok(Living {
            client,
            cluster_id: row.cluster_id,
            members,
        });
    }
    if tried.is_empty() {
        tried.push((
            "nobody".to_owned(),
            "no address is known: name living members with --endpoints".to_owned(),
        ));
    }
    Err(ClientError::Unreachable(tried).into())
}

/// The identity that has to go, if the others still have it.
fn old_identity(owner: &Owner, living: &Living) -> anyhow::Result<Option<String>> {
    let own = owner.id.map(|id| MemberId(id).to_string());
    let named = living.members.iter().find(|m| m.name == owner.name);
    match (own, named) {
        (Some(own), Some(other)) if other.id != own => bail!(
            "member {} is in the cluster under another identity, {}: it runs elsewhere, or was replaced already; \
             start it with an empty data directory if it shall be this one",
            owner.name,
            other.id
        ),
        // Asked for even if the member that we asked does not list it: that one may be behind.
        (Some(own), _) => Ok(Some(own)),
        // The identity cannot be read; whoever runs under the name is found alive by the others.
        (None, named) => Ok(named.map(|m| m.id.clone())),
    }
}

/// Have the living members remove an identity. It is durable on a majority of the rest when this returns.
async fn take_out(living: &Living, id: &str) -> anyhow::Result<()> {
    let body = json!({"name": id, "force": false});
    let answer: Result<String, _> = living.client.post("/api/v1/member/replace", &body).await;
    match answer {
        Ok(_) => Ok(()),
        // An earlier attempt, whose answer was lost.
        Err(ClientError::Refused { message, .. }) if message.starts_with("No such member") => {
            Ok(())
        }
        Err(e) => {
            Err(e).context("the living members do not remove the old identity; nothing was changed")
        }
    }
}
