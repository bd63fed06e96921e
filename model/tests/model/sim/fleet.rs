//! The nodes: agents on machines, each with a home among the members, a stream of sets from it and
//! reports to it.

use crate::sample::{self, Random};
use mainstay_agent::converge::rehearsal::Rehearsal;
use mainstay_agent::wire::{DesiredInstance, DesiredSet, ImageRef, Observed, SaveOrder};
use mainstay_model::instance::{Observation, ObservedPhase, VmInfo, Wanted};
use mainstay_model::node::NodeSpec;
use mainstay_model::plan::desired;
use mainstay_model::save::{SaveReport, SaveSaid};
use mainstay_model::{NodeId, State, TemplateId};
use std::collections::BTreeSet;

/// A stream that is open.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Lines of another one are not heard any more.
    pub number: u64,
    /// The home is the member that lags.
    pub behind: bool,
    /// Generation of the last line.
    pub told: u64,
    /// Lines arrive in order.
    pub last_line: u64,
}

pub struct Machine {
    pub id: NodeId,
    pub spec: NodeSpec,
    pub agent: Rehearsal,
    /// The agent runs.
    pub up: bool,
    /// Counts starts of the agent: events of a former one are not its.
    pub life: u64,
    pub linked: bool,
    pub session: Option<Session>,
    pub sessions: u64,
    /// What the stream of that session said last.
    pub last_line: Option<(u64, DesiredSet)>,
    /// Its work goes on by itself.
    pub working: bool,
    /// A connection is being tried.
    pub connecting: bool,
    pub images: BTreeSet<(TemplateId, u32)>,
    /// Images that its agent was told to have, and to drop.
    pub named: BTreeSet<(TemplateId, u32)>,
    pub evict: BTreeSet<(TemplateId, u32)>,
}

impl Machine {
    pub fn new(number: u64, random: &mut Random) -> Self {
        let name = format!("n{number:04}");
        let mut spec = sample::spec(&name, 1 + random.below(4) as u32);
        if random.one_in(4) {
            spec.arch = "arm64".to_owned();
        }
        if random.one_in(2) {
            spec.groups = vec![format!("g{}", random.below(3)).into()];
        }
        Self {
            id: name.as_str().into(),
            spec,
            agent: Rehearsal::default(),
            up: true,
            life: 0,
            linked: true,
            session: None,
            sessions: 0,
            last_line: None,
            working: false,
            connecting: false,
            images: BTreeSet::new(),
            named: BTreeSet::new(),
            evict: BTreeSet::new(),
        }
    }

    /// Take over a set, its images as the agent's `converge::images` does.
    pub fn accept(&mut self, set: DesiredSet) -> bool {
        let of = |images: &[ImageRef]| {
            let each = images.iter();
            each.map(|i| (TemplateId::from(i.template_id.as_str()), i.number))
                .collect()
        };
        let (named, evict) = (of(&set.images), of(&set.evict));
        let accepted = self.agent.accept(set);
        if accepted {
            (self.named, self.evict) = (named, evict);
        }
        accepted
    }

    /// An image has come: the oldest that nobody asked for makes room.
    pub fn cache(&mut self, image: (TemplateId, u32)) {
        self.images.insert(image);
        let mut free = self.images.iter().filter(|i| !self.named.contains(*i));
        if self.images.len() > 2
            && let Some(oldest) = free.next().cloned()
        {
            self.images.remove(&oldest);
        }
    }

    /// The agent dies; `reboot`: with the machine.
    pub fn die(&mut self, reboot: bool) {
        self.up = false;
        self.life += 1;
        self.session = None;
        self.working = false;
        self.connecting = false;
        self.named.clear();
        self.evict.clear();
        if reboot {
            self.agent.reboot();
        } else {
            self.agent.restart();
        }
    }
}

/// As the server's `agents::desired` words it.
pub fn line(state: &State, node: &NodeId) -> Option<DesiredSet> {
    let generation = state.nodes.get(node)?.desired_generation;
    let wish = |shall: mainstay_model::plan::Shall<'_>| {
        let mut wish = DesiredInstance {
            id: shall.id.to_string(),
            generation: shall.generation,
            run: shall.wanted != Wanted::Gone,
            keep: matches!(shall.wanted, Wanted::Keep | Wanted::Restart | Wanted::Save),
            restart: shall.wanted == Wanted::Restart,
            ..DesiredInstance::default()
        };
        if shall.wanted == Wanted::Save {
            wish.save = state.save_of(shall.id).map(|save| SaveOrder {
                id: save.id.to_string(),
                go: save.begun_ms.is_some(),
                ..SaveOrder::default()
            });
        }
        let named = matches!(shall.wanted, Wanted::Run | Wanted::Restart | Wanted::Save);
        if let Some(i) = shall.instance.filter(|_| named) {
            let template = state.templates.get(&i.request.template);
            let tag = template.and_then(|t| t.tags.get(&i.tag_number));
            wish.image = ImageRef {
                template_id: i.request.template.to_string(),
                number: i.tag_number,
                manifest: tag.map_or_else(String::new, |t| t.content.manifest.to_string()),
                ..ImageRef::default()
            };
        }
        wish
    };
    Some(DesiredSet {
        generation,
        instances: desired(state, node).map(wish).collect(),
        images: state
            .wanted_on(node)
            .map(|d| image(&d.template, d.number))
            .collect(),
        evict: state.evicted_on(node).map(|(of, n)| image(of, n)).collect(),
        ..DesiredSet::default()
    })
}

fn image(of: &TemplateId, number: u32) -> ImageRef {
    ImageRef {
        template_id: of.to_string(),
        number,
        ..ImageRef::default()
    }
}

/// As the server's `agents::translate` reads it.
pub fn observation(seen: &Observed) -> Observation {
    let phase = match seen.phase.as_str() {
        "pulling" => ObservedPhase::Pulling,
        "starting" => ObservedPhase::Starting,
        "running" => ObservedPhase::Running,
        "stopped" => ObservedPhase::Stopped,
        "failed" => ObservedPhase::Failed(seen.message.clone()),
        "rejected" => ObservedPhase::Rejected(seen.message.clone()),
        "gone" => ObservedPhase::Gone,
        other => panic!("phase {other}"),
    };
    let facts = seen.vm.as_ref().filter(|vm| !vm.uuid.is_empty());
    Observation {
        id: seen.id.as_str().into(),
        generation: seen.generation,
        phase,
        vm: facts.map(|vm| VmInfo {
            uuid: vm.uuid.clone(),
            status: vm.status.clone(),
            ip: vm.ip.clone(),
            ..VmInfo::default()
        }),
        script: None,
    }
}

/// The same of what is said of a save.
pub fn save_report(seen: &Observed) -> Option<SaveReport> {
    let save = seen.save.as_ref()?;
    let said = match save.phase.as_str() {
        "begun" => SaveSaid::Begun,
        "pushed" => SaveSaid::Pushed,
        "failed" => SaveSaid::Failed {
            why: save.message.clone(),
            stopped: save.stopped,
        },
        other => panic!("phase {other} of a save"),
    };
    Some(SaveReport {
        id: save.id.as_str().into(),
        said,
        script: None,
    })
}
