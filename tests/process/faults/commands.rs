//! The commands that rebuild a data directory, killed in the place of any call that changes it, or with that
//! call failing. What is left is the old directory, or the new one, or one on which no member starts and
//! which says what to run; and the same command, run again, finishes.

use super::shim::{EIO, Fault, Shim, op};
use crate::cluster::{BIN, Cluster};
use crate::rescue::{refusal, voters};
use crate::snapshots::{add_group, save};
use crate::{Dice, rounds, turn};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const GROUPS: usize = 5;

/// One command on one directory, which is made anew for each round.
struct Rig {
    shim: Shim,
    work: PathBuf,
    args: Vec<String>,
    /// What the directory is before.
    base: Option<PathBuf>,
}

impl Rig {
    fn new(dir: &Path, work: PathBuf, args: &[&str], base: Option<PathBuf>) -> Self {
        let part = format!("{}/", work.display());
        Self {
            shim: Shim::new(dir, &[part]),
            work,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            base,
        }
    }

    fn afresh(&self) {
        let _ = std::fs::remove_dir_all(&self.work);
        if let Some(base) = &self.base {
            copy(base, &self.work);
        }
    }

    fn run(&self) -> Output {
        let mut command = Command::new(BIN);
        command
            .args(&self.args)
            .envs(self.shim.environment())
            .stdin(Stdio::null());
        tokio::task::block_in_place(|| command.output()).unwrap()
    }

    /// The same without faults, which must succeed; how many calls it makes.
    fn finish(&self) -> u64 {
        self.shim.set(op::ALL, 1, Fault::None);
        let out = self.run();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{:?}: {error}", self.args);
        self.shim.count()
    }

    fn unfinished(&self) -> bool {
        self.work.join("unfinished").exists()
    }

    /// Meet `fault` at call `at`, after `before`. What threads write together depends on the moment: a run
    /// that makes fewer calls meets the fault at its last one.
    fn break_off(
        &self,
        mut at: u64,
        fault: Fault,
        before: impl Fn(),
        (cluster, n): (&Cluster, usize),
    ) {
        loop {
            before();
            if self.meet(at, fault, cluster, n) {
                return;
            }
            let calls = self.shim.count();
            assert!(0 < calls && calls < at, "{fault:?} was not met at {at}");
            at = calls;
        }
    }

    /// Meet `fault` at call `at`; `false`: there was no such call. A server must not start on what is half
    /// done.
    fn meet(&self, at: u64, fault: Fault, cluster: &Cluster, n: usize) -> bool {
        self.shim.set(op::ALL, at, fault);
        let out = self.run();
        let hit = self.shim.last();
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        if self.shim.hits() == 0 {
            assert!(out.status.success(), "{error}");
            return false;
        }
        match fault {
            Fault::Kill => assert_eq!(out.status.code(), None, "killed in the place of {hit}"),
            // What may fail without consequence may. sled's own thread panics when its fsync fails, and says
            // so before the command does.
            _ => assert!(
                out.status.success() || error.lines().any(|line| line.starts_with("error: ")),
                "{hit}: {error}"
            ),
        }
        let left = if self.unfinished() {
            let told = refusal(cluster, n);
            assert!(told.contains(&self.args[..2].join(" ")), "{hit}: {told}");
            "refused"
        } else {
            "the old one or the new one"
        };
        let kind = hit.split(' ').next().unwrap_or("");
        let path = hit.rsplit('/').next().unwrap_or("");
        eprintln!(
            "| {} | {fault:?} | {at} | {kind} of {path} | {left} |",
            self.args[1]
        );
        true
    }
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(done.unwrap().success());
}

