//! A member's durable part in founding: its identity and its Paxos memory, saved before anything is
//! answered. Knows the data directory, not the network.

use super::paxos::{Acceptor, Ballot, Charter, Reply, Request};
use mainstay_raft::Member;
use mainstay_storage::StorageError;
use mainstay_storage::datadir::{DataDir, Identity};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What `Identity::founding` holds, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    version: u32,
    acceptor: Acceptor,
    /// This member has been a voter of its cluster. From then on it never asks to join by itself:
    /// an operator may have removed it.
    joined: bool,
    /// The addresses under which it was last known to the group by its own word. When the group says
    /// otherwise while these are still what the flags say, an operator changed them there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    announced: Option<Member>,
    /// The sentence with which its cluster told it that it was removed. Final: it takes part in
    /// nothing any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    removed: Option<String>,
}

/// Version of [`Memory`].
const VERSION: u32 = 1;

impl Default for Memory {
    fn default() -> Self {
        Self {
            version: VERSION,
            acceptor: Acceptor::default(),
            joined: false,
            announced: None,
            removed: None,
        }
    }
}

/// Why the ledger could not.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The disk failed; nothing was answered.
    #[error("cannot save this member's identity: {0}")]
    Storage(#[from] StorageError),
    /// The stored founding state is of another release.
    #[error(
        "the data directory holds a founding state this release cannot read ({0}); start it with the release that wrote it"
    )]
    Unreadable(String),
}

/// The ledger. Calls block on the disk: use [`tokio::task::spawn_blocking`] from async code.
pub struct Ledger {
    dir: Arc<DataDir>,
    inner: Mutex<(Identity, Memory)>,
}

impl Ledger {
    /// Over an open data directory.
    pub fn new(dir: Arc<DataDir>, identity: Identity) -> Result<Self, LedgerError> {
        let memory = match &identity.founding {
            None => Memory::default(),
            Some(bytes) => serde_json::from_slice::<Memory>(bytes)
                .map_err(|e| LedgerError::Unreadable(e.to_string()))?,
        };
        if memory.version != VERSION {
            return Err(LedgerError::Unreadable(format!(
                "version {}",
                memory.version
            )));
        }
        Ok(Self {
            dir,
            inner: Mutex::new((identity, memory)),
        })
    }

    /// What `Identity::founding` holds for a member that alone makes up the cluster of `charter`, and has
    /// been its voter from the beginning. Whoever asks it about founding is told of that cluster.
    pub fn sole(charter: Charter) -> Result<Vec<u8>, LedgerError> {
        let memory = Memory {
            acceptor: Acceptor {
                decided: Some(charter),
                ..Acceptor::default()
            },
            joined: true,
            ..Memory::default()
        };
        serde_json::to_vec(&memory).map_err(|e| LedgerError::Unreadable(e.to_string()))
    }

    /// This member's id.
    pub fn member_id(&self) -> u64 {
        self.inner.lock().0.member_id
    }

    /// The cluster it is part of.
    pub fn cluster_id(&self) -> Option<String> {
        self.inner.lock().0.cluster_id.clone()
    }

    /// The charter, if this member took part in founding and knows the outcome.
    pub fn charter(&self) -> Option<Charter> {
        self.inner.lock().1.acceptor.decided.clone()
    }

    /// Has it ever been a voter of its cluster?
    pub fn joined(&self) -> bool {
        self.inner.lock().1.joined
    }

    /// The addresses that it last announced itself.
    pub fn announced(&self) -> Option<Member> {
        self.inner.lock().1.announced.clone()
    }

    /// What it was told when it was removed from its cluster.
    pub fn removed(&self) -> Option<String> {
        self.inner.lock().1.removed.clone()
    }

    /// The highest ballot it promised.
    pub fn promised(&self) -> Ballot {
        self.inner.lock().1.acceptor.promised
    }

    /// Handle a founding request: durable before it answers. A decision that names this member makes
    /// it part of that cluster.
    pub fn handle(&self, request: Request) -> Result<Reply, LedgerError> {
        self.change(|identity, memory| {
            let reply = memory.acceptor.handle(request);
            if let Some(charter) = &memory.acceptor.decided
                && charter.names(identity.member_id)
                && identity.cluster_id.is_none()
            {
                identity.cluster_id = Some(charter.cluster_id.clone());
            }
            reply
        })
    }

