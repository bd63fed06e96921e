//! Saves in scripts: their verbs, how they are shown, and samples of them for other tests.

use crate::sample::{self, Random};
use crate::script::Words;
use mainstay_model::command::{Addition, Command};
use mainstay_model::instance::{InstanceState, ScriptResult};
use mainstay_model::save::{Save, SaveReport, SaveRequest, SaveSaid, SaveTarget, SavedDisk};
use mainstay_model::{MemberId, State};
use std::fmt::Write as _;

pub const VERBS: [&str; 4] = ["save", "report", "publish-saved", "expire-saves"];

/// `save s1 i1 as=v2 [into=t1] [new=NAME id=t9] [script=..] [cancel] [revert] [revert-tag=v1]`,
/// `report n1 s1 begun|pushed|failed [why=..] [stopped] [exit=0] [stdout=..]`,
/// `publish-saved s1 bytes=2 [holder=1] [copies=1] [voters=1,2]`, `expire-saves ids=s1 after=5 begin=5`.
pub fn command(
    verb: &str,
    args: &Words<'_>,
    voters: std::collections::BTreeSet<MemberId>,
) -> Command {
    match verb {
        "save" => {
            let target = match args.text("new") {
                Some(name) => SaveTarget::New {
                    name,
                    id: args.get("id").unwrap_or("t-new").into(),
                },
                None => SaveTarget::Template(args.get("into").unwrap_or("t1").into()),
            };
            let request = SaveRequest {
                tag: args.text("as").unwrap(),
                target,
                script: args.text("script").unwrap_or_default().into_bytes(),
                cancel_on_script_failure: args.has("cancel"),
                revert: args.has("revert"),
                revert_tag: args.text("revert-tag"),
                ..request(args.bare[1])
            };
            Command::SaveInstance {
                id: args.bare[0].into(),
                request: Box::new(request),
            }
        }
        "report" => {
            let said = match args.bare[2] {
                "begun" => SaveSaid::Begun,
                "pushed" => SaveSaid::Pushed,
                "failed" => SaveSaid::Failed {
                    why: args.text("why").unwrap_or_default().replace('_', " "),
                    stopped: args.has("stopped"),
                },
                other => panic!("said {other}"),
            };
            let script = args.number("exit").map(|return_code| ScriptResult {
                return_code,
                stdout: args.text("stdout").unwrap_or_default(),
                ..ScriptResult::default()
            });
            Command::ReportSaves {
                node: args.bare[0].into(),
                reports: vec![SaveReport {
                    id: args.bare[1].into(),
                    said,
                    script,
                }],
            }
        }
        "publish-saved" => {
            let disk = SavedDisk {
                holder: MemberId(args.number("holder").unwrap_or(1)),
                copies_needed: args.number("copies").unwrap_or(1),
                voters,
                ..disk(args.bare[0], args.number("bytes").unwrap_or(1))
            };
            Command::PublishSaved {
                disk: Box::new(disk),
            }
        }
        _ => Command::ExpireSaves {
            ids: args.list("ids").into_iter().map(Into::into).collect(),
            retention_ms: args.number("after").unwrap(),
            begin_ms: args.number("begin").unwrap(),
        },
    }
}

pub fn request(instance: &str) -> SaveRequest {
    SaveRequest {
        instance: instance.into(),
        tag: "saved".to_owned(),
        target: SaveTarget::Template("t1".into()),
        description: "as it was".to_owned(),
        script: Vec::new(),
        cancel_on_script_failure: false,
        revert: false,
        revert_tag: None,
        suspend: true,
        sanity_test: false,
    }
}

pub fn disk(save: &str, seed: u8) -> SavedDisk {
    SavedDisk {
        save: save.into(),
        template: "debian".to_owned(),
        manifest: sample::digest(seed),
        size: 1 << 30,
        disk: "disk.qcow2".to_owned(),
        format: "qcow2".to_owned(),
        holder: MemberId(1),
        copies_needed: 1,
        voters: [MemberId(1)].into(),
    }
}

pub fn show(state: &State, out: &mut String) {
    for save in state.saves.values() {
        let Save { id, request, .. } = save;
        let target = match &request.target {
            SaveTarget::Template(id) => format!("into {id}"),
            SaveTarget::New { name, .. } => format!("into new {name}"),
        };
        write!(
            out,
            "{id} of {} as {} {target}",
            request.instance, request.tag
        )
        .unwrap();
        if let Some(at) = save.begun_ms {
            write!(out, " begun@{at}").unwrap();
        }
        if !request.script.is_empty() {
            write!(out, " script={}", request.script.len()).unwrap();
        }
        if let Some(script) = &save.script_result {
            write!(out, " exit={} {:?}", script.return_code, script.stdout).unwrap();
        }
        if let Some((template, number)) = &save.published {
            write!(out, " published={template}/{number}").unwrap();
        }
        match &save.end {
            None => out.push_str(" open"),
            Some(end) => match &end.error {
                None => write!(out, " done@{}", end.at_ms).unwrap(),
                Some(why) => write!(out, " failed@{} ({why})", end.at_ms).unwrap(),
            },
        }
        out.push('\n');
    }
}

