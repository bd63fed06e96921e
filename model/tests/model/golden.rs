//! Bytes that outlive the process: one sample of each command, outcome and stored value, compared
//! with `tests/golden/*.txt`. A difference means that old logs and snapshots can no longer be
//! read: append instead, or raise the codec's version. `UPDATE=1` writes them anew.

mod saved;

use crate::sample::{self, Random};
use crate::saves;
use mainstay_model::artifact::ArtifactContent;
use mainstay_model::codec::{decode_envelope, decode_outcome, encode_envelope, encode_outcome};
use mainstay_model::command::{
    Addition, ArtifactPut, ArtifactTemplate, Binding, Command, TagPush, TagSelector,
};
use mainstay_model::group::Group;
use mainstay_model::instance::{
    Observation, ObservedPhase, PortRule, Script, ScriptFailure, ScriptResult, StartRequest, Value,
    VmInfo,
};
use mainstay_model::metadata::Metadata;
use mainstay_model::node::{CapacityMode, NodeConfig};
use mainstay_model::{CommandId, Envelope, MemberId, Outcome, Refusal, State};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

#[test]
fn commands() {
    let mut lines = String::new();
    let mut variants = BTreeSet::new();
    for (name, command) in all_commands() {
        let envelope = Envelope {
            id: CommandId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
            stamp_ms: 1_700_000_000_123,
            command,
        };
        let bytes = encode_envelope(&envelope);
        assert_eq!(decode_envelope(&bytes).unwrap(), envelope, "{name}");
        // Version, id (marker and 16 bytes), stamp (marker and 8 bytes), then the variant.
        variants.insert(bytes[1 + 17 + 9]);
        writeln!(lines, "{name} {}", hex(&bytes)).unwrap();
    }
    assert_eq!(variants, (0..39).collect(), "a command lacks its sample");
    compare("commands.txt", &lines, |bytes| {
        decode_envelope(bytes).map(|e| encode_envelope(&e))
    });
}

#[test]
fn outcomes() {
    let mut lines = String::new();
    let mut variants = BTreeSet::new();
    for (name, outcome) in all_outcomes() {
        let bytes = encode_outcome(&outcome);
        assert_eq!(decode_outcome(&bytes).unwrap(), outcome, "{name}");
        variants.insert((bytes[1], if bytes[1] == 5 { bytes[2] } else { 0 }));
        writeln!(lines, "{name} {}", hex(&bytes)).unwrap();
    }
    let refusals = (0..12).map(|n| (5, n));
    let others = (0..8).filter(|n| *n != 5).map(|n| (n, 0));
    let wanted: BTreeSet<_> = others.chain(refusals).collect();
    assert_eq!(variants, wanted, "an outcome lacks its sample");
    compare("outcomes.txt", &lines, |bytes| {
        decode_outcome(bytes).map(|o| encode_outcome(&o))
    });
}

#[test]
fn stored_values() {
    stored("stored.txt", &full_state(), "cfgilmnoqstuvwx");
}

#[test]
fn stored_values_at_level_7() {
    let mut history = sample_history(7);
    history.extend(note_commands().into_iter().map(|(_, command)| command));
    let state = state_after(&history);
    stored("stored-level-7.txt", &state, "cfgilmnoqrstuvwxyz");
}

/// One that is done, one that waits for a node, one that was cancelled.
#[test]
fn stored_values_at_level_11() {
    let mut history = sample_history(11);
    let wish = |id: &str| Command::Distribute {
        id: id.into(),
        template: "t1".into(),
        selector: None,
        nodes: vec!["n1".into()],
        group: None,
    };
    history.push(wish("d0"));
    history.push(Command::SetNodeImages {
        id: "n1".into(),
        images: Vec::new(),
    });
    history.extend([wish("d1"), wish("d2")]);
    history.push(Command::CancelDistribution { id: "d2".into() });
    let state = state_after(&history);
    stored("stored-level-11.txt", &state, "cdefgilmnoqrstuvwx");
}

/// A node shall drop what it has of a template, of which not all is known.
#[test]
fn stored_values_at_level_12() {
    let mut history = sample_history(12);
    history.push(evict("t1", &["n1"]));
    let state = state_after(&history);
    assert_eq!(state.evicted_on(&"n1".into()).count(), 2);
    stored("stored-level-12.txt", &state, "cfgiklmnoqrstuvwx");
}

