//! The definition, tried out: every order of every choice of unanswered operations. Slow, without
//! any cleverness, and therefore what the search is compared with.

use crate::{Interval, Model};

/// Does any order work?
pub(crate) fn linearizable<M: Model>(
    model: &M,
    initial: &M::State,
    history: &[Interval<M::Op>],
) -> bool {
    let mut left: Vec<usize> = (0..history.len()).collect();
    go(model, initial, history, &mut left)
}

fn go<M: Model>(
    model: &M,
    state: &M::State,
    history: &[Interval<M::Op>],
    left: &mut Vec<usize>,
) -> bool {
    if left.iter().all(|n| history[*n].returned.is_none()) {
        return true;
    }
    for at in 0..left.len() {
        let n = left[at];
        let precedes = |m: &usize| {
            history[*m]
                .returned
                .is_some_and(|end| end < history[n].invoked)
        };
        if left.iter().any(precedes) {
            continue;
        }
        if let Some(after) = model.apply(state, &history[n].op) {
            left.remove(at);
            let found = go(model, &after, history, left);
            left.insert(at, n);
            if found {
                return true;
            }
        }
    }
    false
}
