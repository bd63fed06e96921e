//! The executor rehearsed: the same core, board, records and view, but no driver, disk, clock or task.
//! Whoever drives it says when a piece of work gets one step further, and how that step ends; between
//! any two steps the agent may die. For simulations of thousands of nodes in virtual time.
//!
//! The order of steps is that of `task` and must stay so: what is on disk before what is done, what is
//! done before what is said; of saves that of `save`. Scripts are not rehearsed.

use super::Action;
use super::board::Board;
use super::record::{Record, Saving, SavingEnd, Stage};
use super::task::resume;
use crate::driver::VmSeen;
use crate::wire::{DesiredInstance, DesiredSet, Observed, VmFacts};
use std::collections::BTreeMap;

/// How a step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Well.
    Well,
    /// This node cannot; another might.
    Busy,
    /// It cannot work anywhere.
    Failed,
}

/// What a step did to the VMs that are really there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    /// Nothing.
    Nothing,
    /// One is there that was not.
    Made,
    /// One is no longer there.
    Removed,
    /// Nothing, but a disk is now with a registry, which makes a tag of it for the save of the instance.
    Pushed,
}

/// A piece of work between two steps.
#[derive(Debug)]
enum Work {
    Start(Box<Start>),
    Save(Box<Save>),
    Delete {
        ticket: u64,
        gone_at: u64,
        at: Removal,
    },
    Forget {
        ticket: u64,
        looked: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Removal {
    Vm,
    Record,
}

#[derive(Debug)]
struct Start {
    ticket: u64,
    wish: DesiredInstance,
    record: Record,
    /// Its VM is started again: whatever goes wrong, it stays.
    again: bool,
    next: Next,
}

#[derive(Debug)]
struct Save {
    ticket: u64,
    id: String,
    record: Record,
    next: SaveNext,
}

/// The next step of a save.
#[derive(Debug)]
enum SaveNext {
    /// Whatever is done while the VM runs.
    Prepare,
    /// Write down that it may be stopped.
    Stopping,
    Stop,
    Build,
    Push,
    /// See the tag visible.
    Wait,
    Settle(SavingEnd),
}

/// The next step of a start.
#[derive(Debug)]
enum Next {
    Pull,
    Write,
    Make,
    /// End the VM and start it again.
    Again,
    Say,
    Ready,
    /// Everything of it must go; then it is settled.
    Remove(Stage),
    Stop(Stage),
    Settle(Stage),
}

/// One agent with its disk and its VMs.
#[derive(Debug, Default)]
pub struct Rehearsal {
    board: Board,
    /// What is on its disk.
    records: BTreeMap<String, Record>,
    /// What is really there.
    vms: BTreeMap<String, VmSeen>,
    work: BTreeMap<String, Work>,
}

impl Rehearsal {
    /// See `Executor::accept`.
    pub fn accept(&mut self, set: DesiredSet) -> bool {
        self.board.accept(set).is_some()
    }

    /// Generation of the set in force, 0 before there is one.
    pub fn generation(&self) -> u64 {
        self.board.desired.as_ref().map_or(0, |d| d.generation)
    }

    /// The driver is asked what is there.
    pub fn survey(&mut self) {
        let asked = self.board.tick();
        let list = self.vms.values().cloned().collect();
        self.board.surveyed(asked, list);
    }

    /// Whatever must begin now, begins.
    pub fn act(&mut self) {
        for action in self.board.actions() {
            match action {
                Action::Start(id) => self.start(&id),
                Action::Restart(id) => self.start_again(&id),
                Action::Save(id) => self.save(&id),
                Action::Delete(id) => self.delete(&id),
                Action::Cancel(id) | Action::Forget(id) => self.forget(&id),
            }
        }
    }

    fn start(&mut self, id: &str) {
        let Some(wish) = self.board.wish(id).cloned() else {
            return;
        };
        let begun = self.board.begin_start(&wish);
        let mut record = resume(&wish, begun.record, begun.there.is_some());
        let next = match begun.there {
            Some(facts) if facts.status == "running" => {
                record.vm = Some(facts);
                Next::Ready
            }
            Some(facts) => {
                record.vm = Some(facts);
                let why = "the VM stopped while it was being started";
                Next::Stop(Stage::Failed(why.to_owned()))
            }
            None if record.script_begun => {
                let why = "the VM was lost while it was being started";
                Next::Remove(Stage::Failed(why.to_owned()))
            }
            None => Next::Pull,
        };
        let start = Start {
            ticket: begun.ticket,
            wish,
            record,
            again: false,
            next,
        };
        self.work
            .insert(id.to_owned(), Work::Start(Box::new(start)));
    }

    fn start_again(&mut self, id: &str) {
        let Some(wish) = self.board.wish(id).cloned() else {
            return;
        };
        let again = self.board.begin_restart(&wish);
        let start = Start {
            ticket: again.ticket,
            wish,
            record: again.record,
            again: true,
            next: Next::Write,
        };
        self.work
            .insert(id.to_owned(), Work::Start(Box::new(start)));
    }

    fn save(&mut self, id: &str) {
        let Some(wish) = self.board.wish(id).cloned() else {
            return;
        };
        let Some(order) = &wish.save else {
            return;
        };
        let begun = self.board.begin_save(&wish, &order.id);
        let saving = begun.record.saving.as_ref();
        let next = match saving.is_some_and(|s| s.stopping) {
            true => SaveNext::Stop,
            false => SaveNext::Prepare,
        };
        let save = Save {
            ticket: begun.ticket,
            id: id.to_owned(),
            record: begun.record,
            next,
        };
        self.work.insert(id.to_owned(), Work::Save(Box::new(save)));
    }

    /// The save of an instance that waits for its tag to be visible.
    pub fn awaited(&self, id: &str) -> Option<&str> {
        match self.work.get(id) {
            Some(Work::Save(save)) if matches!(save.next, SaveNext::Wait) => {
                Some(save.record.saving.as_ref()?.id.as_str())
            }
            _ => None,
        }
    }

    fn step_save(&mut self, mut save: Save, how: How) -> Did {
        let mut did = Did::Nothing;
        let failed = |why: &str| SaveNext::Settle(SavingEnd::Failed(why.to_owned()));
        let now = std::mem::replace(&mut save.next, SaveNext::Prepare);
        save.next = match now {
            SaveNext::Prepare if how == How::Well => SaveNext::Stopping,
            SaveNext::Prepare => failed("script exit code 1"),
            SaveNext::Stopping => {
                self.note_saving(&mut save, |saving| saving.stopping = true);
                SaveNext::Stop
            }
            SaveNext::Stop => {
                self.stop_vm(&save.id);
                SaveNext::Build
            }
            SaveNext::Build if !self.vms.contains_key(&save.id) => failed("there is no VM"),
            SaveNext::Build if how == How::Well => {
                self.note_saving(&mut save, |s| s.built = Some("qcow2".to_owned()));
                SaveNext::Push
            }
            SaveNext::Build => failed("no room"),
            SaveNext::Push => {
                did = Did::Pushed;
                SaveNext::Wait
            }
            SaveNext::Wait => match how {
                How::Well => SaveNext::Settle(SavingEnd::Pushed),
                How::Busy => SaveNext::Push,
                How::Failed => failed("the tag is taken"),
            },
            SaveNext::Settle(end) => {
                self.note_saving(&mut save, |saving| saving.end = Some(end));
                self.board.release(&save.id, save.ticket);
                return did;
            }
        };
        self.work
            .insert(save.id.clone(), Work::Save(Box::new(save)));
        did
    }

    /// On disk, then on the board.
    fn note_saving(&mut self, save: &mut Save, change: impl FnOnce(&mut Saving)) {
        if let Some(saving) = &mut save.record.saving {
            change(saving);
        }
        self.records.insert(save.id.clone(), save.record.clone());
        self.board.show(save.ticket, &save.record);
    }

    fn delete(&mut self, id: &str) {
        let Some(wish) = self.board.wish(id).cloned() else {
            return;
        };
        let ending = self.board.begin_delete(&wish);
        let work = Work::Delete {
            ticket: ending.ticket,
            gone_at: ending.gone_at,
            at: Removal::Vm,
        };
        self.work.insert(id.to_owned(), work);
    }

    fn forget(&mut self, id: &str) {
        let Some(ending) = self.board.begin_forget(id) else {
            return;
        };
        let begun = self.work.contains_key(id);
        let work = Work::Forget {
            ticket: ending.ticket,
            looked: !begun,
        };
        self.work.insert(id.to_owned(), work);
    }

    /// Instances that are worked on.
    pub fn busy(&self) -> impl ExactSizeIterator<Item = &str> {
        self.work.keys().map(String::as_str)
    }

    /// One step of the work on an instance.
    pub fn step(&mut self, id: &str, how: How) -> Did {
        match self.work.remove(id) {
            None => Did::Nothing,
            Some(Work::Start(start)) => self.step_start(*start, how),
            Some(Work::Save(save)) => self.step_save(*save, how),
            Some(Work::Delete {
                ticket,
                gone_at,
                at: Removal::Vm,
            }) => {
                if how != How::Well {
                    // Tried again until it is gone.
                    let at = Removal::Vm;
                    let again = Work::Delete {
                        ticket,
                        gone_at,
                        at,
                    };
                    self.work.insert(id.to_owned(), again);
                    return Did::Nothing;
                }
                let did = self.remove_vm(id);
                let at = Removal::Record;
                let next = Work::Delete {
                    ticket,
                    gone_at,
                    at,
                };
                self.work.insert(id.to_owned(), next);
                did
            }
            Some(Work::Delete {
                ticket, gone_at, ..
            }) => {
                self.records.remove(id);
                self.board.removed(id, ticket, gone_at);
                self.board.release(id, ticket);
                Did::Nothing
            }
            Some(Work::Forget { ticket, looked }) => {
                if !looked {
                    self.survey();
                }
                if !self.board.vms.contains_key(id) {
                    self.records.remove(id);
                    self.board.forgotten(id, ticket);
                }
                self.board.release(id, ticket);
                Did::Nothing
            }
        }
    }

    fn step_start(&mut self, mut start: Start, how: How) -> Did {
        let id = start.wish.id.clone();
        let mut did = Did::Nothing;
        let bad = match how {
            How::Well => None,
            How::Busy => Some(Stage::Rejected("this node is busy".to_owned())),
            How::Failed => Some(Stage::Failed("it cannot work".to_owned())),
        };
        let now = std::mem::replace(&mut start.next, Next::Pull);
        let next = match (now, bad) {
            (Next::Pull, None) if start.wish.image.manifest.is_empty() => {
                Next::Remove(Stage::Failed("its image is gone".to_owned()))
            }
            (Next::Pull | Next::Make, Some(bad)) => Next::Remove(bad),
            // Tried again for a while; nothing of it goes.
            (Next::Again | Next::Ready, Some(Stage::Rejected(_))) if start.again => Next::Again,
            (Next::Again | Next::Ready, Some(bad)) if start.again => Next::Settle(bad),
            (Next::Again, _) if !self.vms.contains_key(&id) => {
                Next::Settle(Stage::Failed("there is no VM".to_owned()))
            }
            (Next::Again, _) => {
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.generation = start.record.generation;
                    vm.facts.status = "running".to_owned();
                }
                Next::Say
            }
            (Next::Ready, None) if start.again && !self.runs(&id) => {
                Next::Settle(Stage::Failed("the VM does not run".to_owned()))
            }
            (Next::Ready, Some(bad @ Stage::Rejected(_))) => Next::Remove(bad),
            (Next::Ready, Some(bad)) => Next::Stop(bad),
            (Next::Pull, None) => {
                self.board.pulling(&id, start.ticket, 0.5);
                Next::Write
            }
            (Next::Write, _) => {
                self.write(&start);
                if start.again { Next::Again } else { Next::Make }
            }
            (Next::Make, None) => {
                did = self.make_vm(&start);
                Next::Say
            }
            (Next::Say, _) => {
                start.record.vm = self.vms.get(&id).map(|vm| vm.facts.clone());
                if let Some(vm) = self.vms.get(&id) {
                    self.board.vm_is(vm.clone());
                }
                Next::Ready
            }
            (Next::Ready, None) if !self.runs(&id) => {
                let why = "the VM does not run".to_owned();
                Next::Stop(Stage::Failed(why))
            }
            (Next::Ready, None) => {
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.facts.ip = "10.0.2.15".to_owned();
                    start.record.vm = Some(vm.facts.clone());
                    self.board.vm_is(vm.clone());
                }
                Next::Settle(Stage::Up)
            }
            (Next::Remove(stage), _) => {
                did = self.remove_vm(&id);
                Next::Settle(stage)
            }
            (Next::Stop(stage), _) => {
                self.stop_vm(&id);
                Next::Settle(stage)
            }
            (Next::Settle(stage), _) => {
                start.record.stage = stage;
                self.write(&start);
                self.board.release(&id, start.ticket);
                return did;
            }
        };
        start.next = next;
        self.work.insert(id, Work::Start(Box::new(start)));
        did
    }

