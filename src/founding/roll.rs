//! The roll call: who answers at the addresses we know, as what, and what stands between us. Asks and
//! tells; decides nothing.

use super::Charter;
use crate::peer::client::ASK_TIMEOUT;
use crate::peer::wire::HelloReply;
use crate::peer::{PeerError, PeerPort};
use futures::future::join_all;
use mainstay_raft::Member;
use std::collections::BTreeMap;

/// Where another member may be, and who we expect there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Its name, if we know it: from the list or from the group.
    pub(super) name: Option<String>,
    /// `http://host:port` of its peer port.
    pub(super) url: String,
}

/// What one round of greetings found.
#[derive(Default)]
pub(super) struct RollCall {
    /// Addresses of peers that are part of our cluster and would have us.
    pub(super) ours: Vec<String>,
    /// How many peers are part of each other cluster.
    pub(super) foreign: BTreeMap<String, usize>,
    /// Places in the list of peers without a cluster that would have us.
    pub(super) fresh: Vec<usize>,
    /// Clusters that would have us, and the address that said so.
    pub(super) clusters: BTreeMap<String, String>,
    /// How ours was founded.
    pub(super) charter: Option<Charter>,
    /// A peer is part of a cluster that would not have us: founding another is out of the question.
    pub(super) refused_by_cluster: bool,
    /// Our own cluster says that this identity was taken out for good.
    pub(super) removed: Option<String>,
    /// How many answered at all.
    pub(super) answered: usize,
}

/// Every address at which another member may be: what the group knows, the list, and `--join`.
pub(super) fn targets(port: &PeerPort, members: &BTreeMap<u64, Member>) -> Vec<Target> {
    let own = port.ledger.member_id();
    let known = members.iter().filter(|(id, _)| **id != own);
    let known = known.map(|(_, member)| Target {
        name: Some(member.name.clone()),
        url: member.peer_url.clone(),
    });
    let listed = port.config.list.iter().map(|entry| Target {
        name: Some(entry.name.clone()),
        url: entry.url.clone(),
    });
    let sought = port.config.join.iter().map(|url| Target {
        name: None,
        url: url.clone(),
    });
    let mut all: Vec<Target> = Vec::new();
    for target in known.chain(listed).chain(sought) {
        let here =
            target.name.as_ref() == Some(&port.config.name) || target.url == port.config.own().url;
        if !here && !target.url.is_empty() && all.iter().all(|t| t.url != target.url) {
            all.push(target);
        }
    }
    all
}

/// Greet them all at once; what stands in the way becomes a notice.
pub(super) async fn roll_call(port: &PeerPort, members: &BTreeMap<u64, Member>) -> RollCall {
    let hello = port.hello();
    let hello = &hello;
    let calls = targets(port, members).into_iter().map(|target| async move {
        let asked = port
            .http
            .ask::<HelloReply>(&target.url, "/peer/v1/hello", hello, ASK_TIMEOUT)
            .await;
        (target, asked)
    });
    let mut seen = RollCall::default();
    for (target, asked) in join_all(calls).await {
        seen.answered += usize::from(!matches!(asked, Err(PeerError::Unreachable(_))));
        let subject = target.name.clone().unwrap_or_else(|| target.url.clone());
        let notice = match asked {
            Ok(reply) => seen.take(port, &target, reply, hello.cluster_id.as_deref()),
            Err(PeerError::Refused(sentence)) => Some(sentence),
            Err(PeerError::WrongPort(sentence)) => Some(right_port(port, &target, sentence).await),
            Err(PeerError::Unreachable(why)) => {
                tracing::debug!(peer = %subject, "{why}");
                None
            }
        };
        port.notices.set(&subject, notice);
    }
    seen
}

impl RollCall {
    /// Note an answer; the notice that comes of it.
    fn take(
        &mut self,
        port: &PeerPort,
        target: &Target,
        reply: HelloReply,
        ours: Option<&str>,
    ) -> Option<String> {
        if reply.refusal.is_some() {
            self.refused_by_cluster |= reply.cluster_id.is_some();
            if reply.removed && reply.cluster_id.as_deref() == ours {
                self.removed.clone_from(&reply.refusal);
            }
            if let Some(theirs) = reply.cluster_id
                && ours.is_some_and(|ours| ours != theirs)
            {
                *self.foreign.entry(theirs).or_default() += 1;
            }
            return reply.refusal;
        }
        if let Some(name) = target.name.as_ref().filter(|name| **name != reply.name) {
            return Some(format!(
                "{} answers as member {}, not {name}: correct --initial-cluster or its --name",
                target.url, reply.name
            ));
        }
        if reply.cluster_id.is_some() && reply.cluster_id.as_deref() == ours {
            port.book.note(reply.member_id, &target.url);
            self.ours.push(target.url.clone());
        }
        match (reply.cluster_id, reply.charter) {
            (_, Some(charter)) => {
                self.clusters
                    .insert(charter.cluster_id.clone(), target.url.clone());
                self.charter = Some(charter);
            }
            (Some(id), None) => {
                self.clusters.insert(id, target.url.clone());
            }
            // One that was started with --join founds nothing.
            (None, None) if reply.joining => {}
            (None, None) => {
                let at = port.config.list.iter().position(|e| e.url == target.url);
                self.fresh.extend(at);
            }
        }
        None
    }
}

/// Does an API answer there? Then its members' list says what was meant.
async fn right_port(port: &PeerPort, target: &Target, otherwise: String) -> String {
    let url = &target.url;
    match port.http.peers_by_api(url).await {
        Some(peers) if !peers.is_empty() => format!(
            "{url} is the address of a member's API: give --join the peer address, {}",
            peers.join(" or ")
        ),
        Some(_) => format!(
            "{url} is the address of a member's API: give --join its peer address (its --peer-listen, port {} unless it says otherwise)",
            crate::config::PEER_PORT
        ),
        None => otherwise,
    }
}
