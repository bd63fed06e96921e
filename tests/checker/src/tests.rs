//! Known histories, and random ones beside the definition.

use crate::models::{ABSENT, Membership, MembershipOp, Pile, PileOp, Registers, RegistersOp};
use crate::{Interval, Limit, Model, Verdict, brute, check};

fn at<O>(invoked: u64, returned: u64, op: O) -> Interval<O> {
    Interval {
        invoked,
        returned: Some(returned),
        op,
    }
}

fn lost<O>(invoked: u64, op: O) -> Interval<O> {
    Interval {
        invoked,
        returned: None,
        op,
    }
}

fn write(value: u32) -> RegistersOp {
    RegistersOp::Write(vec![(0, value)])
}

fn read(value: u32) -> RegistersOp {
    RegistersOp::Read(vec![(0, value)])
}

fn one(history: &[Interval<RegistersOp>]) -> Verdict {
    check(&Registers, &vec![ABSENT], history, Limit::default())
}

#[track_caller]
fn good(history: &[Interval<RegistersOp>]) {
    assert!(one(history).is_linearizable(), "{history:?}");
}

#[track_caller]
fn bad(history: &[Interval<RegistersOp>]) {
    let verdict = one(history);
    assert!(matches!(verdict, Verdict::Violation { .. }), "{verdict:?}");
}

#[test]
fn a_read_sees_the_last_write_before_it() {
    good(&[]);
    good(&[at(0, 1, read(ABSENT))]);
    good(&[at(0, 1, write(7)), at(2, 3, read(7))]);
    bad(&[at(0, 1, write(7)), at(2, 3, read(ABSENT))]);
    bad(&[at(0, 1, read(7)), at(2, 3, write(7))]);
    bad(&[at(0, 1, read(7))]);
    bad(&[at(0, 1, write(7)), at(2, 3, write(8)), at(4, 5, read(7))]);
}

#[test]
fn what_overlaps_may_be_seen_or_not_but_not_back_and_forth() {
    good(&[
        at(0, 9, write(7)),
        at(1, 2, read(ABSENT)),
        at(3, 4, read(7)),
    ]);
    bad(&[
        at(0, 9, write(7)),
        at(1, 2, read(7)),
        at(3, 4, read(ABSENT)),
    ]);
    // Two readers see two writes in opposite orders.
    bad(&[
        at(0, 9, write(7)),
        at(0, 9, write(8)),
        at(10, 11, read(7)),
        at(12, 13, read(8)),
    ]);
    // Touching intervals overlap: the clock may be coarse.
    good(&[at(0, 5, write(7)), at(5, 6, read(ABSENT))]);
}

#[test]
fn without_an_answer_it_happens_later_or_never() {
    good(&[
        lost(0, write(7)),
        at(5, 6, read(ABSENT)),
        at(50, 60, read(7)),
    ]);
    good(&[lost(0, write(7)), at(5, 6, read(ABSENT))]);
    // But not before it was sent, and not twice.
    bad(&[at(0, 1, read(7)), lost(2, write(7))]);
    bad(&[
        lost(0, write(7)),
        at(1, 2, read(7)),
        at(3, 4, write(8)),
        at(5, 6, read(8)),
        at(7, 8, read(7)),
    ]);
    // A read without an answer says nothing.
    good(&[lost(0, read(99)), at(1, 2, read(ABSENT))]);
}

#[test]
fn keys_of_one_write_move_together() {
    let both = RegistersOp::Write(vec![(0, 7), (1, 8)]);
    let seen = |a, b| RegistersOp::Read(vec![(0, a), (1, b)]);
    let start = vec![ABSENT; 2];
    let torn = [at(0, 9, both.clone()), at(1, 2, seen(7, ABSENT))];
    let whole = [at(0, 9, both), at(1, 2, seen(7, 8))];
    assert!(!check(&Registers, &start, &torn, Limit::default()).is_linearizable());
    assert!(check(&Registers, &start, &whole, Limit::default()).is_linearizable());
}

#[test]
fn two_keys_can_be_right_each_and_wrong_together() {
    // Each key alone is fine; but who saw the second write had to see the first.
    let history = |late| {
        [
            at(0, 9, write(7)),
            at(10, 11, RegistersOp::Write(vec![(1, 8)])),
            at(2, 99, RegistersOp::Read(vec![(0, late), (1, 8)])),
        ]
    };
    let judge = |history: &[_]| {
        check(&Registers, &vec![ABSENT; 2], history, Limit::default()).is_linearizable()
    };
    assert!(judge(&history(7)));
    assert!(!judge(&history(ABSENT)));
}

