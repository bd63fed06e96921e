//! Members that an operator takes out. The state remembers them, because the group's own list only
//! knows who is in: an identity that is not in the list may be new, or may have been removed.

use super::{Applied, artifact, check, template};
use crate::ids::MemberId;
use crate::limits;
use crate::member::Retired;
use crate::outcome::Outcome;
use crate::state::State;
use std::collections::BTreeSet;

pub(super) fn retire(
    state: &mut State,
    id: MemberId,
    name: &str,
    voters: &BTreeSet<MemberId>,
) -> Applied {
    check::text("member name", name, limits::NAME_BYTES)?;
    if state.retired.contains_key(&id) {
        return Ok(Outcome::Done);
    }
    if state.retired.len() >= limits::RETIRED {
        let oldest = state.retired.iter().min_by_key(|(id, r)| (r.at_ms, **id));
        if let Some(oldest) = oldest.map(|(id, _)| *id) {
            state.forget_retired(oldest);
        }
    }
    let retired = Retired {
        name: name.to_owned(),
        at_ms: state.clock_ms,
    };
    state.retire(id, retired);
    let mut left = voters.clone();
    left.remove(&id);
    template::drop_holder(state, id, &left);
    artifact::drop_holder(state, id, &left);
    Ok(Outcome::Done)
}
