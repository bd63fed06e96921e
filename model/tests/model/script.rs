//! Scripts: `tests/scripts/*.txt`. A line that starts with `> ` is a command; the lines below it,
//! up to the next blank line or command, are what it must answer. `UPDATE=1` rewrites them.
//!
//! Words are `key=value` or bare. Time is `@<ms>` as the first word (it stays until the next);
//! `#<n>` as the first word after it gives the command id, else each command has a new one.

use crate::{sample, saves};
use mainstay_model::command::{ArtifactPut, ArtifactTemplate, Binding, Command, TagSelector};
use mainstay_model::group::Group;
use mainstay_model::instance::{Observation, ObservedPhase, ScriptResult, Value, VmInfo};
use mainstay_model::node::{CapacityMode, NodeConfig};
use mainstay_model::{CommandId, Envelope, InstanceId, MemberId, Outcome, State};
use mainstay_model::{invariants, plan};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

#[test]
fn transcripts() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    files.sort();
    assert!(files.len() >= 10, "scripts are missing: {files:?}");
    let mut wrong = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let got = transcript(&text);
        if crate::update() {
            std::fs::write(&path, got).unwrap();
        } else if got != text {
            wrong.push(format!("{}:\n{}", path.display(), difference(&text, &got)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn difference(want: &str, got: &str) -> String {
    let (mut want, mut got) = (want.lines(), got.lines());
    for line in 1.. {
        match (want.next(), got.next()) {
            (None, None) => break,
            (a, b) if a == b => {}
            (a, b) => return format!("line {line}\n  want {a:?}\n  got  {b:?}"),
        }
    }
    "differs in line ends".to_owned()
}

/// The script with the answers that the model gives.
fn transcript(text: &str) -> String {
    let mut runner = Runner::default();
    let mut out = String::new();
    let mut answering = false;
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("> ") {
            writeln!(out, "{line}").unwrap();
            out.push_str(&runner.run(command));
            answering = true;
        } else if line.trim().is_empty() {
            out.push('\n');
            answering = false;
        } else if !answering {
            writeln!(out, "{line}").unwrap();
        }
    }
    out
}

#[derive(Default)]
struct Runner {
    state: State,
    now_ms: u64,
    next_command: u128,
}

pub struct Words<'a> {
    pub bare: Vec<&'a str>,
    keyed: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn of(words: &[&'a str]) -> Self {
        let (keyed, bare): (Vec<&str>, Vec<&str>) = words.iter().partition(|w| w.contains('='));
        let keyed = keyed.iter().map(|w| w.split_once('=').unwrap()).collect();
        Self { bare, keyed }
    }
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.keyed.get(key).copied()
    }
    pub fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.get(key)
            .map(|v| v.parse().unwrap_or_else(|_| panic!("{key}={v}")))
    }
    pub fn list(&self, key: &str) -> Vec<&'a str> {
        let list = self.get(key).unwrap_or_default().split(',');
        list.filter(|s| !s.is_empty()).collect()
    }
    pub fn has(&self, word: &str) -> bool {
        self.bare.contains(&word)
    }
}

impl Runner {
    fn run(&mut self, line: &str) -> String {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if let Some(now) = words[0].strip_prefix('@') {
            self.now_ms = now.parse().unwrap();
            words.remove(0);
        }
        self.next_command += 1;
        let mut id = CommandId(1_000_000 + self.next_command);
        if let Some(number) = words[0].strip_prefix('#') {
            id = CommandId(number.parse().unwrap());
            words.remove(0);
        }
        let verb = words.remove(0);
        let args = Words::of(&words);
        if let Some(text) = self.show(verb, &args) {
            return text;
        }
        let command = self.command(verb, &args);
        self.apply(id, command)
    }

