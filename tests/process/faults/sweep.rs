//! One failing call anywhere: a member runs under the shim, and at a chosen one of all the calls that
//! change its files (its own, and the state store's inside sled) the disk is full, broken, slow, short or
//! interrupted. Whatever call it is: nothing that was acknowledged is lost, the member goes on rightly or
//! ends with a sentence, the others go on, and it starts again on what is left.

use super::shim::{EIO, ENOSPC, Fault, Shim, op};
use crate::cluster::Cluster;
use crate::load::Writers;
use crate::push::push_small_template;
use crate::{Dice, rounds, turn};
use std::collections::BTreeMap;
use std::time::Duration;

/// The member under the shim.
const VICTIM: usize = 0;
/// Acknowledged writes after its start, in the reference run and in each round.
const WRITES: u64 = 60;
const FAULTS: [Fault; 6] = [
    Fault::Once(EIO),
    Fault::Once(ENOSPC),
    Fault::Always(ENOSPC),
    Fault::Delay { ms: 1000, calls: 3 },
    Fault::Short,
    Fault::Interrupt,
];

const ENDED: &str = "ended with a sentence";

struct Sweep {
    cluster: Cluster,
    shim: Shim,
    writers: Writers,
    /// What happened, by fault and outcome.
    table: BTreeMap<(String, &'static str), usize>,
}

impl Sweep {
    async fn new() -> Self {
        let mut cluster = Cluster::new(3);
        let data = cluster.members[VICTIM].data.clone();
        let part = |name: &str| format!("{}/{name}", data.display());
        let parts = ["log/", "state/", "snapshots/", "identity"].map(part);
        let shim = Shim::new(cluster.dir.path(), &parts);
        shim.attach(&mut cluster, VICTIM);
        // Small, so that snapshots, new segments and purges are among the calls.
        cluster.flags = vec!["--snapshot-log", "128KiB"];
        for n in 0..3 {
            cluster.start(n);
        }
        cluster.wait_ready(&[0, 1, 2]).await;
        let template = push_small_template(&cluster, "t").await;
        let writers = Writers::start(&cluster, &template, 4).await;
        writers.progress(50).await;
        Self {
            cluster,
            shim,
            writers,
            table: BTreeMap::new(),
        }
    }

    /// Calls from a start to `WRITES` acknowledged writes later, and to the end of a clean stop.
    async fn reference(&mut self) -> (u64, u64) {
        self.cluster.stop(VICTIM).await;
        self.shim.set(op::ALL, 1, Fault::None);
        self.cluster.start(VICTIM);
        self.cluster.wait_ready(&[VICTIM]).await;
        self.writers.progress(WRITES).await;
        let running = self.shim.count();
        self.cluster.stop(VICTIM).await;
        (running, self.shim.count())
    }

    /// Meet `fault` at call `at` after a start, or at an earlier one when there are fewer calls this
    /// time. The member is stopped before and after.
    async fn round(&mut self, mut at: u64, fault: Fault, as_leader: bool) {
        for _ in 0..5 {
            match self.meet(at, fault, as_leader).await {
                Ok(()) => return,
                Err(calls) => at = 1 + (at - 1) % (calls / 2).max(1),
            }
        }
        panic!("{fault:?} was never met");
    }

    /// `Err`: it was not met in so many calls.
    async fn meet(&mut self, at: u64, fault: Fault, as_leader: bool) -> Result<(), u64> {
        self.shim.set(op::ALL, at, fault);
        self.cluster.start(VICTIM);
        if as_leader {
            self.try_to_lead().await;
        }
        let Some(ended) = self.until_hit().await else {
            self.cluster.kill_if_running(VICTIM);
            return Err(self.shim.count());
        };
        let hit = self.shim.last();
        let outcome = if ended {
            self.check_end(fault, &hit)
        } else {
            self.writers.progress(20).await;
            self.cluster.stop(VICTIM).await;
            "went on"
        };
        let exact = matches!(fault, Fault::Delay { .. } | Fault::Short | Fault::Interrupt);
        assert!(
            !exact || outcome != ENDED,
            "{fault:?} at {hit} is no reason to end:\n{}",
            self.cluster.log("c1")
        );
        let call = hit.rsplit("/c1/").next().unwrap_or(&hit);
        let kind = hit.split(' ').next().unwrap_or("");
        eprintln!("| {fault:?} | {at} | {kind} of {call} | {outcome} |");
        *self
            .table
            .entry((format!("{fault:?}"), outcome))
            .or_default() += 1;
        // The others never waited for it, and it starts on what it left.
        self.writers.progress(20).await;
        self.shim.set(op::ALL, 1, Fault::None);
        self.cluster.start(VICTIM);
        self.cluster.wait_ready(&[VICTIM]).await;
        let told = self.writers.told();
        told.check(&self.cluster, VICTIM).await;
        self.cluster.stop(VICTIM).await;
        Ok(())
    }

