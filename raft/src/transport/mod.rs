//! How members reach each other: a byte stream per peer, framed and multiplexed inside this crate.

mod frame;
pub(crate) mod link;
pub mod memory;
pub(crate) mod network;
mod pipeline;
pub(crate) mod server;
pub(crate) mod snapshot;
pub(crate) mod wire;
pub(crate) mod witness;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

/// Where a member is. Carried in the replicated membership.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Name in the member list.
    pub name: String,
    /// Members talk here: `http://host:port`.
    pub peer_url: String,
    /// Clients talk here.
    pub api_url: String,
    /// Registry clients talk here.
    pub registry_url: String,
}

/// A connected byte stream.
pub trait PeerStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> PeerStream for T {}

/// Opens a stream to a member; authentication and addressing are the implementor's business.
#[async_trait]
pub trait Dialer: Send + Sync + 'static {
    /// Connect to `member`, which must be the one with this id.
    async fn dial(&self, id: u64, member: &Member) -> std::io::Result<Box<dyn PeerStream>>;

    /// Has the process of `member` ended, by what its machine says: nobody listens where it did.
    /// `false` when it answers, and when nobody can tell.
    async fn gone(&self, id: u64, member: &Member) -> bool {
        let _ = (id, member);
        false
    }
}