    fn apply(&mut self, id: CommandId, command: Command) -> String {
        let before = self.state.clone();
        self.state.take_changes();
        let envelope = Envelope {
            id,
            stamp_ms: self.now_ms,
            command,
        };
        let outcome = self.state.apply(&envelope);
        invariants::check(&self.state).unwrap();
        invariants::check_step(&before, &self.state).unwrap();
        let mut out = format!("{}\n", show_outcome(&outcome));
        if let Outcome::Refused(_) = outcome {
            let mut same = before;
            same.clock_ms = self.state.clock_ms;
            assert_eq!(same.instances, self.state.instances);
            assert_eq!(same.nodes, self.state.nodes);
            assert_eq!(same.left, self.state.left);
            assert_eq!(same.templates, self.state.templates);
            assert_eq!(same.repositories, self.state.repositories);
            assert_eq!(same.groups, self.state.groups);
            assert_eq!(same.distributions, self.state.distributions);
            assert_eq!(same.evictions, self.state.evictions);
            assert_eq!(same.saves, self.state.saves);
        }
        let changed = self.state.take_changes();
        let names = changed
            .iter()
            .map(|(key, value)| (key_name(key), value.is_some()));
        let shown: Vec<String> = names
            .filter(|(name, _)| !name.is_empty())
            .map(|(name, set)| format!("{}{name}", if set { "" } else { "-" }))
            .collect();
        if !shown.is_empty() {
            writeln!(out, "changed {}", shown.join(" ")).unwrap();
        }
        out
    }

    fn show(&self, verb: &str, args: &Words<'_>) -> Option<String> {
        let mut out = String::new();
        let bare = |at: usize| args.bare.get(at).copied();
        match verb {
            "instances" => {
                for instance in self.state.instances.values() {
                    writeln!(out, "{}", show_instance(instance)).unwrap();
                }
            }
            "instance" => {
                let id = InstanceId::from(bare(0).unwrap());
                let found = self.state.instances.get(&id);
                writeln!(out, "{}", found.map_or("none".into(), show_instance)).unwrap();
            }
            "metadata" => {
                let id = InstanceId::from(bare(0).unwrap());
                let request = &self.state.instances[&id].request;
                let (name, mark) = (&request.name, &request.external_id);
                writeln!(out, "name={name:?} external_id={mark:?}").unwrap();
                for (key, value) in request.metadata.iter() {
                    writeln!(out, "{key} = {value:?}").unwrap();
                }
            }
            "nodes" => {
                for node in self.state.nodes.values() {
                    writeln!(out, "{}", show_node(&self.state, node)).unwrap();
                }
            }
            "templates" => self.show_templates(&mut out),
            "repositories" => self.show_repositories(&mut out),
            "notes" => {
                for ((id, number), at) in &self.state.pulls {
                    writeln!(out, "{id}/{number} pulled@{at}").unwrap();
                }
                for (name, bytes) in &self.state.quotas {
                    writeln!(out, "quota of {name:?}: {bytes}").unwrap();
                }
                for template in self.state.templates.values() {
                    for tag in template.tags.values() {
                        let (id, content) = (&template.id, &tag.content);
                        let (arch, text) = (&content.arch, &content.description);
                        writeln!(out, "{id}/{} arch={arch:?} {text:?}", tag.number).unwrap();
                    }
                }
            }
            "distributions" => {
                for d in self.state.distributions.values() {
                    let ended = d.ended_ms.map(|at| format!(" ended@{at}"));
                    let ended = ended.unwrap_or_default();
                    writeln!(out, "{} {}/{} {}{ended}", d.id, d.template, d.number, d.tag).unwrap();
                    for (node, delivery) in &d.nodes {
                        writeln!(out, "  {node} {delivery:?}").unwrap();
                    }
                }
            }
            "evictions" => {
                for node in self.state.nodes.keys() {
                    for (of, number) in self.state.evicted_on(node) {
                        writeln!(out, "{node} {of}/{number}").unwrap();
                    }
                }
            }
            "saves" => saves::show(&self.state, &mut out),
            "groups" => {
                for group in self.state.groups.values() {
                    let fallback = group.fallback.as_ref().map_or("-", |g| g.as_str());
                    writeln!(out, "{} name={} fallback={fallback}", group.id, group.name).unwrap();
                }
            }
            "waiting" => {
                let ids: Vec<&str> = self.state.waiting().map(|i| i.id.as_str()).collect();
                if !ids.is_empty() {
                    writeln!(out, "{}", ids.join(" ")).unwrap();
                }
            }
            "explain" => {
                let why = plan::explain(&self.state, &bare(0).unwrap().into());
                writeln!(out, "{}", why.unwrap_or("does not wait".into())).unwrap();
            }
            "plan" => {
                let limit = args.number("limit").unwrap_or(100);
                let plan = plan::place_at(&self.state, limit, self.now_ms);
                for b in &plan.bindings {
                    writeln!(out, "{} -> {} at {}", b.instance, b.node, b.generation).unwrap();
                }
                for refused in &plan.waiting {
                    let (id, why) = (&refused.first, &refused.why);
                    match refused.behind {
                        0 => writeln!(out, "{id} waits: {why}").unwrap(),
                        more => writeln!(out, "{id} and {more} more wait: {why}").unwrap(),
                    }
                }
            }
            _ => return None,
        }
        Some(if out.is_empty() { "none\n".into() } else { out })
    }

