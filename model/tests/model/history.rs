//! Random histories: whatever commands come, in whatever order and however often, the invariants
//! hold and the state can be rebuilt from its changes and from its export, after every prefix.

use crate::sample::{self, Random};
use crate::saves;
use mainstay_model::codec::{decode_envelope, encode_envelope};
use mainstay_model::command::{ArtifactPut, ArtifactTemplate, Binding, Command, TagSelector};
use mainstay_model::distribution::Delivery;
use mainstay_model::group::Group;
use mainstay_model::instance::{Observation, ObservedPhase, Script, ScriptResult, Value, VmInfo};
use mainstay_model::invariants;
use mainstay_model::node::{CapacityMode, NodeConfig};
use mainstay_model::plan::{self, Refused};
use mainstay_model::{CommandId, Envelope, InstanceId, MemberId, NodeId, Outcome, State};
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn every_prefix_can_be_rebuilt() {
    let mut kinds = BTreeSet::new();
    for seed in 1..=12 {
        kinds.extend(run(seed, 500));
    }
    // A run that did not exercise its commands proves nothing.
    for needed in [
        "started",
        "published",
        "bound",
        "registered",
        "done",
        "refused",
        "retried",
        "saving",
        "Pushing",
        "Started",
        "Terminated",
        "Error",
        "forgotten",
        "waits for an image",
        "given up an image",
        "shall drop an image",
    ] {
        assert!(kinds.contains(needed), "no history had: {needed}");
    }
}

/// Two members that apply the same log agree, one of them having been restored on the way.
#[test]
fn a_restored_member_agrees_with_the_others() {
    for seed in 100..=104 {
        let mut random = Random(seed);
        let mut first = State::default();
        let mut second = State::default();
        let mut log = Vec::new();
        for step in 0..600 {
            let bytes = encode_envelope(&envelope(&mut random, &first, &log, step));
            let entry = decode_envelope(&bytes).unwrap();
            let outcomes = (first.apply(&entry), second.apply(&entry));
            assert_eq!(outcomes.0, outcomes.1, "seed {seed}, step {step}");
            log.push(entry);
            if random.one_in(50) {
                second = State::import(second.export().into_iter()).unwrap();
            }
            if random.one_in(20) {
                assert_eq!(first.digest(), second.digest(), "seed {seed}, step {step}");
                assert_eq!(plan::place(&first, 50), plan::place(&second, 50));
            }
        }
        assert_eq!(first, second);
    }
}

fn run(seed: u64, steps: u64) -> BTreeSet<&'static str> {
    let mut random = Random(seed);
    let mut state = State::default();
    let mut stored: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    let mut log: Vec<Envelope> = Vec::new();
    let mut kinds = BTreeSet::new();
    for step in 0..steps {
        let at = format!("seed {seed}, step {step}");
        let envelope = envelope(&mut random, &state, &log, step);
        let retried = log.iter().any(|e| e.id == envelope.id);
        let before = state.clone();
        let outcome = state.apply(&envelope);
        invariants::check(&state).unwrap_or_else(|e| panic!("{at}: {e}\n{envelope:?}"));
        invariants::check_step(&before, &state)
            .unwrap_or_else(|e| panic!("{at}: {e}\n{envelope:?}"));
        if retried {
            assert_eq!(before, state, "{at}: a retry had an effect");
            assert_eq!(before.outcome_of(envelope.id), Some(&outcome), "{at}");
            kinds.insert("retried");
        }
        kinds.insert(kind(&outcome));
        for instance in before.instances.values() {
            match state.instances.get(&instance.id) {
                Some(i) => kinds.insert(i.state.as_str()),
                None => kinds.insert("forgotten"),
            };
        }
        let distributions = state.distributions.values();
        for delivery in distributions.flat_map(|d| d.nodes.values()) {
            kinds.insert(match delivery {
                Delivery::Wanted => "waits for an image",
                Delivery::Done => "has an image",
                Delivery::Ended(_) => "given up an image",
            });
        }
        if !state.evictions.is_empty() {
            kinds.insert("shall drop an image");
        }
        log.push(envelope);

        // A checkpoint comes after any number of commands; a change says the newest value.
        if random.one_in(2) {
            for (key, value) in state.take_changes() {
                match value {
                    Some(value) => stored.insert(key, value),
                    None => stored.remove(&key),
                };
            }
            let export = state.export();
            assert!(export.is_sorted_by(|a, b| a.0 < b.0), "{at}: not in order");
            assert!(
                stored.clone().into_iter().eq(export),
                "{at}: changes differ"
            );
            let mut rebuilt = State::import(stored.clone().into_iter()).unwrap();
            invariants::check(&rebuilt).unwrap_or_else(|e| panic!("{at}: rebuilt: {e}"));
            assert_eq!(rebuilt, state, "{at}");
            assert_eq!(rebuilt.digest(), state.digest(), "{at}");
            assert_eq!(rebuilt.take_changes(), [], "{at}: a fresh import is clean");
        }
    }
    kinds
}

