//! When tags were last pulled. Who pulls begins with the tag's manifest, asked for by itself, or with its
//! OCI manifest: that is noticed, gathered for a moment, and committed, so that all members tell the same
//! time. Soft: a pull right before a crash of this member may go unnoticed.

use super::RegistryService;
use crate::stamp;
use mainstay_agent::transfer::Id;
use mainstay_model::{Command, TemplateId};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// Pulls are gathered for so long before they are committed.
const GATHER: Duration = Duration::from_secs(2);
/// A tag that was pulled a moment ago is not noted again: a thousand nodes pull at once.
const GRAIN_MS: u64 = 30_000;

/// A tag by template and number.
pub(super) type TagKey = (TemplateId, u32);

/// What was pulled from this member.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    /// Tags by their manifest, as replication knows them.
    tags: Mutex<HashMap<Id, TagKey>>,
    noted: Mutex<Noted>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Noted {
    /// When each was committed last, as far as this member did it.
    known: BTreeMap<TagKey, u64>,
    waiting: BTreeMap<TagKey, u64>,
}

impl Pulls {
    /// A tag is there. Of several with the same content, the last one.
    pub(super) fn know(&self, manifest: Id, template: TemplateId, number: u32) {
        self.tags.lock().insert(manifest, (template, number));
    }

    /// A tag is not there any more.
    pub(super) fn forget(&self, manifest: &Id, template: &TemplateId, number: u32) {
        let gone = (template.clone(), number);
        let mut tags = self.tags.lock();
        if tags.get(manifest) == Some(&gone) {
            tags.remove(manifest);
        }
        self.noted.lock().known.remove(&gone);
    }

    /// No tag is known any more.
    pub(super) fn forget_all(&self) {
        self.tags.lock().clear();
    }

    /// Someone asked for these chunks who is no member.
    pub(super) fn notice(&self, ids: &[Id]) {
        let &[manifest] = ids else {
            return;
        };
        let known = self.tags.lock().get(&manifest).cloned();
        if let Some(tag) = known {
            self.note(tag);
        }
    }

    /// This tag is pulled.
    pub(super) fn note(&self, tag: TagKey) {
        let now = stamp::now_ms();
        let mut noted = self.noted.lock();
        let known = noted.known.get(&tag).copied().unwrap_or(0);
        if now.saturating_sub(known) >= GRAIN_MS {
            noted.known.insert(tag.clone(), now);
            noted.waiting.insert(tag, now);
            self.more.notify_one();
        }
    }
}

/// Commit what was noticed. Runs until dropped.
pub(super) async fn run(service: Arc<RegistryService>) {
    loop {
        service.pulls.more.notified().await;
        tokio::time::sleep(GATHER).await;
        let waiting = std::mem::take(&mut service.pulls.noted.lock().waiting);
        let pulls = waiting
            .into_iter()
            .map(|((id, number), at)| (id, number, at))
            .collect();
        let command = Command::NotePulls { pulls };
        // Refused before every member knows the command; lost when there is no leader.
        if let Err(error) = service.catalog.submit(stamp::command_id(), command).await {
            tracing::debug!(%error, "pulls were not noted");
        }
    }
}