    fn show_templates(&self, out: &mut String) {
        for template in self.state.templates.values() {
            let (id, name, next) = (&template.id, &template.name, template.next_number);
            writeln!(out, "{id} name={name} next={next}").unwrap();
            for tag in template.tags.values() {
                let holders: Vec<String> = tag.holders.iter().map(|m| m.0.to_string()).collect();
                let visible = match tag.visible_ms {
                    Some(at) => format!("visible@{at}"),
                    None => format!("{} of {}", tag.holders.len(), tag.copies_needed),
                };
                let held = holders.join(",");
                let (number, name) = (tag.number, &tag.name);
                writeln!(out, "  {number} {name} {visible} held by {held}").unwrap();
            }
        }
    }

    fn show_repositories(&self, out: &mut String) {
        for (name, repository) in &self.state.repositories {
            writeln!(out, "{name} puts={}", repository.puts).unwrap();
            for artifact in repository.artifacts.values() {
                let holders: Vec<String> =
                    artifact.holders.iter().map(|m| m.0.to_string()).collect();
                let visible = match artifact.visible_ms {
                    Some(at) => format!("visible@{at}"),
                    None => format!("{} of {}", artifact.holders.len(), artifact.copies_needed),
                };
                let (seed, held) = (artifact.content.digest.0[0], holders.join(","));
                write!(out, "  {seed} {visible} held by {held}").unwrap();
                for (tag, put) in &artifact.waiting_tags {
                    write!(out, " waits={tag}@{put}").unwrap();
                }
                for (id, number) in &artifact.template_tags {
                    write!(out, " is={id}/{number}").unwrap();
                }
                out.push('\n');
            }
            for (tag, names) in &repository.tags {
                writeln!(
                    out,
                    "  {tag} -> {} by put {}",
                    names.artifact.0[0], names.put
                )
                .unwrap();
            }
        }
    }

    fn command(&self, verb: &str, args: &Words<'_>) -> Command {
        match verb {
            "put"
            | "artifact-held"
            | "artifact-lost"
            | "delete-artifact"
            | "delete-artifact-tag" => artifact_command(verb, args),
            "start" | "update" | "restart" | "terminate" | "expire" => instance_command(verb, args),
            "bind" | "place" => self.bind_command(verb, args),
            "observe" => self.observe_command(args),
            "publish" | "held" | "lost-copy" | "retire" | "revert" | "delete-tag"
            | "delete-template" => template_command(verb, args),
            "describe" | "pulled" | "quota" => note_command(verb, args),
            "distribute" | "cancel" | "forget" | "evict" => distribute_command(verb, args),
            _ if saves::VERBS.contains(&verb) => saves::command(verb, args, voters(args)),
            _ => node_command(verb, args),
        }
    }

