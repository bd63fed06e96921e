//! What the registry needs of the replicated state. The controller's `App` is one; tests have
//! another without consensus.

use crate::app::{App, AppError, Consistency};
use async_trait::async_trait;
use mainstay_model::{Command, CommandId, MemberId, Outcome, State};
use mainstay_raft::{Role, Status};
use std::collections::BTreeSet;
use tokio::sync::watch;

/// The replicated state, as far as the registry goes.
#[async_trait]
pub trait Catalog: Send + Sync + 'static {
    /// Let `look` see the state. It runs under a lock: take what is needed and leave.
    async fn look(
        &self,
        consistency: Consistency,
        look: &mut (dyn for<'a> FnMut(&'a State) + Send),
    ) -> Result<(), AppError>;
    /// Commit a command; a refusal is an error.
    async fn submit(&self, id: CommandId, command: Command) -> Result<Outcome, AppError>;
    /// The group as of everything acknowledged before the call, not as this member last heard.
    async fn members(&self) -> Result<Status, AppError>;
    /// The group, and every change of it (applied index included).
    fn watch(&self) -> watch::Receiver<Status>;
}

#[async_trait]
impl Catalog for App {
    async fn look(
        &self,
        consistency: Consistency,
        look: &mut (dyn for<'a> FnMut(&'a State) + Send),
    ) -> Result<(), AppError> {
        if consistency == Consistency::Linearizable {
            // The barrier first: the guard below must not live across an await.
            drop(self.read(consistency).await?);
        }
        let guard = self.read(Consistency::Stale).await?;
        look(&guard);
        Ok(())
    }

    async fn submit(&self, id: CommandId, command: Command) -> Result<Outcome, AppError> {
        self.submit_as(id, command).await
    }

    async fn members(&self) -> Result<Status, AppError> {
        drop(self.read(Consistency::Linearizable).await?);
        Ok(self.group().status())
    }

    fn watch(&self) -> watch::Receiver<Status> {
        self.group().watch()
    }
}

/// The members whose copies count.
pub(super) fn voters(group: &Status) -> BTreeSet<MemberId> {
    let members = group.members.iter();
    let voters = members.filter(|(_, m)| m.role == Role::Voter);
    voters.map(|(&id, _)| MemberId(id)).collect()
}

impl dyn Catalog {
    /// Take something out of the state.
    pub(super) async fn take<T: Send>(
        &self,
        consistency: Consistency,
        take: impl Fn(&State) -> T + Send + Sync,
    ) -> Result<T, AppError> {
        let mut taken = None;
        self.look(consistency, &mut |state| taken = Some(take(state)))
            .await?;
        taken.ok_or_else(|| {
            mainstay_raft::GroupError::Stopped("the state was not shown".to_owned()).into()
        })
    }
}
