//! One registry over HTTP: the calls of the protocol, and which failures may pass.

use super::api::{self, Admission, AdmitRequest, Answer, PublishRequest, PutAnswer, TagInfo};
use super::batch::node_url;
use super::{Id, TransferError, Unframer, WireRecord};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::time::Duration;

/// A registry that sends nothing for so long has gone.
const IDLE_MAX: Duration = Duration::from_secs(20);
/// Longest time until an answer begins: the member may have to fetch, or to fsync behind others.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Longest JSON answer.
const JSON_LEN_MAX: usize = 1 << 20;

/// A node's answer must begin within this, and be whole within that: it may have to queue behind others.
const NODE_HEAD_MAX: Duration = Duration::from_secs(5);
const NODE_MAX: Duration = Duration::from_secs(30);
/// Nodes that a member may name at once.
const NODES_MAX: usize = 8;

/// How a node asks a member.
pub(super) struct Asked<'a> {
    /// Digest (hex) of the manifest of the image that it pulls.
    pub(super) manifest: &'a str,
    /// Where other nodes reach it; empty if they cannot.
    pub(super) node: &'a str,
    /// Nodes that did not give.
    pub(super) avoid: Vec<&'a str>,
    /// It has waited for nodes long enough.
    pub(super) insist: bool,
}

/// What it gets.
pub(super) struct Given {
    pub(super) records: Vec<WireRecord>,
    /// Nodes that have, or will have, what was left out.
    pub(super) nodes: Vec<String>,
}

/// Why a call gave no result.
#[derive(Debug)]
pub(super) enum CallError {
    /// Another try, or another member, may do.
    Passing(String),
    /// This member lacks what the request names.
    Incomplete(String),
    /// It was understood and refused.
    Refused(String),
}

/// A registry.
#[derive(Clone, Debug)]
pub(super) struct Registry {
    client: reqwest::Client,
    base: String,
}

impl Registry {
    pub(super) fn new(client: &reqwest::Client, base: &str) -> Self {
        Self {
            client: client.clone(),
            base: base.trim_end_matches('/').to_owned(),
        }
    }

    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Those of these chunks that it can get hold of.
    pub(super) async fn get(&self, ids: &[Id]) -> Result<Vec<WireRecord>, CallError> {
        let request = self
            .client
            .post(self.url(api::CHUNKS_GET))
            .body(ids.concat());
        let response = answered(request).await?;
        read_records(response, ids)
            .await
            .map_err(|e| CallError::Passing(e.to_string()))
    }

    /// The same by a node among others: it may be given the addresses of other nodes instead of chunks that these
    /// have.
    pub(super) async fn give(&self, ids: &[Id], asked: &Asked<'_>) -> Result<Given, CallError> {
        let mut query = vec![("manifest", asked.manifest.to_owned())];
        if !asked.node.is_empty() {
            query.push(("node", asked.node.to_owned()));
        }
        if !asked.avoid.is_empty() {
            query.push(("avoid", asked.avoid.join(",")));
        }
        if asked.insist {
            query.push(("insist", "1".to_owned()));
        }
        let url = reqwest::Url::parse_with_params(&self.url(api::CHUNKS_GET), query)
            .map_err(|e| CallError::Refused(format!("{}: {e}", self.base)))?;
        let response = answered(self.client.post(url).body(ids.concat())).await?;
        let header = response.headers().get(api::NODES);
        let named = header.and_then(|h| h.to_str().ok()).unwrap_or_default();
        let nodes = named.split(',').filter_map(node_url).map(str::to_owned);
        let nodes = nodes.take(NODES_MAX).collect();
        let records = read_records(response, ids)
            .await
            .map_err(|e| CallError::Passing(e.to_string()))?;
        Ok(Given { records, nodes })
    }

    /// What another node has of these chunks, and how many of the image it has. A slow one has gone.
    pub(super) async fn of_node(
        &self,
        ids: &[Id],
        manifest: &str,
        key: &str,
    ) -> Result<(Vec<WireRecord>, u64), CallError> {
        let url = reqwest::Url::parse_with_params(
            &self.url(api::CHUNKS_GET),
            [("manifest", manifest.to_owned())],
        )
        .map_err(|e| CallError::Refused(format!("{}: {e}", self.base)))?;
        let slow = |_| CallError::Passing("it is too slow".to_owned());
        let call = async {
            let request = self.client.post(url).bearer_auth(key);
            let response = answered(request.body(ids.concat()));
            let response = tokio::time::timeout(NODE_HEAD_MAX, response);
            let response = response.await.map_err(slow)??;
            let header = response.headers().get(api::HELD);
            let held = header.and_then(|h| h.to_str().ok()?.parse().ok());
            let records = read_records(response, ids).await;
            let records = records.map_err(|e| CallError::Passing(e.to_string()))?;
            Ok((records, held.unwrap_or(0)))
        };
        tokio::time::timeout(NODE_MAX, call).await.map_err(slow)?
    }

    /// Those of these chunks that it lacks.
    pub(super) async fn missing(&self, ids: &[Id]) -> Result<Vec<Id>, CallError> {
        let request = self.client.post(self.url(api::MISSING)).body(ids.concat());
        let response = answered(request).await?;
        let flags = read_all(response, ids.len()).await?;
        if flags.len() != ids.len() {
            return Err(CallError::Passing(format!("{}: a cut answer", self.base)));
        }
        Ok(ids
            .iter()
            .zip(flags)
            .filter(|(_, flag)| *flag != 0)
            .map(|(id, _)| *id)
            .collect())
    }

