//! Saves: who asks for them, how a tag comes of one, and what the leader does about those that nobody begins.

use super::cluster::Cluster;
use super::world::World;
use crate::sample::Random;
use crate::saves;
use mainstay_agent::converge::rehearsal::How;
use mainstay_model::feature::SAVE;
use mainstay_model::instance::InstanceState;
use mainstay_model::save::{SaveReport, SaveRequest, SaveTarget, SavedDisk};
use mainstay_model::{Command, CommandId, Envelope, InstanceId, NodeId, SaveId, State, plan};

/// Milliseconds that an ended save is kept, and within which a node must begin one.
const RETENTION_MS: u64 = 10_000;
const BEGIN_MS: u64 = 20_000;

/// What a member logs of what a node says of its saves. Now and then: what is said to be no news changes nothing.
pub fn told(
    state: &State,
    node: &NodeId,
    said: Vec<SaveReport>,
    random: &mut Random,
) -> Option<Command> {
    let (news, same): (Vec<_>, Vec<_>) = said
        .into_iter()
        .partition(|report| plan::is_save_news(state, node, report));
    let log = |reports| Command::ReportSaves {
        node: node.clone(),
        reports,
    };
    if !same.is_empty() && random.one_in(4) {
        let mut copy = state.clone();
        let envelope = Envelope {
            id: CommandId(u128::MAX),
            stamp_ms: 0,
            command: log(same),
        };
        copy.apply(&envelope);
        assert!(
            copy.instances == state.instances && copy.saves == state.saves,
            "what is no news changed something: {envelope:?}"
        );
    }
    (!news.is_empty()).then(|| log(news))
}

impl World {
    /// Somebody wants a running instance as a tag, of a template that is there or of a new one.
    pub fn wish_for_save(&mut self) -> Option<Command> {
        let head = &self.cluster.head;
        if head.features < SAVE {
            return None;
        }
        let started = |i: &&mainstay_model::instance::Instance| i.state == InstanceState::Started;
        let started: Vec<&InstanceId> = head
            .instances
            .values()
            .filter(started)
            .map(|i| &i.id)
            .collect();
        let templates: Vec<_> = head.templates.keys().cloned().collect();
        if started.is_empty() || templates.is_empty() {
            return None;
        }
        let instance = (*self.random.pick(&started)).clone();
        self.made += 1;
        let made = self.made;
        let r = &mut self.random;
        let target = match r.below(6) {
            0 => SaveTarget::New {
                name: format!("saved{}", r.below(3)),
                id: format!("t-saved{made}").into(),
            },
            _ => SaveTarget::Template(r.pick(&templates).clone()),
        };
        let request = SaveRequest {
            tag: format!("v{}", made - r.below(2)),
            target,
            revert: r.one_in(5),
            ..saves::request(instance.as_str())
        };
        self.count("saves asked for");
        Some(Command::SaveInstance {
            id: format!("s{made}").into(),
            request: Box::new(request),
        })
    }

    /// A disk is with a registry: a member makes a tag of it.
    pub fn publish_saved(&mut self, node: usize, id: &str) {
        let Some(save) = self.fleet[node].agent.awaited(id).map(SaveId::from) else {
            return;
        };
        let disk = SavedDisk {
            // Equal bytes have equal names.
            manifest: mainstay_model::ids::Digest([id.len() as u8; 32]),
            ..saves::disk(save.as_str(), 0)
        };
        let member = Cluster::random_member(&mut self.random);
        let disk = Box::new(disk);
        self.propose(member, Command::PublishSaved { disk });
    }

    /// What an agent sees that looks whether its tag is there.
    pub fn look_for_tag(&mut self, node: usize, id: &str) -> Option<How> {
        let save = SaveId::from(self.fleet[node].agent.awaited(id)?);
        let head = &self.cluster.head;
        let save = head.saves.get(&save);
        let Some(save) = save.filter(|save| save.open()) else {
            return Some(How::Failed);
        };
        let Some((template, number)) = &save.published else {
            return Some(match self.refused.contains(&save.id) {
                true => How::Failed,
                false => How::Busy,
            });
        };
        let template = head.templates.get(template);
        Some(match template.and_then(|t| t.tags.get(number)) {
            Some(tag) if tag.visible => How::Well,
            Some(_) => How::Busy,
            None => How::Failed,
        })
    }

    /// As the server's `reconcile::expire`.
    pub fn expire_saves(&mut self, leader: usize, now: u64) {
        let ids = plan::overdue_saves(&self.cluster.head, RETENTION_MS, BEGIN_MS, now, 100);
        if !ids.is_empty() {
            let command = Command::ExpireSaves {
                ids,
                retention_ms: RETENTION_MS,
                begin_ms: BEGIN_MS,
            };
            self.propose(leader, command);
        }
    }

    /// How many have ended, with a tag and without.
    pub fn count_saves(&mut self, before: &[SaveId]) {
        for id in before {
            let save = self.cluster.head.saves.get(id);
            match save.and_then(|save| save.end.as_ref()) {
                Some(end) if end.error.is_none() => self.count("saves done"),
                Some(_) => self.count("saves failed"),
                None => {}
            }
        }
    }
}
