//! Lives of instances.

use crate::stub::*;
use mainstay_agent::driver::fake::{FakeConfig, Verb};
use mainstay_agent::driver::{Driver, DriverError};
use mainstay_agent::wire::{DesiredInstance, ImageRef, Report};
use std::collections::BTreeSet;
use std::time::Duration;

fn hold(agent: &Running, tags: &[&str]) {
    let tags: BTreeSet<String> = tags.iter().map(|t| (*t).to_owned()).collect();
    agent.images.held.send_replace(tags);
}

#[tokio::test]
async fn from_request_to_removal() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![script(run("a", 2), "echo hello\nexit 0", 0)]);
    let seen = cluster.phase("a", "running").await;
    assert_eq!(seen.generation, 2);
    assert_eq!(seen.script.unwrap().stdout, "hello\n");
    assert_eq!(seen.vm.unwrap().ip, "10.0.2.15");
    let report = cluster.reported("image", |r| r.images.len() == 1).await;
    assert_eq!(report.stats.vm_count, 1);
    cluster.want(vec![stop("a", 3)]);
    let seen = cluster.phase("a", "gone").await;
    assert_eq!(seen.generation, 3);
    assert!(agent.vms().await.is_empty());
    cluster.want(Vec::new());
    cluster.reported("nothing", |r| r.observed.is_empty()).await;
    let left = std::fs::read_dir(dir.path().join("instances")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test]
async fn a_pull_blocks_no_other_start_and_an_end_wins_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    hold(&agent, &["slow"]);
    let mut slow = run("slow", 2);
    slow.image.tag = "slow".to_owned();
    slow.image.manifest = "cd".repeat(32);
    cluster.want(vec![slow, run("quick", 2)]);
    cluster.phase("quick", "running").await;
    let pulling = cluster.phase("slow", "pulling").await;
    assert!((pulling.progress - 0.25).abs() < 0.01);
    cluster.want(vec![stop("slow", 3), run("quick", 2)]);
    cluster.phase("slow", "gone").await;
    hold(&agent, &[]);
    assert_eq!(agent.vms().await, ["quick"]);
    cluster.want(vec![run("quick", 2)]);
    cluster
        .reported("only one", |r| r.observed.len() == 1)
        .await;
    assert_eq!(agent.vms().await, ["quick"], "nothing came of it later");
}

#[tokio::test]
async fn a_failed_script_has_its_message_and_its_policy() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    let body = "echo no >&2\nexit 7";
    cluster.want(vec![
        script(run("stop", 2), body, 0),
        script(run("keep", 2), body, 1),
        script(run("delete", 2), body, 2),
    ]);
    for id in ["stop", "keep", "delete"] {
        let seen = cluster.phase(id, "failed").await;
        assert_eq!(seen.message, "startup script exit code 7");
        assert_eq!(seen.script.unwrap().stderr, "no\n");
    }
    let status = async |id: &str| {
        let list = agent.driver.list().await.unwrap();
        let vm = list.into_iter().find(|vm| vm.id == id);
        vm.map(|vm| vm.facts.status)
    };
    assert_eq!(status("stop").await.as_deref(), Some("stopped"));
    assert_eq!(status("keep").await.as_deref(), Some("running"));
    assert_eq!(status("delete").await, None);
    // The controller has taken note: what is left is kept and told, and nothing begins anew.
    let kept = ["stop", "keep", "delete"].map(|id| {
        let mut kept = script(run(id, 2), body, 0);
        kept.keep = true;
        kept
    });
    cluster.want(kept.to_vec());
    cluster.phase("delete", "gone").await;
    cluster.phase("stop", "stopped").await;
    cluster.phase("keep", "running").await;
}