/// One of each command, with every field set somewhere.
pub fn samples() -> Vec<(&'static str, Command)> {
    let report = |said, script| Command::ReportSaves {
        node: "n1".into(),
        reports: vec![SaveReport {
            id: "s1".into(),
            said,
            script,
        }],
    };
    let ended = ScriptResult {
        return_code: -1,
        did_timeout: true,
        stdout: "out".into(),
        stderr: "err".into(),
    };
    let failed = SaveSaid::Failed {
        why: "no room".into(),
        stopped: true,
    };
    let save = |id: &str, request| Command::SaveInstance {
        id: id.into(),
        request: Box::new(request),
    };
    let new = SaveTarget::New {
        name: "made".into(),
        id: "t9".into(),
    };
    let full = SaveRequest {
        tag: "v2".into(),
        target: new,
        script: b"sync".to_vec(),
        cancel_on_script_failure: true,
        revert: true,
        revert_tag: Some("v1".into()),
        sanity_test: true,
        ..request("i5")
    };
    let boxed = || Box::new(disk("s1", 9));
    vec![
        ("save", save("s1", full)),
        ("save-bare", save("s2", request("i4"))),
        ("report-save-begun", report(SaveSaid::Begun, None)),
        ("report-save-script", report(SaveSaid::Begun, Some(ended))),
        ("report-save-pushed", report(SaveSaid::Pushed, None)),
        ("report-save-failed", report(failed, None)),
        ("publish-saved", Command::PublishSaved { disk: boxed() }),
        (
            "add-saved-within",
            Command::AddWithin {
                named: 300,
                what: Addition::Saved(boxed()),
            },
        ),
        (
            "expire-saves",
            Command::ExpireSaves {
                ids: vec!["s1".into()],
                retention_ms: 7_200_000,
                begin_ms: 600_000,
            },
        ),
    ]
}

/// Anything about saves, rather about ones that are there.
pub fn any(r: &mut Random, state: &State) -> Command {
    let started: Vec<_> = state
        .instances
        .values()
        .filter(|i| i.state == InstanceState::Started)
        .collect();
    let open: Vec<_> = state.open_saves().collect();
    match r.below(8) {
        0..=2 if !started.is_empty() => {
            let mut request = request(r.pick(&started).id.as_str());
            request.tag = format!("v{}", r.below(9));
            request.target = match r.below(3) {
                0 => SaveTarget::New {
                    name: format!("template{}", r.below(5)),
                    id: format!("t{}", r.below(9)).into(),
                },
                _ => SaveTarget::Template(format!("t{}", r.below(3)).into()),
            };
            request.script = vec![7; r.below(3_000) as usize];
            request.revert = r.one_in(3);
            Command::SaveInstance {
                id: format!("s{}", r.below(30)).into(),
                request: Box::new(request),
            }
        }
        0..=4 if !open.is_empty() => {
            let save = r.pick(&open);
            Command::PublishSaved {
                disk: Box::new(SavedDisk {
                    copies_needed: 1 + r.below(2) as u32,
                    ..disk(save.id.as_str(), r.below(3) as u8)
                }),
            }
        }
        5..=6 if !open.is_empty() => {
            let save = r.pick(&open);
            let said = match r.below(4) {
                0..=1 => SaveSaid::Begun,
                2 => SaveSaid::Pushed,
                _ => SaveSaid::Failed {
                    why: "no room".to_owned(),
                    stopped: r.one_in(2),
                },
            };
            let script = r.one_in(2).then(|| ScriptResult {
                stdout: "o".repeat(r.below(5_000) as usize),
                ..ScriptResult::default()
            });
            Command::ReportSaves {
                node: save.node.clone(),
                reports: vec![SaveReport {
                    id: save.id.clone(),
                    said,
                    script,
                }],
            }
        }
        _ => Command::ExpireSaves {
            ids: (0..r.below(4))
                .map(|n| format!("s{}", n * 7 % 30).into())
                .collect(),
            retention_ms: r.below(20_000),
            begin_ms: r.below(60_000),
        },
    }
}
