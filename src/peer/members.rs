//! Requests to other members by id: addresses come from the membership, proofs from [`PeerClient`].

use super::PeerClient;
use mainstay_model::MemberId;
use mainstay_raft::Group;

/// [`crate::registry::PeerHttp`] over the peer ports of this cluster.
#[derive(Clone)]
pub struct MemberHttp {
    client: PeerClient,
    group: Group,
}

impl MemberHttp {
    /// `client` must speak as a member of the group's cluster.
    pub fn new(client: PeerClient, group: Group) -> Self {
        Self { client, group }
    }
}

impl MemberHttp {
    /// A request to a member of the group; `None`: there is no such member.
    pub fn request(
        &self,
        method: reqwest::Method,
        member: MemberId,
        path: &str,
    ) -> Option<reqwest::RequestBuilder> {
        let status = self.group.status();
        let base = &status.members.get(&member.0)?.member.peer_url;
        Some(self.client.request(method, &format!("{base}{path}")))
    }
}

impl crate::registry::PeerHttp for MemberHttp {
    fn request(
        &self,
        method: reqwest::Method,
        member: MemberId,
        path: &str,
    ) -> Option<reqwest::RequestBuilder> {
        self.request(method, member, path)
    }
}
