//! Which release a member runs and what it supports, asked on the peer port.

use super::MemberHttp;
use crate::app::App;
use crate::cli;
use axum::Json;
use futures::future::join_all;
use mainstay_model::MemberId;
use mainstay_model::feature::SUPPORTED;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Where it is asked.
pub const PATH: &str = "/peer/v1/release";
/// For one member's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// `x.y.z-hash`.
    pub version: String,
    /// Highest feature level.
    pub features: u32,
}

/// This member's.
pub(super) async fn own() -> Json<Release> {
    Json(Release {
        version: cli::VERSION.to_owned(),
        features: SUPPORTED,
    })
}

/// The feature level that every member supports; `None` while one of them does not answer.
pub async fn common(app: &App, members: &MemberHttp) -> Option<u32> {
    let status = app.group().status();
    let others = status.members.keys().filter(|id| **id != status.id);
    let asked = others.map(|id| ask(members, MemberId(*id)));
    let all: Option<Vec<u32>> = join_all(asked).await.into_iter().collect();
    Some(all?.into_iter().chain([SUPPORTED]).min().unwrap_or(0))
}

async fn ask(members: &MemberHttp, id: MemberId) -> Option<u32> {
    let request = members.request(reqwest::Method::GET, id, PATH)?;
    let answer = request.timeout(ANSWER_TIMEOUT).send().await.ok()?;
    match answer.status() {
        reqwest::StatusCode::OK => Some(answer.json::<Release>().await.ok()?.features),
        // A release that was made before there were levels.
        reqwest::StatusCode::NOT_FOUND => Some(0),
        _ => None,
    }
}
