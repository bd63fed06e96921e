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
//! | 5 | those stored before level 3 move sixteen at a time, when the first of them is replaced; raised to less, all move at once |
//! | 7 | `DescribeTag`, `NotePulls`, `SetQuota` |
//! | 8 | what all repositories say together has a bound, and a manifest one media type |
//! | 9 | a binding holds only if the node is one that the request allows still; who waits for a group that is no more fails; an agent is told to keep what it said has failed or stopped |
//! | 10 | `AddWithin`: quotas hold however many push at once; `RestartInstance` |
//! | 11 | `Distribute`, `CancelDistribution`, `ExpireDistributions` |
//! | 12 | `EvictImages` |
//! | 13 | tags with the memory of a suspended VM: what a tag is made of names it |
//! | 14 | `SaveInstance` and what follows from it: instances are saved as tags |

use crate::command::{Addition, Command};

/// The highest level that this release applies.
pub const SUPPORTED: u32 = 14;
/// From which on remembered commands are stored in blocks.
pub const RECENT_BLOCKS: u32 = 3;
/// At which they move there little by little.
pub const RECENT_GRADUALLY: u32 = 5;
/// At which `RetireMember` may be logged.
pub const RETIRE_MEMBER: u32 = 2;
/// At which the commands about artifacts may be logged.
pub const ARTIFACTS: u32 = 4;
/// At which what is said of tags may be changed, and how much may be stored.
pub const TAG_NOTES: u32 = 7;
/// At which a put of an artifact is refused that the cluster has no room for, or that calls a known
/// manifest by another media type.
pub const ARTIFACT_ROOM: u32 = 8;
/// At which a binding is compared with the groups and the architecture of its node again, and a request
/// ends with the group that it waits for.
pub const GROUPS_KEPT: u32 = 9;
/// At which a node's desired set changes with what its agent is to do about an instance, also where
/// that follows from its own report: until it is told to keep what failed, it does not say that nothing
/// of it is left, and the room stays taken.
pub const TOLD_TO_KEEP: u32 = 9;
/// At which what is weighed against quotas may be added under the condition that nothing else came.
pub const ADD_WITHIN: u32 = 10;
/// At which a tag may have the memory of a suspended VM. What is stored has the same form; a release that does not
/// know it shows the disk's name with the memory's.
pub const SUSPENDED: u32 = 13;
/// At which instances may be restarted.
pub const RESTART: u32 = 10;
/// At which images may be distributed to nodes.
pub const DISTRIBUTE: u32 = 11;
/// At which nodes may be asked to drop images.
pub const EVICT: u32 = 12;
/// At which instances may be saved as tags.
pub const SAVE: u32 = 14;

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
            Self::DescribeTag { .. } | Self::NotePulls { .. } | Self::SetQuota { .. } => TAG_NOTES,
            Self::SaveInstance { .. }
            | Self::ReportSaves { .. }
            | Self::PublishSaved { .. }
            | Self::ExpireSaves { .. }
            | Self::AddWithin {
                what: Addition::Saved(_),
                ..
            } => SAVE,
            Self::AddWithin { .. } => ADD_WITHIN,
            Self::RestartInstance { .. } => RESTART,
            Self::Distribute { .. }
            | Self::CancelDistribution { .. }
            | Self::ExpireDistributions { .. } => DISTRIBUTE,
            Self::EvictImages { .. } => EVICT,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::RECENT_COMMANDS;
    use crate::{CommandId, Envelope, State};
    use std::collections::BTreeMap;

    /// A state, and what a store that follows its changes holds.
    #[derive(Clone, Default)]
    struct Followed {
        state: State,
        stored: BTreeMap<Vec<u8>, Vec<u8>>,
        commands: u128,
    }

    impl Followed {
        /// How many keys that changed.
        fn apply(&mut self, command: Command) -> usize {
            self.commands += 1;
            self.state.apply(&Envelope {
                id: CommandId(self.commands),
                stamp_ms: 1,
                command,
            });
            let changes = self.state.take_changes();
            let count = changes.len();
            for (key, value) in changes {
                match value {
                    Some(value) => self.stored.insert(key, value),
                    None => self.stored.remove(&key),
                };
            }
            count
        }

        /// What is stored is what an export has, and what it is read back from.
        fn check(&self) {
            let whole: Vec<_> = self.stored.clone().into_iter().collect();
            assert!(whole == self.state.export(), "after {}", self.commands);
            let back = State::import(whole.into_iter()).unwrap();
            assert!(back == self.state, "after {}", self.commands);
            assert_eq!(back.check_index(), Ok(()));
        }

        fn table(&self, table: u8) -> usize {
            self.stored.keys().filter(|key| key[0] == table).count()
        }
    }

    /// However full, no command pays for more than its neighbours; in the middle of the move, members
    /// that go on, that start again, and that take a snapshot write the same.
    #[test]
    fn remembered_commands_move_little_by_little() {
        const STEPS: usize = 8;
        let mut first = Followed::default();
        for _ in 0..RECENT_COMMANDS + 5 {
            first.apply(Command::Noop);
        }
        assert_eq!((first.table(b'q'), first.table(b'r')), (0, RECENT_COMMANDS));
        let mut most = first.apply(Command::SetFeatures {
            level: RECENT_GRADUALLY,
        });
        for step in 0..STEPS {
            first.check();
            let mut second = first.clone();
            second.state = State::import(first.stored.clone().into_iter()).unwrap();
            for n in 0..RECENT_COMMANDS / STEPS {
                most = most.max(first.apply(Command::Noop));
                if n < 100 {
                    second.apply(Command::Noop);
                    assert!(n < 99 || second.stored == first.stored, "step {step}");
                }
            }
        }
        first.check();
        assert_eq!(
            (first.table(b'q'), first.table(b'r')),
            (RECENT_COMMANDS / 16, 0)
        );
        // Sixteen go, one comes; the clock and the level.
        assert!(most <= 19, "{most} keys in one command");
    }

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
