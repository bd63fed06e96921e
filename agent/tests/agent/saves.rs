//! Disks that become tags, with agents that die on the way.

use crate::stub::*;
use mainstay_agent::driver::fake::Verb;
use mainstay_agent::driver::{Driver, DriverError};
use mainstay_agent::transfer::TransferError;
use std::path::Path;

fn hold(agent: &Running, tags: &[&str]) {
    let tags = tags.iter().map(|t| (*t).to_owned()).collect();
    agent.images.held.send_replace(tags);
}

async fn status(agent: &Running, id: &str) -> String {
    let list = agent.driver.list().await.unwrap();
    let vm = list.into_iter().find(|vm| vm.id == id).unwrap();
    vm.facts.status
}

fn nothing_left(dir: &Path) -> bool {
    let left = std::fs::read_dir(dir.join("saves")).unwrap();
    left.count() == 0
}

#[tokio::test]
async fn a_disk_becomes_a_tag_once_the_controller_says_go() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    cluster.want(vec![save(run("a", 2), "s1", false)]);
    let seen = cluster.saving("a", "known", |s| s.phase == "begun").await;
    assert_eq!((seen.generation, seen.phase.as_str()), (2, "running"));
    assert_eq!(
        status(&agent, "a").await,
        "running",
        "not before it is told"
    );
    hold(&agent, &["v2"]);
    let go = script(save(run("a", 2), "s1", true), "echo packed", 0);
    cluster.want(vec![go.clone()]);
    let seen = cluster.saving("a", "pushing", |s| s.progress > 0.0).await;
    let said = seen.save.unwrap();
    assert_eq!(said.script.unwrap().stdout, "packed\n");
    assert_eq!(status(&agent, "a").await, "stopped");
    // What the controller knows is not told again.
    let mut known = go;
    known.save.as_mut().unwrap().script_known = true;
    cluster.want(vec![known]);
    cluster.saving("a", "told", |s| s.script.is_none()).await;
    hold(&agent, &[]);
    let seen = cluster.saving("a", "pushed", |s| s.phase == "pushed").await;
    assert_eq!(seen.phase, "stopped");
    let delivered = agent.images.delivered.borrow().clone();
    assert_eq!(delivered, [("s1".to_owned(), "disk of a".to_owned())]);
    assert!(nothing_left(dir.path()));
    cluster.want(vec![stop("a", 3)]);
    cluster.phase("a", "gone").await;
    assert!(agent.vms().await.is_empty());
}

#[tokio::test]
async fn a_failed_script_ends_it_only_if_it_shall_and_the_vm_runs_on() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2), run("b", 2)]);
    cluster.phase("a", "running").await;
    cluster.phase("b", "running").await;
    let body = "echo no >&2\nexit 7";
    let mut cancels = script(save(run("a", 2), "s1", true), body, 0);
    cancels.save.as_mut().unwrap().cancel_on_script_failure = true;
    let goes_on = script(save(run("b", 2), "s2", true), body, 0);
    cluster.want(vec![cancels, goes_on.clone()]);
    let seen = cluster.saving("a", "failed", |s| s.phase == "failed").await;
    let said = seen.save.unwrap();
    assert_eq!(said.message, "script exit code 7");
    assert_eq!(said.script.unwrap().stderr, "no\n");
    assert!(!said.stopped);
    assert_eq!(status(&agent, "a").await, "running");
    cluster.saving("b", "pushed", |s| s.phase == "pushed").await;
    // It is as it was: nothing begins anew, and another save may.
    cluster.want(vec![run("a", 2), goes_on.clone()]);
    let as_before = |r: &mainstay_agent::wire::Report| {
        let a = r.observed.iter().find(|o| o.id == "a");
        a.is_some_and(|a| a.save.is_none() && a.phase == "running")
    };
    cluster.reported("a runs on", as_before).await;
    cluster.want(vec![save(run("a", 2), "s3", true), goes_on]);
    cluster.saving("a", "pushed", |s| s.phase == "pushed").await;
    assert_eq!(agent.images.delivered.borrow().len(), 2);
}

#[tokio::test]
async fn an_agent_that_died_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    hold(&first, &["v2"]);
    let go = script(save(run("a", 2), "s1", true), "echo once", 0);
    cluster.want(vec![go]);
    cluster.saving("a", "pushing", |s| s.progress > 0.0).await;
    first.kill().await;
    assert!(dir.path().join("saves/a/disk").is_file());
    let second = agent(dir.path(), &[&home]).await;
    // It would fail if it were made anew, and so would its script.
    let broken = || DriverError::Failed("twice".to_owned());
    second.driver.fail_next(Verb::Export, broken());
    second.driver.fail_next(Verb::Script, broken());
    let seen = cluster.saving("a", "pushed", |s| s.phase == "pushed").await;
    assert_eq!(seen.save.unwrap().script.unwrap().stdout, "once\n");
    assert_eq!(second.images.delivered.borrow()[0].1, "disk of a");
    second.kill().await;
    // That it is done is known to the next one as well.
    let third = agent(dir.path(), &[&home]).await;
    cluster.reports.send_replace(Default::default());
    cluster.saving("a", "pushed", |s| s.phase == "pushed").await;
    assert_eq!(third.images.delivered.borrow().len(), 0);
}

