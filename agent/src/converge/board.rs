//! Everything the agent knows about its instances now, behind one lock that is never held over an
//! await.

use super::record::{Record, Stage};
use super::{Action, Doing, Job, plan, view};
use crate::driver::VmSeen;
use crate::wire::{DesiredInstance, DesiredSet, ImageRef, Observed, VmFacts};
use std::collections::{BTreeMap, BTreeSet};
use tokio::task::JoinHandle;

/// How far a start is, before there is a record of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Step {
    /// Image or VM in the making.
    #[default]
    Starting,
    /// Part of the image that is here.
    Pulling(f32),
    /// Part of the saved disk that is pushed.
    Pushing(f32),
}

/// A task that works on an instance.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) kind: Job,
    /// Only the holder of the newest ticket may write to its instance.
    pub(super) ticket: u64,
    /// Absent until it is spawned, and in a rehearsal.
    pub(super) task: Option<JoinHandle<()>>,
}

/// A start that begins.
pub(super) struct Begun {
    pub(super) ticket: u64,
    /// What an earlier start of this generation left on record.
    pub(super) record: Option<Record>,
    /// The VM, if there is one already.
    pub(super) there: Option<VmFacts>,
}

/// A restart that begins.
pub(super) struct Again {
    pub(super) ticket: u64,
    /// Of the new generation; not on disk yet.
    pub(super) record: Record,
    /// What is to be broken off.
    pub(super) before: Option<JoinHandle<()>>,
}

/// A save that begins, or goes on.
pub(super) struct Saves {
    pub(super) ticket: u64,
    /// With the save; not on disk yet.
    pub(super) record: Record,
    /// What is to be broken off.
    pub(super) before: Option<JoinHandle<()>>,
}

/// A removal, or a start that is broken off, begins.
pub(super) struct Ending {
    pub(super) ticket: u64,
    /// What is to be broken off.
    pub(super) before: Option<JoinHandle<()>>,
    /// The generation that is gone in the end.
    pub(super) gone_at: u64,
}

/// One instance, as this agent deals with it.
#[derive(Debug, Default)]
pub(super) struct Local {
    pub(super) generation: u64,
    pub(super) job: Option<Running>,
    pub(super) record: Option<Record>,
    pub(super) step: Step,
    pub(super) gone: bool,
}

/// The board.
#[derive(Debug, Default)]
pub(super) struct Board {
    /// Newest accepted.
    pub(super) desired: Option<DesiredSet>,
    pub(super) locals: BTreeMap<String, Local>,
    /// As the driver last said, corrected by what our own tasks did since.
    pub(super) vms: BTreeMap<String, VmSeen>,
    /// The driver has been asked at least once: until then nothing may be begun.
    pub(super) surveyed: bool,
    clock: u64,
    /// When (by `clock`) the newest list that was taken was asked for.
    listed: u64,
    /// When (by `clock`) a task of ours last changed an instance's VM.
    touched: BTreeMap<String, u64>,
}

impl Board {
    pub(super) fn new(records: BTreeMap<String, Record>) -> Self {
        let locals = records.into_iter().map(|(id, record)| {
            let local = Local {
                generation: record.generation,
                record: Some(record),
                ..Local::default()
            };
            (id, local)
        });
        Self {
            locals: locals.collect(),
            ..Self::default()
        }
    }

    /// A number that no other call got.
    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Take over a desired set. `None`: it is older than the one in force and changes nothing; else
    /// whether anything is new in it.
    pub(super) fn accept(&mut self, set: DesiredSet) -> Option<bool> {
        if let Some(now) = &self.desired {
            if set.generation < now.generation {
                return None;
            }
            if *now == set {
                return Some(false);
            }
        }
        self.desired = Some(set);
        Some(true)
    }

    /// Whatever must begin now. Nothing before the driver was asked and a set was accepted.
    pub(super) fn actions(&self) -> Vec<Action> {
        match &self.desired {
            Some(desired) if self.surveyed => plan(desired, &self.doing(), &self.generations()),
            _ => Vec::new(),
        }
    }

    /// The images of the set in force. Nothing before the driver was asked: what its VMs stand on must be
    /// known before there is room to be made.
    pub(super) fn images(&self) -> Option<Vec<ImageRef>> {
        let desired = self.desired.as_ref().filter(|_| self.surveyed)?;
        Some(desired.images.clone())
    }

    /// Images that the set in force wants dropped; nothing before it is known what VMs stand on.
    pub(super) fn evict(&self) -> Vec<ImageRef> {
        let desired = self.desired.as_ref().filter(|_| self.surveyed);
        desired.map_or_else(Vec::new, |d| d.evict.clone())
    }

    /// An instance of the set in force.
    pub(super) fn wish(&self, id: &str) -> Option<&DesiredInstance> {
        let desired = self.desired.as_ref()?;
        desired.instances.iter().find(|i| i.id == id)
    }

