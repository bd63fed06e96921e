//! What agents are told and what of their reports becomes a command, over a state made by commands.

use super::desired::desired_set;
use super::intake::{OBSERVE_BYTES, commands};
use mainstay_agent::wire::{ImageRef, Observed, Report, SaveSeen, ScriptResult, VmFacts};
use mainstay_model::codec::encode_envelope;
use mainstay_model::command::{Binding, Command, TagContent};
use mainstay_model::ids::Digest;
use mainstay_model::instance::StartRequest;
use mainstay_model::limits::{SAVE_OUTPUT_BYTES, SCRIPT_OUTPUT_BYTES};
use mainstay_model::node::NodeSpec;
use mainstay_model::save::{SaveRequest, SaveTarget};
use mainstay_model::{CommandId, Envelope, InstanceId, MemberId, NodeId, Outcome, State};

/// A template, and node `n1` with this many instances `i0`, `i1`, ... bound to it.
struct World {
    state: State,
    commands: u128,
}

impl World {
    fn new(instances: usize) -> Self {
        let mut world = Self {
            state: State::default(),
            commands: 0,
        };
        world.apply(Command::PublishTag {
            new_template_id: "t1".into(),
            template: "debian".into(),
            tag: "v1".into(),
            content: TagContent {
                manifest: Digest([7; 32]),
                size: 1,
                arch: String::new(),
                description: String::new(),
                disk: "disk.qcow2".into(),
                format: "qcow2".into(),
                forwards: Vec::new(),
            },
            holder: MemberId(1),
            copies_needed: 1,
            voters: [MemberId(1)].into(),
        });
        world.register();
        let ids: Vec<InstanceId> = (0..instances).map(|n| format!("i{n}").into()).collect();
        world.apply(Command::StartInstances {
            ids: ids.clone(),
            request: Box::new(request()),
        });
        let bind = |instance| Binding {
            instance,
            node: "n1".into(),
            generation: 1,
        };
        let bindings = ids.into_iter().map(bind).collect();
        assert_eq!(
            world.apply(Command::Bind { bindings }),
            Outcome::Bound(u32::try_from(instances).unwrap())
        );
        world
    }