fn kind(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Started(_) => "started",
        Outcome::Published { .. } => "published",
        Outcome::Bound(n) if *n > 0 => "bound",
        Outcome::Bound(_) => "bound nothing",
        Outcome::Registered(_) => "registered",
        Outcome::Asked(_) => "asked",
        Outcome::Saving(_) => "saving",
        Outcome::Refused(_) => "refused",
    }
}

fn envelope(random: &mut Random, state: &State, log: &[Envelope], step: u64) -> Envelope {
    if !log.is_empty() && random.one_in(12) {
        return random.pick(log).clone();
    }
    Envelope {
        id: CommandId(u128::from(step) << 64 | u128::from(random.next())),
        // Proposers' clocks differ.
        stamp_ms: 1_000_000 + step * 500 + random.below(3_000),
        command: command(random, state),
    }
}

fn command(r: &mut Random, state: &State) -> Command {
    match r.below(44) {
        0..=5 => start(r),
        6..=8 => Command::UpdateInstance {
            id: instance(r),
            name: r.one_in(3).then(|| format!("name{}", r.below(3))),
            external_id: r.one_in(3).then(|| format!("mark{}", r.below(3))),
            metadata: (0..r.below(3)).map(|_| entry(r)).collect(),
        },
        9..=11 => Command::TerminateInstance { id: instance(r) },
        12..=15 => planned(r, state),
        16 => random_bindings(r),
        17..=25 => observe(r, state),
        26..=27 => Command::ExpireInstances {
            ids: (0..r.below(6)).map(|_| instance(r)).collect(),
            retention_ms: r.below(20_000),
        },
        28..=31 => node_command(r),
        32..=33 => group_command(r),
        34..=36 => template_command(r),
        37..=38 => artifact_command(r),
        39..=42 => saves::any(r, state),
        _ => Command::Noop,
    }
}

fn instance(r: &mut Random) -> InstanceId {
    format!("i{}", r.below(40)).into()
}
fn node(r: &mut Random) -> NodeId {
    format!("n{}", r.below(4)).into()
}
fn entry(r: &mut Random) -> (String, Value) {
    let value = match r.below(3) {
        0 => Value::Int(r.next() as i64),
        1 => Value::Bool(r.one_in(2)),
        _ => Value::Text("x".repeat(r.below(300) as usize)),
    };
    (format!("key{}", r.below(5)), value)
}

fn start(r: &mut Random) -> Command {
    let mut request = sample::request(&format!("t{}", r.below(3)));
    request.tag = r.one_in(3).then(|| format!("v{}", r.below(4)));
    request.version = r.one_in(4).then(|| r.below(4) as u32);
    request.priority = 1 + r.below(3) as u32;
    request.node = r.one_in(6).then(|| node(r));
    request.group = r.one_in(6).then(|| format!("g{}", r.below(3)).into());
    request.vcpu = r.one_in(3).then(|| r.below(5) as u32);
    request.script = r.one_in(3).then(|| {
        Box::new(Script {
            body: vec![7; r.below(5_000) as usize],
            monitored: true,
            ..Script::default()
        })
    });
    Command::StartInstances {
        ids: (0..1 + r.below(3)).map(|_| instance(r)).collect(),
        request: Box::new(request),
    }
}

fn planned(r: &mut Random, state: &State) -> Command {
    let plan = plan::place(state, 1 + r.below(6) as usize);
    let waiting = state.waiting().count();
    assert!(plan.bindings.len() + plan.waiting.len() <= waiting);
    let mut copy = state.clone();
    let bindings = plan.bindings;
    let outcome = copy.apply(&Envelope {
        id: CommandId(u128::MAX),
        stamp_ms: 0,
        command: Command::Bind {
            bindings: bindings.clone(),
        },
    });
    assert_eq!(
        outcome,
        Outcome::Bound(bindings.len() as u32),
        "a fresh plan holds"
    );
    let behind: usize = plan.waiting.iter().map(|refused| refused.behind).sum();
    assert!(behind <= waiting);
    for Refused { first, why, .. } in plan.waiting {
        assert!(!why.is_empty() && !why.ends_with(": "), "{first}: {why:?}");
    }
    Command::Bind { bindings }
}

