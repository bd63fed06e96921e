//! A client of the REST dialect that knows several members and fails over between them. Knows the
//! envelope and the status codes; refuses to know what any body means.

use parking_lot::Mutex;
use reqwest::{Method, Response, StatusCode, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::time::{Duration, Instant};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

/// Header under which a request and all its retries are one request (see docs/rest-dialect.md).
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// A member that does not accept a connection within this time is passed over.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for one member's answer; a member itself gives up after 9 s.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest time for a call with all its attempts.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for an answer that opens a way into a VM: its node's agent has to be found, and the VM's own answer.
const WAY_TIMEOUT: Duration = Duration::from_secs(35);
/// Pause after every member was tried in vain.
const ROUND_PAUSE: Duration = Duration::from_millis(250);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The cluster answered `FAIL`, or a status that another member would answer too.
    #[error("{message}")]
    Refused {
        /// HTTP status of the answer (200 for a logical failure).
        status: u16,
        /// The answer's message.
        message: String,
    },
    /// No member answered in time; one sentence per member.
    #[error("no member answered; tried:{}", list(.0))]
    Unreachable(Vec<(String, String)>),
    /// An answer that is not in the dialect: most likely not a member's API port.
    #[error("{url}: not an answer of this API: {reason}")]
    Strange {
        /// Who answered.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The call itself cannot be made.
    #[error("{0}")]
    Usage(String),
}

fn list(tried: &[(String, String)]) -> String {
    tried
        .iter()
        .map(|(url, why)| format!("\n  {url}: {why}"))
        .collect()
}

/// A WebSocket to a member.
pub type Socket = WebSocketStream<reqwest::Upgraded>;

/// One of the answers: keep asking elsewhere, or done.
enum Attempt {
    Done(Result<Value, ClientError>),
    Next(String),
}

/// A client with an ordered list of members. The one that answered last is asked first.
#[derive(Debug)]
pub struct ApiClient {
    endpoints: Vec<String>,
    home: Mutex<usize>,
    http: reqwest::Client,
    /// For answers that go on for as long as they like.
    ways: reqwest::Client,
}

impl ApiClient {
    /// `endpoints` are addresses of API ports: `http://host:port` or `host:port`. Members are asked
    /// directly: proxies named by the environment are not used.
    pub fn new(endpoints: &[String]) -> Result<Self, ClientError> {
        let endpoints: Vec<String> = endpoints.iter().filter_map(|e| normalise(e)).collect();
        if endpoints.is_empty() {
            return Err(ClientError::Usage(
                "no endpoints: name members with --endpoints or MAINSTAY_ENDPOINTS".to_owned(),
            ));
        }
        let plain = || {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .no_proxy()
        };
        let failed =
            |e: reqwest::Error| ClientError::Usage(format!("cannot set up an HTTP client: {e}"));
        let http = plain().timeout(ATTEMPT_TIMEOUT).build().map_err(failed)?;
        let ways = plain()
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(15))
            .http1_only()
            .build()
            .map_err(failed)?;
        Ok(Self {
            endpoints,
            home: Mutex::new(0),
            http,
            ways,
        })
    }

    /// The members' addresses, normalised, in the given order.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// `GET`; the envelope's body.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None).await
    }
    /// `POST` with a JSON body. Safe to retry: every attempt carries the same idempotency key.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(json(body)?)).await
    }
    /// `PUT` with a JSON body.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::PUT, path, Some(json(body)?)).await
    }
    /// `DELETE` with a JSON body.
    pub async fn delete<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, Some(json(body)?)).await
    }

    /// `GET` from one given member only, no failover; the envelope's body.
    pub async fn get_from<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        path: &str,
    ) -> Result<T, ClientError> {
        let base = normalise(endpoint).unwrap_or_default();
        match self.attempt(&base, &Method::GET, path, None, "").await {
            Attempt::Done(done) => decode(&base, done?),
            Attempt::Next(why) => Err(ClientError::Unreachable(vec![(base, why)])),
        }
    }

    /// `GET` of a path that is answered with a WebSocket, from the first member that can.
    pub async fn socket(&self, path: &str) -> Result<Socket, ClientError> {
        let key = generate_key();
        let headers = [
            (header::CONNECTION, "Upgrade"),
            (header::UPGRADE, "websocket"),
            (header::SEC_WEBSOCKET_VERSION, "13"),
            (header::SEC_WEBSOCKET_KEY, &key),
        ];
        let (url, answer) = self.way(path, &headers).await?;
        let strange = |reason: String| ClientError::Strange {
            url: url.clone(),
            reason,
        };
        let accept = answer.headers().get(header::SEC_WEBSOCKET_ACCEPT);
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS
            || accept.is_none_or(|a| a.as_bytes() != derive_accept_key(key.as_bytes()).as_bytes())
        {
            let status = answer.status();
            return Err(strange(format!("HTTP {status}, but no WebSocket")));
        }
        let upgraded = answer.upgrade().await.map_err(|e| strange(root(&e)))?;
        Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await)
    }

    /// `GET` of a path that is answered with bytes, from the first member that can; they may go on for ever.
    pub async fn stream(&self, path: &str) -> Result<Response, ClientError> {
        Ok(self.way(path, &[]).await?.1)
    }

    /// An answer that is no envelope, from the first member that gives one, and who gave it.
    async fn way(
        &self,
        path: &str,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<(String, Response), ClientError> {
        let mut tried = Vec::new();
        let first = *self.home.lock();
        for step in 0..self.endpoints.len() {
            let at = (first + step) % self.endpoints.len();
            let base = &self.endpoints[at];
            let request = headers.iter().fold(
                self.ways.get(format!("{base}{path}")),
                |r, (name, value)| r.header(name, *value),
            );
            let why = match tokio::time::timeout(WAY_TIMEOUT, request.send()).await {
                Err(_) => "no answer in time".to_owned(),
                Ok(Err(e)) if e.is_connect() => format!("{CANNOT_CONNECT}: {}", root(&e)),
                Ok(Err(e)) if e.is_builder() => return Err(ClientError::Usage(root(&e))),
                Ok(Err(e)) => format!("connection lost: {}", root(&e)),
                Ok(Ok(answer)) => {
                    let json = answer.headers().get(header::CONTENT_TYPE);
                    let json = json.is_some_and(|v| v.as_bytes().starts_with(b"application/json"));
                    let status = answer.status();
                    if !json && (status.is_success() || status.is_informational()) {
                        *self.home.lock() = at;
                        return Ok((base.clone(), answer));
                    }
                    match read(base, answer).await {
                        Attempt::Next(why) => why,
                        Attempt::Done(Err(error)) => return Err(error),
                        Attempt::Done(Ok(_)) => {
                            let reason = "an envelope instead of bytes".to_owned();
                            let url = base.clone();
                            return Err(ClientError::Strange { url, reason });
                        }
                    }
                }
            };
            tried.push((base.clone(), why));
        }
        Err(ClientError::Unreachable(tried))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let key = uuid::Uuid::new_v4().to_string();
        let until = Instant::now() + CALL_TIMEOUT;
        loop {
            let mut tried = Vec::new();
            let first = *self.home.lock();
            for step in 0..self.endpoints.len() {
                let at = (first + step) % self.endpoints.len();
                let base = &self.endpoints[at];
                match self
                    .attempt(base, &method, path, body.as_deref(), &key)
                    .await
                {
                    Attempt::Done(done) => {
                        *self.home.lock() = at;
                        return decode(base, done?);
                    }
                    Attempt::Next(why) => tried.push((base.clone(), why)),
                }
            }
            // Members that refuse connections at once need no patience; a cluster without a leader does.
            let patience = tried
                .iter()
                .any(|(_, why)| !why.starts_with(CANNOT_CONNECT));
            if !patience || Instant::now() + ROUND_PAUSE >= until {
                return Err(ClientError::Unreachable(tried));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    async fn attempt(
        &self,
        base: &str,
        method: &Method,
        path: &str,
        body: Option<&[u8]>,
        key: &str,
    ) -> Attempt {
        let mut request = self.http.request(method.clone(), format!("{base}{path}"));
        if *method != Method::GET {
            request = request.header(IDEMPOTENCY_KEY, key);
        }
        if let Some(body) = body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_vec());
        }
        match request.send().await {
            Ok(response) => read(base, response).await,
            Err(e) if e.is_connect() => Attempt::Next(format!("{CANNOT_CONNECT}: {}", root(&e))),
            Err(e) if e.is_timeout() => Attempt::Next("no answer in time".to_owned()),
            Err(e) if e.is_builder() => Attempt::Done(Err(ClientError::Usage(root(&e)))),
            Err(e) => Attempt::Next(format!("connection lost: {}", root(&e))),
        }
    }
}

const CANNOT_CONNECT: &str = "cannot connect";

/// Take an answer apart: 5xx is this member's trouble, everything else is the cluster's word.
async fn read(base: &str, response: Response) -> Attempt {
    let status = response.status();
    let bytes = match response.bytes().await {
        Ok(bytes) => bytes,
        Err(e) => return Attempt::Next(format!("answer cut short: {}", root(&e))),
    };
    let envelope: Value = match serde_json::from_slice(&bytes) {
        Ok(value) => value,
        Err(_) if status.is_server_error() => return Attempt::Next(format!("HTTP {status}")),
        Err(_) => {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
            return Attempt::Done(Err(ClientError::Strange {
                url: base.to_owned(),
                reason: format!("HTTP {status}: {}", text.trim()),
            }));
        }
    };
    let message = envelope["message"].as_str().unwrap_or_default().to_owned();
    if status.is_server_error() {
        return Attempt::Next(format!("HTTP {status}: {message}"));
    }
    if status == StatusCode::OK && envelope["status"] == "OK" {
        return Attempt::Done(Ok(envelope));
    }
    Attempt::Done(Err(ClientError::Refused {
        status: status.as_u16(),
        message,
    }))
}

/// The envelope's body as a `T`; a missing body is `null`.
fn decode<T: DeserializeOwned>(base: &str, mut envelope: Value) -> Result<T, ClientError> {
    let body = envelope.get_mut("body").map_or(Value::Null, Value::take);
    serde_json::from_value(body).map_err(|e| ClientError::Strange {
        url: base.to_owned(),
        reason: format!("unexpected body: {e}"),
    })
}

fn json(body: &impl Serialize) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(body).map_err(|e| ClientError::Usage(format!("cannot encode: {e}")))
}