    /// `bind i1:n1 i2:n1@3`: at the present generation unless one is given. `place`: as planned.
    fn bind_command(&self, verb: &str, args: &Words<'_>) -> Command {
        if verb == "place" {
            let limit = args.number("limit").unwrap_or(100);
            let bindings = plan::place_at(&self.state, limit, self.now_ms).bindings;
            return Command::Bind { bindings };
        }
        let binding = |word: &&str| {
            let (instance, rest) = word.split_once(':').unwrap();
            let instance = InstanceId::from(instance);
            let present = self
                .state
                .instances
                .get(&instance)
                .map_or(0, |i| i.generation);
            let (node, generation) = match rest.split_once('@') {
                Some((node, generation)) => (node, generation.parse().unwrap()),
                None => (rest, present),
            };
            Binding {
                instance,
                node: node.into(),
                generation,
            }
        };
        let bindings = args.bare.iter().map(binding).collect();
        Command::Bind { bindings }
    }

    /// `observe n1 i1 running [gen=2] [why=..] [ip=..] [blank] [exit=0]`.
    fn observe_command(&self, args: &Words<'_>) -> Command {
        let id = InstanceId::from(args.bare[1]);
        let present = self.state.instances.get(&id).map_or(0, |i| i.generation);
        let why = args.text("why").unwrap_or_default().replace('_', " ");
        let phase = match args.bare[2] {
            "pulling" => ObservedPhase::Pulling,
            "starting" => ObservedPhase::Starting,
            "running" => ObservedPhase::Running,
            "stopped" => ObservedPhase::Stopped,
            "failed" => ObservedPhase::Failed(why),
            "rejected" => ObservedPhase::Rejected(why),
            "gone" => ObservedPhase::Gone,
            other => panic!("phase {other}"),
        };
        let vm = args.text("ip").map(|ip| VmInfo {
            uuid: if args.has("blank") {
                String::new()
            } else {
                format!("vm-{id}")
            },
            status: "running".into(),
            ip,
            ..VmInfo::default()
        });
        let script = args.number("exit").map(|return_code| ScriptResult {
            return_code,
            stdout: args.text("stdout").unwrap_or_default(),
            ..ScriptResult::default()
        });
        Command::Observe {
            node: args.bare[0].into(),
            changes: vec![Observation {
                generation: args.number("gen").unwrap_or(present),
                id,
                phase,
                vm,
                script,
            }],
        }
    }
}

fn key_name(key: &[u8]) -> String {
    match key[0] {
        b'c' | b'r' | b'q' => String::new(),
        table @ (b'v' | b'z') => {
            let (id, tail) = key[1..].split_at(key.len() - 6);
            let number = u32::from_be_bytes(tail[1..].try_into().unwrap());
            let table = char::from(table);
            format!("{table}:{}/{number}", String::from_utf8_lossy(id))
        }
        b'w' => {
            let (name, digest) = key[1..].split_at(key.len() - 34);
            format!("w:{}/{}", String::from_utf8_lossy(name), digest[1])
        }
        table @ (b'e' | b'k' | b'x') => format!(
            "{}:{}",
            char::from(table),
            String::from_utf8_lossy(&key[1..]).replace('\0', ":")
        ),
        b'm' => {
            let id = u64::from_be_bytes(key[1..].try_into().unwrap());
            format!("m:{id}")
        }
        table => format!(
            "{}:{}",
            char::from(table),
            String::from_utf8_lossy(&key[1..])
        ),
    }
}

/// `describe t1 [tag=v1] [arch=..] [text=..]`, `pulled t1 number=0 at=5`, `quota [of=NAME] [bytes=5]`.
fn note_command(verb: &str, args: &Words<'_>) -> Command {
    match verb {
        "describe" => Command::DescribeTag {
            id: args.bare[0].into(),
            selector: args.text("tag").map(TagSelector::Name),
            arch: args.text("arch"),
            description: args.text("text"),
        },
        "pulled" => Command::NotePulls {
            pulls: vec![(
                args.bare[0].into(),
                args.number("number").unwrap(),
                args.number("at").unwrap(),
            )],
        },
        _ => Command::SetQuota {
            template: args.text("of"),
            bytes: args.number("bytes"),
        },
    }
}