    /// On disk, then on the board.
    fn write(&mut self, start: &Start) {
        self.records
            .insert(start.wish.id.clone(), start.record.clone());
        self.board.show(start.ticket, &start.record);
    }

    fn runs(&self, id: &str) -> bool {
        let vm = self.vms.get(id);
        vm.is_some_and(|vm| vm.facts.status == "running")
    }

    /// A VM that is there stays as it is.
    fn make_vm(&mut self, start: &Start) -> Did {
        let wish = &start.wish;
        if self.vms.contains_key(&wish.id) {
            return Did::Nothing;
        }
        let vm = VmSeen {
            id: wish.id.clone(),
            generation: wish.generation,
            facts: VmFacts {
                uuid: format!("vm-{}-{}", wish.id, wish.generation),
                status: "running".to_owned(),
                ..VmFacts::default()
            },
            message: String::new(),
        };
        self.vms.insert(wish.id.clone(), vm);
        Did::Made
    }

    fn remove_vm(&mut self, id: &str) -> Did {
        let did = match self.vms.remove(id) {
            Some(_) => Did::Removed,
            None => Did::Nothing,
        };
        self.board.vm_is_gone(id);
        did
    }

    fn stop_vm(&mut self, id: &str) {
        if let Some(vm) = self.vms.get_mut(id) {
            vm.facts.status = "stopped".to_owned();
            self.board.vm_is(vm.clone());
        }
    }

    /// Everything there is to report.
    pub fn observe(&self) -> Vec<Observed> {
        self.board.observe()
    }

    /// VMs that are really there: instance, generation, and whether it runs.
    pub fn vms(&self) -> impl Iterator<Item = (&str, u64, bool)> {
        let all = self.vms.iter();
        all.map(|(id, vm)| (id.as_str(), vm.generation, vm.facts.status == "running"))
    }

    /// A VM's process dies. Found out at the next survey.
    pub fn kill_vm(&mut self, id: &str) {
        if let Some(vm) = self.vms.get_mut(id) {
            vm.facts.status = "failed".to_owned();
            vm.message = "the VM was killed".to_owned();
        }
    }

    /// Somebody removes a VM behind the agent's back.
    pub fn lose_vm(&mut self, id: &str) {
        self.vms.remove(id);
    }

    /// The agent dies and starts again: what is on disk and what runs stays.
    pub fn restart(&mut self) {
        self.work.clear();
        self.board = Board::new(self.records.clone());
    }

    /// The machine dies and starts again: what is on disk stays, no VM runs.
    pub fn reboot(&mut self) {
        for vm in self.vms.values_mut() {
            vm.facts.status = "stopped".to_owned();
        }
        self.restart();
    }
}