    /// A start begins; its task is told by [`Board::employ`].
    pub(super) fn begin_start(&mut self, wish: &DesiredInstance) -> Begun {
        let ticket = self.tick();
        let there = self.vms.get(&wish.id).map(|vm| vm.facts.clone());
        let record = self.locals.remove(&wish.id).and_then(|l| l.record);
        let local = Local {
            generation: wish.generation,
            job: Some(Running {
                kind: Job::Start,
                ticket,
                task: None,
            }),
            record: record.clone(),
            step: Step::Starting,
            gone: false,
        };
        self.locals.insert(wish.id.clone(), local);
        Begun {
            ticket,
            record,
            there,
        }
    }

    /// A restart begins. From now on the board speaks of it, and not of what was up before.
    pub(super) fn begin_restart(&mut self, wish: &DesiredInstance) -> Again {
        let ticket = self.tick();
        let old = self.locals.remove(&wish.id).unwrap_or_default();
        let record = old
            .record
            .unwrap_or_else(|| Record::begin(&wish.id, 0, &wish.image))
            .again(wish.generation);
        let local = Local {
            generation: wish.generation,
            job: Some(Running {
                kind: Job::Start,
                ticket,
                task: None,
            }),
            record: Some(record.clone()),
            step: Step::Starting,
            gone: false,
        };
        self.locals.insert(wish.id.clone(), local);
        Again {
            ticket,
            record,
            before: old.job.and_then(|j| j.task),
        }
    }

    /// A save begins. The VM is still what it was.
    pub(super) fn begin_save(&mut self, wish: &DesiredInstance, save: &str) -> Saves {
        let ticket = self.tick();
        let old = self.locals.remove(&wish.id).unwrap_or_default();
        let record = old.record.unwrap_or_else(|| {
            // It was lost; that the controller wants it saved says that it was up.
            let mut record = Record::begin(&wish.id, wish.generation, &wish.image);
            record.stage = Stage::Up;
            record.script_begun = true;
            record
        });
        let record = record.saving(save);
        let local = Local {
            generation: wish.generation,
            job: Some(Running {
                kind: Job::Save,
                ticket,
                task: None,
            }),
            record: Some(record.clone()),
            step: Step::Starting,
            gone: false,
        };
        self.locals.insert(wish.id.clone(), local);
        Saves {
            ticket,
            record,
            before: old.job.and_then(|j| j.task),
        }
    }

    /// A removal begins.
    pub(super) fn begin_delete(&mut self, wish: &DesiredInstance) -> Ending {
        let ticket = self.tick();
        // A removal that only makes way for a start leaves everything before that start gone.
        let gone_at = if wish.run {
            wish.generation.saturating_sub(1)
        } else {
            wish.generation
        };
        let local = self.locals.entry(wish.id.clone()).or_default();
        let before = local.job.take().and_then(|j| j.task);
        local.generation = gone_at;
        local.job = Some(Running {
            kind: Job::Delete,
            ticket,
            task: None,
        });
        Ending {
            ticket,
            before,
            gone_at,
        }
    }

    /// A start is broken off, or what is remembered is dropped.
    pub(super) fn begin_forget(&mut self, id: &str) -> Option<Ending> {
        let ticket = self.tick();
        let local = self.locals.get_mut(id)?;
        let before = local.job.take().and_then(|j| j.task);
        local.job = Some(Running {
            kind: Job::Cancel,
            ticket,
            task: None,
        });
        Some(Ending {
            ticket,
            before,
            gone_at: local.generation,
        })
    }

    /// Who carries out what has begun.
    pub(super) fn employ(&mut self, id: &str, task: JoinHandle<()>) {
        if let Some(job) = self.locals.get_mut(id).and_then(|l| l.job.as_mut()) {
            job.task = Some(task);
        }
    }

    /// Nothing of the instance is left.
    pub(super) fn removed(&mut self, id: &str, ticket: u64, gone_at: u64) {
        if let Some(local) = self.holder(id, ticket) {
            local.generation = gone_at;
            local.record = None;
            local.gone = true;
        }
    }

    /// No VM came of it: it is not remembered either.
    pub(super) fn forgotten(&mut self, id: &str, ticket: u64) {
        if self.holder(id, ticket).is_some() {
            self.locals.remove(id);
        }
    }

    /// The task is at its end: the core may decide anew.
    pub(super) fn release(&mut self, id: &str, ticket: u64) {
        if let Some(local) = self.holder(id, ticket) {
            local.job = None;
        }
    }

    /// What is on disk from now on.
    pub(super) fn show(&mut self, ticket: u64, record: &Record) {
        if let Some(local) = self.holder(&record.id, ticket) {
            local.record = Some(record.clone());
        }
    }