/// `distribute d1 of=t1 [tag=v1] [nodes=n1,n2] [group=g1]`, `cancel d1`, `forget d1 d2 keep=5 [patience=9]`,
/// `evict t1 [nodes=n1]`.
fn distribute_command(verb: &str, args: &Words<'_>) -> Command {
    match verb {
        "distribute" => Command::Distribute {
            id: args.bare[0].into(),
            template: args.get("of").unwrap_or("t1").into(),
            selector: args.text("tag").map(TagSelector::Name),
            nodes: args.list("nodes").into_iter().map(Into::into).collect(),
            group: args.get("group").map(Into::into),
        },
        "evict" => Command::EvictImages {
            template: args.bare[0].into(),
            nodes: args.list("nodes").into_iter().map(Into::into).collect(),
        },
        "cancel" => Command::CancelDistribution {
            id: args.bare[0].into(),
        },
        _ => Command::ExpireDistributions {
            ids: args.bare.iter().map(|id| (*id).into()).collect(),
            patience_ms: args.number("patience").unwrap_or(u64::MAX),
            retention_ms: args.number("keep").unwrap_or(0),
        },
    }
}

fn instance_command(verb: &str, args: &Words<'_>) -> Command {
    let ids: Vec<InstanceId> = args.list("ids").into_iter().map(Into::into).collect();
    match verb {
        "start" => {
            let mut request = sample::request(args.get("of").unwrap_or("t1"));
            request.tag = args.text("tag");
            request.version = args.number("version");
            request.priority = args.number("priority").unwrap_or(1000);
            request.node = args.get("node").map(Into::into);
            request.group = args.get("group").map(Into::into);
            request.vcpu = args.number("vcpu");
            request.vram_mb = args.number("vram");
            request.script = args
                .text("script")
                .map(|body| mainstay_model::instance::Script {
                    body: body.into_bytes(),
                    monitored: true,
                    ..Default::default()
                })
                .map(Box::new);
            let ids = match args.number("count") {
                Some(count) => (0..count).map(|n: u32| format!("i{n:04}").into()).collect(),
                None => ids,
            };
            Command::StartInstances {
                ids,
                request: Box::new(request),
            }
        }
        "update" => Command::UpdateInstance {
            id: args.bare[0].into(),
            name: args.text("name"),
            external_id: args.text("external_id"),
            metadata: args
                .keyed
                .iter()
                .filter_map(|(k, v)| Some((k.strip_prefix("m.")?.to_owned(), value(v))))
                .collect(),
        },
        "terminate" => Command::TerminateInstance {
            id: args.bare[0].into(),
        },
        "restart" => Command::RestartInstance {
            id: args.bare[0].into(),
        },
        _ => Command::ExpireInstances {
            ids,
            retention_ms: args.number("after").unwrap(),
        },
    }
}

fn value(text: &str) -> Value {
    match (text.parse(), text) {
        (Ok(n), _) => Value::Int(n),
        (_, "true") => Value::Bool(true),
        (_, "false") => Value::Bool(false),
        (_, t) => Value::Text(t.replace("<20k>", &"x".repeat(20_000))),
    }
}

/// Members 1 to 3 unless `voters=1,2` says otherwise.
fn voters(args: &Words<'_>) -> BTreeSet<MemberId> {
    match args.get("voters") {
        Some(_) => {
            let ids = args.list("voters").into_iter();
            ids.map(|id| MemberId(id.parse().unwrap())).collect()
        }
        None => [1, 2, 3].map(MemberId).into(),
    }
}