fn random_bindings(r: &mut Random) -> Command {
    let binding = |r: &mut Random| Binding {
        instance: instance(r),
        node: node(r),
        generation: 1 + r.below(3),
    };
    Command::Bind {
        bindings: (0..r.below(5)).map(|_| binding(r)).collect(),
    }
}

fn observe(r: &mut Random, state: &State) -> Command {
    let on_nodes: Vec<_> = state
        .instances
        .values()
        .filter(|i| i.node.is_some())
        .collect();
    let (mut id, mut from, mut generation) = (instance(r), node(r), r.below(5));
    if !on_nodes.is_empty() && !r.one_in(8) {
        let known = r.pick(&on_nodes);
        id = known.id.clone();
        from = known.node.clone().unwrap();
        generation = known.generation.saturating_sub(u64::from(r.one_in(6)));
    }
    let phase = match r.below(12) {
        0..=1 => ObservedPhase::Pulling,
        2..=3 => ObservedPhase::Starting,
        4..=6 => ObservedPhase::Running,
        7 => ObservedPhase::Stopped,
        8 => ObservedPhase::Failed("broken".into()),
        9 => ObservedPhase::Rejected("no room".into()),
        _ => ObservedPhase::Gone,
    };
    let vm = r.one_in(2).then(|| VmInfo {
        uuid: if r.one_in(8) { "" } else { "vm" }.into(),
        ip: format!("10.0.0.{}", r.below(3)),
        ..VmInfo::default()
    });
    let script = r.one_in(4).then(|| ScriptResult {
        return_code: r.below(2) as i32,
        stdout: "o".repeat(r.below(2_000) as usize),
        ..ScriptResult::default()
    });
    Command::Observe {
        node: from,
        changes: vec![Observation {
            id,
            generation,
            phase,
            vm,
            script,
        }],
    }
}

fn node_command(r: &mut Random) -> Command {
    let id = node(r);
    match r.below(8) {
        0..=2 => {
            let mut spec = sample::spec(id.as_str(), r.below(5) as u32);
            spec.groups = r.one_in(3).then(|| "g1".into()).into_iter().collect();
            Command::RegisterNode {
                id,
                spec: Box::new(spec),
            }
        }
        3 => Command::ConfigureNode {
            id,
            config: NodeConfig {
                capacity: r.one_in(2).then(|| r.below(6) as u32),
                capacity_mode: r.one_in(3).then(|| match r.below(2) {
                    0 => CapacityMode::Number,
                    _ => CapacityMode::Resource,
                }),
                drain: r.one_in(2).then(|| r.one_in(3)),
                ..NodeConfig::default()
            },
        },
        4 => Command::RemoveNode { id },
        5..=6 => {
            let reachable = !r.one_in(3);
            Command::SetNodeReachability {
                id,
                reachable,
                lost: r.one_in(2) && !reachable,
            }
        }
        _ if r.one_in(3) => Command::EvictImages {
            template: format!("t{}", r.below(3)).into(),
            nodes: (0..r.below(2)).map(|_| node(r)).collect(),
        },
        _ => Command::SetNodeImages {
            id,
            images: (0..r.below(4))
                .map(|_| (format!("t{}", r.below(3)).into(), r.below(3) as u32))
                .collect(),
        },
    }
}

fn group_command(r: &mut Random) -> Command {
    let id = |r: &mut Random| format!("g{}", r.below(3)).into();
    match r.below(4) {
        0..=1 => Command::PutGroup {
            group: Group {
                id: id(r),
                name: format!("group{}", r.below(4)),
                description: String::new(),
                fallback: r.one_in(2).then(|| id(r)),
            },
        },
        2 => Command::ChangeNodeGroups {
            nodes: vec![node(r)],
            groups: vec![id(r)],
            member: r.one_in(2),
        },
        _ if r.one_in(4) => Command::SetFeatures {
            level: r.below(10) as u32,
        },
        _ => Command::DeleteGroup { id: id(r) },
    }
}

fn voters(r: &mut Random) -> BTreeSet<MemberId> {
    (0..3).filter(|_| !r.one_in(5)).map(MemberId).collect()
}