    fn apply(&mut self, command: Command) -> Outcome {
        self.commands += 1;
        let outcome = self.state.apply(&envelope(self.commands, command));
        assert!(!matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
        outcome
    }

    fn register(&mut self) {
        self.apply(Command::RegisterNode {
            id: "n1".into(),
            spec: Box::new(NodeSpec {
                name: "n1".into(),
                capacity: 1_000,
                ..NodeSpec::default()
            }),
        });
    }

    /// Take a report as the intake does; how many commands it became.
    fn take(&mut self, observed: Vec<Observed>) -> usize {
        let commands = commands(&self.state, &report(observed));
        let count = commands.len();
        for command in commands {
            let bytes = encode_envelope(&envelope(0, command.clone())).len();
            assert!(bytes <= OBSERVE_BYTES + 1_000, "{bytes} bytes in a command");
            self.apply(command);
        }
        count
    }

    /// Id, generation and "shall run" of all that the node is told.
    fn told(&self) -> Vec<(String, u64, bool)> {
        let set = desired_set(&self.state, &NodeId::from("n1")).unwrap();
        assert_eq!(
            set.generation,
            self.state.nodes[&"n1".into()].desired_generation
        );
        let all = set.instances.into_iter();
        all.map(|i| (i.id, i.generation, i.run)).collect()
    }
}

fn envelope(id: u128, command: Command) -> Envelope {
    Envelope {
        id: CommandId(id),
        stamp_ms: 1_000,
        command,
    }
}

fn request() -> StartRequest {
    StartRequest {
        template: "t1".into(),
        tag: None,
        version: None,
        name: None,
        name_template: None,
        external_id: None,
        node: None,
        group: None,
        priority: 1,
        script: None,
        vcpu: None,
        vram_mb: None,
        metadata: Default::default(),
        port_forwarding: None,
    }
}

fn report(observed: Vec<Observed>) -> Report {
    Report {
        node_id: "n1".into(),
        observed,
        ..Report::default()
    }
}

fn seen(id: &str, generation: u64, phase: &str) -> Observed {
    Observed {
        id: id.into(),
        generation,
        phase: phase.into(),
        ..Observed::default()
    }
}

fn facts(ip: &str) -> VmFacts {
    VmFacts {
        uuid: "vm".into(),
        ip: ip.into(),
        ..VmFacts::default()
    }
}

#[test]
fn a_node_that_comes_back_removes_what_ended_without_it() {
    let mut world = World::new(2);
    world.take(vec![seen("i0", 2, "running"), seen("i1", 2, "running")]);
    world.apply(Command::SetNodeReachability {
        id: "n1".into(),
        reachable: false,
        lost: true,
    });
    world.apply(Command::TerminateInstance { id: "i0".into() });
    world.apply(Command::ExpireInstances {
        ids: vec!["i0".into()],
        retention_ms: 0,
    });
    world.apply(Command::RemoveNode { id: "n1".into() });
    assert!(desired_set(&world.state, &"n1".into()).is_none());
    world.register();
    let (kept, left) = (("i1".to_owned(), 3, true), ("i0".to_owned(), 4, false));
    assert_eq!(world.told(), [kept, left]);
    assert_eq!(world.state.load(&"n1".into()).count, 2);

    // Of the past, or not there yet: nothing to say to the log.
    assert_eq!(world.take(vec![seen("i0", 2, "running")]), 0);
    assert_eq!(world.take(vec![seen("i0", 2, "gone")]), 0);
    assert_eq!(world.take(vec![seen("i0", 4, "gone")]), 1);
    assert_eq!(world.told(), [("i1".to_owned(), 3, true)]);
    assert_eq!(world.take(vec![seen("i0", 4, "gone")]), 0);
}

#[test]
fn many_long_outputs_become_several_commands_with_the_ends() {
    const COUNT: usize = 200;
    let mut world = World::new(COUNT);
    let long = "é".repeat(SCRIPT_OUTPUT_BYTES) + "end";
    let ended = |n: usize| Observed {
        script: Some(ScriptResult {
            stdout: long.clone(),
            stderr: long.clone(),
            ..ScriptResult::default()
        }),
        message: long.clone(),
        ..seen(&format!("i{n}"), 2, "failed")
    };
    let report: Vec<_> = (0..COUNT).map(ended).collect();
    let commands = world.take(report.clone());
    assert!((5..=8).contains(&commands), "{commands} commands");
    for instance in world.state.instances.values() {
        let script = instance.script_result.as_ref().unwrap();
        for text in [&script.stdout, &script.stderr] {
            assert!(text.len() <= SCRIPT_OUTPUT_BYTES && text.len() > SCRIPT_OUTPUT_BYTES - 4);
            assert!(text.ends_with("éend"));
        }
    }
    assert_eq!(world.take(report), 0, "all was taken");
}

#[test]
fn a_node_is_told_what_to_fetch_until_it_has_had_it() {
    let mut world = World::new(1);
    let told = |world: &World| {
        let set = desired_set(&world.state, &NodeId::from("n1")).unwrap();
        (set.generation, set.images)
    };
    let (before, none) = told(&world);
    assert!(none.is_empty());
    let wish = |id: &str| Command::Distribute {
        id: id.into(),
        template: "t1".into(),
        selector: None,
        nodes: Vec::new(),
        group: None,
    };
    world.apply(wish("d1"));
    let (asked, images) = told(&world);
    assert!(asked > before);
    assert_eq!(images.len(), 1);
    let (tag, manifest) = (images[0].tag.as_str(), images[0].manifest.as_str());
    assert_eq!((tag, manifest), ("v1", "07".repeat(32).as_str()));
    // It has it; then it needs the room for another.
    for cached in [images, Vec::new()] {
        let report = Report {
            images: cached,
            ..report(Vec::new())
        };
        for command in commands(&world.state, &report) {
            world.apply(command);
        }
        let (now, images) = told(&world);
        assert!(now > asked && images.is_empty(), "asked once only");
    }
    world.apply(wish("d2"));
    assert_eq!(told(&world).1.len(), 1);
    world.apply(Command::CancelDistribution { id: "d2".into() });
    assert!(told(&world).1.is_empty());
}

#[test]
fn a_node_is_told_what_to_drop_until_it_has() {
    let mut world = World::new(1);
    let has = |world: &mut World, images: Vec<ImageRef>| {
        let report = Report {
            images,
            ..report(Vec::new())
        };
        for command in commands(&world.state, &report) {
            world.apply(command);
        }
        let set = desired_set(&world.state, &NodeId::from("n1")).unwrap();
        let evict: Vec<_> = set.evict.iter().map(|i| i.number).collect();
        (set.generation, evict)
    };
    let image = ImageRef {
        template_id: "t1".into(),
        ..ImageRef::default()
    };
    let (before, none) = has(&mut world, vec![image.clone()]);
    assert!(none.is_empty());
    let evict = Command::EvictImages {
        template: "t1".into(),
        nodes: Vec::new(),
    };
    world.apply(evict);
    let (asked, told) = has(&mut world, vec![image]);
    assert!(asked > before && told == [0], "it still has it");
    let (done, told) = has(&mut world, Vec::new());
    assert!(done > asked && told.is_empty());
}

#[test]
fn blank_facts_are_no_news_and_erase_nothing() {
    let mut world = World::new(1);
    let with = |vm, phase| Observed {
        vm: Some(vm),
        ..seen("i0", 2, phase)
    };
    assert_eq!(world.take(vec![with(facts("10.0.0.1"), "running")]), 1);
    let blank = || VmFacts {
        status: "failed".into(),
        ..VmFacts::default()
    };
    assert_eq!(world.take(vec![with(blank(), "running")]), 0);
    assert_eq!(world.take(vec![with(blank(), "failed")]), 1);
    let vm = world.state.instances[&"i0".into()].vm.as_ref().unwrap();
    assert_eq!((vm.uuid.as_str(), vm.ip.as_str()), ("vm", "10.0.0.1"));
}

#[test]
fn a_save_is_ordered_when_it_is_known_and_its_output_is_heard_once() {
    let mut world = World::new(1);
    let running = || Observed {
        vm: Some(facts("10.0.0.1")),
        ..seen("i0", 2, "running")
    };
    world.take(vec![running()]);
    let request = SaveRequest {
        instance: "i0".into(),
        tag: "v2".into(),
        target: SaveTarget::Template("t1".into()),
        description: String::new(),
        script: b"sync".to_vec(),
        cancel_on_script_failure: true,
        revert: false,
        revert_tag: None,
        suspend: true,
        sanity_test: false,
    };
    world.apply(Command::SaveInstance {
        id: "s1".into(),
        request: Box::new(request),
    });
    let wish = |world: &World| {
        let set = desired_set(&world.state, &NodeId::from("n1")).unwrap();
        let wish = set.instances.into_iter().next().unwrap();
        assert!(wish.run && wish.keep && !wish.restart, "for older agents");
        assert_eq!((wish.generation, wish.image.tag.as_str()), (2, "v1"));
        wish.save.unwrap()
    };
    let order = wish(&world);
    let body = order.script.as_ref().unwrap().body.as_str();
    assert_eq!((order.id.as_str(), body), ("s1", "c3luYw=="));
    assert_eq!(
        (order.template.as_str(), order.tag.as_str()),
        ("debian", "v2")
    );
    assert!(order.cancel_on_script_failure && !order.go && !order.script_known);
    let said = |phase: &str, script: Option<ScriptResult>| {
        let save = SaveSeen {
            id: "s1".into(),
            phase: phase.into(),
            stopped: true,
            script,
            ..SaveSeen::default()
        };
        let save = Some(save);
        vec![Observed { save, ..running() }]
    };
    assert_eq!(world.take(said("begun", None)), 1);
    assert_eq!(world.take(said("begun", None)), 0, "it is known");
    assert!(wish(&world).go);
    let long = "é".repeat(SAVE_OUTPUT_BYTES) + "end";
    let output = ScriptResult {
        stdout: long.clone(),
        stderr: long,
        ..ScriptResult::default()
    };
    assert_eq!(world.take(said("begun", Some(output.clone()))), 1);
    assert_eq!(world.take(said("begun", Some(output))), 0);
    assert!(wish(&world).script_known);
    let kept = world.state.saves[&"s1".into()].script_result.clone();
    assert!(kept.unwrap().stdout.len() > SAVE_OUTPUT_BYTES - 4);
    assert_eq!(world.take(said("pushed", None)), 0, "there is no tag");
    assert_eq!(world.take(said("failed", None)), 1);
    let set = desired_set(&world.state, &NodeId::from("n1")).unwrap();
    assert!(set.instances[0].restart && set.instances[0].save.is_none());
    assert_eq!(set.instances[0].generation, 3);
}
