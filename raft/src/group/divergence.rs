//! Do all members hold the same state? Each member asks the others for their digests, compares where
//! both know one, and judges itself. Knows no state, only its digests.
//!
//! | what is seen | this member |
//! | --- | --- |
//! | all that can be compared agree | goes on |
//! | a majority of the members agree with it, another does not | goes on, and names the other one |
//! | a majority of the members agree with each other, but not with it | is *diverged*: answers no reads and does not lead |
//! | some differ, and there is no majority either way | goes on, and names them: nobody can say who is right |
//!
//! Outcomes and reads come from the state: a member that is known to hold another one must not
//! answer. What it has voted for and logged is not in doubt, so it goes on doing both.

use super::rounds::repeat;
use super::{Inner, Unfit};
use crate::codec;
use crate::store::digest::At;
use crate::transport::wire::{Lane, kind};
use bytes::Bytes;
use futures::FutureExt;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// Members are compared this often.
const COMPARE_EVERY: Duration = Duration::from_secs(1);
/// For one member's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// What a member makes of the digests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// The highest index at which this member was compared with another and agreed.
    pub agreed: Option<u64>,
    /// Members that hold another state at an equal applied index, and that index.
    pub differing: BTreeMap<u64, u64>,
    /// A majority holds another state than this member: it is the one that is wrong.
    pub diverged: bool,
}

/// See the module. `members`: how many there are, this one included.
fn judge(own: &[At], others: &BTreeMap<u64, Vec<At>>, members: usize) -> Agreement {
    let mut seen = Agreement::default();
    for (id, theirs) in others {
        match compare(own, theirs) {
            Some((at, true)) => seen.agreed = seen.agreed.max(Some(at)),
            Some((at, false)) => {
                seen.differing.insert(*id, at);
            }
            None => {}
        }
    }
    // Members that differ from this one, and how many of those agree with each of them.
    let among = |one: &u64| {
        let agree = |other: &&u64| compare(&others[one], &others[*other]).is_some_and(|c| c.1);
        seen.differing.keys().filter(agree).count()
    };
    seen.diverged = seen.differing.keys().any(|one| among(one) > members / 2);
    seen
}

/// The highest index known to both, and whether the digests there are equal.
fn compare(one: &[At], other: &[At]) -> Option<(u64, bool)> {
    let other: HashMap<u64, u64> = other.iter().copied().collect();
    let shared = one.iter().filter_map(|(at, digest)| {
        let equal = other.get(at)? == digest;
        Some((*at, equal))
    });
    shared.max_by_key(|(at, _)| *at)
}

/// Compare until the member ends.
pub(super) fn spawn(inner: &Arc<Inner>) {
    repeat(inner, |inner| {
        async move {
            tokio::time::sleep(COMPARE_EVERY).await;
            inner.compare().await;
        }
        .boxed()
    });
}

impl Inner {
    async fn compare(&self) {
        let members = self.members();
        let asked = members.iter().filter(|(id, _)| *id != self.config.id);
        let asked = asked.map(|(id, member)| async move {
            let link = self.peers.link(*id, member, Lane::Control);
            let answer = link.call(kind::DIGESTS, Bytes::new(), ANSWER_TIMEOUT);
            // A member that is down, or of a release that knows no digests, is not compared.
            let digests = codec::decode::<Vec<At>>(&answer.await.ok()?).ok()?;
            Some((*id, digests))
        });
        let others: BTreeMap<_, _> = futures::future::join_all(asked)
            .await
            .into_iter()
            .flatten()
            .collect();
        let now = judge(&self.checkpointer.digests(), &others, members.len());
        let barred = now
            .diverged
            .then(|| Unfit::Barred("its state is not that of the other members".into()));
        self.fitness.set("divergence", barred);
        self.agreement.send_if_modified(|seen| {
            if seen.differing.keys().ne(now.differing.keys()) || seen.diverged != now.diverged {
                alarm(&now);
            }
            let changed = *seen != now;
            *seen = now;
            changed
        });
    }

    /// The digests this member can be compared by.
    pub(super) fn digests_for_peer(&self) -> Bytes {
        codec::encode(&self.checkpointer.digests()).into()
    }

    /// Why this member must not answer from its state, if so.
    pub(super) fn diverged(&self) -> Option<String> {
        let seen = self.agreement.borrow();
        let at = seen.differing.values().max().filter(|_| seen.diverged)?;
        Some(format!(
            "this member's state at index {at} is not that of the other members; \
             stop it and run `mainstay member repair`"
        ))
    }
}

fn alarm(now: &Agreement) {
    let differing = &now.differing;
    if now.diverged {
        tracing::error!(
            ?differing,
            "this member's state is not that of the others: it answers no reads and will not lead; \
             stop it and run `mainstay member repair`"
        );
    } else if differing.is_empty() {
        tracing::info!("all members hold the same state again");
    } else {
        tracing::error!(?differing, "members hold another state than this one");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn others(all: &[(u64, &[At])]) -> BTreeMap<u64, Vec<At>> {
        all.iter().map(|(id, at)| (*id, at.to_vec())).collect()
    }

    #[test]
    fn only_equal_positions_are_compared_and_the_newest_counts() {
        let seen = judge(&[(1, 7), (3, 9)], &others(&[(2, &[(1, 8), (3, 9)])]), 2);
        assert_eq!(seen.agreed, Some(3));
        assert_eq!(
            seen.differing,
            BTreeMap::new(),
            "they differed, and do no more"
        );
        let seen = judge(&[(3, 9)], &others(&[(2, &[(1, 9), (2, 5)])]), 2);
        assert_eq!(seen, Agreement::default());
    }

    #[test]
    fn the_odd_one_out_knows_it_and_the_others_name_it() {
        let (right, wrong): (&[At], &[At]) = (&[(5, 1)], &[(5, 2)]);
        let odd = judge(wrong, &others(&[(2, right), (3, right)]), 3);
        assert!(odd.diverged);
        assert_eq!(odd.differing, BTreeMap::from([(2, 5), (3, 5)]));
        let other = judge(right, &others(&[(1, wrong), (3, right)]), 3);
        assert!(!other.diverged);
        assert_eq!(other.differing, BTreeMap::from([(1, 5)]));
        assert_eq!(other.agreed, Some(5));
    }

    #[test]
    fn without_a_majority_nobody_is_judged() {
        let one = judge(&[(5, 1)], &others(&[(2, &[(5, 2)])]), 3);
        assert!(!one.diverged, "the third is down");
        let all = judge(&[(5, 1)], &others(&[(2, &[(5, 2)]), (3, &[(5, 3)])]), 3);
        assert!(!all.diverged, "three states");
        let two = judge(&[(5, 1)], &others(&[(2, &[(5, 2)])]), 2);
        assert!(!two.diverged, "one against one");
        let five = [(2, &[(5, 2)][..]), (3, &[(5, 2)]), (4, &[(5, 1)])];
        assert!(!judge(&[(5, 1)], &others(&five), 5).diverged, "two of five");
    }
}
