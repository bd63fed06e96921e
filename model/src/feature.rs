//! Which commands a cluster may use: a level that is committed once every member supports it. Until
//! then nothing is logged or stored that the previous release could not read, so that members of
//! both work side by side and the way back is open. From then on it is closed.
//!
//! | level | what it allows |
//! | --- | --- |
//! | 0 | what the first release had |
//! | 1 | `SetFeatures` itself: a cluster that remembers its level |
//! | 2 | `RetireMember`: a cluster that remembers whom it let go |
//! | 3 | remembered commands are stored sixteen to a key |
//! | 4 | OCI artifacts: `PutArtifact` and what follows from it |

use crate::command::Command;

/// The highest level that this release applies.
pub const SUPPORTED: u32 = 4;
/// From which on remembered commands are stored in blocks.
pub const RECENT_BLOCKS: u32 = 3;
/// At which `RetireMember` may be logged.
pub const RETIRE_MEMBER: u32 = 2;
/// At which the commands about artifacts may be logged.
pub const ARTIFACTS: u32 = 4;

impl Command {
    /// The level at which a member may log this command. `SetFeatures` needs none: who proposes it
    /// has asked every member.
    pub fn needs(&self) -> u32 {
        match self {
            Self::RetireMember { .. } => RETIRE_MEMBER,
            Self::PutArtifact { .. }
            | Self::ReportArtifactHeld { .. }
            | Self::DeleteArtifact { .. }
            | Self::DeleteArtifactTag { .. } => ARTIFACTS,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CommandId, Envelope, State};

    /// What is stored by changes is what an export has, whenever the level is raised.
    #[test]
    fn remembered_commands_move_once() {
        let mut state = State::default();
        let mut stored = std::collections::BTreeMap::new();
        for n in 0..100_u128 {
            let command = match n {
                40 => Command::SetFeatures { level: 2 },
                70 => Command::SetFeatures { level: 3 },
                _ => Command::Noop,
            };
            state.apply(&Envelope {
                id: CommandId(n),
                stamp_ms: 1,
                command,
            });
            for (key, value) in state.take_changes() {
                match value {
                    Some(value) => stored.insert(key, value),
                    None => stored.remove(&key),
                };
            }
            let whole: Vec<_> = stored.clone().into_iter().collect();
            assert_eq!(whole, state.export(), "after command {n}");
            assert_eq!(State::import(whole.into_iter()).unwrap(), state);
        }
        let table = |t: u8| stored.keys().filter(|key| key[0] == t).count();
        assert_eq!((table(b'q'), table(b'r')), (7, 0));
    }

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