    /// How much of the image is here.
    pub(super) fn pulling(&mut self, id: &str, ticket: u64, part: f32) {
        if let Some(local) = self.holder(id, ticket) {
            local.step = Step::Pulling(part);
        }
    }

    /// How much of the saved disk is pushed.
    pub(super) fn pushing(&mut self, id: &str, ticket: u64, part: f32) {
        if let Some(local) = self.holder(id, ticket) {
            local.step = Step::Pushing(part);
        }
    }

    /// What the pure core needs to know.
    pub(super) fn doing(&self) -> BTreeMap<String, Doing> {
        let doing = |local: &Local| Doing {
            generation: local.generation,
            job: local.job.as_ref().map(|j| j.kind),
            settled: local.record.as_ref().is_some_and(Record::settled),
            gone: local.gone,
            saved: local
                .record
                .as_ref()
                .and_then(Record::saved)
                .map(str::to_owned),
        };
        let all = self.locals.iter();
        all.map(|(id, local)| (id.clone(), doing(local))).collect()
    }

    /// The same of the VMs.
    pub(super) fn generations(&self) -> BTreeMap<String, u64> {
        let all = self.vms.iter();
        all.map(|(id, vm)| (id.clone(), vm.generation)).collect()
    }

    /// The instance, if `ticket` still has the say over it.
    pub(super) fn holder(&mut self, id: &str, ticket: u64) -> Option<&mut Local> {
        let local = self.locals.get_mut(id)?;
        let holds = local.job.as_ref().is_some_and(|j| j.ticket == ticket);
        holds.then_some(local)
    }

    /// A task of ours made (or changed) a VM.
    pub(super) fn vm_is(&mut self, vm: VmSeen) {
        let now = self.tick();
        self.touched.insert(vm.id.clone(), now);
        self.vms.insert(vm.id.clone(), vm);
    }

    /// A task of ours removed a VM.
    pub(super) fn vm_is_gone(&mut self, id: &str) {
        let now = self.tick();
        self.touched.insert(id.to_owned(), now);
        self.vms.remove(id);
    }

    /// The driver's list, asked for at `asked`. What our tasks changed since then is newer, and so is
    /// what a list says that was asked for later but came sooner. Is there news?
    pub(super) fn surveyed(&mut self, asked: u64, list: Vec<VmSeen>) -> bool {
        if asked < self.listed {
            return false;
        }
        self.listed = asked;
        self.touched.retain(|_, at| *at > asked);
        let newer = &self.touched;
        let mut vms: BTreeMap<String, VmSeen> = list
            .into_iter()
            .filter(|vm| !newer.contains_key(&vm.id))
            .map(|vm| (vm.id.clone(), vm))
            .collect();
        for id in newer.keys() {
            if let Some(vm) = self.vms.remove(id) {
                vms.insert(id.clone(), vm);
            }
        }
        let news = !self.surveyed || !same(&self.vms, &vms);
        self.vms = vms;
        self.surveyed = true;
        news
    }

    /// Everything there is to report. Empty until the driver was asked for the first time.
    pub(super) fn observe(&self) -> Vec<Observed> {
        if !self.surveyed {
            return Vec::new();
        }
        let wanted: BTreeMap<&str, _> = self
            .desired
            .iter()
            .flat_map(|set| &set.instances)
            .map(|i| (i.id.as_str(), i))
            .collect();
        // Of what is to be kept it is news as well that there is nothing at all.
        let kept = wanted.values().filter(|w| w.run && w.keep);
        let ids: BTreeSet<&str> = kept
            .map(|w| w.id.as_str())
            .chain(self.locals.keys().map(String::as_str))
            .chain(self.vms.keys().map(String::as_str))
            .collect();
        let seen = ids.into_iter().filter_map(|id| {
            let wanted = wanted.get(id).copied();
            view::observe(id, wanted, self.locals.get(id), self.vms.get(id))
        });
        view::bounded(seen.collect())
    }

    /// Manifests that VMs stand on; `None` if that cannot be said.
    pub(super) fn manifests_in_use(&self) -> Option<BTreeSet<String>> {
        if !self.surveyed {
            return None;
        }
        let record = |id: &str| self.locals.get(id).and_then(|l| l.record.as_ref());
        if self.vms.keys().any(|id| record(id).is_none()) {
            return None;
        }
        let records = self.locals.values().filter_map(|l| l.record.as_ref());
        Some(records.map(|r| r.image.manifest.clone()).collect())
    }
}

fn same(a: &BTreeMap<String, VmSeen>, b: &BTreeMap<String, VmSeen>) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|((_, a), (_, b))| {
            a.id == b.id
                && a.generation == b.generation
                && a.facts == b.facts
                && a.message == b.message
        })
}
