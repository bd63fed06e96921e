//! Which commands a cluster may use: a level that is committed once every member supports it. Until
//! then nothing is logged or stored that the previous release could not read, so that members of
//! both work side by side and the way back is open. From then on it is closed.
//!
//! | level | what it allows |
//! | --- | --- |
//! | 0 | what the first release had |
//! | 1 | `SetFeatures` itself: a cluster that remembers its level |

use crate::command::Command;

/// The highest level that this release applies.
pub const SUPPORTED: u32 = 1;

impl Command {
    /// The level at which a member may log this command. `SetFeatures` needs none: who proposes it
    /// has asked every member.
    pub fn needs(&self) -> u32 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CommandId, Envelope, State};

    #[test]
    fn a_level_is_never_taken_back_and_level_0_leaves_no_trace() {
        let mut state = State::default();
        let set = |state: &mut State, n: u128, level| {
            state.apply(&Envelope {
                id: CommandId(n),
                stamp_ms: 1,
                command: Command::SetFeatures { level },
            })
        };
        let stored = |state: &State| state.export().iter().any(|(key, _)| key == b"f");
        set(&mut state, 1, 0);
        assert!(!stored(&state), "the previous release knows no such key");
        set(&mut state, 2, 2);
        set(&mut state, 3, 1);
        assert_eq!(state.features, 2);
        assert!(stored(&state));
        assert_eq!(State::import(state.export().into_iter()).unwrap(), state);
    }
}