#[test]
fn a_thing_taken_twice_is_missed() {
    let pile = |history: &[Interval<PileOp>]| {
        check(&Pile, &5, history, Limit::default()).is_linearizable()
    };
    use PileOp::{Count, Take};
    assert!(pile(&[at(0, 1, Take), at(2, 3, Count(4))]));
    assert!(!pile(&[at(0, 1, Take), at(2, 3, Count(3))]));
    assert!(!pile(&[at(0, 1, Take), at(2, 3, Count(5))]));
    assert!(pile(&[at(0, 1, Take), lost(0, Take), at(2, 3, Count(3))]));
    assert!(pile(&[at(0, 1, Take), lost(0, Take), at(2, 3, Count(4))]));
    // The one without an answer comes late, and then is not undone.
    assert!(pile(&[
        lost(0, Take),
        at(2, 3, Count(5)),
        at(4, 5, Count(4))
    ]));
    assert!(!pile(&[
        lost(0, Take),
        at(2, 3, Count(4)),
        at(4, 5, Count(5))
    ]));
    // Between two counts that agree no whole one fits, although there is a longer one to blame.
    let hidden = [
        at(0, 10, Take),
        at(1, 2, Count(4)),
        at(3, 4, Take),
        at(5, 6, Count(4)),
    ];
    assert!(!pile(&hidden));
}

#[test]
fn a_member_of_a_set_does_not_leave_it() {
    let set = |history: &[Interval<MembershipOp>]| {
        check(&Membership, &false, history, Limit::default()).is_linearizable()
    };
    use MembershipOp::{Add, Look};
    assert!(set(&[at(0, 1, Add), at(0, 1, Add), at(2, 3, Look(true))]));
    assert!(!set(&[at(0, 1, Add), at(2, 3, Look(false))]));
    assert!(!set(&[
        lost(0, Add),
        at(2, 3, Look(true)),
        at(4, 5, Look(false))
    ]));
    assert!(!set(&[at(2, 3, Look(true)), lost(4, Add)]));
}

#[test]
fn a_violation_says_where_it_got_stuck() {
    let history = [
        at(0, 1, write(7)),
        at(2, 3, write(8)),
        at(4, 5, read(7)),
        at(6, 7, read(8)),
    ];
    let Verdict::Violation { order, stuck } = one(&history) else {
        panic!("a stale read passed");
    };
    assert_eq!(order, [0, 1]);
    assert_eq!(stuck, [2]);
}

#[test]
fn what_is_too_hard_is_undecided() {
    // Thirty writes at once and a value that nobody wrote: every subset is a configuration.
    let mut history: Vec<_> = (1..=30).map(|n| at(0, 99, write(n))).collect();
    history.push(at(100, 101, read(77)));
    let limit = Limit {
        configurations: 10_000,
    };
    let verdict = check(&Registers, &vec![ABSENT], &history, limit);
    assert_eq!(verdict, Verdict::Undecided { looked_at: 10_001 });
    assert!(!verdict.is_linearizable());
}

#[test]
fn long_histories_are_quick() {
    let mut dice = Dice(11);
    let history = simulate(&mut dice, 5_000, 12, 20);
    let Verdict::Linearizable { order } = one(&history) else {
        panic!("a linearizable history was refused");
    };
    explains(&history, &order);
    // A hundred unanswered takes and a wrong count at the end: alike ones are tried once.
    let mut pile: Vec<_> = (0..100).map(|n| lost(n, PileOp::Take)).collect();
    pile.extend((0..100).map(|n| at(200 + n, 210 + n, PileOp::Take)));
    let last = |count| at(500, 501, PileOp::Count(count));
    for (count, right) in [(900, true), (800, true), (901, false), (799, false)] {
        pile.push(last(count));
        let verdict = check(&Pile, &1_000, &pile, Limit::default());
        let decided = !matches!(verdict, Verdict::Undecided { .. });
        assert!(decided && verdict.is_linearizable() == right, "{count}");
        pile.pop();
    }
}