    /// Would a push fit? `None`: the registry is of a release that cannot say.
    pub(super) async fn admit(&self, asked: &AdmitRequest) -> Result<Option<Admission>, CallError> {
        let request = self.client.post(self.url(api::ADMIT)).json(asked);
        let response = match tokio::time::timeout(ANSWER_MAX, request.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(e)) => return Err(CallError::Passing(chain(&e))),
            Err(_) => return Err(CallError::Passing("no answer in time".to_owned())),
        };
        if response.status().as_u16() == 404 {
            return Ok(None);
        }
        body_of(judged(response).await?).await.map(Some)
    }

    /// Store these records, of this push.
    pub(super) async fn put(&self, body: Bytes, push: &str) -> Result<PutAnswer, CallError> {
        let url = format!("{}?push={push}", self.url(api::CHUNKS));
        json(self.client.put(url).body(body)).await
    }

    pub(super) async fn publish(&self, request: &PublishRequest) -> Result<TagInfo, CallError> {
        json(self.client.post(self.url(api::PUBLISH)).json(request)).await
    }

    /// Wait up to `wait_s` seconds for this tag to be held as it was asked for.
    pub(super) async fn tag(&self, tag: &TagInfo, wait_s: u32) -> Result<TagInfo, CallError> {
        let query = [
            ("template", tag.template_id.clone()),
            ("number", tag.number.to_string()),
            ("copies", tag.copies_needed.to_string()),
            ("wait", wait_s.to_string()),
        ];
        let url = reqwest::Url::parse_with_params(&self.url(api::TAG), query)
            .map_err(|e| CallError::Refused(format!("{}: {e}", self.base)))?;
        json(self.client.get(url)).await
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }
}

/// Send and look at the status only.
async fn answered(request: reqwest::RequestBuilder) -> Result<reqwest::Response, CallError> {
    let response = match tokio::time::timeout(ANSWER_MAX, request.send()).await {
        Ok(Ok(response)) => response,
        Ok(Err(e)) if e.is_builder() => return Err(CallError::Refused(chain(&e))),
        Ok(Err(e)) => return Err(CallError::Passing(chain(&e))),
        Err(_) => return Err(CallError::Passing("no answer in time".to_owned())),
    };
    judged(response).await
}

async fn judged(response: reqwest::Response) -> Result<reqwest::Response, CallError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let text = read_all(response, JSON_LEN_MAX).await.unwrap_or_default();
    let message = serde_json::from_slice::<Answer<serde_json::Value>>(&text).map_or_else(
        |_| String::from_utf8_lossy(&text).trim().to_owned(),
        |a| a.message,
    );
    let message = if message.is_empty() {
        status.to_string()
    } else {
        message
    };
    Err(match status.as_u16() {
        409 => CallError::Incomplete(message),
        408 | 429 | 500.. => CallError::Passing(message),
        _ => CallError::Refused(message),
    })
}

async fn json<T: DeserializeOwned>(request: reqwest::RequestBuilder) -> Result<T, CallError> {
    body_of(answered(request).await?).await
}

async fn body_of<T: DeserializeOwned>(response: reqwest::Response) -> Result<T, CallError> {
    let bytes = read_all(response, JSON_LEN_MAX).await?;
    let answer: Answer<T> = serde_json::from_slice(&bytes)
        .map_err(|e| CallError::Refused(format!("not an answer of a registry: {e}")))?;
    match answer.body {
        Some(body) if answer.status == "OK" => Ok(body),
        _ => Err(CallError::Refused(answer.message)),
    }
}

async fn read_all(mut response: reqwest::Response, len_max: usize) -> Result<Vec<u8>, CallError> {
    let mut out = Vec::new();
    while let Some(bytes) = next_bytes(&mut response)
        .await
        .map_err(CallError::Passing)?
    {
        if out.len() + bytes.len() > len_max {
            return Err(CallError::Passing(
                "an answer longer than it may be".to_owned(),
            ));
        }
        out.extend_from_slice(&bytes);
    }
    Ok(out)
}

async fn next_bytes(response: &mut reqwest::Response) -> Result<Option<Bytes>, String> {
    match tokio::time::timeout(IDLE_MAX, response.chunk()).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(e)) => Err(chain(&e)),
        Err(_) => Err("the answer stalled".to_owned()),
    }
}

async fn read_records(
    response: reqwest::Response,
    ids: &[Id],
) -> Result<Vec<WireRecord>, TransferError> {
    let mut records = Vec::with_capacity(ids.len());
    read_records_into(response, ids, &mut |record| records.push(record)).await?;
    Ok(records)
}

/// Hand on the records of an answer to [`api::CHUNKS_GET`] for `ids` as they come, not yet verified: of
/// one that is cut off, or given up, all but its end. A record that was not asked for, or twice the same,
/// ends it: the answer is bounded by the question.
pub async fn read_records_into(
    mut response: reqwest::Response,
    ids: &[Id],
    take: &mut (dyn FnMut(WireRecord) + Send),
) -> Result<(), TransferError> {
    let mut expected: HashSet<Id> = ids.iter().copied().collect();
    let mut unframer = Unframer::default();
    while let Some(bytes) = next_bytes(&mut response)
        .await
        .map_err(TransferError::Unavailable)?
    {
        unframer.push(&bytes);
        while let Some(record) = unframer.next_record()? {
            if !expected.remove(&record.id) {
                return Err(TransferError::Invalid(
                    "a chunk came that was not asked for".to_owned(),
                ));
            }
            take(record);
        }
    }
    unframer.finish()
}

/// An error with its causes: reqwest's own text hides why.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