/// Repositories carry the names of templates, so that some artifacts are tags of them.
fn artifact_command(r: &mut Random) -> Command {
    let repository = format!("template{}", r.below(2));
    let seed = r.below(3) as u8;
    let tag = |r: &mut Random| format!("v{}", r.below(4));
    match r.below(12) {
        0..=5 => {
            let wanted = r.one_in(3).then(|| ArtifactTemplate {
                new_template_id: format!("t{}", r.below(3)).into(),
                tag: tag(r),
                content: sample::content(r.below(3) as u8, ""),
            });
            let mut content = sample::artifact(seed);
            content.bundle = sample::digest(if r.one_in(6) { 9 } else { seed });
            Command::PutArtifact {
                put: Box::new(ArtifactPut {
                    repository,
                    tags: (0..r.below(3)).map(|_| tag(r)).collect(),
                    content,
                    template: wanted,
                    holder: MemberId(r.below(3)),
                    copies_needed: r.below(4) as u32,
                    voters: voters(r),
                }),
            }
        }
        6..=8 => Command::ReportArtifactHeld {
            repository,
            digest: sample::sha256(seed),
            bundle: sample::digest(seed),
            member: MemberId(r.below(3)),
            held: !r.one_in(3),
            voters: voters(r),
        },
        9..=10 => Command::DeleteArtifactTag {
            repository,
            tag: tag(r),
        },
        _ => Command::DeleteArtifact {
            repository,
            digest: sample::sha256(seed),
        },
    }
}

fn note_command(r: &mut Random, id: mainstay_model::TemplateId) -> Command {
    match r.below(7) {
        3..=4 => Command::Distribute {
            id: format!("d{}", r.below(5)).into(),
            template: id,
            selector: r.one_in(2).then(|| TagSelector::Number(r.below(3) as u32)),
            nodes: (0..r.below(3)).map(|_| node(r)).collect(),
            group: None,
        },
        5 => Command::CancelDistribution {
            id: format!("d{}", r.below(5)).into(),
        },
        6 => Command::ExpireDistributions {
            ids: (0..5).map(|n| format!("d{n}").into()).collect(),
            patience_ms: r.below(200),
            retention_ms: r.below(50),
        },
        0 => Command::DescribeTag {
            id,
            selector: r.one_in(2).then(|| TagSelector::Number(r.below(4) as u32)),
            arch: r.one_in(2).then(|| "amd64".to_owned()),
            description: r.one_in(2).then(|| format!("text {}", r.below(9))),
        },
        1 => Command::NotePulls {
            pulls: (0..r.below(4))
                .map(|_| (id.clone(), r.below(4) as u32, r.below(1000)))
                .collect(),
        },
        _ => Command::SetQuota {
            template: r.one_in(2).then(|| format!("template{}", r.below(3))),
            bytes: r.one_in(3).then(|| r.below(1000)),
        },
    }
}

fn template_command(r: &mut Random) -> Command {
    let number = r.below(3);
    let id = format!("t{number}").into();
    let selector = |r: &mut Random| match r.below(2) {
        0 => TagSelector::Name(format!("v{}", r.below(4))),
        _ => TagSelector::Number(r.below(4) as u32),
    };
    match r.below(12) {
        0..=5 => Command::PublishTag {
            new_template_id: id,
            template: format!("template{number}"),
            tag: format!("v{}", r.below(4)),
            content: sample::content(r.below(3) as u8, if r.one_in(8) { "arm64" } else { "" }),
            holder: MemberId(r.below(3)),
            copies_needed: r.below(4) as u32,
            voters: voters(r),
        },
        6..=8 => Command::ReportHeld {
            template: id,
            number: r.below(4) as u32,
            manifest: sample::digest(r.below(3) as u8),
            member: MemberId(r.below(3)),
            held: !r.one_in(3),
            voters: voters(r),
        },
        9 if r.one_in(2) => Command::DeleteTag {
            id,
            selector: selector(r),
        },
        9 => note_command(r, id),
        10 => Command::RevertTemplate {
            id,
            selector: r.one_in(2).then(|| selector(r)),
        },
        _ if r.one_in(2) => Command::DeleteTemplate { id },
        _ if r.one_in(4) => Command::RetireMember {
            id: MemberId(r.below(3)),
            name: "c".to_owned(),
            voters: voters(r),
        },
        _ => Command::Noop,
    }
}
