//! Clients and operators, who want things, and fate, which does things.

use super::cluster::{Cluster, MEMBERS};
use super::world::{Event, World};
use crate::sample::{self, Random};
use mainstay_model::command::TagSelector;
use mainstay_model::group::Group;
use mainstay_model::node::{CapacityMode, NodeConfig};
use mainstay_model::{Command, InstanceId, MemberId};

const TEMPLATES: u64 = 3;
const GROUPS: u64 = 3;

impl World {
    /// Before the first step: nodes that join, templates, groups.
    pub fn found(&mut self) {
        self.now += 1;
        self.cluster.leads_since = self.now;
        let level = super::number("MAINSTAY_SIM_LEVEL")
            .and_then(|level| u32::try_from(level).ok())
            .unwrap_or(mainstay_model::feature::SUPPORTED);
        self.commit_now(Command::SetFeatures { level });
        for n in 0..GROUPS {
            let fallback = (n > 0).then(|| format!("g{}", n - 1).as_str().into());
            let group = Group {
                id: format!("g{n}").as_str().into(),
                name: format!("group{n}"),
                description: String::new(),
                fallback,
            };
            self.commit_now(Command::PutGroup { group });
        }
        for n in 0..TEMPLATES {
            let publish = self.publish(n);
            self.commit_now(publish);
        }
        for node in 0..self.fleet.len() {
            let machine = &mut self.fleet[node];
            machine.agent.survey();
            let spec = Box::new(machine.spec.clone());
            let id = machine.id.clone();
            self.commit_now(Command::RegisterNode { id, spec });
            let spread = self.random.below(self.shape.beat_ms);
            self.connect_later(node, spread);
        }
        self.lead();
        self.after(5, Event::CatchUp);
        self.after(10, Event::People);
        self.after(500, Event::Fault);
    }

    fn commit_now(&mut self, command: Command) {
        let envelope = self.cluster.envelope(0, self.now, command);
        self.cluster.commit(envelope);
    }

    fn publish(&mut self, template: u64) -> Command {
        self.made += 1;
        let arch = match template {
            0 => "",
            1 => "amd64",
            _ => "arm64",
        };
        let made = self.made;
        Command::PublishTag {
            // An id is never used again, a name is.
            new_template_id: format!("t{template}-{made}").into(),
            template: format!("template{template}"),
            tag: format!("v{made}"),
            content: sample::content(made as u8, arch),
            holder: MemberId(1),
            copies_needed: 1,
            voters: [MemberId(1)].into(),
        }
    }

    pub fn people(&mut self) {
        if self.calm {
            return;
        }
        let member = Cluster::random_member(&mut self.random);
        if let Some(command) = self.wish() {
            self.propose(member, command);
        }
        // Now and then several at once.
        let next = match self.random.below(3) {
            0 => 1 + self.random.below(10),
            _ => 1 + self.random.below(600),
        };
        self.after(next, Event::People);
    }

    fn wish(&mut self) -> Option<Command> {
        match self.random.below(39) {
            0..=11 => self.start(),
            12..=21 => {
                let id = self.any_instance()?;
                Some(Command::TerminateInstance { id })
            }
            22..=24 => Some(self.configure()),
            25 => {
                let at = self.any_node();
                let id = self.fleet[at].id.clone();
                self.random.one_in(2).then_some(Command::RemoveNode { id })
            }
            26..=27 => Some(self.regroup()),
            30..=31 => {
                let id = self.any_instance()?;
                Some(Command::RestartInstance { id })
            }
            32..=34 => self.distribute(),
            35..=38 => self.wish_for_save(),
            _ => self.change_templates(),
        }
    }