/// What a directory holds, by a dry run of `member recover`.
fn holds(data: &Path) -> Value {
    let data = data.to_str().unwrap();
    let args = [
        "member",
        "recover",
        "--dry-run",
        "--output",
        "json",
        "--data-dir",
        data,
    ];
    let out = Command::new(BIN).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{error}");
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Where in a command with so many calls: spread, and the last ones, where it becomes valid.
fn points(calls: u64, default: usize, dice: &mut Dice) -> Vec<u64> {
    let wanted = (rounds("MAINSTAY_COMMAND_POINTS", default) as u64).min(calls);
    let spread = (0..wanted).map(|n| {
        let (from, to) = (n * calls / wanted, (n + 1) * calls / wanted);
        1 + from + dice.below((to - from).max(1))
    });
    let mut all: Vec<u64> = spread.chain([calls - 2, calls - 1, calls]).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn fault(point: usize) -> Fault {
    match point % 3 {
        2 => Fault::Once(EIO),
        _ => Fault::Kill,
    }
}

async fn groups(cluster: &Cluster, n: usize) -> usize {
    let list = cluster.call(n, "GET", "/api/v1/group", None).await.unwrap();
    list.as_array().unwrap().len()
}

/// `MAINSTAY_COMMAND_POINTS=1000`: in the place of every call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recover_and_restore_are_killed_anywhere_and_finish_when_run_again() {
    let _turn = turn().await;
    let mut dice = Dice::new("commands broken off");
    let mut cluster = Cluster::new(1);
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    for n in 0..GROUPS {
        add_group(&cluster, &format!("g{n}")).await;
    }
    let snapshot = save(&cluster, "saved.snap");
    cluster.stop(0).await;
    let dir = cluster.dir.path().to_owned();
    let base = dir.join("base");
    std::fs::rename(&cluster.members[0].data, &base).unwrap();
    let before = holds(&base);

    let work = dir.join("recovered");
    cluster.members[0].data.clone_from(&work);
    let args = ["member", "recover", "--data-dir", work.to_str().unwrap()];
    let rig = Rig::new(&dir, work.clone(), &args, Some(base));
    rig.afresh();
    let calls = rig.finish();
    for (n, at) in points(calls, 5, &mut dice).into_iter().enumerate() {
        rig.break_off(at, fault(n), || rig.afresh(), (&cluster, 0));
        if !rig.unfinished() {
            // Nothing has begun, or all is done: never less than before.
            let now = holds(&work);
            assert!(now["last_index"].as_u64() >= before["last_index"].as_u64());
        }
        rig.finish();
        let now = holds(&work);
        assert_ne!(now["cluster_id"], before["cluster_id"]);
        assert!(now["last_index"].as_u64() > before["last_index"].as_u64());
    }
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    assert_eq!(groups(&cluster, 0).await, GROUPS);
    cluster.stop(0).await;

    let work = dir.join("restored");
    cluster.members[0].data.clone_from(&work);
    let (file, at) = (snapshot.to_str().unwrap(), work.to_str().unwrap());
    let args = [
        "snapshot",
        "restore",
        file,
        "--name",
        "c1",
        "--data-dir",
        at,
    ];
    let rig = Rig::new(&dir, work.clone(), &args, None);
    rig.afresh();
    let calls = rig.finish();
    let whole = holds(&work);
    for (n, at) in points(calls, 5, &mut dice).into_iter().enumerate() {
        rig.break_off(at, fault(n), || rig.afresh(), (&cluster, 0));
        let done = work.join("identity").exists() && !rig.unfinished();
        if done {
            assert_eq!(holds(&work)["last_index"], whole["last_index"]);
            rig.afresh();
        }
        rig.finish();
        assert_eq!(holds(&work)["last_index"], whole["last_index"]);
    }
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    assert_eq!(groups(&cluster, 0).await, GROUPS);
}

/// The living members are asked in the middle of it; each round ends with a voter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_is_killed_anywhere_and_finishes_when_run_again() {
    let _turn = turn().await;
    let mut dice = Dice::new("repairs broken off");
    let mut cluster = Cluster::ready().await;
    voters(&cluster, 0, 3).await;
    for n in 0..GROUPS {
        add_group(&cluster, &format!("g{n}")).await;
    }
    let (dir, work) = (
        cluster.dir.path().to_owned(),
        cluster.members[2].data.clone(),
    );
    let living: Vec<String> = (0..2)
        .map(|n| format!("http://{}", cluster.members[n].api))
        .collect();
    let (at, living) = (work.to_str().unwrap().to_owned(), living.join(","));
    let args = [
        "member",
        "repair",
        "--force",
        "--data-dir",
        &at,
        "--endpoints",
        &living,
    ];
    let rig = Rig::new(&dir, work, &args, None);
    cluster.stop(2).await;
    let calls = rig.finish();
    for (n, at) in points(calls, 1, &mut dice).into_iter().enumerate() {
        cluster.start(2);
        cluster.wait_ready(&[2]).await;
        voters(&cluster, 0, 3).await;
        cluster.stop(2).await;
        rig.break_off(at, fault(n), || (), (&cluster, 2));
        rig.finish();
    }
    cluster.start(2);
    cluster.wait_ready(&[2]).await;
    voters(&cluster, 0, 3).await;
    assert_eq!(groups(&cluster, 2).await, GROUPS);
}
