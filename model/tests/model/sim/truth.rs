//! What must hold at every step, as users would put it. The model's own invariants are asked as well.
//!
//! * An accepted instance is there until it has ended; what was terminated never lives again.
//! * One node for one instance at one generation, and never two VMs of one instance anywhere.
//! * Every VM that is really there is known: it takes room, or it is on the list of what is left.
//! * Nothing is placed where it does not fit: room, group, architecture, pin, drain.

use super::fleet::Machine;
use super::oracle;
use mainstay_model::instance::{Instance, InstanceState};
use mainstay_model::node::Load;
use mainstay_model::{Command, InstanceId, NodeId, Outcome, State};
use std::collections::{BTreeMap, BTreeSet};

/// What is remembered of an instance.
#[derive(Debug)]
struct Known {
    state: InstanceState,
    generation: u64,
    node: Option<NodeId>,
    ended: bool,
    terminated: bool,
}

#[derive(Default)]
pub struct Truth {
    /// Asked after some commands only: who was forgotten may have ended in between.
    sometimes: bool,
    known: BTreeMap<InstanceId, Known>,
    nodes: BTreeMap<NodeId, (Load, u64)>,
    bound: BTreeMap<(InstanceId, u64), NodeId>,
    forgotten: BTreeSet<InstanceId>,
}

type Checked = Result<(), String>;

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(what()) }
}

impl Truth {
    pub fn new(sometimes: bool) -> Self {
        Self {
            sometimes,
            ..Self::default()
        }
    }

    /// After a command was applied; `outcome`: unless it was known already.
    pub fn step(&mut self, state: &State, command: &Command, outcome: Option<&Outcome>) -> Checked {
        if let (Command::StartInstances { ids, .. }, Some(Outcome::Started(started))) =
            (command, outcome)
        {
            ensure(ids == started, || "others were started".to_owned())?;
            for id in ids {
                let there = state.instances.contains_key(id) || self.known.contains_key(id);
                ensure(there, || format!("{id}: accepted and not there"))?;
            }
        }
        if let (Command::TerminateInstance { id }, Some(Outcome::Done)) = (command, outcome)
            && let Some(known) = self.known.get_mut(id)
        {
            known.terminated = true;
        }
        for instance in state.instances.values() {
            self.instance(state, instance)
                .map_err(|why| format!("instance {}: {why}", instance.id))?;
        }
        for save in state.saves.values() {
            let done = save.end.as_ref().is_some_and(|end| end.error.is_none());
            ensure(!done || save.published.is_some(), || {
                format!("save {}: done without a tag", save.id)
            })?;
        }
        self.gone(state)?;
        self.loads(state)
    }

    fn instance(&mut self, state: &State, i: &Instance) -> Checked {
        use InstanceState::{Error, Terminated, Terminating};
        ensure(!self.forgotten.contains(&i.id), || {
            "it was forgotten and is back".into()
        })?;
        let fresh = Known {
            state: i.state,
            generation: i.generation,
            node: None,
            ended: false,
            terminated: false,
        };
        let known = self.known.entry(i.id.clone()).or_insert(fresh);
        ensure(i.generation >= known.generation, || {
            "its generation went back".into()
        })?;
        ensure(
            !known.terminated || matches!(i.state, Terminating | Terminated),
            || format!("it was terminated and is {}", i.state.as_str()),
        )?;
        ensure(
            known.state != Error || matches!(i.state, Error | Terminating | Terminated),
            || format!("it had failed and is {}", i.state.as_str()),
        )?;
        ensure(!known.ended || i.ended_ms.is_some(), || {
            "it had ended and has not".into()
        })?;
        if i.node != known.node
            && let Some(node) = &i.node
        {
            let node = state.nodes.get(node);
            let node = node.ok_or("it was placed on a node that is not there")?;
            ensure(oracle::tier(state, i, node).is_some(), || {
                format!(
                    "it was placed on {}, which its request does not allow",
                    node.id
                )
            })?;
            ensure(node.accepts(), || {
                format!("it was placed on {}, which takes nothing", node.id)
            })?;
            let key = (i.id.clone(), i.generation);
            let first = self.bound.entry(key).or_insert(node.id.clone());
            ensure(first == &node.id, || {
                format!(
                    "two nodes at generation {}: {first} and {}",
                    i.generation, node.id
                )
            })?;
        }
        known.state = i.state;
        known.generation = i.generation;
        known.node.clone_from(&i.node);
        known.ended = i.ended_ms.is_some();
        Ok(())
    }

    fn gone(&mut self, state: &State) -> Checked {
        if self.known.len() == state.instances.len() {
            return Ok(());
        }
        let gone: Vec<InstanceId> = self
            .known
            .keys()
            .filter(|id| !state.instances.contains_key(id))
            .cloned()
            .collect();
        for id in gone {
            let known = self.known.remove(&id);
            ensure(self.sometimes || known.is_some_and(|k| k.ended), || {
                format!("instance {id}: lost")
            })?;
            self.forgotten.insert(id);
        }
        Ok(())
    }

