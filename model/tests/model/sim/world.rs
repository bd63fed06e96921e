//! Time and what happens in it. Each event is one step; equal seeds have equal steps.

use super::cluster::{Cluster, JUDGE_EVERY_MS};
use super::fleet::{Machine, Session, line, observation, save_report};
use super::truth::{self, Truth};
use super::{Shape, oracle, saves};
use crate::sample::Random;
use mainstay_agent::converge::rehearsal::{Did, How};
use mainstay_agent::wire::DesiredSet;
use mainstay_model::instance::Observation;
use mainstay_model::save::SaveReport;
use mainstay_model::{Command, Envelope, Outcome, SaveId, TemplateId, invariants, plan};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Milliseconds that an ended instance is kept.
const RETENTION_MS: u64 = 10_000;
/// How long nodes have to fetch what is distributed.
const PATIENCE_MS: u64 = 60_000;
/// Decisions in one `Bind`.
const BIND_MAX: usize = 512;
/// Within which everything must come to rest once the faults have stopped.
const CALM_MS: u64 = 400_000;
/// Longest that a proposal is tried.
const PROPOSE_MS: u64 = 9_000;

#[derive(Debug)]
pub enum Event {
    Commit(Box<Envelope>),
    CatchUp,
    Schedule {
        term: u64,
    },
    Judge {
        term: u64,
    },
    Expire {
        term: u64,
    },
    Connect {
        node: usize,
        life: u64,
    },
    Beat {
        node: usize,
        session: u64,
        once: bool,
    },
    Work {
        node: usize,
        life: u64,
    },
    Survey {
        node: usize,
        life: u64,
    },
    Line {
        node: usize,
        session: u64,
        set: Box<DesiredSet>,
    },
    Report {
        node: usize,
        behind: bool,
        seen: Vec<Observation>,
        saves: Vec<SaveReport>,
        images: BTreeSet<(TemplateId, u32)>,
    },
    People,
    Fault,
}

pub struct World {
    pub random: Random,
    pub shape: Shape,
    pub now: u64,
    pub cluster: Cluster,
    pub fleet: Vec<Machine>,
    pub truth: Truth,
    pub tally: BTreeMap<&'static str, u64>,
    /// The faults have stopped.
    pub calm: bool,
    /// Made up so far: instances, and tags.
    pub made: u64,
    events: BTreeMap<(u64, u64), Event>,
    sequence: u64,
    /// Saves whose disk no member takes, as their agents were answered.
    pub refused: BTreeSet<SaveId>,
    /// When the scheduler looks next.
    scheduling: Option<u64>,
    commits: u64,
    /// Remember the last events for people to read.
    trace: bool,
    last: VecDeque<String>,
}

impl World {
    pub fn new(seed: u64, shape: Shape, trace: bool) -> Self {
        let mut random = Random(seed ^ 0x51AB_17E5);
        let nodes = match shape.nodes {
            few @ 0..=20 => 2 + random.below(few),
            many => many,
        };
        let fleet = (0..nodes).map(|n| Machine::new(n, &mut random)).collect();
        let mut world = Self {
            random,
            shape,
            now: 1_700_000_000_000,
            cluster: Cluster::new(&shape),
            fleet,
            truth: Truth::new(shape.check_every > 1),
            tally: BTreeMap::new(),
            calm: false,
            made: 0,
            events: BTreeMap::new(),
            sequence: 0,
            refused: BTreeSet::new(),
            scheduling: None,
            commits: 0,
            trace,
            last: VecDeque::new(),
        };
        world.found();
        world
    }

    pub fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub fn last_events(&self) -> String {
        let all: Vec<&str> = self.last.iter().map(String::as_str).collect();
        all.join("\n")
    }