#[tokio::test]
async fn a_restarted_agent_adopts_what_runs_and_finishes_what_was_begun() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    cluster.want(vec![script(run("up", 2), "exit 0", 0)]);
    cluster.phase("up", "running").await;
    hold(&first, &["v2"]);
    let mut late = run("late", 2);
    late.image.tag = "v2".to_owned();
    late.image.manifest = "ef".repeat(32);
    let up = script(run("up", 2), "exit 0", 0);
    cluster.want(vec![up.clone(), late.clone()]);
    cluster.phase("late", "pulling").await;
    let started = first.driver.list().await.unwrap()[0].facts.started_ms;
    first.kill().await;
    // While nobody looks, the controller changes its mind about nothing.
    let second = agent(dir.path(), &[&home]).await;
    cluster.phase("late", "running").await;
    let seen = cluster.phase("up", "running").await;
    assert_eq!(
        seen.vm.unwrap().started_ms,
        started,
        "adopted, not started again"
    );
    assert!(seen.script.is_some(), "its result is still known");
    assert_eq!(second.vms().await, ["late", "up"]);
}

#[tokio::test]
async fn a_script_never_runs_twice() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    let wish = script(run("a", 2), "sleep 50\nexit 0", 0);
    cluster.want(vec![wish]);
    let record = dir.path().join("instances/a.json");
    until("the script has begun", async || {
        let text = std::fs::read_to_string(&record).unwrap_or_default();
        text.contains("\"script_begun\":true")
    })
    .await;
    first.kill().await;
    let second = agent(dir.path(), &[&home]).await;
    let seen = cluster.phase("a", "failed").await;
    assert!(
        seen.message
            .contains("restarted while the startup script ran"),
        "{}",
        seen.message
    );
    let vm = &second.driver.list().await.unwrap()[0];
    assert_eq!(vm.facts.status, "stopped", "its policy was carried out");
}

#[tokio::test]
async fn a_vm_that_dies_by_itself_is_reported_and_not_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2), run("b", 2)]);
    cluster.phase("a", "running").await;
    cluster.phase("b", "running").await;
    agent.driver.kill("a").unwrap();
    agent.driver.stop("b").await.unwrap();
    let seen = cluster.phase("a", "failed").await;
    assert_eq!(seen.message, "the VM was killed");
    cluster.phase("b", "stopped").await;
    // A new generation is a new start; the old VM makes way.
    cluster.want(vec![run("a", 5), run("b", 2)]);
    let seen = cluster.phase("a", "running").await;
    assert_eq!(seen.generation, 5);
}

/// At a newer generation, on its disk, once; without its script, and also where an agent that dies has to
/// go on with it. Nothing says that it runs before it does.
#[tokio::test]
async fn a_restart_happens_once_and_costs_nothing_but_time() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let first = agent(dir.path(), &[&home]).await;
    let wish = |generation| script(run("a", generation), "echo once\nexit 0", 0);
    cluster.want(vec![wish(2)]);
    let before = cluster.phase("a", "running").await.vm.unwrap();
    let busy = || DriverError::Busy("a port is taken".to_owned());
    first.driver.fail_next(Verb::Restart, busy());
    cluster.want(vec![again(wish(3))]);
    let running = |r: &Report| {
        let of = r.observed.iter().find(|o| o.id == "a").cloned();
        of.filter(|o| o.generation == 3 && o.phase == "running")
    };
    let report = cluster
        .reported("restarted", |r| running(r).is_some())
        .await;
    let seen = running(&report).unwrap();
    let after = seen.vm.unwrap();
    assert!(after.started_ms > before.started_ms);
    assert_eq!(after.uuid, before.uuid);
    assert_eq!(seen.script.unwrap().stdout, "once\n", "the first start's");
    // The controller has seen it; then it asks once more, and the agent dies before it can.
    cluster.want(vec![wish(3)]);
    first.kill().await;
    let vm = std::fs::read_to_string(dir.path().join("instances/a.json")).unwrap();
    assert!(vm.contains("\"generation\":3"), "{vm}");
    cluster.want(vec![again(wish(4))]);
    let second = agent(dir.path(), &[&home]).await;
    let last = cluster
        .reported("restarted again", |r| {
            r.observed
                .iter()
                .any(|o| o.generation == 4 && o.phase == "running")
        })
        .await;
    let last = last.observed[0].vm.clone().unwrap();
    assert!(last.started_ms > after.started_ms);
    // A VM that is gone cannot be restarted, and nothing is made in its place.
    second.driver.delete("a").await.unwrap();
    cluster.want(vec![again(wish(5))]);
    let seen = cluster.phase("a", "failed").await;
    assert!(
        seen.message.contains("could not be restarted"),
        "{}",
        seen.message
    );
    assert!(second.vms().await.is_empty());
}