    /// An image ahead of its instances, or away again.
    fn distribute(&mut self) -> Option<Command> {
        let templates: Vec<_> = self.cluster.head.templates.keys().cloned().collect();
        let known = self.cluster.head.features >= mainstay_model::feature::EVICT;
        if templates.is_empty() || !known {
            return None;
        }
        let template = self.random.pick(&templates).clone();
        let at = self.any_node();
        let node = self.fleet[at].id.clone();
        let some = self.random.one_in(2).then_some(node);
        let nodes: Vec<_> = some.into_iter().collect();
        let id = format!("d{}", self.random.below(8)).as_str().into();
        Some(match self.random.below(6) {
            0..=2 => Command::Distribute {
                id,
                template,
                selector: None,
                nodes,
                group: None,
            },
            3 => Command::CancelDistribution { id },
            _ => Command::EvictImages { template, nodes },
        })
    }

    fn start(&mut self) -> Option<Command> {
        let live = |i: &&mainstay_model::instance::Instance| i.ended_ms.is_none();
        let large = self.fleet.len() > 100;
        if !large
            && self.cluster.head.instances.values().filter(live).count() > self.shape.instances
        {
            return None;
        }
        let templates: Vec<_> = self.cluster.head.templates.keys().cloned().collect();
        if templates.is_empty() {
            return None;
        }
        let template = self.random.pick(&templates).clone();
        let most = if large { 200 } else { 3 };
        let ids: Vec<InstanceId> = (0..1 + self.random.below(most))
            .map(|_| {
                self.made += 1;
                // Ids have no order in time.
                format!("i{:03}-{}", self.made * 7_919 % 997, self.made).into()
            })
            .collect();
        let node = self.any_node();
        let node = self.fleet[node].id.clone();
        let r = &mut self.random;
        let mut request = sample::request(template.as_str());
        request.priority = *r.pick(&[1, 100, 1_000, 10_000]);
        request.group = r.one_in(3).then(|| format!("g{}", r.below(GROUPS)).into());
        request.node = r.one_in(8).then_some(node);
        request.vcpu = r.one_in(4).then(|| 1 + r.below(8) as u32);
        request.vram_mb = r.one_in(6).then(|| 1_024 << r.below(4));
        Some(Command::StartInstances {
            ids,
            request: Box::new(request),
        })
    }

    /// Rather one that was not terminated yet.
    fn any_instance(&mut self) -> Option<InstanceId> {
        let all: Vec<&InstanceId> = self.cluster.head.instances.keys().collect();
        if all.is_empty() {
            return None;
        }
        let first = self.random.pick(&all);
        let second = self.random.pick(&all);
        let taken = self.truth.terminated(first);
        Some(if taken {
            (*second).clone()
        } else {
            (*first).clone()
        })
    }

    fn any_node(&mut self) -> usize {
        self.random.below(self.fleet.len() as u64) as usize
    }

    fn configure(&mut self) -> Command {
        let at = self.any_node();
        let id = self.fleet[at].id.clone();
        let r = &mut self.random;
        let config = match r.below(3) {
            0 => NodeConfig {
                drain: Some(r.one_in(2)),
                ..NodeConfig::default()
            },
            1 => NodeConfig {
                capacity: Some(r.below(5) as u32),
                ..NodeConfig::default()
            },
            _ => NodeConfig {
                capacity_mode: Some(match r.below(2) {
                    0 => CapacityMode::Number,
                    _ => CapacityMode::Resource,
                }),
                ..NodeConfig::default()
            },
        };
        if config.drain == Some(true) {
            self.count("drains");
        }
        Command::ConfigureNode { id, config }
    }

    fn regroup(&mut self) -> Command {
        let at = self.any_node();
        let node = self.fleet[at].id.clone();
        let r = &mut self.random;
        let group = |r: &mut Random| format!("g{}", r.below(GROUPS)).as_str().into();
        match r.below(5) {
            0..=2 => Command::ChangeNodeGroups {
                nodes: vec![node],
                groups: vec![group(r)],
                member: r.one_in(2),
            },
            3 => Command::DeleteGroup { id: group(r) },
            _ => {
                let id: mainstay_model::GroupId = group(r);
                let name = format!("group-{id}");
                let fallback = r.one_in(2).then(|| group(r));
                let description = String::new();
                Command::PutGroup {
                    group: Group {
                        id,
                        name,
                        description,
                        fallback,
                    },
                }
            }
        }
    }

