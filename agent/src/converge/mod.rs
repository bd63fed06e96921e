//! Convergence: what must happen so that the node runs what it shall run. This module is the pure
//! core: desired set and what is known here in, actions out. It knows no driver, no file, no clock.
//!
//! * [`plan`]: the actions; at most one per instance, none while one is under way.
//! * [`executor`]: carries actions out, several at once; `task`: one instance's start and end; `save`: how its
//!   disk becomes a tag.
//! * `images`: those to fetch before an instance needs them.
//! * [`record`]: what outlives the agent; `view`: what is reported; `board`: what is known now.
//! * [`rehearsal`]: all of it without driver, disk, clock and tasks, for simulations.
//!
//! Rules, in order of weight:
//! 1. Only an instance that the controller names is ever destroyed: `run == false`, or a VM left
//!    from an older generation of an instance that shall run.
//! 2. An end wins over a start that is under way.
//! 3. A save that is not wanted any more is broken off; its VM stays as it is.
//! 4. Nothing is started twice for one generation: once its start has come to an end (also a bad
//!    one), only a new generation starts it again. A restart is a new generation of the same disk.

mod board;
pub mod executor;
mod images;
pub mod record;
pub mod rehearsal;
mod save;
mod survey;
mod task;
#[cfg(test)]
mod transcript;
mod view;

use crate::wire::{DesiredInstance, DesiredSet};
use std::collections::{BTreeMap, BTreeSet};

/// What is under way for an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Being started (pull, VM, script), or started again.
    Start,
    /// A start is being broken off; what it made stays.
    Cancel,
    /// Its disk is being made a tag.
    Save,
    /// Being removed.
    Delete,
}

/// What this agent did or does for an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Doing {
    /// Generation acted on.
    pub generation: u64,
    /// Under way.
    pub job: Option<Job>,
    /// Its start came to an end at this generation.
    pub settled: bool,
    /// Removed at this generation.
    pub gone: bool,
    /// The newest save that has ended.
    pub saved: Option<String>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Start it, or go on with a start that a dead agent left half-done.
    Start(String),
    /// End its VM and start it again on its disk, or go on with that.
    Restart(String),
    /// Make a tag of its disk, or go on with that.
    Save(String),
    /// Break its start, or its save, off.
    Cancel(String),
    /// Break off what is under way, then remove everything of it.
    Delete(String),
    /// It is nobody's business any more: drop what is remembered.
    Forget(String),
}

/// Everything that must begin now. `vms`: generation of each VM that is there.
pub fn plan(
    desired: &DesiredSet,
    doing: &BTreeMap<String, Doing>,
    vms: &BTreeMap<String, u64>,
) -> Vec<Action> {
    let wanted: BTreeMap<&str, &DesiredInstance> = desired
        .instances
        .iter()
        .map(|i| (i.id.as_str(), i))
        .collect();
    let ids: BTreeSet<&str> = wanted
        .keys()
        .copied()
        .chain(doing.keys().map(String::as_str))
        .collect();
    ids.into_iter()
        .filter_map(|id| {
            let make = next(wanted.get(id).copied(), doing.get(id), vms.get(id).copied())?;
            Some(make(id.to_owned()))
        })
        .collect()
}

type MakeAction = fn(String) -> Action;

fn next(
    wanted: Option<&DesiredInstance>,
    doing: Option<&Doing>,
    vm: Option<u64>,
) -> Option<MakeAction> {
    match wanted {
        None => unwanted(doing?, vm),
        Some(wanted) if wanted.run && wanted.restart => shall_restart(wanted.generation, doing, vm),
        Some(wanted) if wanted.run && wanted.save.is_some() => shall_be_saved(wanted, doing),
        Some(wanted) if wanted.run && wanted.keep => shall_stay(doing?),
        Some(wanted) if wanted.run => shall_run(wanted.generation, doing, vm),
        Some(wanted) => shall_go(wanted.generation, doing),
    }
}

/// The controller no longer names it. A VM stays (and is reported); a start without purpose ends.
fn unwanted(doing: &Doing, vm: Option<u64>) -> Option<MakeAction> {
    match doing.job {
        Some(Job::Start) if !doing.settled => Some(Action::Cancel),
        Some(Job::Save) => Some(Action::Cancel),
        Some(_) => None,
        None if vm.is_none() => Some(Action::Forget),
        None => None,
    }
}

/// Failed or stopped, and its user may still want to look at it.
fn shall_stay(doing: &Doing) -> Option<MakeAction> {
    match doing.job {
        Some(Job::Start) if !doing.settled => Some(Action::Cancel),
        Some(Job::Save) => Some(Action::Cancel),
        _ => None,
    }
}

fn shall_run(generation: u64, doing: Option<&Doing>, vm: Option<u64>) -> Option<MakeAction> {
    let Some(doing) = doing else {
        // A VM of ours without a record: what an older generation left is replaced, else adopted.
        return match vm {
            Some(made_for) if made_for < generation => Some(Action::Delete),
            Some(made_for) if made_for > generation => None,
            _ => Some(Action::Start),
        };
    };
    match doing.job {
        Some(Job::Start) if doing.generation < generation => Some(Action::Delete),
        // It was given up; what it stands on runs on.
        Some(Job::Save) => Some(Action::Cancel),
        Some(_) => None,
        None if doing.generation > generation => None,
        None if doing.generation < generation => match vm {
            // A removal at an older generation left nothing behind.
            None if doing.gone => Some(Action::Start),
            _ => Some(Action::Delete),
        },
        None if doing.settled || doing.gone => None,
        None => Some(Action::Start),
    }
}

/// On its disk, once at this generation. Where nothing is left of it, trying says so.
fn shall_restart(generation: u64, doing: Option<&Doing>, vm: Option<u64>) -> Option<MakeAction> {
    let Some(doing) = doing else {
        let older = vm.is_none_or(|made_for| made_for <= generation);
        return older.then_some(Action::Restart);
    };
    match doing.job {
        _ if doing.generation > generation => None,
        // It is up, and a script that nobody waits for still runs.
        Some(Job::Start | Job::Save) if doing.generation < generation => Some(Action::Restart),
        Some(_) => None,
        None if doing.settled && doing.generation == generation => None,
        None => Some(Action::Restart),
    }
}

/// Once for each save, and not before the controller knows that we know of it.
fn shall_be_saved(wanted: &DesiredInstance, doing: Option<&Doing>) -> Option<MakeAction> {
    let order = wanted.save.as_ref().filter(|order| order.go)?;
    let Some(doing) = doing else {
        return Some(Action::Save);
    };
    match doing.job {
        _ if doing.generation > wanted.generation => None,
        // It is up, and a script that nobody waits for still runs.
        Some(Job::Start) if doing.settled => Some(Action::Save),
        Some(_) => None,
        None if doing.saved.as_ref() == Some(&order.id) => None,
        None => Some(Action::Save),
    }
}

fn shall_go(generation: u64, doing: Option<&Doing>) -> Option<MakeAction> {
    match doing {
        Some(doing) if doing.generation > generation => None,
        Some(doing) if doing.job == Some(Job::Delete) => None,
        Some(doing) if doing.gone && doing.generation == generation => None,
        _ => Some(Action::Delete),
    }
}
