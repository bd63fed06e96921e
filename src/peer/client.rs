//! Calls to the peer ports of other members over plain HTTP: founding, joining, chunk transfer.
//! Knows addresses and headers, not what is said.

use super::auth;
use super::wire::{LOOK_PATH, Refused};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// A peer that does not accept a connection within this time is down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for the answer to a small question.
pub const ASK_TIMEOUT: Duration = Duration::from_millis(1500);
/// Longest wait for a membership change.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for a member that is told to look at the membership.
const LOOK_TIMEOUT: Duration = Duration::from_millis(1000);

/// Why a peer gave no answer that could be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It answered: no; a sentence for the operator.
    #[error("{0}")]
    Refused(String),
    /// What answers there is no peer port.
    #[error("{0}")]
    WrongPort(String),
    /// It is down, far, or busy; asking again may help.
    #[error("{0}")]
    Unreachable(String),
}

/// An HTTP client whose calls the peer ports of this cluster let through. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PeerClient {
    http: reqwest::Client,
    token: String,
    from: u64,
    cluster: String,
}

impl PeerClient {
    /// For member `from` with this cluster token; part of no cluster yet.
    pub fn new(token: &str, from: u64) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .pool_idle_timeout(Duration::from_secs(60))
            .no_proxy()
            .http1_only()
            .build()?;
        Ok(Self {
            http,
            token: token.to_owned(),
            from,
            cluster: String::new(),
        })
    }

    /// The same, speaking as a member of this cluster.
    #[must_use]
    pub fn for_cluster(&self, cluster_id: &str) -> Self {
        Self {
            cluster: cluster_id.to_owned(),
            ..self.clone()
        }
    }

    /// A request to `url` (absolute, on a peer port) that carries what the peer port asks for. The
    /// caller sets a timeout.
    pub fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        let headers = auth::headers(&self.token, &self.cluster, self.from);
        self.http.request(method, url).headers(headers)
    }

    /// GET.
    pub fn get(&self, url: &str) -> reqwest::RequestBuilder {
        self.request(reqwest::Method::GET, url)
    }

    /// POST.
    pub fn post(&self, url: &str) -> reqwest::RequestBuilder {
        self.request(reqwest::Method::POST, url)
    }

    /// POST `body` as JSON to `path` of the peer at `base` and decode its JSON answer.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        base: &str,
        path: &str,
        body: &(impl Serialize + Sync),
        timeout: Duration,
    ) -> Result<T, PeerError> {
        let url = format!("{base}{path}");
        let unreachable = |e: reqwest::Error| {
            PeerError::Unreachable(format!("cannot reach {base}: {}", innermost(&e)))
        };
        let response = self
            .post(&url)
            .json(body)
            .timeout(timeout)
            .send()
            .await
            .map_err(unreachable)?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(unreachable)?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|e| {
                PeerError::WrongPort(format!(
                    "{base} does not answer like a member ({e}): is this its --peer-listen address?"
                ))
            });
        }
        match serde_json::from_slice::<Refused>(&bytes) {
            Ok(refused) if status.is_server_error() => Err(PeerError::Unreachable(refused.message)),
            Ok(refused) => Err(PeerError::Refused(refused.message)),
            Err(_) => Err(PeerError::WrongPort(format!(
                "{base} does not answer like a member (HTTP {status}): is this its --peer-listen address?"
            ))),
        }
    }

    /// Tell member `id` at `base` to look at the membership now. It looks by itself as well; an error
    /// says that this very identity does not answer there.
    pub async fn tell_to_look(&self, base: &str, id: u64) -> Result<(), String> {
        let call = self
            .post(&format!("{base}{LOOK_PATH}"))
            .header(auth::TO_HEADER, id.to_string())
            .timeout(LOOK_TIMEOUT);
        let answer = call.send().await.map_err(|e| innermost(&e))?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            status => match answer.json::<Refused>().await {
                Ok(refused) => Err(refused.message),
                Err(_) => Err(format!("HTTP {status}")),
            },
        }
    }

    /// If a member's API answers at `base`: the peer addresses of the members it knows. The token is not
    /// shown to it.
    pub async fn peers_by_api(&self, base: &str) -> Option<Vec<String>> {
        #[derive(serde::Deserialize)]
        struct Row {
            peer_url: String,
        }
        #[derive(serde::Deserialize)]
        struct Answer {
            status: String,
            #[serde(default)]
            body: Option<Vec<Row>>,
        }
        let url = format!("{base}/api/v1/members");
        let asked = self.http.get(url).timeout(ASK_TIMEOUT).send().await.ok()?;
        let answer: Answer = asked.json().await.ok()?;
        let known = matches!(answer.status.as_str(), "OK" | "FAIL");
        let rows = answer.body.unwrap_or_default();
        known.then(|| rows.into_iter().map(|row| row.peer_url).collect())
    }
}

/// The innermost cause: reqwest's own text repeats the URL only.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}
