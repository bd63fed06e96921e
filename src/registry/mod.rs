//! The template registry: push, replication, pull, and the registry's own REST dialect.
//! Refuses to know how members are authenticated: requests to peers come ready made.

use mainstay_model::MemberId;

/// Requests to other members' peer ports, with whatever proves who we are.
pub trait PeerHttp: Send + Sync + 'static {
    /// A request to `path` (with a leading slash, query included) at a member's peer address;
    /// `None` if no such member is known.
    fn request(
        &self,
        method: reqwest::Method,
        member: MemberId,
        path: &str,
    ) -> Option<reqwest::RequestBuilder>;
}
