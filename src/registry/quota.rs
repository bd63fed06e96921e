//! How much may be stored, by what it weighs: of everything, or of one template or repository. Looked at
//! before bytes are sent, and once more when the name is committed: then under the condition that nothing
//! came since it was weighed, so that pushes through any members at once do not exceed a quota together.
//!
//! ```text
//! weigh what the state names, with what is new -> AddWithin(as of then) -> refused as stale? weigh again
//! ```

use super::RegistryService;
use super::answer::Refused;
use super::usage::{Named, named, own};
use crate::app::{AppError, Consistency};
use mainstay_agent::transfer::Id;
use mainstay_model::command::Addition;
use mainstay_model::feature::ADD_WITHIN;
use mainstay_model::{self as model, Command, CommandId, Outcome, Refusal};
use std::time::Duration;
use tokio::time::Instant;

/// What the quota without a name is of.
const ALL: &str = "all templates and repositories";
/// Others may come in between so often; then the client tries again.
const ATTEMPTS: u128 = 20;
/// A member weighs only what it has: for so long it waits for copies of what others took.
const WHOLE_MAX: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 20 });
const WHOLE_STEP: Duration = Duration::from_millis(250);
/// What did not come then may be lost: for so long nobody waits for it again.
const IN_VAIN: Duration = Duration::from_secs(300);

/// One addition is weighed at a time.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Since when it is known that waiting for copies does not help.
    in_vain: Option<Instant>,
}

/// Why nothing was added.
pub(super) enum NotAdded {
    /// It is over a quota: which, and what to do.
    Over(String),
    /// It could not be weighed.
    Unweighed(Refused),
    /// The group said so, or could not.
    App(AppError),
}

impl From<AppError> for NotAdded {
    fn from(error: AppError) -> Self {
        Self::App(error)
    }
}

/// A moment of the state.
struct Moment {
    /// [`model::State::named`]; `None`: not every member knows what that is for.
    at: Option<u64>,
    named: Named,
}

impl RegistryService {
    /// Why what is called `name` may not get so many bytes more, if a quota says so.
    pub(super) async fn over_quota(
        &self,
        name: &str,
        more: u64,
    ) -> Result<Option<String>, Refused> {
        if !self.has_quota(name).await? {
            return Ok(None);
        }
        let usage = self.usage().await?;
        let own = own(&usage, name);
        let quota = usage.quotas.get(name).copied();
        Ok(
            exceeds(name, quota, own, own.saturating_add(more)).or_else(|| {
                let stored = usage.stored_bytes;
                exceeds(ALL, usage.quota, stored, stored.saturating_add(more))
            }),
        )
    }

    /// Commit a tag or an artifact whose manifest or bundle, with all it reaches, is here; unless that
    /// would be over a quota. `id` and those behind it are of this request.
    pub(super) async fn add(
        &self,
        id: CommandId,
        (name, manifest): (&str, Id),
        what: Addition,
    ) -> Result<Outcome, NotAdded> {
        let weighed = self.has_quota(name).await?;
        // Through this member one after the other: they would only be stale.
        let mut turn = match weighed {
            true => Some(self.adding.lock().await),
            false => None,
        };
        for attempt in 0..ATTEMPTS {
            let command = match &mut turn {
                Some(turn) => {
                    let weighed = self.weighed(turn, (name, manifest), what.clone());
                    weighed.await?
                }
                None => what.clone().unconditional(),
            };
            let id = CommandId(id.0.wrapping_add(attempt));
            match self.catalog.submit(id, command).await {
                Err(AppError::Refused(Refusal::Stale)) => {}
                other => return Ok(other?),
            }
        }
        Err(AppError::Refused(Refusal::Stale).into())
    }

    /// The command that adds it, if no quota says no.
    async fn weighed(
        &self,
        turn: &mut Turn,
        (name, manifest): (&str, Id),
        what: Addition,
    ) -> Result<Command, NotAdded> {
        let moment = self
            .catalog
            .take(Consistency::Linearizable, |state| moment(state, name))
            .await?;
        let over = self.manifest_over_quota(turn, &moment.named, name, manifest);
        if let Some(why) = over.await.map_err(NotAdded::Unweighed)? {
            return Err(NotAdded::Over(why));
        }
        Ok(match moment.at {
            Some(named) => Command::AddWithin { named, what },
            None => what.unconditional(),
        })
    }

    async fn manifest_over_quota(
        &self,
        turn: &mut Turn,
        before: &Named,
        name: &str,
        manifest: Id,
    ) -> Result<Option<String>, Refused> {
        let mut with = before.clone();
        with.add(name, manifest);
        let begun = Instant::now();
        let until = match turn.in_vain {
            Some(since) if since + IN_VAIN > begun => begun,
            _ => begun + WHOLE_MAX,
        };
        let (before, after) = loop {
            let weighed = self.usage_of(before).await?;
            if !weighed.whole && Instant::now() >= until && until > begun {
                turn.in_vain = Some(begun);
            }
            if weighed.whole || Instant::now() >= until {
                break (weighed, self.weigh(with).await?);
            }
            // What another member took is on its way here.
            tokio::time::sleep(WHOLE_STEP).await;
        };
        let quota = after.quotas.get(name).copied();
        let why = exceeds(name, quota, own(&before, name), own(&after, name));
        Ok(why.or_else(|| {
            let (was, now) = (before.stored_bytes, after.stored_bytes);
            exceeds(ALL, after.quota, was, now)
        }))
    }

    async fn has_quota(&self, name: &str) -> Result<bool, AppError> {
        let any =
            |state: &model::State| state.quotas.contains_key("") || state.quotas.contains_key(name);
        self.catalog.take(Consistency::Linearizable, any).await
    }
}

fn moment(state: &model::State, name: &str) -> Moment {
    Moment {
        at: (state.features >= ADD_WITHIN).then(|| state.named(name)),
        named: named(state),
    }
}

/// What adds nothing is never refused, however small the quota has become.
fn exceeds(of: &str, quota: Option<u64>, before: u64, after: u64) -> Option<String> {
    let quota = quota.filter(|quota| after > *quota && after > before)?;
    Some(format!(
        "the quota of {of} is {quota} bytes, {before} are stored and this adds up to {}: delete tags, or raise it with `mainstay registry quota`",
        after - before
    ))
}

#[cfg(test)]
mod tests {
    use super::exceeds;

    #[test]
    fn a_quota_refuses_growth_only() {
        assert_eq!(exceeds("t", None, 0, u64::MAX), None);
        assert_eq!(exceeds("t", Some(10), 5, 10), None);
        assert!(exceeds("t", Some(10), 5, 11).is_some_and(|why| why.contains("adds up to 6")));
        assert_eq!(exceeds("t", Some(1), 5, 5), None, "nothing new");
    }
}
