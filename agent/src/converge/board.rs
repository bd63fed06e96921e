//! Everything the agent knows about its instances now, behind one lock that is never held over an
//! await.

use super::record::Record;
use super::{Doing, Job, view};
use crate::driver::VmSeen;
use crate::wire::{DesiredSet, Observed};
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
}

/// A task that works on an instance.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) kind: Job,
    /// Only the holder of the newest ticket may write to its instance.
    pub(super) ticket: u64,
    pub(super) task: JoinHandle<()>,
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

    /// What the pure core needs to know.
    pub(super) fn doing(&self) -> BTreeMap<String, Doing> {
        let doing = |local: &Local| Doing {
            generation: local.generation,
            job: local.job.as_ref().map(|j| j.kind),
            settled: local.record.as_ref().is_some_and(Record::settled),
            gone: local.gone,
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

    /// The driver's list, asked for at `asked`. What our tasks changed since then is newer.
    pub(super) fn surveyed(&mut self, asked: u64, list: Vec<VmSeen>) -> bool {
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

    /// Everything there is to report.
    pub(super) fn observe(&self) -> Vec<Observed> {
        let wanted: BTreeMap<&str, _> = self
            .desired
            .iter()
            .flat_map(|set| &set.instances)
            .map(|i| (i.id.as_str(), i))
            .collect();
        let ids: BTreeSet<&String> = self.locals.keys().chain(self.vms.keys()).collect();
        ids.into_iter()
            .filter_map(|id| {
                let wanted = wanted.get(id.as_str()).copied();
                view::observe(id, wanted, self.locals.get(id), self.vms.get(id))
            })
            .collect()
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