    /// This member is part of that cluster (it joins an existing one). The first word counts.
    pub fn join(&self, cluster_id: &str) -> Result<(), LedgerError> {
        self.change(|identity, _| {
            identity
                .cluster_id
                .get_or_insert_with(|| cluster_id.to_owned());
        })
    }

    /// This member is a voter now.
    pub fn set_joined(&self) -> Result<(), LedgerError> {
        self.change(|_, memory| memory.joined = true)
    }

    /// The group knows this member under the addresses that its flags say.
    pub fn set_announced(&self, member: &Member) -> Result<(), LedgerError> {
        self.change(|_, memory| memory.announced = Some(member.clone()))
    }

    /// This identity was removed from its cluster: durable, so that no restart forgets it.
    pub fn set_removed(&self, sentence: &str) -> Result<(), LedgerError> {
        self.change(|_, memory| memory.removed = Some(sentence.to_owned()))
    }

    fn change<T>(
        &self,
        act: impl FnOnce(&mut Identity, &mut Memory) -> T,
    ) -> Result<T, LedgerError> {
        let mut inner = self.inner.lock();
        let (mut identity, mut memory) = inner.clone();
        let answer = act(&mut identity, &mut memory);
        if identity != inner.0 || memory != inner.1 {
            let bytes =
                serde_json::to_vec(&memory).map_err(|e| LedgerError::Unreadable(e.to_string()))?;
            identity.founding = Some(bytes);
            self.dir.save(&identity)?;
            *inner = (identity, memory);
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::founding::paxos::Founder;

    fn open(root: &std::path::Path) -> Ledger {
        let fresh = || Identity {
            member_id: 7,
            name: "c1".to_owned(),
            cluster_id: None,
            created_by: "test".to_owned(),
            founding: None,
        };
        let (dir, identity) = DataDir::open(root, fresh).unwrap();
        Ledger::new(Arc::new(dir), identity).unwrap()
    }

    fn charter(id: u64) -> Charter {
        let member = Member {
            name: "c1".to_owned(),
            ..Member::default()
        };
        Charter {
            cluster_id: "x".to_owned(),
            founders: vec![Founder { id, member }],
        }
    }

    #[test]
    fn what_was_answered_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("d");
        let ballot = Ballot {
            round: 3,
            proposer: 9,
        };
        assert!(matches!(
            open(&root)
                .handle(Request::Accept {
                    ballot,
                    charter: charter(7)
                })
                .unwrap(),
            Reply::Accepted { .. }
        ));
        let low = Ballot {
            round: 2,
            proposer: 9,
        };
        let reply = open(&root)
            .handle(Request::Prepare { ballot: low })
            .unwrap();
        assert_eq!(reply, Reply::Outbid { promised: ballot });
        open(&root)
            .handle(Request::Decide {
                charter: charter(7),
            })
            .unwrap();
        let ledger = open(&root);
        assert_eq!(ledger.cluster_id().as_deref(), Some("x"));
        assert!(!ledger.joined());
        ledger.set_joined().unwrap();
        drop(ledger);
        assert!(open(&root).joined());
        assert_eq!(open(&root).removed(), None);
        assert_eq!(open(&root).announced(), None);
        let member = charter(7).founders.remove(0).member;
        open(&root).set_announced(&member).unwrap();
        open(&root).set_removed("go").unwrap();
        let ledger = open(&root);
        assert_eq!(ledger.removed().as_deref(), Some("go"));
        assert_eq!(ledger.announced(), Some(member));
    }

    #[test]
    fn a_decision_without_us_makes_us_no_member() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = open(&dir.path().join("d"));
        ledger
            .handle(Request::Decide {
                charter: charter(8),
            })
            .unwrap();
        assert_eq!(ledger.cluster_id(), None);
        ledger.join("x").unwrap();
        ledger.join("y").unwrap();
        assert_eq!(ledger.cluster_id().as_deref(), Some("x"));
    }

    /// The bytes on disk of this release: a later one must still read them.
    #[test]
    fn golden_memory() {
        let memory = Memory {
            joined: true,
            ..Memory::default()
        };
        let text = r#"{"version":1,"acceptor":{"promised":{"round":0,"proposer":0},"accepted":null,"decided":null},"joined":true}"#;
        assert_eq!(serde_json::to_string(&memory).unwrap(), text);
        assert_eq!(serde_json::from_str::<Memory>(text).unwrap(), memory);
    }
}