    /// No placement of ours makes a node fuller than it may be.
    fn loads(&mut self, state: &State) -> Checked {
        for node in state.nodes.values() {
            let load = state.load(&node.id);
            let was = self.nodes.get(&node.id);
            let grew = was.is_some_and(|(was, _)| load.count > was.count);
            ensure(!grew || node.has_room_for(load), || {
                format!("node {}: was given more than it takes", node.id)
            })?;
            let back = was.is_some_and(|(_, told)| *told > node.desired_generation);
            ensure(!back, || {
                format!("node {}: its desired set went back", node.id)
            })?;
            if was != Some(&(load, node.desired_generation)) {
                self.nodes
                    .insert(node.id.clone(), (load, node.desired_generation));
            }
        }
        Ok(())
    }

    pub fn forgotten(&self) -> usize {
        self.forgotten.len()
    }

    pub fn terminated(&self, id: &InstanceId) -> bool {
        self.known.get(id).is_none_or(|k| k.terminated)
    }
}

/// Every VM there is has one owner in the state, and no instance has two.
pub fn vms(state: &State, fleet: &[Machine]) -> Checked {
    let mut seen: BTreeMap<&str, &NodeId> = BTreeMap::new();
    for machine in fleet {
        for (id, generation, _) in machine.agent.vms() {
            if let Some(other) = seen.insert(id, &machine.id) {
                return Err(format!(
                    "instance {id}: VMs on {other} and on {}",
                    machine.id
                ));
            }
            accounted(state, machine, id, generation)?;
        }
    }
    Ok(())
}

fn accounted(state: &State, machine: &Machine, id: &str, generation: u64) -> Checked {
    let key = InstanceId::from(id);
    let instance = state.instances.get(&key);
    let known = instance.is_some_and(|i| i.occupies() == Some(&machine.id))
        || state.left.get(&key).is_some_and(|l| l.node == machine.id);
    ensure(known, || {
        let now = instance.map(|i| (i.state, &i.node, i.generation, i.vm_gone));
        format!(
            "a VM of instance {id}@{generation} on {} that nobody knows of: {now:?}",
            machine.id
        )
    })
}

/// Everything has come to rest: `Err` says what has not.
pub fn rest(state: &State, fleet: &[Machine], now: u64) -> Checked {
    vms(state, fleet)?;
    for node in state.nodes.values() {
        ensure(node.reachable, || format!("node {} is still away", node.id))?;
    }
    for machine in fleet {
        ensure(state.nodes.contains_key(&machine.id), || {
            format!("node {} has not joined", machine.id)
        })?;
    }
    let waits = state.distributions.values().find(|d| d.waits());
    ensure(waits.is_none(), || format!("still waited for: {waits:?}"))?;
    let evicted = state.evictions.first_key_value();
    ensure(evicted.is_none(), || {
        format!("still to be dropped: {evicted:?}")
    })?;
    let open = state.open_saves().next();
    ensure(open.is_none(), || format!("still open: {open:?}"))?;
    let left = state.left.keys().next();
    ensure(left.is_none(), || {
        format!("instance {left:?}: still left behind")
    })?;
    let fleet: BTreeMap<&NodeId, &Machine> = fleet.iter().map(|m| (&m.id, m)).collect();
    for instance in state.instances.values() {
        at_rest(state, &fleet, instance, now).map_err(|why| {
            let Instance {
                id,
                state,
                node,
                generation,
                ..
            } = instance;
            format!(
                "instance {id} {} on {node:?} at {generation}: {why}",
                state.as_str()
            )
        })?;
    }
    Ok(())
}

fn at_rest(state: &State, fleet: &BTreeMap<&NodeId, &Machine>, i: &Instance, now: u64) -> Checked {
    use InstanceState::{Error, Started, Stopped, Terminated, Terminating};
    let machine = i.node.as_ref().and_then(|node| fleet.get(node));
    let vm = machine.and_then(|m| m.agent.vms().find(|(id, ..)| *id == i.id.as_str()));
    match i.state {
        Started => ensure(vm.is_some_and(|(_, _, runs)| runs), || {
            "its VM does not run".into()
        }),
        Stopped | Error => ensure(i.vm_gone || i.node.is_none() || vm.is_some(), || {
            "its VM is gone, and nobody said so".into()
        }),
        Terminated => ensure(vm.is_none(), || "its VM is still there".into()),
        Terminating => ensure(i.ended_ms.is_some(), || "has not ended".into()),
        _ if i.node.is_some() => Err("is still being started".into()),
        // Nobody could ever take it, or nobody has room: then it says so.
        _ => ensure(!oracle::placeable(state, i, now), || {
            "could be placed".into()
        }),
    }
}
