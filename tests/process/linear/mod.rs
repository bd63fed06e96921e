//! Real processes under faults, and the checker over what their clients saw: one schedule after
//! another, each from a seed, each in a cluster of its own.
//!
//! ```text
//! cluster behind links -> clients -> faults, one by one -> all links open, all run -> everyone serves
//!   -> clients end -> everything read through every member -> states compared -> history judged
//! ```
//!
//! A run that did not exercise its faults fails, as does one that the checker cannot decide.
//! See docs/testing.md.

mod clients;
mod field;
mod history;
mod links;
mod nemesis;
mod plan;
#[cfg(feature = "seeded-bugs")]
mod seeded;
mod settle;
mod table;

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::{Dice, rounds, turn};
use field::Field;
use history::{History, Judgement};
use links::Links;
use mainstay_agent::transfer::api::{Durability, PUBLISH, PublishRequest};
use nemesis::{Done, Nemesis};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use table::Table;

/// Members that clients know. One more comes and goes.
const MEMBERS: usize = 3;
/// Instances whose metadata clients write.
const INSTANCES: usize = 3;
/// Templates that clients take tags from, and tags of each.
const PILES: usize = 2;
const PILE_TAGS: u32 = 48;
/// Publishing requests under way at once.
const PUBLISHING: usize = 8;
/// Violations of one schedule that are printed; all of them are in its history.
const SHOWN: usize = 3;
/// A step of making the cluster: the machine may be busy with other things.
const SETUP_MAX: Duration = Duration::from_secs(60);
/// A schedule that takes longer hangs.
const SCHEDULE_MAX: Duration = Duration::from_secs(240);

/// What became of one schedule.
pub(crate) struct Outcome {
    pub(crate) done: Vec<Done>,
    /// Making and furnishing the cluster.
    pub(crate) ready: Duration,
    pub(crate) judgement: Judgement,
    pub(crate) healed: Duration,
    pub(crate) judged: Duration,
    pub(crate) took: Duration,
    /// Where the history is, if it is worth a look.
    pub(crate) saved: Option<PathBuf>,
}

/// `MAINSTAY_SCHEDULES=200` is the long form. `MAINSTAY_SEED=n MAINSTAY_SCHEDULES=1` replays one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn histories_under_faults_are_linearizable() {
    let _turn = turn().await;
    let schedules = rounds("MAINSTAY_SCHEDULES", 6);
    // From a whole round of kinds on, unless a seed is given: a short run has the first of them.
    let first = match Dice::new("linearizability").0 {
        seed if std::env::var_os("MAINSTAY_SEED").is_some() => seed,
        seed => (seed >> 12) % 1_000_000 * plan::KINDS.len() as u64,
    };
    let mut table = Table::default();
    let mut wrong = 0;
    for n in 0..schedules {
        // A task of its own: a run that proves nothing is counted, and the others follow.
        match tokio::spawn(run(first + n as u64, None)).await {
            Ok(outcome) => {
                wrong += usize::from(!outcome.judgement.clean());
                table.add(&outcome);
            }
            Err(_) => {
                wrong += 1;
                table.invalid += 1;
            }
        }
        if (n + 1) % 20 == 0 || n + 1 == schedules {
            eprintln!("{table}");
        }
    }
    assert_eq!(wrong, 0, "of {schedules} schedules: see above");
}

/// One schedule: the faults that `seed` makes, in a cluster of its own, whose members have this bug if
/// they are built to have bugs. Panics if the run proves nothing.
pub(crate) async fn run(seed: u64, bug: Option<&'static str>) -> Outcome {
    let mut dice = plan::dice(seed);
    let faults = plan::faults(seed, &mut dice);
    let text: Vec<String> = faults.iter().map(ToString::to_string).collect();
    eprintln!(
        "schedule MAINSTAY_SEED={seed} MAINSTAY_SCHEDULES=1: {}",
        text.join(", ")
    );
    let outcome = tokio::time::timeout(SCHEDULE_MAX, schedule(seed, faults, dice, bug));
    let outcome = outcome.await.expect("the schedule hangs");
    eprintln!("  {}", table::line(&outcome));
    let judgement = &outcome.judgement;
    let wrong = judgement.violations.iter().chain(&judgement.undecided);
    for text in wrong.take(SHOWN) {
        eprintln!("  VIOLATION {text}");
    }
    outcome
}