/// While remembered commands move into blocks: the last ones have, the first ones not.
#[test]
fn stored_values_at_level_5() {
    let state = state_after(&sample_history(5));
    stored("stored-level-5.txt", &state, "cfgilmnoqrstuvwx");
}

/// While members of the first release may be there.
#[test]
fn stored_values_at_level_0() {
    let commands = sample_history(4);
    // Without those that need more: a member that is taken out, artifacts, and the level itself.
    let before = &commands[..commands.len() - 5];
    stored("stored-level-0.txt", &state_after(before), "cgilnorstv");
}

fn stored(file: &str, state: &State, wanted: &str) {
    let mut lines = String::new();
    let mut tables = BTreeSet::new();
    for (key, value) in state.export() {
        tables.insert(char::from(key[0]));
        writeln!(lines, "{} {}", hex(&key), hex(&value)).unwrap();
    }
    let wanted: BTreeSet<char> = wanted.chars().collect();
    assert_eq!(tables, wanted, "a table lacks its sample");
    check_file(file, &lines);
    // What an older release wrote can be read, and is written back the same.
    let old = golden(file);
    let entries = old.lines().map(|line| {
        let (key, value) = line.split_once(' ').unwrap();
        (unhex(key), unhex(value))
    });
    assert_eq!(&State::import(entries).unwrap(), state);
}

#[test]
fn digest_of_the_sample() {
    let digest = format!("{:032x}\n", full_state().digest());
    check_file("digest.txt", &digest);
}

