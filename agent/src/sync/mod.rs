//! The connection to the controllers: one of them is home, for registration, the stream of desired
//! sets and reports; when it dies, falls silent or says that it cannot, the next one is. Refuses to
//! know what a set means: it hands sets over and carries observations back.
//!
//! * `homes`: whose turn it is, and how long to wait; `session`: life with one home; `lines`: the
//!   framing of the stream.

mod homes;
mod lines;
mod session;

use crate::agent::Identity;
use crate::cache::Sources;
use crate::converge::executor::Executor;
use crate::share::Key;
use crate::tunnel::Tunnels;
use crate::wire::{NodeStats, RegisterRequest};
use homes::Homes;
use parking_lot::Mutex;
pub(crate) use session::chain;
use session::{End, Session};
use std::sync::Arc;
use std::time::Duration;

/// Times of the connection.
#[derive(Clone, Copy, Debug)]
pub struct SyncConfig {
    /// For a call to be answered.
    pub answer: Duration,
    /// Changes within this time travel in one report.
    pub coalesce: Duration,
    /// First and longest pause after all controllers were tried in vain.
    pub backoff: (Duration, Duration),
}

impl Default for SyncConfig {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(10),
            coalesce: Duration::from_millis(20),
            backoff: (Duration::from_millis(200), Duration::from_secs(5)),
        }
    }
}

/// Everything that the connection needs of the agent.
pub struct Sync {
    /// For all calls.
    pub client: reqwest::Client,
    /// Who we are.
    pub identity: Arc<Mutex<Identity>>,
    /// How we introduce ourselves.
    pub introduction: RegisterRequest,
    /// Whose sets are handed over and observations carried.
    pub executor: Executor,
    /// Told when the registries' list changes.
    pub sources: Sources,
    /// Told what nodes show each other.
    pub key: Key,
    /// Told when a member wants a tunnel; those that are open outlive a change of the home.
    pub tunnels: Tunnels,
    /// Soft figures for reports.
    pub stats: Arc<dyn Fn() -> NodeStats + Send + std::marker::Sync>,
    /// Times.
    pub config: SyncConfig,
}

impl std::fmt::Debug for Sync {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sync").finish_non_exhaustive()
    }
}

impl Sync {
    /// Stay connected for ever. Ends only if a controller of another cluster answers first: then
    /// serving on would be wrong.
    pub async fn run(self, controllers: &[String]) -> anyhow::Error {
        let known = self.identity.lock().controllers().to_vec();
        let seed = self.introduction.node_id.clone();
        let mut homes = Homes::new(controllers, &known, &seed, self.config.backoff);
        loop {
            let Some(url) = homes.next().await else {
                return anyhow::anyhow!("no controller is known");
            };
            let session = Session::new(&self, &url);
            match session.run(&mut homes).await {
                End::Moved(why) => {
                    tracing::warn!(controller = %url, why, "moving on to the next controller");
                }
                End::Stranger(error) => {
                    tracing::error!(controller = %url, %error, "not our cluster");
                    if homes.strangers_only(&url) {
                        return error;
                    }
                }
            }
        }
    }
}
