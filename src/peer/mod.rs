//! The peer port: what members say to each other. Authentication first, then founding and joining
//! (JSON), the Raft stream (an HTTP upgrade) and, mounted by the composition, nodes' heartbeats and
//! chunk transfer.
//!
//! ```text
//! POST /peer/v1/hello      Hello -> HelloReply            token
//! POST /peer/v1/founding   FoundingCall -> FoundingReply  token
//! POST /peer/v1/join       Hello -> JoinReply             token, same cluster
//! GET  /peer/v1/release    -> Release                     token, same cluster
//! POST /peer/v1/look       (look at the membership now)   token, same cluster
//! GET  /peer/v1/raft       Upgrade: mainstay-raft         token, same cluster
//! POST /peer/v1/nodes      (agents::exchange)             token, same cluster
//! GET  /peer/v1/tunnel     Upgrade: (agents::tunnels)     token, same cluster
//! POST /peer/v1/tunnel/where   (agents::tunnels)          token, same cluster
//! *    (transfer routes)                                  token, same cluster
//! ```

pub mod admission;
pub mod auth;
pub mod client;
pub mod dial;
pub mod members;
pub mod release;
mod routes;
pub mod wire;

pub use client::{PeerClient, PeerError};
pub use dial::{AddressBook, PeerDialer};
pub use members::MemberHttp;
pub use routes::router;

use crate::app::App;
use crate::config::Config;
use crate::founding::{Founder, Ledger};
use mainstay_model::MemberId;
use mainstay_raft::{Group, Member};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use tokio::sync::{Notify, watch};
use wire::Hello;

/// What the peer port and the founding share.
pub struct PeerPort {
    /// This member's configuration.
    pub config: Config,
    /// What others are told of it.
    pub member: Member,
    /// Its durable identity.
    pub ledger: Arc<Ledger>,
    /// Where others have been seen.
    pub book: Arc<AddressBook>,
    /// Calls to others while founding.
    pub http: PeerClient,
    /// This member's part in the group, once it has one.
    pub group: OnceLock<Group>,
    /// Woken when something was learnt from a peer's call.
    pub learnt: Notify,
    /// The replicated state, once this member has one.
    pub app: OnceLock<App>,
    /// Woken when the membership should be looked at.
    pub look: Notify,
    /// Whether clients may be served. `None` until the others were asked once.
    pub standing: watch::Sender<Option<Standing>>,
    /// What stands in this member's way, for its operator.
    pub notices: Notices,
}

/// How a member stands to its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is in, and serves.
    Member,
    /// It is not let in yet: there is nothing to serve.
    Waiting,
    /// More members around it are part of another cluster than of its own: it must not serve.
    Outnumbered,
}

impl PeerPort {
    /// Was this identity taken out of the cluster, as far as this member has applied?
    pub fn retired(&self, id: u64) -> bool {
        let app = self.app.get();
        app.is_some_and(|app| app.retired().contains(&MemberId(id)))
    }

    /// This member as a founder.
    pub fn founder(&self) -> Founder {
        Founder {
            id: self.ledger.member_id(),
            member: self.member.clone(),
        }
    }

    /// Was it started to join a cluster that runs?
    pub fn joins(&self) -> bool {
        !self.config.join.is_empty()
    }

    /// This member's greeting.
    pub fn hello(&self) -> Hello {
        Hello {
            member_id: self.ledger.member_id(),
            member: self.member.clone(),
            cluster_id: self.ledger.cluster_id(),
            joined: self.ledger.joined(),
            list: self.config.list.clone(),
            joining: self.joins(),
            learner: self.config.learner,
        }
    }
}

/// Sentences for the operator, one per subject: logged when they change, shown on `/readyz`.
#[derive(Debug, Default)]
pub struct Notices(Mutex<BTreeMap<String, String>>);

impl Notices {
    /// Say this about `subject` (once), or that there is nothing left to say.
    pub fn set(&self, subject: &str, sentence: Option<String>) {
        let mut all = self.0.lock();
        match sentence {
            None => {
                all.remove(subject);
            }
            Some(text) if all.get(subject) == Some(&text) => {}
            Some(text) => {
                tracing::warn!(%subject, "{text}");
                all.insert(subject.to_owned(), text);
            }
        }
    }

    /// Everything that is said at the moment.
    pub fn all(&self) -> Vec<String> {
        let mut all: Vec<_> = self.0.lock().values().cloned().collect();
        all.sort();
        all.dedup();
        all
    }
}