    async fn try_to_lead(&mut self) {
        let begun = std::time::Instant::now();
        while self.shim.hits() == 0
            && self.cluster.exited(VICTIM).is_none()
            && begun.elapsed() < Duration::from_secs(10)
        {
            let name = self.cluster.members[VICTIM].name.clone();
            let body = Some(serde_json::json!({ "name": name }));
            let path = "/api/v1/member/transfer-leader";
            if self.cluster.call(1, "POST", path, body).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Wait for the fault; did the member end? Late ones are met while it stops. `None`: it stopped and
    /// never met it.
    async fn until_hit(&mut self) -> Option<bool> {
        let begun = std::time::Instant::now();
        let enough = self.writers.acknowledged() + WRITES * 2;
        while self.shim.hits() == 0 {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "the fault was never met, {} calls were made",
                self.shim.count()
            );
            if self.cluster.exited(VICTIM).is_some() {
                return (self.shim.hits() > 0).then_some(true);
            }
            if self.writers.acknowledged() > enough {
                // Later than the reference run: the stop makes further calls.
                self.cluster.signal(VICTIM, "TERM");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // What a failed call leads to shows within a moment: an end, or further answers.
        let begun = std::time::Instant::now();
        loop {
            if self.cluster.exited(VICTIM).is_some() {
                return Some(true);
            }
            let url = format!("http://{}/readyz", self.cluster.members[VICTIM].api);
            let settled = begun.elapsed() > Duration::from_millis(700);
            if settled
                && let Ok(answer) = self.cluster.client.get(url).send().await
                && answer.status() == 200
            {
                return Some(false);
            }
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "after {} the member neither ended nor served:\n{}",
                self.shim.last(),
                self.cluster.log("c1")
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn check_end(&mut self, fault: Fault, hit: &str) -> &'static str {
        let status = self.cluster.exited(VICTIM).unwrap();
        self.cluster.kill_if_running(VICTIM);
        let log = self.cluster.log("c1");
        let last: Vec<&str> = log.lines().rev().take(12).collect();
        let reasons = ["No space left on device", "Input/output error"];
        let says =
            |line: &&str| line.starts_with("error: ") && reasons.iter().any(|r| line.contains(r));
        let told = status.success() || last.iter().any(says);
        assert!(
            told && matches!(status.code(), Some(0 | 1)),
            "{fault:?} at {hit}: ended with {status} and without its reason:\n{}",
            last.join("\n")
        );
        if status.success() {
            "stopped cleanly"
        } else {
            ENDED
        }
    }
}

/// `MAINSTAY_FAULT_POINTS=n`: that many points; more than there are calls: every one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_failing_call_anywhere_loses_nothing() {
    let _turn = turn().await;
    let points = rounds("MAINSTAY_FAULT_POINTS", 6) as u64;
    let mut dice = Dice::new("failing calls");
    let mut sweep = Sweep::new().await;
    let (running, all) = sweep.reference().await;
    eprintln!("{running} calls from the start on, {all} with the stop");
    eprintln!("| fault | at call | which was | outcome |\n| --- | --- | --- | --- |");
    let points = points.min(all);
    for point in 0..points {
        // A random place in each of equally long stretches; the first ones are the start's.
        let (from, to) = (point * all / points, (point + 1) * all / points);
        let at = 1 + from + dice.below((to - from).max(1));
        let fault = FAULTS[(point as usize) % FAULTS.len()];
        sweep.round(at, fault, point % 2 == 1).await;
    }
    for ((fault, outcome), count) in &sweep.table {
        eprintln!("| {fault} | {count} | {outcome} |");
    }
    sweep.cluster.start(VICTIM);
    sweep.cluster.wait_ready(&[VICTIM]).await;
    let told = sweep.writers.stop_only().await;
    for n in 0..3 {
        told.check(&sweep.cluster, n).await;
    }
}
