//! The whole replicated state, and the bookkeeping that lets it be stored and compared.

use crate::command::Envelope;
use crate::ids::{CommandId, InstanceId, NodeId, TemplateId};
use crate::instance::Instance;
use crate::node::Node;
use crate::outcome::Outcome;
use crate::template::Template;
use std::collections::BTreeMap;

/// Bytes of a key, and its new value or `None` for removed: what a checkpoint writes.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Everything the cloud knows.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// State clock: the greatest stamp applied so far.
    pub clock_ms: u64,
    /// Instances by id.
    pub instances: BTreeMap<InstanceId, Instance>,
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Templates by id.
    pub templates: BTreeMap<TemplateId, Template>,
    // + template ids by name, recent command ids with their outcomes (bounded), instances by node,
    //   waiting instances in scheduling order, the set of dirty keys: see the model's owner.
}

impl State {
    /// Apply one command. Total: every command has an outcome. A command id seen before (within
    /// the bound) answers its first outcome again and changes nothing.
    pub fn apply(&mut self, envelope: &Envelope) -> Outcome {
        let _ = envelope;
        todo!()
    }

    /// Keys changed since the last call with their newest values, for the durable store.
    pub fn take_changes(&mut self) -> Vec<Change> {
        todo!()
    }

    /// The whole state as keys and values, in key order (snapshot).
    pub fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        todo!()
    }

    /// The reverse of [`State::export`]. Fails on bytes it does not understand.
    pub fn import(
        entries: impl Iterator<Item = (Vec<u8>, Vec<u8>)>,
    ) -> Result<Self, crate::codec::CodecError> {
        let _ = entries;
        todo!()
    }

    /// Outcome of a recent command, if it was applied.
    pub fn outcome_of(&self, id: CommandId) -> Option<&Outcome> {
        let _ = id;
        todo!()
    }
}
