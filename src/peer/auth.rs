//! Who may speak on the peer port: holders of the cluster token, of one protocol version and, for
//! everything but founding, of the same cluster. Checked on headers alone, before any body is read.

use super::PeerPort;
use super::wire::Refused;
use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// Version of everything said on the peer port.
pub const PROTOCOL: &str = "1";
/// Derived from the cluster token.
pub const TOKEN_HEADER: &str = "x-mainstay-token";
/// Protocol version.
pub const PROTOCOL_HEADER: &str = "x-mainstay-protocol";
/// Cluster id, or empty while founding.
pub const CLUSTER_HEADER: &str = "x-mainstay-cluster";
/// Id of the member that calls, in decimal.
pub const FROM_HEADER: &str = "x-mainstay-from";
/// Id of the member that is meant, in decimal.
pub const TO_HEADER: &str = "x-mainstay-to";

/// What proves knowledge of `token` to members of `cluster`.
pub fn proof(token: &str, cluster: &str) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_derive_key("mainstay peer token");
    for part in [PROTOCOL, cluster, token] {
        hasher.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize()
}

/// The headers that let a call of member `from` through.
pub fn headers(token: &str, cluster: &str, from: u64) -> HeaderMap {
    let mut map = HeaderMap::new();
    let hex = proof(token, cluster).to_hex();
    let values = [
        (TOKEN_HEADER, hex.as_str().to_owned()),
        (PROTOCOL_HEADER, PROTOCOL.to_owned()),
        (CLUSTER_HEADER, cluster.to_owned()),
        (FROM_HEADER, from.to_string()),
    ];
    for (name, value) in values {
        // A cluster id is a UUID and the rest is made here: always a legal header value.
        if let Ok(value) = HeaderValue::from_str(&value) {
            map.insert(name, value);
        }
    }
    map
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("")
}

/// A refusal with its sentence.
pub(super) fn refuse(status: StatusCode, message: impl Into<String>) -> Response {
    (
        status,
        Json(Refused {
            message: message.into(),
        }),
    )
        .into_response()
}

/// Refuse a caller that has not our token or speaks another protocol.
#[expect(clippy::result_large_err, reason = "the error is the response")]
pub fn check(headers: &HeaderMap, token: &str, name: &str) -> Result<(), Response> {
    let protocol = text(headers, PROTOCOL_HEADER);
    if !protocol.is_empty() && protocol != PROTOCOL {
        return Err(refuse(
            StatusCode::CONFLICT,
            format!(
                "member {name} speaks peer protocol {PROTOCOL}, the caller {protocol}: run the same release on every member"
            ),
        ));
    }
    let claimed = blake3::Hash::from_hex(text(headers, TOKEN_HEADER));
    // `blake3::Hash` compares in constant time.
    if claimed.is_ok_and(|hash| hash == proof(token, text(headers, CLUSTER_HEADER))) {
        Ok(())
    } else {
        Err(refuse(
            StatusCode::UNAUTHORIZED,
            format!(
                "member {name} refused this member's token: start every member with the same --cluster-token (or --cluster-token-file)"
            ),
        ))
    }
}

/// Middleware for every route of the peer port.
pub(super) async fn token(
    State(port): State<Arc<PeerPort>>,
    request: Request,
    next: Next,
) -> Response {
    match check(request.headers(), &port.config.token, &port.config.name) {
        Ok(()) => next.run(request).await,
        Err(response) => response,
    }
}

/// Middleware for routes that only members of the same cluster may use.
pub(super) async fn same_cluster(
    State(port): State<Arc<PeerPort>>,
    request: Request,
    next: Next,
) -> Response {
    let name = &port.config.name;
    match port.ledger.cluster_id() {
        Some(ours) if ours == text(request.headers(), CLUSTER_HEADER) => next.run(request).await,
        Some(_) => refuse(
            StatusCode::CONFLICT,
            format!("member {name} is part of another cluster than the caller"),
        ),
        None => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("member {name} is not part of a cluster yet"),
        ),
    }
}

/// The member id in a header.
pub(super) fn id(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_passes() {
        let good = headers("secret", "cluster", 1);
        assert!(check(&good, "secret", "c1").is_ok());
        assert_eq!(check(&good, "other", "c1").unwrap_err().status(), 401);
        assert_eq!(
            check(&HeaderMap::new(), "", "c1").unwrap_err().status(),
            401
        );
        let mut moved = good.clone();
        moved.insert(CLUSTER_HEADER, HeaderValue::from_static("elsewhere"));
        assert_eq!(check(&moved, "secret", "c1").unwrap_err().status(), 401);
        let mut newer = good;
        newer.insert(PROTOCOL_HEADER, HeaderValue::from_static("2"));
        assert_eq!(check(&newer, "secret", "c1").unwrap_err().status(), 409);
        // Lengths are part of what is hashed: moving a byte between parts changes the proof.
        assert_ne!(proof("b", "ca"), proof("ab", "c"));
    }
}
