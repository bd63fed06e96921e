//! Has a member's disk been put back to an older state? A member that runs on a restored backup has
//! forgotten what it acknowledged and how it voted, and nothing on its own disk can tell it so. The others
//! can: they have seen how far it was. Knows positions, no entries.
//!
//! ```text
//!   every second, and before anything else is said on a new connection, both ways:
//!
//!     X ── "I have entry 120, term 7; for good: entry 110, term 7" ──► B      B keeps the second, if higher
//!     X ◄─ the same of B; and, if that is less than B knows of X, what B knows ──
//! ```
//!
//! * *For good* is what can never be less again on this disk: the entry that the last durable checkpoint
//!   was made at (it is committed, and the log under it was durable first) and the term of the durable vote.
//! * A leader knows more: what a member acknowledged to it. In the leader's own term that is never taken
//!   back; a later leader may have it replaced, and then the member's vote is of a later term.
//! * Who is behind what another knows of it stops, with the sentence that says what to do; who knows more
//!   of it says nothing else to it, so that it neither votes for nor acknowledges anything there. Whoever is
//!   accused looks at its own disk once more: a claim that was overtaken on its way harms nobody.
//!
//! What it cannot see, because it is remembered in memory only: a disk that was put back while every other
//! member that had heard of it was restarted as well; and what was acknowledged in the last second, if the
//! leader that it was acknowledged to is gone too.

use super::wire::{Claim, Known, Position, Verdict};
use crate::store::checkpoint::Checkpointer;
use crate::store::fault::FaultCell;
use crate::store::log::LogStore;
use mainstay_storage::error::data_dir;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Most members that are remembered: as many as anybody has.
const REMEMBERED_MAX: usize = 64;

/// What a leader knows of a member: its own term, and what was acknowledged to it.
type Led = Box<dyn Fn(u64) -> Option<Position> + Send + Sync>;

#[derive(Clone, Copy, Default)]
struct Seen {
    kept: Position,
    /// Claims in a row that were behind it.
    behind: u32,
}

/// See the module.
pub(crate) struct Witness {
    id: u64,
    log: LogStore,
    checkpointer: Arc<Checkpointer>,
    fault: FaultCell,
    data_dir: PathBuf,
    seen: Mutex<BTreeMap<u64, Seen>>,
    led: OnceLock<Led>,
}

impl Witness {
    /// `part`: a part of the data directory.
    pub(crate) fn new(
        id: u64,
        log: LogStore,
        checkpointer: Arc<Checkpointer>,
        fault: FaultCell,
        part: &Path,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            log,
            checkpointer,
            fault,
            data_dir: data_dir(part).to_path_buf(),
            seen: Mutex::default(),
            led: OnceLock::new(),
        })
    }

    /// How far this member is.
    pub(crate) fn claim(&self) -> Claim {
        let term = self.log.vote().map_or(0, |vote| vote.leader_id.term);
        let index = self.checkpointer.durable();
        Claim {
            from: self.id,
            // A snapshot that was just installed is ahead of the log.
            has: Position {
                term,
                index: self.log.end().unwrap_or(0).max(index),
            },
            kept: Position { term, index },
        }
    }

    /// Believe a claim, or say what is known that contradicts it.
    pub(crate) fn judge(&self, claim: &Claim) -> Option<Known> {
        #[cfg(feature = "seeded-bugs")]
        if crate::seeded::bug("lost-write") {
            return None;
        }
        let mut seen = self.seen.lock();
        if seen.len() >= REMEMBERED_MAX && !seen.contains_key(&claim.from) {
            return None;
        }
        let one = seen.entry(claim.from).or_default();
        let led = self.led.get().and_then(|led| led(claim.from));
        let known = [Some(Known::Kept(one.kept)), led.map(Known::Acknowledged)];
        let against = known
            .into_iter()
            .flatten()
            .find(|k| k.contradicts(claim.has));
        if let Some(known) = against {
            one.behind += 1;
            // Once may be a claim that was overtaken.
            if one.behind == 2 {
                tracing::warn!(
                    peer = claim.from, has = ?claim.has, ?known,
                    "this member's disk was put back to an older state: it is not listened to"
                );
            }
            return Some(known);
        }
        one.behind = 0;
        one.kept.term = one.kept.term.max(claim.kept.term);
        one.kept.index = one.kept.index.max(claim.kept.index);
        None
    }

    /// Another member's answer to our claim. An error: nothing else is to be said to it now.
    pub(crate) fn heard(&self, verdict: &Verdict) -> Result<(), String> {
        let by = verdict.claim.from;
        if let Some(known) = verdict.against {
            let has = self.claim().has;
            if known.contradicts(has) {
                self.fault.raise(self.sentence(by, has, known.position()));
            }
            return Err(format!("member {by:016x} knows more of this member's disk"));
        }
        match self.judge(&verdict.claim) {
            None => Ok(()),
            Some(known) => Err(format!(
                "its disk was put back to an older state: it has {:?}, and had {known:?}",
                verdict.claim.has
            )),
        }
    }

    fn sentence(&self, by: u64, has: Position, had: Position) -> String {
        format!(
            "this member's disk was put back to an older state: its log ends at entry {} (term {}), and member {by:016x} \
             has seen it at entry {} (term {}). It must not vote or acknowledge, for it has forgotten what it did. \
             Give it a new identity with `mainstay member repair --force --data-dir {}` (the images are kept), or empty \
             the directory and run `mainstay member replace` with its name; then start it again",
            has.index,
            has.term,
            had.index,
            had.term,
            self.data_dir.display()
        )
    }

    /// The entry that this member's disk is known to hold for good.
    pub(crate) fn kept(&self, id: u64) -> Option<u64> {
        self.seen.lock().get(&id).map(|seen| seen.kept.index)
    }

    /// As far as this member leads: what was acknowledged to it. Once, when there is a core to ask.
    pub(crate) fn lead_by(&self, led: impl Fn(u64) -> Option<Position> + Send + Sync + 'static) {
        // A second one would say the same.
        self.led.set(Box::new(led)).ok();
    }

    /// Forget who is no member any more.
    pub(crate) fn retain(&self, members: impl Fn(u64) -> bool) {
        self.seen.lock().retain(|id, _| members(*id));
    }
}