/// `host:port`, `http://host:port/` and the like, to `http://host:port`.
fn normalise(endpoint: &str) -> Option<String> {
    let text = endpoint.trim().trim_end_matches('/');
    if text.is_empty() {
        return None;
    }
    Some(if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    })
}

/// The innermost cause: reqwest's own text repeats the URL only.
fn root(error: &dyn std::error::Error) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}

/// Encode `pairs` as a query string with its leading `?`; empty when there is none.
pub fn query(pairs: &[(&str, &str)]) -> String {
    if pairs.is_empty() {
        return String::new();
    }
    let text = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(pairs)
        .finish();
    format!("?{text}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{Router, http::HeaderMap, routing::post};
    use std::sync::Arc;

    async fn serve(router: Router) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address.to_string()
    }

    /// An address that nobody listens on.
    async fn dead() -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    }

    #[tokio::test]
    async fn fails_over_with_one_key_for_all_attempts() {
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let note = |answer: (u16, &'static str)| {
            let seen = seen.clone();
            post(move |headers: HeaderMap| async move {
                seen.lock()
                    .push(headers[IDEMPOTENCY_KEY].to_str().unwrap().to_owned());
                (StatusCode::from_u16(answer.0).unwrap(), answer.1)
            })
        };
        let busy = serve(Router::new().route(
            "/x",
            note((503, r#"{"status":"FAIL","message":"no leader"}"#)),
        ))
        .await;
        let good = serve(Router::new().route(
            "/x",
            note((200, r#"{"status":"OK","message":"","body":["a"]}"#)),
        ))
        .await;
        let client = ApiClient::new(&[dead().await, busy, format!("http://{good}/")]).unwrap();
        let ids: Vec<String> = client.post("/x", &serde_json::json!({})).await.unwrap();
        assert_eq!(ids, ["a"]);
        let keys = seen.lock().clone();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[0], keys[1]);
        // The member that answered is asked first from now on.
        let _: Vec<String> = client.post("/x", &serde_json::json!({})).await.unwrap();
        assert_eq!(seen.lock().len(), 3);
        assert_ne!(seen.lock()[2], keys[0]);
    }

    #[tokio::test]
    async fn a_refusal_is_final_and_carries_its_text() {
        let fail = serve(Router::new().route(
            "/x",
            post(|| async { r#"{"status":"FAIL","message":"VM not in the registry"}"# }),
        ))
        .await;
        let client = ApiClient::new(&[fail, dead().await]).unwrap();
        let error = client.post::<Value>("/x", &1).await.unwrap_err();
        assert_eq!(error.to_string(), "VM not in the registry");
    }

    #[tokio::test]
    async fn all_dead_names_each_member() {
        let (a, b) = (dead().await, dead().await);
        let client = ApiClient::new(&[a.clone(), b.clone()]).unwrap();
        let text = client.get::<Value>("/x").await.unwrap_err().to_string();
        assert!(text.contains(&a) && text.contains(&b), "{text}");
        assert!(ApiClient::new(&[]).is_err());
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(query(&[]), "");
        assert_eq!(
            query(&[("id", "a b"), ("tag", "v1+x")]),
            "?id=a+b&tag=v1%2Bx"
        );
    }
}