    pub fn after(&mut self, ms: u64, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + ms, self.sequence), event);
    }

    /// A member proposes something; what becomes of it is luck.
    pub fn propose(&mut self, member: usize, command: Command) {
        let envelope = Box::new(self.cluster.envelope(member, self.now, command));
        let soon = 1 + self.random.below(20);
        if self.calm {
            return self.after(soon, Event::Commit(envelope));
        }
        let late = |r: &mut Random| r.below(PROPOSE_MS);
        match self.random.below(60) {
            0 => self.count("commands lost"),
            1..=2 => {
                self.count("commands late");
                let at = late(&mut self.random);
                self.after(at, Event::Commit(envelope));
            }
            3 => {
                self.count("commands twice");
                let at = late(&mut self.random);
                self.after(at, Event::Commit(envelope.clone()));
                self.after(soon, Event::Commit(envelope));
            }
            _ => self.after(soon, Event::Commit(envelope)),
        }
    }

    /// `events` steps under faults.
    pub fn storm(&mut self, events: u64) -> Result<(), String> {
        for _ in 0..events {
            self.step()?;
        }
        Ok(())
    }

    /// The faults stop; within a bound everything comes to rest.
    pub fn calm(&mut self) -> Result<(), String> {
        self.calm = true;
        self.heal();
        let end = self.now + CALM_MS;
        let mut look = self.now;
        loop {
            self.step()?;
            if self.now < look {
                continue;
            }
            look = self.now + 1_000;
            let rest = self.rest();
            if rest.is_ok() {
                return self.cluster.agree();
            }
            if self.now > end {
                return rest.map_err(|why| format!("does not come to rest: {why}"));
            }
        }
    }

    fn rest(&mut self) -> Result<(), String> {
        let proposals = |e: &Event| matches!(e, Event::Commit(_) | Event::Report { .. });
        if self.events.values().any(proposals) && self.fleet.len() < 100 {
            return Err("something is still under way".to_owned());
        }
        let now = self.cluster.clock(self.cluster.leader, self.now);
        truth::rest(&self.cluster.head, &self.fleet, now)?;
        match self.cluster.head.ended().next() {
            Some((_, id)) => Err(format!("instance {id} has ended and is not forgotten")),
            None => Ok(()),
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let Some(((at, _), event)) = self.events.pop_first() else {
            return Err("nothing happens any more".to_owned());
        };
        self.now = at;
        self.count("events");
        if self.trace {
            // All of them for who asked for this one seed.
            let (kept, bytes) = match super::number("MAINSTAY_SEED") {
                Some(_) => (usize::MAX, 2_000),
                None => (40, 200),
            };
            if self.last.len() >= kept {
                self.last.pop_front();
            }
            let mut text = format!("{} {event:?}", at % 10_000_000);
            text.truncate(text.floor_char_boundary(bytes));
            self.last.push_back(text);
        }
        self.happen(event)
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Commit(envelope) => return self.commit(*envelope),
            Event::CatchUp => {
                let some = 1 + self.random.below(30) as usize;
                self.cluster.catch_up(some);
                self.tell();
                let next = 200 + self.random.below(1_000);
                self.after(next, Event::CatchUp);
            }
            Event::Schedule { term } => return self.schedule(term),
            Event::Judge { term } => return self.judge(term),
            Event::Expire { term } => self.expire(term),
            Event::Connect { node, life } => self.connect(node, life),
            Event::Beat {
                node,
                session,
                once,
            } => self.beat(node, session, once),
            Event::Work { node, life } => return self.work(node, life),
            Event::Survey { node, life } => {
                if self.fleet[node].life == life {
                    self.fleet[node].agent.survey();
                    self.begin(node);
                }
            }
            Event::Line { node, session, set } => self.hear_line(node, session, *set),
            Event::Report {
                node,
                behind,
                seen,
                saves,
                images,
            } => {
                self.report(node, behind, &seen, saves, images);
            }
            Event::People => self.people(),
            Event::Fault => self.fault(),
        }
        Ok(())
    }

    fn commit(&mut self, envelope: Envelope) -> Result<(), String> {
        if self.now < self.cluster.silent_until {
            let more = self.cluster.silent_until - self.now + self.random.below(50);
            self.after(more, Event::Commit(Box::new(envelope)));
            return Ok(());
        }
        self.commits += 1;
        let whole = self.commits.is_multiple_of(self.shape.check_every);
        let before = (whole && self.commits.is_multiple_of(8)).then(|| self.cluster.head.clone());
        let starting = self.starting(&envelope.command);
        let command = envelope.command.clone();
        let known = self.cluster.head.outcome_of(envelope.id).is_some();
        let saves: Vec<_> = self
            .cluster
            .head
            .open_saves()
            .map(|save| save.id.clone())
            .collect();
        let outcome = self.cluster.commit(envelope);
        self.count_saves(&saves);
        if let (Command::PublishSaved { disk }, Outcome::Refused(_)) = (&command, &outcome) {
            self.refused.insert(disk.save.clone());
        }
        self.note(&command, &outcome);
        if starting && outcome == Outcome::Done && !known {
            self.count("terminated while starting");
        }
        if whole || matches!(command, Command::Bind { .. }) {
            invariants::check(&self.cluster.head)?;
            let news = (!known).then_some(&outcome);
            self.truth.step(&self.cluster.head, &command, news)?;
            truth::vms(&self.cluster.head, &self.fleet)?;
        }
        if let Some(before) = before {
            invariants::check_step(&before, &self.cluster.head)?;
        }
        self.tally
            .insert("forgotten", self.truth.forgotten() as u64);
        self.tell();
        self.want_schedule(1);
        Ok(())
    }

    fn starting(&self, command: &Command) -> bool {
        let Command::TerminateInstance { id } = command else {
            return false;
        };
        let instance = self.cluster.head.instances.get(id);
        instance.is_some_and(mainstay_model::instance::Instance::starts)
    }

    fn note(&mut self, command: &Command, outcome: &Outcome) {
        if matches!(outcome, Outcome::Refused(_)) {
            return self.count("refused");
        }
        match command {
            Command::SetNodeReachability { lost: true, .. } => self.count("nodes lost"),
            Command::SetNodeReachability {
                reachable: true, ..
            } => self.count("nodes back"),
            Command::RemoveNode { .. } => self.count("nodes removed"),
            Command::DeleteGroup { .. } => self.count("groups deleted"),
            Command::DeleteTemplate { .. } => self.count("templates deleted"),
            Command::Bind { bindings } if *outcome != Outcome::Bound(bindings.len() as u32) => {
                self.count("plans out of date");
            }
            _ => {}
        }
        if !self.cluster.head.left.is_empty() {
            self.count("left behind");
        }
    }

    /// The scheduler is woken by every change, and by time.
    pub fn want_schedule(&mut self, ms: u64) {
        let at = self.now + ms + self.random.below(30);
        if self.scheduling.is_none_or(|next| at < next) && self.cluster.head.any_waits() {
            self.scheduling = Some(at);
            let term = self.cluster.term;
            self.after(at - self.now, Event::Schedule { term });
        }
    }

    fn schedule(&mut self, term: u64) -> Result<(), String> {
        let leads = term == self.cluster.term;
        if leads && self.scheduling.take_if(|at| *at == self.now).is_none() || !leads && self.calm {
            return Ok(());
        }
        if leads && self.now < self.cluster.silent_until {
            self.want_schedule(500);
            return Ok(());
        }
        // A member that leads no more plans once more, from what it has.
        let member = self.cluster.leader;
        let now = self.cluster.clock(member, self.now);
        let state = self.cluster.state(!leads);
        let plan = plan::place_at(state, BIND_MAX, now);
        let waiting = state.waiting().count();
        let refused: usize = plan.waiting.iter().map(|r| 1 + r.behind).sum();
        if plan.bindings.len() < BIND_MAX && plan.bindings.len() + refused != waiting {
            return Err(format!(
                "{waiting} wait, {} are placed and {refused} refused",
                plan.bindings.len()
            ));
        }
        if plan
            .waiting
            .iter()
            .any(|r| r.why.is_empty() || r.why.ends_with(": "))
        {
            return Err(format!("no reason: {:?}", plan.waiting));
        }
        if self.fleet.len() < 100 {
            let slow = oracle::place(state, now);
            if slow != plan.bindings {
                return Err(format!(
                    "planned {:?}, by the rules {slow:?}",
                    plan.bindings
                ));
            }
            self.count("plans compared");
        }
        self.count("plans");
        let bindings = plan.bindings;
        if bindings.is_empty() {
            // Only time, or another command, changes anything.
            self.want_schedule(1_000);
        } else {
            self.propose(member, Command::Bind { bindings });
            // Should nothing be heard of it.
            self.want_schedule(1_000);
        }
        Ok(())
    }

    fn judge(&mut self, term: u64) -> Result<(), String> {
        if term != self.cluster.term {
            return Ok(());
        }
        let late = if self.calm { 0 } else { self.random.below(300) };
        if self.now >= self.cluster.silent_until {
            for verdict in self.cluster.judge(JUDGE_EVERY_MS + late, self.now)? {
                let leader = self.cluster.leader;
                self.propose(leader, verdict);
            }
        }
        self.after(JUDGE_EVERY_MS + late, Event::Judge { term });
        Ok(())
    }

    fn expire(&mut self, term: u64) {
        if term != self.cluster.term {
            return;
        }
        let leader = self.cluster.leader;
        let now = self.cluster.clock(leader, self.now);
        let ids = plan::forgettable(&self.cluster.head, RETENTION_MS, now, 100);
        if !ids.is_empty() && self.now >= self.cluster.silent_until {
            let retention_ms = RETENTION_MS;
            self.propose(leader, Command::ExpireInstances { ids, retention_ms });
        }
        let (patience_ms, retention_ms) = (PATIENCE_MS, RETENTION_MS);
        let ids = plan::overdue(&self.cluster.head, patience_ms, retention_ms, now);
        if !ids.is_empty() && self.now >= self.cluster.silent_until {
            let over = Command::ExpireDistributions {
                ids,
                patience_ms,
                retention_ms,
            };
            self.propose(leader, over);
        }
        if self.now >= self.cluster.silent_until {
            self.expire_saves(leader, now);
        }
        self.after(2_000, Event::Expire { term });
    }

    /// What a new leader begins with.
    pub fn lead(&mut self) {
        let term = self.cluster.term;
        self.scheduling = None;
        self.after(1, Event::Judge { term });
        self.after(2, Event::Expire { term });
        self.want_schedule(3);
    }
}