/// Whatever the bytes: an answer, no panic, and no attempt to allocate what they promise.
#[test]
fn garbage_is_refused() {
    let mut random = Random(42);
    let samples: Vec<Vec<u8>> = all_commands()
        .into_iter()
        .map(|(_, command)| {
            encode_envelope(&Envelope {
                id: CommandId(1),
                stamp_ms: 1,
                command,
            })
        })
        .collect();
    for sample in &samples {
        for cut in 0..sample.len() {
            assert!(decode_envelope(&sample[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = sample.clone();
        longer.push(0);
        assert!(decode_envelope(&longer).is_err(), "a byte too many");
        let mut newer = sample.clone();
        newer[0] = 2;
        let error = decode_envelope(&newer).unwrap_err().to_string();
        assert!(error.contains("format 2"), "{error}");
    }
    for _ in 0..200_000 {
        let mut bytes = random.pick(&samples).clone();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
        let _ = decode_envelope(&bytes);
        let _ = decode_outcome(&bytes);
    }
    // Lengths that promise far more than there is.
    for length in [1_u64 << 20, 1 << 30, 1 << 40, u64::MAX] {
        for variant in 0..35_u8 {
            let mut bytes = vec![1, 1, 1, variant, 253];
            bytes.extend_from_slice(&length.to_le_bytes());
            assert!(decode_envelope(&bytes).is_err());
            bytes[1] = variant;
            assert!(decode_outcome(&bytes).is_err());
        }
    }
}

#[test]
fn strange_stored_values_are_refused() {
    let good = full_state().export();
    let import = |entries: Vec<(Vec<u8>, Vec<u8>)>| State::import(entries.into_iter());
    assert!(import(good.clone()).is_ok());
    let mut random = Random(7);
    for at in 0..good.len() {
        let mut cut = good.clone();
        cut[at].1.pop();
        assert!(import(cut).is_err(), "value {at} cut short");
        for _ in 0..200 {
            let mut bent = good.clone();
            let value = &mut bent[at].1;
            let byte = random.below(value.len() as u64) as usize;
            value[byte] = random.next() as u8;
            let _ = import(bent);
        }
    }
    let without = |table: u8| good.iter().filter(|e| e.0[0] != table).cloned().collect();
    assert!(import(without(b's')).is_err(), "a script is missing");
    assert!(
        import(without(b't')).is_err(),
        "tags without their template"
    );
    assert!(
        import(without(b'i')).is_err(),
        "outputs without their instance"
    );
    assert!(
        import(vec![(b"z".to_vec(), vec![1])]).is_err(),
        "unknown table"
    );
}

fn compare(
    file: &str,
    lines: &str,
    again: impl Fn(&[u8]) -> Result<Vec<u8>, mainstay_model::codec::CodecError>,
) {
    check_file(file, lines);
    for line in golden(file).lines() {
        let (name, text) = line.split_once(' ').unwrap();
        let bytes = unhex(text);
        assert_eq!(again(&bytes).unwrap(), bytes, "{name}");
    }
}

fn path(file: &str) -> String {
    format!("{}/tests/golden/{file}", env!("CARGO_MANIFEST_DIR"))
}

fn golden(file: &str) -> String {
    std::fs::read_to_string(path(file)).unwrap()
}

fn check_file(file: &str, lines: &str) {
    if crate::update() {
        std::fs::write(path(file), lines).unwrap();
    }
    for (want, got) in golden(file).lines().zip(lines.lines()) {
        assert_eq!(want, got, "{file}");
    }
    assert_eq!(
        golden(file).lines().count(),
        lines.lines().count(),
        "{file}"
    );
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let pair = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(pair).collect()
}

fn full_request() -> StartRequest {
    let rule = PortRule {
        name: "ssh".into(),
        guest_port: 22,
        host_port: 10_022,
    };
    StartRequest {
        template: "t1".into(),
        tag: Some("v1".into()),
        version: Some(0),
        name: Some("name".into()),
        name_template: Some("$ts".into()),
        external_id: Some("https://ci/1".into()),
        node: Some("n1".into()),
        group: Some("g1".into()),
        priority: 10_000,
        script: Some(Box::new(Script {
            body: b"exit 0\n".to_vec(),
            monitored: true,
            timeout_s: 90,
            at_boot: true,
            on_failure: ScriptFailure::Delete,
        })),
        vcpu: Some(4),
        vram_mb: Some(8_192),
        metadata: Metadata::from_iter([
            ("int".into(), Value::Int(-5)),
            ("text".into(), Value::Text("é".into())),
            ("truth".into(), Value::Bool(true)),
        ]),
        port_forwarding: Some(vec![rule]),
    }
}

fn full_observation(phase: ObservedPhase) -> Observation {
    Observation {
        id: "i1".into(),
        generation: 2,
        phase,
        vm: Some(VmInfo {
            uuid: "vm-1".into(),
            name: "mgmtManaged-1".into(),
            status: "running".into(),
            ip: "10.0.2.15".into(),
            host_ip: "192.0.2.1".into(),
            cpu_cores: 4,
            ram_mb: 8_192,
            port_forwarding: Vec::new(),
            vnc_port: 5_901,
            created_ms: 1_700_000_000_000,
            started_ms: 1_700_000_001_000,
            accelerator: "tcg (no kvm)".into(),
        }),
        script: Some(ScriptResult {
            return_code: -1,
            did_timeout: true,
            stdout: "out".into(),
            stderr: "err".into(),
        }),
    }
}

fn full_config() -> NodeConfig {
    NodeConfig {
        capacity: Some(8),
        name: Some("builder".into()),
        host: Some("builder.example".into()),
        capacity_mode: Some(CapacityMode::Resource),
        vcpu_override: Some(32),
        ram_override_mb: Some(65_536),
        drain: Some(false),
    }
}

fn all_commands() -> Vec<(&'static str, Command)> {
    let mut all = instance_commands();
    all.extend(other_commands());
    all.extend(artifact_commands());
    all.extend(note_commands());
    all.extend(weighed_commands());
    all.extend(distribute_commands());
    all.extend(saves::samples());
    all
}

fn evict(of: &str, nodes: &[&str]) -> Command {
    Command::EvictImages {
        template: of.into(),
        nodes: nodes.iter().map(|n| (*n).into()).collect(),
    }
}

fn distribute_commands() -> Vec<(&'static str, Command)> {
    let distribute = Command::Distribute {
        id: "d1".into(),
        template: "t1".into(),
        selector: Some(TagSelector::Number(300)),
        nodes: vec!["n1".into(), "n2".into()],
        group: Some("g1".into()),
    };
    let bare = Command::Distribute {
        id: "d2".into(),
        template: "t1".into(),
        selector: None,
        nodes: Vec::new(),
        group: None,
    };
    let cancel = Command::CancelDistribution { id: "d1".into() };
    let expire = Command::ExpireDistributions {
        ids: vec!["d1".into(), "d2".into()],
        patience_ms: 86_400_000,
        retention_ms: 7_200_000,
    };
    vec![
        ("distribute", distribute),
        ("distribute-bare", bare),
        ("cancel-distribution", cancel),
        ("expire-distributions", expire),
        ("evict-images", evict("t1", &["n1", "n2"])),
        ("evict-everywhere", evict("t2", &[])),
    ]
}

fn note_commands() -> Vec<(&'static str, Command)> {
    let describe = Command::DescribeTag {
        id: "t1".into(),
        selector: Some(TagSelector::Number(0)),
        arch: Some("arm64".into()),
        description: Some("nightly".into()),
    };
    let pulls = Command::NotePulls {
        pulls: vec![("t1".into(), 0, 1_700_000_000_500), ("t9".into(), 300, 1)],
    };
    let quota = |template: Option<&str>, bytes| Command::SetQuota {
        template: template.map(str::to_owned),
        bytes,
    };
    vec![
        ("describe-tag", describe),
        ("note-pulls", pulls),
        ("set-quota", quota(None, Some(1 << 40))),
        ("set-quota-of-one", quota(Some("debian"), Some(300))),
        ("set-quota-none", quota(Some("other"), None)),
    ]
}

fn weighed_commands() -> Vec<(&'static str, Command)> {
    let push = TagPush {
        new_template_id: "t1".into(),
        template: "debian".into(),
        tag: "v1".into(),
        content: sample::content(7, "arm64"),
        holder: MemberId(0xfeed_beef),
        copies_needed: 2,
        voters: [MemberId(2), MemberId(0xfeed_beef)].into(),
    };
    let put = ArtifactPut {
        repository: "images/debian".into(),
        tags: vec!["v7".into()],
        content: sample::artifact(5),
        template: None,
        holder: MemberId(2),
        copies_needed: 2,
        voters: [MemberId(2)].into(),
    };
    let within = |named, what| Command::AddWithin { named, what };
    vec![
        (
            "add-tag-within",
            within(u64::MAX, Addition::Tag(Box::new(push))),
        ),
        (
            "add-artifact-within",
            within(300, Addition::Artifact(Box::new(put))),
        ),
        (
            "restart-instance",
            Command::RestartInstance { id: "i1".into() },
        ),
    ]
}

fn artifact_commands() -> Vec<(&'static str, Command)> {
    let repository = || "images/debian".to_owned();
    let template = ArtifactTemplate {
        new_template_id: "t7".into(),
        tag: "v7".into(),
        content: sample::content(8, "arm64"),
    };
    let put = ArtifactPut {
        repository: repository(),
        tags: vec!["v7".into(), "latest".into()],
        content: sample::artifact(5),
        template: Some(template),
        holder: MemberId(2),
        copies_needed: 2,
        voters: [MemberId(2), MemberId(0xfeed_beef)].into(),
    };
    let bare = ArtifactPut {
        tags: vec!["next".into()],
        content: ArtifactContent {
            subject: None,
            blobs: Vec::new(),
            ..sample::artifact(6)
        },
        template: None,
        ..put.clone()
    };
    let held = Command::ReportArtifactHeld {
        repository: repository(),
        digest: sample::sha256(5),
        bundle: sample::digest(5),
        member: MemberId(0xfeed_beef),
        held: true,
        voters: [MemberId(2), MemberId(0xfeed_beef)].into(),
    };
    let delete = Command::DeleteArtifact {
        repository: repository(),
        digest: sample::sha256(5),
    };
    let delete_tag = Command::DeleteArtifactTag {
        repository: repository(),
        tag: "latest".into(),
    };
    let put_of = |put| Command::PutArtifact { put: Box::new(put) };
    vec![
        ("put-artifact", put_of(put)),
        ("put-artifact-bare", put_of(bare)),
        ("report-artifact-held", held),
        ("delete-artifact", delete),
        ("delete-artifact-tag", delete_tag),
    ]
}

fn instance_commands() -> Vec<(&'static str, Command)> {
    use ObservedPhase as Seen;
    let mut all = vec![
        (
            "start",
            Command::StartInstances {
                ids: vec!["i1".into(), "i2".into()],
                request: Box::new(full_request()),
            },
        ),
        (
            "start-bare",
            Command::StartInstances {
                ids: vec!["i3".into()],
                request: Box::new(sample::request("t1")),
            },
        ),
        (
            "update",
            Command::UpdateInstance {
                id: "i1".into(),
                name: Some("other".into()),
                external_id: None,
                metadata: BTreeMap::from([("k".into(), Value::Int(i64::MAX))]),
            },
        ),
        ("terminate", Command::TerminateInstance { id: "i1".into() }),
        (
            "bind",
            Command::Bind {
                bindings: vec![Binding {
                    instance: "i1".into(),
                    node: "n1".into(),
                    generation: 1,
                }],
            },
        ),
        (
            "expire",
            Command::ExpireInstances {
                ids: vec!["i1".into()],
                retention_ms: 60_000,
            },
        ),
    ];
    for (name, phase) in [
        ("observe-pulling", Seen::Pulling),
        ("observe-starting", Seen::Starting),
        ("observe-running", Seen::Running),
        ("observe-stopped", Seen::Stopped),
        ("observe-failed", Seen::Failed("why".into())),
        ("observe-rejected", Seen::Rejected("why".into())),
        ("observe-gone", Seen::Gone),
    ] {
        let changes = vec![full_observation(phase)];
        let node = "n1".into();
        all.push((name, Command::Observe { node, changes }));
    }
    all
}

fn other_commands() -> Vec<(&'static str, Command)> {
    let id = || "t1".into();
    let by_name = || TagSelector::Name("v1".into());
    let mut spec = sample::spec("n1", 2);
    spec.groups = vec!["g1".into()];
    let node = || "n1".into();
    let group = Group {
        id: "g1".into(),
        name: "fast".into(),
        description: "the fast ones".into(),
        fallback: Some("g2".into()),
    };
    let register = Command::RegisterNode {
        id: node(),
        spec: Box::new(spec),
    };
    let configure = Command::ConfigureNode {
        id: node(),
        config: full_config(),
    };
    let reachability = Command::SetNodeReachability {
        id: node(),
        reachable: false,
        lost: true,
    };
    let images = Command::SetNodeImages {
        id: node(),
        images: vec![(id(), 0), (id(), 300)],
    };
    let publish = Command::PublishTag {
        new_template_id: id(),
        template: "debian".into(),
        tag: "v1".into(),
        content: sample::content(9, "amd64"),
        holder: MemberId(0xfeed_beef),
        copies_needed: 2,
        voters: [MemberId(2), MemberId(0xfeed_beef)].into(),
    };
    let held = Command::ReportHeld {
        template: id(),
        number: 0,
        manifest: sample::digest(9),
        member: MemberId(2),
        held: true,
        voters: [MemberId(2), MemberId(0xfeed_beef)].into(),
    };
    let revert = |selector| Command::RevertTemplate { id: id(), selector };
    let change_groups = Command::ChangeNodeGroups {
        nodes: vec![node()],
        groups: vec!["g1".into()],
        member: true,
    };
    let retire = Command::RetireMember {
        id: MemberId(0xdead_beef),
        name: "c3".into(),
        voters: [MemberId(2), MemberId(0xfeed_beef)].into(),
    };
    vec![
        ("register-node", register),
        ("configure-node", configure),
        ("remove-node", Command::RemoveNode { id: node() }),
        ("set-node-reachability", reachability),
        ("set-node-images", images),
        ("publish-tag", publish),
        ("report-held", held),
        ("delete-template", Command::DeleteTemplate { id: id() }),
        ("revert-latest", revert(None)),
        ("revert-by-number", revert(Some(TagSelector::Number(1)))),
        ("revert-by-name", revert(Some(by_name()))),
        (
            "delete-tag",
            Command::DeleteTag {
                id: id(),
                selector: by_name(),
            },
        ),
        ("noop", Command::Noop),
        ("put-group", Command::PutGroup { group }),
        ("delete-group", Command::DeleteGroup { id: "g1".into() }),
        ("change-node-groups", change_groups),
        ("set-features", Command::SetFeatures { level: 300 }),
        ("retire-member", retire),
    ]
}

fn all_outcomes() -> Vec<(&'static str, Outcome)> {
    let published = Outcome::Published {
        template: "t1".into(),
        number: 7,
        visible: true,
    };
    let text = || "text".to_owned();
    let mut all = vec![
        ("done", Outcome::Done),
        ("started", Outcome::Started(vec!["i1".into(), "i2".into()])),
        ("published", published),
        ("bound", Outcome::Bound(3)),
        ("registered", Outcome::Registered("n1".into())),
        ("asked", Outcome::Asked(vec!["n1".into(), "n2".into()])),
        ("saving", Outcome::Saving("s1".into())),
    ];
    let refusals = [
        ("template-unknown", Refusal::TemplateUnknown(text())),
        ("tag-unknown", Refusal::TagUnknown(text())),
        ("instance-unknown", Refusal::InstanceUnknown("i1".into())),
        ("node-unknown", Refusal::NodeUnknown("n1".into())),
        ("tag-taken", Refusal::TagTaken(text())),
        ("limit", Refusal::Limit(text())),
        ("conflict", Refusal::Conflict(text())),
        ("group-unknown", Refusal::GroupUnknown("g1".into())),
        ("repository-unknown", Refusal::RepositoryUnknown(text())),
        (
            "artifact-unknown",
            Refusal::ArtifactUnknown(sample::sha256(5)),
        ),
        ("refused-stale", Refusal::Stale),
        ("distribution-unknown", Refusal::DistributionUnknown(text())),
    ];
    all.extend(refusals.map(|(name, refusal)| (name, Outcome::Refused(refusal))));
    all
}

/// Every table with every field set somewhere.
fn full_state() -> State {
    state_after(&sample_history(4))
}

/// Ends with the command that switches features on, up to this level, and one that needs that.
fn sample_history(level: u32) -> Vec<Command> {
    let observe = |phase, generation| Command::Observe {
        node: "n1".into(),
        changes: vec![Observation {
            generation,
            ..full_observation(phase)
        }],
    };
    let bind = |generation| Command::Bind {
        bindings: vec![Binding {
            instance: "i1".into(),
            node: "n1".into(),
            generation,
        }],
    };
    let named = |name: &str| {
        let found = all_commands().into_iter().find(|(n, _)| *n == name);
        found.unwrap().1
    };
    let fallback = Group {
        id: "g2".into(),
        name: "slow".into(),
        description: String::new(),
        fallback: None,
    };
    let rejected = ObservedPhase::Rejected("no disk space".into());
    vec![
        Command::PutGroup { group: fallback },
        named("put-group"),
        named("register-node"),
        named("configure-node"),
        named("set-node-images"),
        named("publish-tag"),
        named("report-held"),
        named("start"),
        named("start-bare"),
        bind(1),
        observe(rejected, 2),
        bind(3),
        observe(ObservedPhase::Failed("exit code -1".into()), 4),
        observe(ObservedPhase::Gone, 4),
        Command::TerminateInstance { id: "i2".into() },
        Command::Bind {
            bindings: vec![Binding {
                instance: "i3".into(),
                node: "n1".into(),
                generation: 1,
            }],
        },
        Command::TerminateInstance { id: "i3".into() },
        named("set-node-reachability"),
        Command::TerminateInstance { id: "i9".into() },
        Command::SetFeatures { level },
        named("retire-member"),
        named("put-artifact"),
        named("report-artifact-held"),
        named("put-artifact-bare"),
    ]
}

fn state_after(commands: &[Command]) -> State {
    let mut state = State::default();
    let script = |n: usize, command: &Command| Envelope {
        id: CommandId(0x1000 + n as u128),
        stamp_ms: 1_700_000_000_000 + n as u64,
        command: command.clone(),
    };
    for (n, command) in commands.iter().enumerate() {
        let outcome = state.apply(&script(n, command));
        let refused = matches!(outcome, Outcome::Refused(_));
        assert_eq!(refused, n == 18, "command {n}: {outcome:?}");
    }
    let instance = &state.instances[&"i1".into()];
    assert!(instance.vm_gone && instance.rejections.len() == 1);
    assert_eq!(state.left.len(), 1);
    state
}
