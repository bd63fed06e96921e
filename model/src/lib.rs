//! The replicated state machine of the cloud and the planner over it: pure functions of their
//! input. No async, no IO, no clock, no randomness, no hash maps: two members that apply the same
//! log must agree to the byte.
//!
//! * [`State`] holds everything; [`State::apply`] is the only way it changes.
//! * [`plan`] proposes; the log records the choice; `apply` checks it again.
//! * [`invariants`] says what must hold after every command; tests ask after each step.
//! * [`codec`] is the only place that knows how these types become bytes.

pub mod apply;
pub mod artifact;
pub mod codec;
pub mod command;
pub mod distribution;
pub mod feature;
pub mod group;
pub mod ids;
pub mod instance;
pub mod invariants;
pub mod limits;
pub mod member;
pub mod metadata;
pub mod node;
pub mod outcome;
pub mod pace;
pub mod plan;
pub mod save;
#[cfg(feature = "seeded-bugs")]
pub mod seeded;
pub mod state;
pub mod template;

pub use command::{Command, Envelope};
pub use ids::{
    CommandId, DistributionId, GroupId, InstanceId, MemberId, NodeId, SaveId, Sha256, TemplateId,
};
pub use outcome::{Outcome, Refusal};
pub use state::State;