/// Nodes and what they say.
impl World {
    pub fn connect_later(&mut self, node: usize, ms: u64) {
        let machine = &mut self.fleet[node];
        if machine.up && !machine.connecting {
            machine.connecting = true;
            let life = machine.life;
            self.after(ms, Event::Connect { node, life });
        }
    }

    fn connect(&mut self, node: usize, life: u64) {
        let calm = self.calm;
        let machine = &mut self.fleet[node];
        if !machine.up || machine.life != life {
            return;
        }
        machine.connecting = false;
        if machine.session.is_some() {
            return;
        }
        if !machine.linked || self.now < self.cluster.silent_until {
            let again = 1_000 + self.random.below(2_000);
            return self.connect_later(node, again);
        }
        let id = machine.id.clone();
        let known = self.cluster.head.nodes.get(&id);
        let same = known.is_some_and(|n| n.spec == machine.spec && n.reachable && !n.lost);
        self.cluster.heard(&id, self.now);
        if !same {
            let spec = Box::new(machine.spec.clone());
            let member = Cluster::random_member(&mut self.random);
            self.propose(member, Command::RegisterNode { id, spec });
            let again = 50 + self.random.below(200);
            return self.connect_later(node, again);
        }
        // A stream begins with a state as new as any acknowledged write.
        let behind = !calm && self.random.one_in(3);
        if behind {
            self.cluster.catch_up(usize::MAX);
        }
        let machine = &mut self.fleet[node];
        machine.sessions += 1;
        machine.session = Some(Session {
            number: machine.sessions,
            behind,
            told: 0,
            last_line: self.now,
        });
        self.count("sessions");
        self.send_line(node);
        let session = self.fleet[node].sessions;
        let beat = self.random.below(200);
        self.after(
            beat,
            Event::Beat {
                node,
                session,
                once: false,
            },
        );
    }

