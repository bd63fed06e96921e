//! What is reported of one instance: pure.

use super::Job;
use super::board::{Local, Step};
use super::record::{SavingEnd, Stage};
use crate::driver::VmSeen;
use crate::wire::{DesiredInstance, Observed, SaveOrder, SaveSeen, VmFacts};

/// The observation, if there is something to say: while something is on its way out, nothing is.
pub(super) fn observe(
    id: &str,
    wanted: Option<&DesiredInstance>,
    local: Option<&Local>,
    vm: Option<&VmSeen>,
) -> Option<Observed> {
    if let Some(wish) = wanted.filter(|w| w.run)
        && let Some(order) = &wish.save
    {
        return Some(saved(wish, order, local, vm));
    }
    if let Some(kept) = wanted.filter(|w| w.run && w.keep && !w.restart) {
        return kept_as_is(kept, local, vm);
    }
    let shall_go = wanted.is_some_and(|w| !w.run);
    let Some(local) = local else {
        return (!shall_go).then(|| unknown(id, vm)).flatten();
    };
    if local.gone {
        return shall_go.then(|| say(id, local.generation, "gone", ""));
    }
    if shall_go || local.job.as_ref().is_some_and(|j| j.kind == Job::Delete) {
        return None;
    }
    let Some(record) = &local.record else {
        return Some(match local.step {
            Step::Pulling(progress) => Observed {
                progress,
                ..say(id, local.generation, "pulling", "")
            },
            Step::Starting | Step::Pushing(_) => say(id, local.generation, "starting", ""),
        });
    };
    let (phase, message) = match (&record.stage, vm) {
        (Stage::Failed(why), _) => ("failed", why.as_str()),
        (Stage::Rejected(why), _) => ("rejected", why.as_str()),
        (Stage::Begun, _) => ("starting", ""),
        (Stage::Up, None) => ("failed", "the VM is no longer on its node"),
        (Stage::Up, Some(vm)) => by_status(vm),
    };
    let last = || {
        let status = if phase == "failed" && record.stage == Stage::Up {
            "failed"
        } else {
            "stopped"
        };
        let vm = record.vm.clone()?;
        Some(VmFacts {
            status: status.to_owned(),
            ..vm
        })
    };
    Some(Observed {
        vm: vm.map(|v| v.facts.clone()).or_else(last),
        script: record.script.clone(),
        ..say(id, local.generation, phase, message)
    })
}

/// A VM whose disk becomes a tag, and how far that is. That it does not run is no news once it may have been
/// stopped for that.
fn saved(
    wish: &DesiredInstance,
    order: &SaveOrder,
    local: Option<&Local>,
    vm: Option<&VmSeen>,
) -> Observed {
    let record = local.and_then(|l| l.record.as_ref());
    let saving = record.and_then(|r| r.saving.as_ref());
    let saving = saving.filter(|saving| saving.id == order.id);
    let stopping = saving.is_some_and(|s| s.stopping);
    let (phase, message) = match vm {
        None => ("gone", ""),
        Some(_) if stopping => ("stopped", ""),
        Some(vm) => by_status(vm),
    };
    let (said, why) = match saving.and_then(|s| s.end.as_ref()) {
        None => ("begun", ""),
        Some(SavingEnd::Pushed) => ("pushed", ""),
        Some(SavingEnd::Failed(why)) => ("failed", why.as_str()),
    };
    let told = saving.and_then(|s| s.script.clone());
    let progress = match local.map(|l| l.step) {
        Some(Step::Pushing(part)) => part,
        _ => 0.0,
    };
    Observed {
        vm: vm.map(|vm| vm.facts.clone()),
        script: record.and_then(|r| r.script.clone()),
        save: Some(SaveSeen {
            id: order.id.clone(),
            phase: said.to_owned(),
            message: why.to_owned(),
            stopped: stopping,
            script: told.filter(|_| !order.script_known),
            progress,
        }),
        ..say(&wish.id, wish.generation, phase, message)
    }
}

/// Bytes of output of saves' scripts in one report, beyond the first: as JSON they may be six times as many, and a
/// member reads no report over 64 MiB.
const OUTPUTS_MAX: usize = 6 << 20;

/// The same with no more output than a member reads. A save whose output has to wait for the next report is not
/// said to have ended before: the output of one that has is not taken any more.
pub(super) fn bounded(mut all: Vec<Observed>) -> Vec<Observed> {
    let mut told = 0;
    for save in all.iter_mut().filter_map(|seen| seen.save.as_mut()) {
        let Some(script) = &save.script else {
            continue;
        };
        let bytes = script.stdout.len() + script.stderr.len();
        if told == 0 || told + bytes <= OUTPUTS_MAX {
            told += bytes;
            continue;
        }
        save.script = None;
        "begun".clone_into(&mut save.phase);
        save.message.clear();
    }
    all
}

/// What is there, told at the generation at which it was last named.
fn kept_as_is(
    wanted: &DesiredInstance,
    local: Option<&Local>,
    vm: Option<&VmSeen>,
) -> Option<Observed> {
    if local.is_some_and(|l| l.job.is_some()) {
        return None;
    }
    let script = local.and_then(|l| l.record.as_ref()?.script.clone());
    let Some(vm) = vm else {
        return Some(Observed {
            script,
            ..say(&wanted.id, wanted.generation, "gone", "")
        });
    };
    let (phase, message) = by_status(vm);
    Some(Observed {
        vm: Some(vm.facts.clone()),
        script,
        ..say(&wanted.id, wanted.generation, phase, message)
    })
}

/// A VM that nobody named since this agent started.
fn unknown(id: &str, vm: Option<&VmSeen>) -> Option<Observed> {
    let vm = vm?;
    let (phase, message) = by_status(vm);
    Some(Observed {
        vm: Some(vm.facts.clone()),
        ..say(id, vm.generation, phase, message)
    })
}

fn by_status(vm: &VmSeen) -> (&'static str, &str) {
    match vm.facts.status.as_str() {
        "running" => ("running", ""),
        "failed" if vm.message.is_empty() => ("failed", "the VM failed"),
        "failed" => ("failed", &vm.message),
        _ => ("stopped", &vm.message),
    }
}

fn say(id: &str, generation: u64, phase: &str, message: &str) -> Observed {
    Observed {
        id: id.to_owned(),
        generation,
        phase: phase.to_owned(),
        message: message.to_owned(),
        ..Observed::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ScriptResult;

    #[test]
    fn outputs_that_do_not_fit_wait_for_the_next_report() {
        let seen = |bytes: usize| Observed {
            save: Some(SaveSeen {
                phase: "failed".to_owned(),
                message: "script exit code 1".to_owned(),
                script: Some(ScriptResult {
                    stdout: "\0".repeat(bytes),
                    ..ScriptResult::default()
                }),
                ..SaveSeen::default()
            }),
            ..Observed::default()
        };
        let told = |all: &[usize]| -> Vec<bool> {
            let all = bounded(all.iter().map(|bytes| seen(*bytes)).collect());
            let saves = all.into_iter().filter_map(|seen| seen.save);
            let told = saves.map(|save| {
                let whole = save.script.is_some();
                assert_eq!(save.phase, if whole { "failed" } else { "begun" });
                assert_eq!(save.message.is_empty(), !whole);
                whole
            });
            told.collect()
        };
        let mib = 1 << 20;
        assert_eq!(told(&[2 * mib; 4]), [true, true, true, false]);
        assert_eq!(told(&[mib, 6 * mib, mib]), [true, false, true]);
        assert_eq!(
            told(&[9 * mib, 0, 1]),
            [true, false, false],
            "one always goes"
        );
    }
}