async fn schedule(
    seed: u64,
    faults: Vec<plan::Fault>,
    mut dice: Dice,
    bug: Option<&'static str>,
) -> Outcome {
    let begin = Instant::now();
    let (mut cluster, links) = start(bug).await;
    let field = Arc::new(furnish(&cluster).await);
    let ready = begin.elapsed();
    let mut clients = clients::start(&field, &mut dice);
    let mut nemesis = Nemesis {
        cluster: &mut cluster,
        links: &links,
        field: &field,
    };
    let mut done = Vec::new();
    for fault in faults {
        nemesis.progress(&[0, 1, 2], 40 + dice.below(60)).await;
        done.push(nemesis.inflict(fault).await);
    }
    let healed = settle::heal(&mut nemesis).await;
    field.stop.store(true, Ordering::SeqCst);
    let mut history = History::default();
    while let Some(seen) = clients.join_next().await {
        history.add(seen.expect("a client does not panic"));
    }
    history.add(clients::read_all(&field).await);
    settle::equal(&cluster, &field).await;
    for fault in &done {
        let why = fault.invalid();
        assert!(why.is_none(), "an invalid run, {}", why.unwrap_or_default());
        assert!(
            history.overlaps(fault.begin, fault.end),
            "an invalid run: nothing was under way during {}",
            fault.fault
        );
    }
    let tags: Vec<u32> = field.piles.iter().map(|(_, tags)| *tags).collect();
    let judging = Instant::now();
    let judgement = history.judge(field.instances.len(), &tags);
    let judged = judging.elapsed();
    let saved = (!judgement.clean()).then(|| save(seed, &history, &cluster));
    Outcome {
        done,
        ready,
        judgement,
        healed,
        judged,
        took: begin.elapsed(),
        saved,
    }
}

/// Three members whose words to each other pass the links.
async fn start(bug: Option<&'static str>) -> (Cluster, Links) {
    let mut cluster = Cluster::new(MEMBERS);
    let bug = bug.map(|bug| ("MAINSTAY_SEEDED_BUG", bug.to_owned()));
    cluster.environment.extend(bug);
    let ports: Vec<String> = cluster.members.iter().map(|m| m.peer.clone()).collect();
    let (links, addresses) = Links::before(&ports).await;
    for (member, address) in cluster.members.iter_mut().zip(addresses) {
        member.advertised = Some(address);
    }
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    nemesis::name(&cluster, &links, &[0, 1, 2]).await;
    cluster.joiner(&[0, 1, 2]);
    until("three voters", SETUP_MAX, || async {
        let members = cluster.call(0, "GET", "/api/v1/members", None).await.ok()?;
        let members = members.as_array()?;
        (members.len() == 3 && members.iter().all(|m| m["role"] == "voter")).then_some(())
    })
    .await;
    (cluster, links)
}

/// Everything that clients work on.
async fn furnish(cluster: &Cluster) -> Field {
    let template = push_small_template(cluster, "load").await;
    let members = cluster.members.iter().take(MEMBERS);
    let apis = members.map(|m| m.api.clone()).collect();
    let mut field = Field::new(apis, template.clone());
    let body = json!({"vmid": template, "count": INSTANCES, "external_id": "written"});
    field.instances = until("instances to write to", SETUP_MAX, || async {
        let ids = cluster.call(0, "POST", "/api/v1/vm", Some(body.clone()));
        serde_json::from_value(ids.await.ok()?).ok()
    })
    .await;
    let path = format!("/api/v1/registry/vm?id={template}");
    let manifest = until("all hold the bytes", SETUP_MAX, || async {
        let shown = cluster.call(0, "GET", &path, None).await.ok()?;
        let tag = &shown["versions"][0];
        (tag["holders"].as_array()?.len() == 3).then_some(())?;
        Some(tag["manifest"].as_str()?.to_owned())
    })
    .await;
    for n in 0..PILES {
        let name = format!("pile-{n}");
        let id = pile(cluster, &name, &manifest).await;
        field.piles.push((id, PILE_TAGS));
    }
    field
}

/// A template with many tags of the same content; its id.
async fn pile(cluster: &Cluster, name: &str, manifest: &str) -> String {
    use futures::StreamExt as _;
    let url = format!("http://{}{PUBLISH}", cluster.members[0].registry);
    let publish = |n: u32| {
        let request = PublishRequest {
            template: name.to_owned(),
            tag: format!("t{n}"),
            manifest: manifest.to_owned(),
            durability: Durability::One,
            ..PublishRequest::default()
        };
        let url = &url;
        // Published twice, a tag with the same content is the same tag.
        let attempt = move || {
            let sent = cluster.client.post(url).json(&request).send();
            async {
                let answer: serde_json::Value = sent.await.ok()?.json().await.ok()?;
                (answer["body"]["visible"] == true).then_some(())?;
                Some(answer["body"]["template_id"].as_str()?.to_owned())
            }
        };
        async move { until("a tag is published", SETUP_MAX, attempt).await }
    };
    let ids = futures::stream::iter(0..PILE_TAGS).map(publish);
    let ids: Vec<String> = ids.buffer_unordered(PUBLISHING).collect().await;
    ids[0].clone()
}

/// Keep the history and what the members printed.
fn save(seed: u64, history: &History, cluster: &Cluster) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("schedule-{seed}"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("history.txt"), history.dump()).unwrap();
    for member in &cluster.members {
        let log = cluster.log(&member.name);
        std::fs::write(dir.join(format!("{}.log", member.name)), log).unwrap();
    }
    dir
}