    /// Streams say what is new in their home's state.
    pub fn tell(&mut self) {
        for node in 0..self.fleet.len() {
            let machine = &self.fleet[node];
            let Some(session) = machine.session else {
                continue;
            };
            let state = self.cluster.state(session.behind);
            let generation = state.nodes.get(&machine.id).map(|n| n.desired_generation);
            if generation != Some(session.told) {
                self.send_line(node);
            }
        }
    }

    fn send_line(&mut self, node: usize) {
        let delay = match (self.calm, self.random.below(30)) {
            (false, 0) => self.random.below(3_000),
            _ => 1 + self.random.below(20),
        };
        let machine = &mut self.fleet[node];
        let Some(session) = &mut machine.session else {
            return;
        };
        let state = self.cluster.state(session.behind);
        let generation = state.nodes.get(&machine.id).map(|n| n.desired_generation);
        let last = machine.last_line.as_ref();
        // As the server does: the same bytes again unless the generation is another.
        let last = last.filter(|(number, set)| {
            *number == session.number && Some(set.generation) == generation
        });
        let set = last.map(|(_, set)| set.clone());
        let Some(set) = set.or_else(|| line(state, &machine.id)) else {
            // A node that was removed has no set: its stream ends.
            machine.session = None;
            return self.connect_later(node, 100);
        };
        machine.last_line = Some((session.number, set.clone()));
        session.told = set.generation;
        session.last_line = session.last_line.max(self.now + delay);
        let (number, wait) = (session.number, session.last_line - self.now);
        let set = Box::new(set);
        self.after(
            wait,
            Event::Line {
                node,
                session: number,
                set,
            },
        );
    }