fn template_command(verb: &str, args: &Words<'_>) -> Command {
    let selector = match (args.text("tag"), args.number("number")) {
        (Some(name), _) => Some(TagSelector::Name(name)),
        (None, Some(number)) => Some(TagSelector::Number(number)),
        (None, None) => None,
    };
    let seed = args.number("bytes").unwrap_or(1);
    match verb {
        "publish" => Command::PublishTag {
            new_template_id: args.get("id").unwrap_or("t-unused").into(),
            template: args.bare[0].to_owned(),
            tag: args.bare[1].to_owned(),
            content: sample::content(seed, args.get("arch").unwrap_or("")),
            holder: MemberId(args.number("holder").unwrap_or(1)),
            copies_needed: args.number("copies").unwrap_or(1),
            voters: voters(args),
        },
        "held" | "lost-copy" => Command::ReportHeld {
            template: args.bare[0].into(),
            number: args.number("number").unwrap_or(0),
            manifest: sample::digest(seed),
            member: MemberId(args.number("member").unwrap()),
            held: verb == "held",
            voters: voters(args),
        },
        "retire" => Command::RetireMember {
            id: MemberId(args.number("member").unwrap()),
            name: args.bare[0].to_owned(),
            voters: voters(args),
        },
        "revert" => Command::RevertTemplate {
            id: args.bare[0].into(),
            selector,
        },
        "delete-tag" => Command::DeleteTag {
            id: args.bare[0].into(),
            selector: selector.unwrap(),
        },
        _ => Command::DeleteTemplate {
            id: args.bare[0].into(),
        },
    }
}

/// `put images/a 5 [tags=v1,v2] [holder=1] [copies=2] [bundle=5] [template=t1 as=v1 bytes=7]`.
fn artifact_command(verb: &str, args: &Words<'_>) -> Command {
    let repository = args.bare[0].to_owned();
    let seed = |at: usize| args.bare.get(at).map_or(0, |word| word.parse().unwrap());
    match verb {
        "put" => {
            let template = args.get("template").map(|id| ArtifactTemplate {
                new_template_id: id.into(),
                tag: args.text("as").unwrap(),
                content: sample::content(args.number("bytes").unwrap_or(1), ""),
            });
            let mut content = sample::artifact(seed(1));
            content.bundle = sample::digest(args.number("bundle").unwrap_or(seed(1)));
            let put = ArtifactPut {
                repository,
                tags: args.list("tags").into_iter().map(str::to_owned).collect(),
                content,
                template,
                holder: MemberId(args.number("holder").unwrap_or(1)),
                copies_needed: args.number("copies").unwrap_or(2),
                voters: voters(args),
            };
            Command::PutArtifact { put: Box::new(put) }
        }
        "artifact-held" | "artifact-lost" => Command::ReportArtifactHeld {
            repository,
            digest: sample::sha256(seed(1)),
            bundle: sample::digest(args.number("bundle").unwrap_or(seed(1))),
            member: MemberId(args.number("member").unwrap()),
            held: verb == "artifact-held",
            voters: voters(args),
        },
        "delete-artifact" => Command::DeleteArtifact {
            repository,
            digest: sample::sha256(seed(1)),
        },
        _ => Command::DeleteArtifactTag {
            repository,
            tag: args.bare[1].to_owned(),
        },
    }
}

