//! Bits that change by themselves, and files that end too early, on the disk of a stopped member: every
//! one is either refused at the next start, with the command that repairs it, or it made no difference:
//! the member serves exactly what the others serve. Never a wrong answer, never a vote that was forgotten.
//!
//! Prints the table in docs/testing.md.

use crate::cluster::{Cluster, until};
use crate::load::Writers;
use crate::push::push_small_template;
use crate::{Dice, rounds, turn};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const VICTIM: usize = 2;
/// What a refusal must name.
const REPAIRS: [&str; 2] = ["mainstay member repair", "mainstay member replace"];

/// Files of a member that hold something, by the part they belong to.
fn files(data: &Path) -> Vec<(&'static str, PathBuf)> {
    let mut found = Vec::new();
    for part in ["log", "state", "snapshots"] {
        for entry in fs::read_dir(data.join(part)).unwrap().flatten() {
            if entry.metadata().unwrap().is_file() && entry.metadata().unwrap().len() > 0 {
                found.push((part, entry.path()));
            }
        }
    }
    found.push(("identity", data.join("identity")));
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(done.unwrap().success());
}

/// What was done to a file, in words.
fn damage(path: &Path, cut: bool, dice: &mut Dice) -> String {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let at = dice.below(len);
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    if cut {
        file.set_len(at).unwrap();
        return format!("{name} cut at {at} of {len}");
    }
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    let bit = dice.below(8);
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
    format!("{name} byte {at} of {len}, bit {bit}")
}

/// All instances as a member serves them, by id.
async fn served(cluster: &Cluster, n: usize) -> BTreeMap<String, Value> {
    let list = cluster.call(n, "GET", "/api/v1/vm", None).await.unwrap();
    let each = list.as_array().unwrap().iter();
    each.map(|i| {
        let mut i = i.clone();
        // Each member names its own registry.
        i["vm"]["anka_registry"].take();
        (i["instance_id"].as_str().unwrap_or("").to_owned(), i)
    })
    .collect()
}

/// What the member made of it, once it has ended or serves.
async fn outcome(cluster: &mut Cluster) -> Result<(), String> {
    let begun = Instant::now();
    loop {
        if cluster.exited(VICTIM).is_some() {
            cluster.kill_if_running(VICTIM);
            let log = cluster.log("c3");
            let told = log
                .lines()
                .rev()
                .take(30)
                .find(|l| REPAIRS.iter().any(|r| l.contains(r)));
            let Some(told) = told else {
                let last: Vec<&str> = log.lines().rev().take(12).collect();
                panic!(
                    "it ended without the command that repairs it:\n{}",
                    last.join("\n")
                );
            };
            return Err(told.to_owned());
        }
        let url = format!("http://{}/readyz", cluster.members[VICTIM].api);
        if let Ok(answer) = cluster.client.get(url).send().await
            && answer.status() == 200
        {
            return Ok(());
        }
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "it neither ended nor served:\n{}",
            cluster.log("c3")
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// `MAINSTAY_FLIPS=50` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flipped_bit_is_refused_or_harmless() {
    let _turn = turn().await;
    let flips = rounds("MAINSTAY_FLIPS", 10);
    let mut dice = Dice::new("flipped bits");
    let mut cluster = Cluster::new(3);
    cluster.flags = vec!["--snapshot-log", "128KiB"];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let template = push_small_template(&cluster, "t").await;
    let writers = Writers::start(&cluster, &template, 8).await;
    let snapshots = cluster.members[VICTIM].data.join("snapshots");
    until("a snapshot", Duration::from_secs(60), || async {
        let made = fs::read_dir(&snapshots).is_ok_and(|mut dir| dir.next().is_some());
        made.then_some(())
    })
    .await;
    writers.progress(300).await;
    let told = writers.stop_only().await;
    told.check(&cluster, VICTIM).await;
    // As a crash leaves it: the end of the log was never sealed.
    cluster.kill(VICTIM);
    let data = cluster.members[VICTIM].data.clone();
    let whole = cluster.dir.path().join("whole");
    copy(&data, &whole);
    let right = served(&cluster, 0).await;
    eprintln!("| file | what | outcome |\n| --- | --- | --- |");
    let mut refused = 0;
    for flip in 0..flips {
        copy(&whole, &data);
        let kinds = files(&whole);
        // In turn, so that each kind of file is met, and every third is cut.
        let parts = [
            "log",
            "state",
            "snapshots",
            "state",
            "log",
            "snapshots",
            "state",
            "identity",
        ];
        let part = parts[flip % parts.len()];
        let of_part: Vec<&PathBuf> = kinds
            .iter()
            .filter(|(p, _)| *p == part)
            .map(|(_, f)| f)
            .collect();
        // Mostly the one that holds the most.
        let largest = of_part
            .iter()
            .max_by_key(|f| fs::metadata(f).unwrap().len());
        let file = match dice.below(4) {
            0 => of_part[dice.below(of_part.len() as u64) as usize],
            _ => largest.unwrap(),
        };
        let file = data.join(file.strip_prefix(&whole).unwrap());
        let what = damage(&file, flip % 3 == 2, &mut dice);
        let before = cluster.log("c3").len();
        cluster.start(VICTIM);
        let said = match outcome(&mut cluster).await {
            Err(why) => {
                refused += 1;
                let why = why.split("c3/").last().unwrap_or(&why).to_owned();
                format!("refused: {}", why.chars().take(150).collect::<String>())
            }
            Ok(()) => {
                assert_eq!(
                    served(&cluster, VICTIM).await,
                    right,
                    "{what}: served wrong"
                );
                told.check(&cluster, VICTIM).await;
                cluster.kill(VICTIM);
                // What it has acknowledged since must not be taken back by an older copy.
                copy(&data, &whole);
                let log = cluster.log("c3");
                let log = &log[before..];
                let how = if log.contains("torn write") {
                    "the torn end of the log cut off, with a warning"
                } else if log.contains("is discarded") {
                    "the file discarded, with a warning: the state holds the same"
                } else {
                    assert_ne!(part, "snapshots", "{what}: damage that was not noticed");
                    "no difference"
                };
                format!("starts, serves what the others serve ({how})")
            }
        };
        eprintln!("| {part} | {what} | {said} |");
    }
    eprintln!("{flips} damages: {refused} refused with the repair command, the rest harmless");
    assert!(refused > 0, "no damage was met: the run proves nothing");
    copy(&whole, &data);
    cluster.start(VICTIM);
    cluster.wait_ready(&[VICTIM]).await;
    told.check(&cluster, VICTIM).await;
}