    fn hear_line(&mut self, node: usize, session: u64, set: DesiredSet) {
        let machine = &mut self.fleet[node];
        let open = machine.session.is_some_and(|s| s.number == session);
        if !open || !machine.linked || !machine.up {
            return;
        }
        if !machine.accept(set) {
            self.count("sets refused");
            self.fleet[node].session = None;
            return self.connect_later(node, 100);
        }
        self.begin(node);
    }

    /// Whatever must begin on a node, begins.
    fn begin(&mut self, node: usize) {
        let machine = &mut self.fleet[node];
        machine.agent.act();
        if machine.up && !machine.working && machine.agent.busy().len() > 0 {
            machine.working = true;
            let life = machine.life;
            let ms = 10 + self.random.below(400);
            self.after(ms, Event::Work { node, life });
        }
    }

    fn work(&mut self, node: usize, life: u64) -> Result<(), String> {
        let machine = &mut self.fleet[node];
        if machine.life != life {
            return Ok(());
        }
        machine.working = false;
        let count = machine.agent.busy().len() as u64;
        if count == 0 {
            return Ok(());
        }
        let at = self.random.below(count) as usize;
        let busy = machine.agent.busy().nth(at).map(str::to_owned);
        let id = busy.ok_or("nobody is busy")?;
        let luck = match (self.calm, self.random.below(30)) {
            (true, _) | (_, 3..) => How::Well,
            (_, 0) => How::Failed,
            _ => How::Busy,
        };
        let how = self.look_for_tag(node, &id).unwrap_or(luck);
        let did = self.fleet[node].agent.step(&id, how);
        match did {
            Did::Made => {
                self.count("VMs made");
                truth::vms(&self.cluster.head, &self.fleet)?;
                let instance = self.cluster.head.instances.get(&id.as_str().into());
                let image = instance.map(|i| (i.request.template.clone(), i.tag_number));
                if let Some(image) = image {
                    self.fleet[node].cache(image);
                }
            }
            Did::Removed => self.count("VMs removed"),
            Did::Pushed => self.publish_saved(node, &id),
            Did::Nothing => {}
        }
        if luck == How::Busy {
            self.count("rejected");
        }
        self.begin(node);
        let session = self.fleet[node].sessions;
        if self.random.one_in(2) {
            self.after(
                20,
                Event::Beat {
                    node,
                    session,
                    once: true,
                },
            );
        }
        Ok(())
    }