    fn change_templates(&mut self) -> Option<Command> {
        let all: Vec<_> = self.cluster.head.templates.values().collect();
        if all.len() < TEMPLATES as usize || self.random.one_in(2) {
            let template = self.random.below(TEMPLATES);
            return Some(self.publish(template));
        }
        let template = *self.random.pick(&all);
        let id = template.id.clone();
        let numbers: Vec<u32> = template.tags.keys().copied().collect();
        Some(match self.random.below(3) {
            0 => Command::DeleteTemplate { id },
            1 => Command::DeleteTag {
                id,
                selector: TagSelector::Number(*self.random.pick(&numbers)),
            },
            _ => Command::RevertTemplate { id, selector: None },
        })
    }

    pub fn fault(&mut self) {
        if self.calm {
            return;
        }
        let node = self.any_node();
        match self.random.below(20) {
            0..=3 => {
                let cut = self.fleet[node].linked;
                self.fleet[node].linked = !cut;
                if cut {
                    self.count("links cut");
                }
            }
            4..=6 if self.fleet[node].up => {
                self.count("agents killed");
                self.fleet[node].die(false);
                if self.random.one_in(2) {
                    self.start_agent(node);
                }
            }
            7 if self.fleet[node].up => {
                self.count("machines rebooted");
                self.fleet[node].die(true);
            }
            4..=8 => self.start_agent(node),
            9..=11 => self.hurt_vm(node),
            12..=14 => self.change_leader(),
            15..=16 => {
                self.count("clocks jumped");
                let member = Cluster::random_member(&mut self.random);
                let far = if self.random.one_in(4) {
                    3_600_000
                } else {
                    5_000
                };
                self.cluster.skew[member] = self.random.below(2 * far) as i64 - far as i64;
            }
            17..=18 => {
                self.cluster.lags = !self.cluster.lags;
                self.count("lags changed");
            }
            _ => {
                // Comes back with other facts.
                if self.fleet[node].up {
                    self.fleet[node].die(false);
                }
                self.fleet[node].spec.capacity = self.random.below(5) as u32;
                self.start_agent(node);
            }
        }
        let next = 200 + self.random.below(3_000);
        self.after(next, Event::Fault);
    }

    fn start_agent(&mut self, node: usize) {
        let machine = &mut self.fleet[node];
        if machine.up {
            return;
        }
        machine.up = true;
        let life = machine.life;
        self.after(20, Event::Survey { node, life });
        self.connect_later(node, 30);
    }

    fn hurt_vm(&mut self, node: usize) {
        let agent = &mut self.fleet[node].agent;
        let Some(id) = agent.vms().next().map(|(id, ..)| id.to_owned()) else {
            return;
        };
        if self.random.one_in(3) {
            agent.lose_vm(&id);
            self.count("VMs lost");
        } else {
            agent.kill_vm(&id);
            self.count("VMs died");
        }
    }

    fn change_leader(&mut self) {
        self.count("leader changes");
        let leader = self.random.below(MEMBERS as u64) as usize;
        // Now and then nobody leads for longer than any lease.
        let gap = match self.random.below(12) {
            0 => self.shape.lease_ms * 2,
            _ => self.random.below(1_500),
        };
        let (term, now) = (self.cluster.term, self.now);
        self.cluster.change_leader(leader, now + gap);
        // The former one may plan on for a while.
        for _ in 0..self.random.below(4) {
            let late = self.random.below(gap + 2_000);
            self.after(late, Event::Schedule { term });
        }
        self.lead();
    }

    /// The faults stop: everything runs and is heard, clocks are right, nobody lags.
    pub fn heal(&mut self) {
        self.cluster.lags = false;
        self.cluster.catch_up(usize::MAX);
        self.cluster.skew = [0, 200, -200];
        for node in 0..self.fleet.len() {
            self.fleet[node].linked = true;
            self.start_agent(node);
            if self.fleet[node].session.is_none() {
                self.connect_later(node, 10);
            }
        }
    }
}
