//! From a seed to a schedule: which faults, in which order, how long. The first kind follows from the
//! seed's remainder, so that consecutive seeds try every kind; the rest is thrown.

use crate::Dice;
use std::fmt;

/// What is done to the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// kill -9 of the leader; it starts again once another leads.
    KillLeader,
    /// SIGSTOP of the leader until another leads and writes, then SIGCONT.
    PauseLeader,
    /// The leader hears and is heard by nobody.
    IsolateLeader,
    /// kill -9 of all, started again in some order.
    KillAll,
    /// The leader and one follower do not hear each other; the third hears both.
    Bridge,
    /// A dead follower's (or leader's) disk is wiped; it is replaced by a new identity.
    Replace,
    /// Others hear the leader, it hears nobody.
    LeaderDeaf,
    /// kill -9 of a follower.
    KillFollower,
    /// The leader hears others, nobody hears it.
    LeaderMute,
    /// Leadership is handed over.
    Transfer,
    /// SIGTERM of the leader.
    StopLeader,
    /// SIGSTOP of a follower.
    PauseFollower,
    /// SIGSTOP of the leader and a follower: no majority.
    PauseMost,
    /// A follower hears and is heard by nobody.
    IsolateFollower,
    /// Every direction of every pair is slow.
    Slow,
    /// Directions are cut for moments.
    Blink,
    /// A fourth member joins, gets a vote, and is taken out again.
    Resize,
}

use Kind::{
    Blink, Bridge, IsolateFollower, IsolateLeader, KillAll, KillFollower, KillLeader, LeaderDeaf,
    LeaderMute, PauseFollower, PauseLeader, PauseMost, Replace, Resize, Slow, StopLeader, Transfer,
};

/// Every kind. The first six are those of a short run.
pub(crate) const KINDS: [Kind; 17] = [
    KillLeader,
    PauseLeader,
    IsolateLeader,
    KillAll,
    Bridge,
    Replace,
    LeaderDeaf,
    KillFollower,
    LeaderMute,
    Transfer,
    StopLeader,
    PauseFollower,
    PauseMost,
    IsolateFollower,
    Slow,
    Blink,
    Resize,
];
/// Those that are thrown. [`Resize`] is not: it is added to every fourth schedule, so that seeds from
/// before there was one make what they made.
const THROWN: usize = KINDS.len() - 1;

impl Kind {
    /// Another leader must have come of it.
    pub(crate) fn deposes(self) -> bool {
        matches!(
            self,
            KillLeader
                | PauseLeader
                | IsolateLeader
                | KillAll
                | LeaderDeaf
                | LeaderMute
                | Transfer
                | StopLeader
        )
    }

    /// It acts on links, and must have been felt there.
    pub(crate) fn on_links(self) -> bool {
        matches!(
            self,
            IsolateLeader | IsolateFollower | LeaderDeaf | LeaderMute | Bridge | Slow | Blink
        )
    }
}

/// One fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    /// How long it lasts beyond what it must have reached.
    pub(crate) dwell_ms: u64,
    /// Between telling those who take and the fault.
    pub(crate) lead_ms: u64,
    /// Chooses among followers, orders, delays.
    pub(crate) pick: u64,
    /// Held back bytes arrive after the cut; otherwise their connections are broken.
    pub(crate) late: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} +{} ms", self.kind, self.dwell_ms)?;
        if self.kind.on_links() && self.late {
            f.write_str(" late")?;
        }
        Ok(())
    }
}

/// The faults of the schedule with this seed.
pub(crate) fn faults(seed: u64, dice: &mut Dice) -> Vec<Fault> {
    let first = KINDS[(seed % THROWN as u64) as usize];
    let mut kinds = vec![first];
    for _ in 0..1 + dice.below(2) {
        kinds.push(KINDS[dice.below(THROWN as u64) as usize]);
    }
    if seed % 4 == 3 {
        kinds.push(Resize);
    }
    let fault = |kind| Fault {
        kind,
        dwell_ms: dice.below(1_200),
        lead_ms: dice.below(8),
        pick: dice.below(1 << 32),
        late: dice.below(2) == 0,
    };
    kinds.into_iter().map(fault).collect()
}

/// Neighbouring seeds must not throw alike.
pub(crate) fn dice(seed: u64) -> Dice {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Dice((mixed ^ (mixed >> 31)) | 1)
}

#[test]
fn a_seed_makes_one_schedule_and_all_of_them_every_kind() {
    let text = |seed| format!("{:?}", faults(seed, &mut dice(seed)));
    assert_eq!(text(5), text(5));
    assert_ne!(text(5), text(5 + THROWN as u64));
    let of = |seed| faults(seed, &mut dice(seed)).into_iter().map(|f| f.kind);
    let firsts = (100..100 + THROWN as u64).map(|seed| of(seed).next().unwrap());
    let mut kinds: Vec<_> = firsts
        .chain((100..104).filter_map(|seed| of(seed).next_back()))
        .collect();
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds.len(), KINDS.len());
}