/// The order respects time and explains every answer.
fn explains(history: &[Interval<RegistersOp>], order: &[usize]) {
    let mut state = vec![ABSENT];
    let mut latest_start = 0;
    for n in order {
        let interval = &history[*n];
        assert!(interval.returned.is_none_or(|end| end >= latest_start));
        latest_start = latest_start.max(interval.invoked);
        state = Registers.apply(&state, &interval.op).expect("explained");
    }
    let answered = history.iter().filter(|i| i.returned.is_some()).count();
    let ordered = |n: &&usize| history[**n].returned.is_some();
    assert_eq!(order.iter().filter(ordered).count(), answered);
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What clients of a register that is linearizable would record: each operation takes effect at a
/// moment of its own within its interval; some answers are lost, some effects as well.
fn simulate(dice: &mut Dice, count: u64, width: u64, lost_in: u64) -> Vec<Interval<RegistersOp>> {
    let mut value = ABSENT;
    let mut history = Vec::new();
    for n in 0..count {
        let moment = width + n * 3;
        let (early, late) = (dice.below(width), dice.below(width));
        let answered = dice.below(lost_in) != 0;
        let returned = answered.then_some(moment + late);
        let op = if dice.below(2) == 0 {
            if answered || dice.below(2) == 0 {
                value = n as u32 + 1;
            }
            write(n as u32 + 1)
        } else {
            read(value)
        };
        history.push(Interval {
            invoked: moment - early,
            returned,
            op,
        });
    }
    history
}

/// Spoil one thing; it may be harmless.
fn mutate(dice: &mut Dice, history: &mut [Interval<RegistersOp>]) {
    let n = dice.below(history.len() as u64) as usize;
    let other = dice.below(history.len() as u64 + 1) as u32;
    let interval = &mut history[n];
    match dice.below(3) {
        0 => {
            if let RegistersOp::Read(values) = &mut interval.op {
                values[0].1 = other;
            }
        }
        1 => interval.invoked = interval.returned.unwrap_or(interval.invoked + 20),
        _ => interval.returned = interval.returned.map(|end| end.min(interval.invoked + 1)),
    }
}

#[test]
fn simulated_histories_are_never_flagged() {
    let mut dice = Dice(1);
    for _ in 0..2_000 {
        let count = 1 + dice.below(40);
        let history = simulate(&mut dice, count, 30, 5);
        good(&history);
        good(&Registers::without_unseen(history));
    }
}

#[test]
fn mutated_histories_are_flagged_exactly_when_the_definition_says_so() {
    let mut dice = Dice(2);
    let mut flagged = 0;
    for _ in 0..3_000 {
        let count = 2 + dice.below(6);
        let mut history = simulate(&mut dice, count, 12, 4);
        for _ in 0..1 + dice.below(2) {
            mutate(&mut dice, &mut history);
        }
        let right = brute::linearizable(&Registers, &vec![ABSENT], &history);
        flagged += usize::from(!right);
        assert_eq!(one(&history).is_linearizable(), right, "{history:?}");
        let less = Registers::without_unseen(history.clone());
        assert_eq!(one(&less).is_linearizable(), right, "{history:?}");
    }
    assert!((300..2_700).contains(&flagged), "{flagged} of 3000");
}

#[test]
fn piles_and_sets_are_judged_as_the_definition_says() {
    let mut dice = Dice(3);
    let (mut flagged, rounds) = (0, 4_000);
    for _ in 0..rounds {
        let mut piles = Vec::new();
        let mut sets = Vec::new();
        for _ in 0..2 + dice.below(6) {
            let invoked = dice.below(20);
            let returned = (dice.below(4) != 0).then(|| invoked + dice.below(10));
            let take = dice.below(2) == 0;
            let (count, seen) = (3 + dice.below(3) as u32, dice.below(2) == 0);
            piles.push(Interval {
                invoked,
                returned,
                op: if take {
                    PileOp::Take
                } else {
                    PileOp::Count(count)
                },
            });
            sets.push(Interval {
                invoked,
                returned,
                op: if take {
                    MembershipOp::Add
                } else {
                    MembershipOp::Look(seen)
                },
            });
        }
        let right = brute::linearizable(&Pile, &5, &piles);
        flagged += usize::from(!right);
        let verdict = check(&Pile, &5, &piles, Limit::default());
        assert_eq!(verdict.is_linearizable(), right, "{piles:?}");
        let right = brute::linearizable(&Membership, &false, &sets);
        let verdict = check(&Membership, &false, &sets, Limit::default());
        assert_eq!(verdict.is_linearizable(), right, "{sets:?}");
    }
    assert!(
        (rounds / 10..rounds * 9 / 10).contains(&flagged),
        "{flagged}"
    );
}
