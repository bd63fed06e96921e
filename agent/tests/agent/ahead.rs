//! Images that are fetched before an instance needs them.

use crate::stub::*;
use mainstay_agent::wire::{ImagePull, ImageRef, Report};
use std::collections::BTreeSet;

fn image(number: u32, tag: &str) -> ImageRef {
    ImageRef {
        template_id: "t1".to_owned(),
        template: "t".to_owned(),
        tag: tag.to_owned(),
        number,
        manifest: format!("{number:064x}"),
    }
}

fn hold(agent: &Running, tags: &[&str]) {
    let tags: BTreeSet<String> = tags.iter().map(|t| (*t).to_owned()).collect();
    agent.images.held.send_replace(tags);
}

fn name(cluster: &Cluster, images: &[ImageRef]) {
    cluster.desired.send_modify(|set| {
        set.generation += 1;
        set.images = images.to_vec();
    });
}

fn pulls(report: &Report) -> &[ImagePull] {
    report.pulls.as_deref().unwrap()
}

/// Numbers of the images that are told to be under way, or here.
fn told(report: &Report) -> Vec<u32> {
    pulls(report).iter().map(|p| p.number).collect()
}

fn cached(report: &Report) -> BTreeSet<u32> {
    report.images.iter().map(|i| i.number).collect()
}

#[tokio::test]
async fn named_images_come_a_few_at_a_time_and_no_instance_waits_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    let none = cluster.reported("it can", |r| r.pulls.is_some()).await;
    assert!(pulls(&none).is_empty());
    hold(&agent, &["a", "b"]);
    let all = [image(1, "a"), image(2, "b"), image(3, "c")];
    name(&cluster, &all);
    let report = cluster.reported("two", |r| told(r) == [1, 2]).await;
    assert!((pulls(&report)[0].progress - 0.25).abs() < 0.01);
    // An instance starts meanwhile, with its own image.
    cluster.want(vec![run("i", 2)]);
    cluster.phase("i", "running").await;
    assert_eq!(told(&cluster.reports.borrow()), [1, 2], "c waits its turn");
    // One that is not named any more is given up, and the next has its turn.
    name(&cluster, &[image(2, "b"), image(3, "c")]);
    let here = |r: &Report| cached(r).contains(&3);
    let report = cluster.reported("c", here).await;
    assert!(!cached(&report).contains(&1));
    // The agent dies; another goes on with what is still named.
    agent.kill().await;
    let agent = crate::stub::agent(dir.path(), &[&home]).await;
    let all_here = |r: &Report| cached(r).is_superset(&[2, 3].into());
    let report = cluster.reported("b and c", all_here).await;
    assert!(!cached(&report).contains(&1), "what was given up stays so");
    // Named until the controller knows; then nothing is said of them any more, and they stay.
    name(&cluster, &[]);
    cluster.reported("nothing", |r| pulls(r).is_empty()).await;
    assert_eq!(agent.executor.cache().images().len(), 3);
}

#[tokio::test]
async fn an_image_that_does_not_fit_says_so_and_holds_up_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    name(
        &cluster,
        &[
            image(1, "endless"),
            image(2, "endless-too"),
            image(3, "fits"),
        ],
    );
    let report = cluster.reported("c", |r| cached(r).contains(&3)).await;
    let failed = |r: &Report| {
        let failed = pulls(r).iter().filter(|p| p.error.contains("disk space"));
        failed.count() == 2
    };
    let report = match failed(&report) {
        true => report,
        false => cluster.reported("errors", failed).await,
    };
    for pull in pulls(&report).iter().filter(|p| p.number < 3) {
        assert!(pull.progress < 1.0, "{pull:?}");
    }
    assert_eq!(cached(&report), [3].into());
    assert_eq!(agent.executor.cache().images().len(), 1);
}

#[tokio::test]
async fn an_image_that_shall_go_goes_when_no_vm_stands_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::new();
    let home = Stub::new(&cluster).await;
    let agent = agent(dir.path(), &[&home]).await;
    name(&cluster, &[image(7, "v7")]);
    cluster.want(vec![run("i", 2)]);
    cluster.phase("i", "running").await;
    let both = |r: &Report| cached(r) == [0, 7].into();
    cluster.reported("both", both).await;
    cluster.desired.send_modify(|set| {
        set.generation += 1;
        set.images = Vec::new();
        set.evict = vec![image(0, ""), image(7, "")];
    });
    let one = |r: &Report| cached(r) == [0].into();
    cluster.reported("what the VM stands on", one).await;
    assert_eq!(agent.vms().await, ["i"]);
    cluster.want(vec![stop("i", 3)]);
    cluster.reported("none", |r| cached(r).is_empty()).await;
    assert_eq!(agent.executor.cache().used_bytes(), 0);
}