#[tokio::test]
async fn a_disk_that_was_not_whole_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    hold(&first, &["v2"]);
    cluster.want(vec![save(run("a", 2), "s1", true)]);
    cluster.saving("a", "pushing", |s| s.progress > 0.0).await;
    first.kill().await;
    // As if it had died in the middle of writing.
    let record = dir.path().join("instances/a.json");
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains(r#""built":"raw""#), "{text}");
    std::fs::write(&record, text.replace(r#""built":"raw""#, r#""built":null"#)).unwrap();
    std::fs::write(dir.path().join("saves/a/disk"), "half").unwrap();
    let second = agent(dir.path(), &[&home]).await;
    cluster.saving("a", "pushed", |s| s.phase == "pushed").await;
    assert_eq!(second.images.delivered.borrow()[0].1, "disk of a");
}

#[tokio::test]
async fn a_script_that_an_agent_left_alone_is_not_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    cluster.want(vec![script(save(run("a", 2), "s1", true), "sleep 50", 0)]);
    let record = dir.path().join("instances/a.json");
    until("the script has begun", async || {
        let text = std::fs::read_to_string(&record).unwrap_or_default();
        text.contains(r#""id":"s1","script_begun":true"#)
    })
    .await;
    first.kill().await;
    let second = agent(dir.path(), &[&home]).await;
    let seen = cluster.saving("a", "failed", |s| s.phase == "failed").await;
    let said = seen.save.unwrap();
    assert!(
        said.message.contains("its result is lost"),
        "{}",
        said.message
    );
    assert!(!said.stopped);
    assert_eq!(status(&second, "a").await, "running");
}

#[tokio::test]
async fn what_no_registry_takes_fails_and_its_vm_can_be_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    let started = cluster.phase("a", "running").await.vm.unwrap().started_ms;
    agent.images.refusals.lock().unwrap().extend([
        TransferError::Refused("Tag v2 already exists".to_owned()),
        TransferError::Unavailable("nobody answers".to_owned()),
    ]);
    cluster.want(vec![save(run("a", 2), "s1", true)]);
    let seen = cluster.saving("a", "failed", |s| s.phase == "failed").await;
    let said = seen.save.unwrap();
    assert_eq!(said.message, "Tag v2 already exists");
    assert!(said.stopped);
    assert!(nothing_left(dir.path()));
    cluster.want(vec![again(run("a", 3))]);
    let seen = cluster.phase("a", "running").await;
    assert_eq!(seen.generation, 3);
    assert!(seen.vm.unwrap().started_ms > started);
    // A node without room for the disk says so.
    agent
        .driver
        .fail_next(Verb::Export, DriverError::Busy("No space left".to_owned()));
    cluster.want(vec![save(run("a", 3), "s2", true)]);
    let seen = cluster
        .saving("a", "failed", |s| s.id == "s2" && s.phase == "failed")
        .await;
    let said = seen.save.unwrap();
    assert!(said.message.contains("No space left"), "{}", said.message);
}

#[tokio::test]
async fn an_end_wins_over_a_save() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2), run("b", 2)]);
    cluster.phase("a", "running").await;
    cluster.phase("b", "running").await;
    hold(&agent, &["v2"]);
    let both = |id: &str| save(run(id, 2), "s", true);
    cluster.want(vec![both("a"), both("b")]);
    cluster.saving("a", "pushing", |s| s.progress > 0.0).await;
    cluster.saving("b", "pushing", |s| s.progress > 0.0).await;
    // One is terminated; the other's node was given up meanwhile, and it is to be kept.
    let mut kept = run("b", 3);
    kept.keep = true;
    cluster.want(vec![stop("a", 3), kept]);
    cluster.phase("a", "gone").await;
    let seen = cluster
        .reported("b is kept", |r| {
            r.observed.iter().any(|o| o.id == "b" && o.generation == 3)
        })
        .await;
    let b = seen.observed.iter().find(|o| o.id == "b").unwrap();
    assert_eq!((b.phase.as_str(), &b.save), ("stopped", &None));
    hold(&agent, &[]);
    until("nothing is left", async || nothing_left(dir.path())).await;
    assert_eq!(agent.images.delivered.borrow().len(), 0);
}