#[tokio::test]
async fn what_this_node_cannot_do_another_may() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent_with(dir.path(), vec![home.url.clone()], 1).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    cluster.want(vec![run("a", 2), run("b", 2)]);
    cluster.phase("b", "rejected").await;
    agent
        .driver
        .fail_next(Verb::Start, DriverError::Failed("a bad image".to_owned()));
    cluster.want(vec![run("a", 2), run("c", 2)]);
    let seen = cluster.phase("c", "failed").await;
    assert_eq!(seen.message, "a bad image");
    assert_eq!(agent.vms().await, ["a"]);
    // Bound here once more, after it was elsewhere: a rejection holds for its generation only.
    agent.driver.delete("a").await.unwrap();
    cluster.want(vec![run("b", 4)]);
    let seen = cluster.phase("b", "running").await;
    assert_eq!(seen.generation, 4);
}

#[tokio::test]
async fn an_unknown_vm_is_reported_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    cluster.want(Vec::new());
    let generation = cluster.desired.borrow().generation;
    cluster
        .reported("the new set", |r| r.generation == generation)
        .await;
    let seen = cluster.phase("a", "running").await;
    assert_eq!(seen.generation, 2);
    assert_eq!(agent.vms().await, ["a"]);
    cluster.want(vec![stop("a", 9)]);
    cluster.phase("a", "gone").await;
    assert!(agent.vms().await.is_empty(), "once it is named, it goes");
}

/// Its node was given up before its VM was made, and told so when it came back: it says that there is
/// nothing, or the room would stay taken.
#[tokio::test]
async fn what_is_kept_and_was_never_there_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    let kept = |id: &str| DesiredInstance {
        keep: true,
        ..run(id, 3)
    };
    hold(&agent, &["v1"]);
    cluster.want(vec![run("pulled", 2)]);
    cluster.phase("pulled", "pulling").await;
    cluster.want(vec![kept("pulled"), kept("unheard")]);
    for id in ["pulled", "unheard"] {
        assert_eq!(cluster.phase(id, "gone").await.generation, 3);
    }
    assert!(agent.vms().await.is_empty());
}

/// Its node was given up while its VM was being made, just when that was there: it is still this node's.
#[tokio::test]
async fn a_start_broken_off_behind_its_vm_leaves_a_vm_that_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let never = Duration::from_secs(3600);
    let fake = FakeConfig {
        answer_delay: never,
        ..FakeConfig::default()
    };
    let agent = agent_on(dir.path(), vec![home.url.clone()], fake, never).await;
    cluster.want(vec![run("a", 2)]);
    until("the VM is there", async || agent.vms().await == ["a"]).await;
    let kept = DesiredInstance {
        keep: true,
        ..run("a", 3)
    };
    cluster.want(vec![kept]);
    let seen = cluster
        .reported("what became of it", |r| {
            r.observed.iter().any(|o| o.id == "a" && o.generation == 3)
        })
        .await;
    assert_eq!(seen.observed[0].phase, "running");
    cluster.want(vec![stop("a", 4)]);
    cluster.phase("a", "gone").await;
    assert!(agent.vms().await.is_empty());
}

#[tokio::test]
async fn trouble_with_the_driver_is_outlived() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    let busy = || DriverError::Busy("not now".to_owned());
    agent.driver.fail_next(Verb::List, busy());
    cluster.want(vec![run("a", 2)]);
    cluster.phase("a", "running").await;
    agent.driver.fail_next(Verb::Delete, busy());
    agent.driver.fail_next(Verb::Delete, busy());
    cluster.want(vec![stop("a", 3)]);
    cluster.phase("a", "gone").await;
    assert_eq!(agent.driver.list().await.unwrap().len(), 0);
    let image: Vec<ImageRef> = agent.executor.cache().images();
    assert_eq!(image.len(), 1, "the image stays for the next start");
}