fn node_command(verb: &str, args: &Words<'_>) -> Command {
    let first = args.bare.first().copied().unwrap_or_default();
    let groups = args.list("groups").into_iter().map(Into::into).collect();
    match verb {
        "register" => {
            let mut spec = sample::spec(first, args.number("capacity").unwrap_or(2));
            spec.arch = args.text("arch").unwrap_or("amd64".into());
            spec.cpu_count = args.number("cpus").unwrap_or(4);
            spec.groups = groups;
            Command::RegisterNode {
                id: first.into(),
                spec: Box::new(spec),
            }
        }
        "configure" => Command::ConfigureNode {
            id: first.into(),
            config: NodeConfig {
                capacity: args.number("capacity"),
                name: args.text("name"),
                host: args.text("host"),
                capacity_mode: args.get("mode").map(|m| match m {
                    "resource" => CapacityMode::Resource,
                    _ => CapacityMode::Number,
                }),
                vcpu_override: args.number("vcpu"),
                ram_override_mb: args.number("ram"),
                drain: args.number("drain"),
            },
        },
        "remove-node" => Command::RemoveNode { id: first.into() },
        "reachable" | "unreachable" => Command::SetNodeReachability {
            id: first.into(),
            reachable: verb == "reachable",
            lost: args.has("lost"),
        },
        "images" => Command::SetNodeImages {
            id: first.into(),
            images: args.bare[1..]
                .iter()
                .map(|w| w.split_once('/').unwrap())
                .map(|(t, n)| (t.into(), n.parse().unwrap()))
                .collect(),
        },
        "put-group" => Command::PutGroup {
            group: Group {
                id: first.into(),
                name: args.text("name").unwrap_or(first.to_owned()),
                description: String::new(),
                fallback: args.get("fallback").map(Into::into),
            },
        },
        "delete-group" => Command::DeleteGroup { id: first.into() },
        "join" | "leave" => Command::ChangeNodeGroups {
            nodes: args.list("nodes").into_iter().map(Into::into).collect(),
            groups,
            member: verb == "join",
        },
        "noop" => Command::Noop,
        "level" => Command::SetFeatures {
            level: first.parse().unwrap(),
        },
        other => panic!("unknown command {other}"),
    }
}

fn show_outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Started(ids) if ids.len() > 8 => format!("started {} instances", ids.len()),
        Outcome::Started(ids) => {
            let ids: Vec<&str> = ids.iter().map(InstanceId::as_str).collect();
            format!("started {}", ids.join(" "))
        }
        Outcome::Published {
            template,
            number,
            visible,
        } => format!("published {template}/{number} visible={visible}"),
        Outcome::Bound(n) => format!("bound {n}"),
        Outcome::Registered(id) => format!("registered {id}"),
        Outcome::Saving(id) => format!("saving {id}"),
        Outcome::Done => "done".into(),
        Outcome::Asked(nodes) => {
            let nodes: Vec<&str> = nodes.iter().map(|n| n.as_str()).collect();
            format!("asked {}", nodes.join(" "))
        }
        Outcome::Refused(why) => format!("refused: {why:?}"),
    }
}

fn show_instance(i: &mainstay_model::instance::Instance) -> String {
    let mut out = format!("{} {} gen={}", i.id, i.state.as_str(), i.generation);
    let node = i.node.as_ref().map_or("-", |n| n.as_str());
    write!(out, " node={node} tag={}/{}", i.tag, i.tag_number).unwrap();
    if let Some(at) = i.ended_ms {
        write!(out, " ended@{at}").unwrap();
    }
    if let Some(vm) = &i.vm {
        write!(out, " ip={}", vm.ip).unwrap();
    }
    if let Some(script) = &i.script_result {
        write!(out, " exit={}", script.return_code).unwrap();
    }
    if i.vm_gone {
        out.push_str(" vm-gone");
    }
    if let Some(message) = &i.message {
        write!(out, " ({message})").unwrap();
    }
    out
}

fn show_node(state: &State, node: &mainstay_model::node::Node) -> String {
    let load = state.load(&node.id);
    let mut out = format!("{} desired={}", node.id, node.desired_generation);
    write!(out, " load={}/{}", load.count, node.capacity()).unwrap();
    for (word, holds) in [
        ("unreachable", !node.reachable),
        ("lost", node.lost),
        ("draining", node.draining()),
    ] {
        if holds {
            write!(out, " {word}").unwrap();
        }
    }
    if !node.groups.is_empty() {
        let groups: Vec<&str> = node.groups.iter().map(|g| g.as_str()).collect();
        write!(out, " groups={}", groups.join(",")).unwrap();
    }
    let on: Vec<&str> = state.on_node(&node.id).map(|i| i.id.as_str()).collect();
    if !on.is_empty() {
        write!(out, " on={}", on.join(",")).unwrap();
    }
    let left = state.left_on(&node.id);
    let left: Vec<String> = left
        .map(|(id, l)| format!("{id}@{}", l.generation))
        .collect();
    if !left.is_empty() {
        write!(out, " left={}", left.join(",")).unwrap();
    }
    out
}