    /// `once`: because there is news; else the next one follows.
    fn beat(&mut self, node: usize, number: u64, once: bool) {
        let calm = self.calm;
        let machine = &mut self.fleet[node];
        let Some(session) = machine.session.filter(|s| s.number == number) else {
            return;
        };
        let beat_ms = self.shape.beat_ms;
        let silent = self.now < self.cluster.silent_until;
        if !machine.linked || silent {
            // It notices, and looks for another home.
            machine.session = None;
            return self.connect_later(node, beat_ms);
        }
        // An image comes, another goes; not every time.
        let come = machine.named.difference(&machine.images).next().cloned();
        let goes = machine.evict.intersection(&machine.images).next().cloned();
        let (come, goes) = match self.calm || self.random.one_in(2) {
            true => (come, goes),
            false => (None, None),
        };
        if come.is_some() {
            self.count("images fetched ahead");
        }
        if goes.is_some() {
            self.count("images dropped");
        }
        let machine = &mut self.fleet[node];
        if let Some(image) = come {
            machine.cache(image);
        }
        if let Some(image) = goes {
            machine.images.remove(&image);
        }
        let observed = machine.agent.observe();
        let seen = observed.iter().map(observation).collect();
        let saves = observed.iter().filter_map(save_report).collect();
        let images = machine.images.clone();
        let report = Event::Report {
            node,
            behind: session.behind,
            seen,
            saves,
            images,
        };
        let delay = match (calm, self.random.below(30)) {
            (false, 0) => None,
            (false, 1) => Some(self.random.below(5_000)),
            _ => Some(1 + self.random.below(30)),
        };
        match delay {
            None => self.count("reports lost"),
            Some(delay) => self.after(delay, report),
        }
        if self.random.one_in(8) {
            // The last line again, as a sign of life.
            self.send_line(node);
        }
        if self.random.one_in(3) {
            self.fleet[node].agent.survey();
            self.begin(node);
        }
        if !once {
            let next = beat_ms * 3 / 4 + self.random.below(beat_ms / 4);
            self.after(
                next,
                Event::Beat {
                    node,
                    session: number,
                    once,
                },
            );
        }
    }

    /// As the server's `agents::intake` does it, from the state of the member that got it.
    fn report(
        &mut self,
        node: usize,
        behind: bool,
        seen: &[Observation],
        saves: Vec<SaveReport>,
        images: BTreeSet<(TemplateId, u32)>,
    ) {
        if self.now < self.cluster.silent_until {
            return;
        }
        let id = self.fleet[node].id.clone();
        let state = self.cluster.state(behind);
        let Some(known) = state.nodes.get(&id) else {
            self.fleet[node].session = None;
            return self.connect_later(node, 100);
        };
        let mut commands = Vec::new();
        let (news, old): (Vec<_>, Vec<_>) = seen
            .iter()
            .cloned()
            .partition(|seen| plan::is_news(state, &id, seen));
        if known.images != images {
            let images = images.into_iter().collect();
            commands.push(Command::SetNodeImages {
                id: id.clone(),
                images,
            });
        }
        if !news.is_empty() {
            commands.push(Command::Observe {
                node: id.clone(),
                changes: news,
            });
        }
        commands.extend(saves::told(state, &id, saves, &mut self.random));
        self.cluster.heard(&id, self.now);
        if !old.is_empty() && self.fleet.len() < 100 && self.random.one_in(16) {
            // What is said to be no news changes nothing.
            let mut copy = self.cluster.state(behind).clone();
            let changes = old;
            let told = Command::Observe { node: id, changes };
            let envelope = self.cluster.envelope(0, 0, told);
            copy.apply(&envelope);
            let state = self.cluster.state(behind);
            assert!(
                copy.instances == state.instances && copy.left == state.left,
                "what is no news changed something: {envelope:?}"
            );
        }
        let member = Cluster::random_member(&mut self.random);
        for command in commands {
            self.propose(member, command);
        }
    }
}
