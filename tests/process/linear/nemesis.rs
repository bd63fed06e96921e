//! Faults, one at a time: done to the members, kept until they have had their effect, undone. Waits
//! for states, each within a bound. Knows what a fault must have caused; refuses to judge answers.

use super::MEMBERS;
use super::field::Field;
use super::links::{Link, Links};
use super::plan::{Fault, Kind};
use crate::Dice;
use crate::cluster::{Cluster, until};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A leader, an acknowledged write: each must come within this.
const PATIENCE: Duration = Duration::from_secs(30);
/// A member that is paused does not answer: ask on.
const ASK: Duration = Duration::from_millis(400);

/// What a fault did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) fault: Fault,
    /// Microseconds of the field's clock.
    pub(crate) begin: u64,
    pub(crate) end: u64,
    /// Term before and after.
    pub(crate) terms: (u64, u64),
    /// Times that links were felt.
    pub(crate) felt: u64,
}

impl Done {
    /// Why the run proves nothing about this fault.
    pub(crate) fn invalid(&self) -> Option<String> {
        let kind = self.fault.kind;
        if kind.deposes() && self.terms.1 <= self.terms.0 {
            return Some(format!("{kind:?}: the term stayed {}", self.terms.0));
        }
        if kind.on_links() && self.felt == 0 {
            return Some(format!("{kind:?}: no link felt it"));
        }
        None
    }
}

/// Whoever hurts the members of one schedule.
pub(crate) struct Nemesis<'a> {
    pub(crate) cluster: &'a mut Cluster,
    pub(crate) links: &'a Links,
    pub(crate) field: &'a Arc<Field>,
}

impl Nemesis<'_> {
    /// All members that clients know.
    fn all(&self) -> Vec<usize> {
        (0..MEMBERS).collect()
    }

    fn but(&self, n: usize) -> Vec<usize> {
        self.all().into_iter().filter(|m| *m != n).collect()
    }

    /// A member's row of `mainstay status`, if it answers soon.
    pub(crate) async fn row(&self, n: usize) -> Option<Value> {
        row(self.cluster, n).await
    }

    /// Who leads among these, in which term: the newest that says so of itself.
    async fn leads(&self, among: &[usize]) -> Option<(usize, u64)> {
        let mut found = None;
        for &n in among {
            let Some(row) = self.row(n).await else {
                continue;
            };
            let term = row["term"].as_u64().unwrap_or(0);
            if row["is_leader"] == true && found.is_none_or(|(_, t)| term > t) {
                found = Some((n, term));
            }
        }
        found
    }

    async fn leader(&self, among: &[usize], after: u64) -> (usize, u64) {
        until("a leader", PATIENCE, || async {
            self.leads(among).await.filter(|(_, term)| *term > after)
        })
        .await
    }

    /// Further writes are acknowledged by these.
    pub(crate) async fn progress(&self, through: &[usize], more: u64) {
        let goal = self.field.acknowledged(through) + more;
        until("writes are acknowledged", PATIENCE, || async {
            (self.field.acknowledged(through) >= goal).then_some(())
        })
        .await;
    }

    /// Started again, ready, its identity known to the links.
    async fn start(&mut self, which: &[usize]) {
        for &n in which {
            self.field.process[n].fetch_add(1, Ordering::SeqCst);
            self.cluster.start(n);
        }
        self.cluster.wait_ready(which).await;
        name(self.cluster, self.links, which).await;
    }

    async fn dwell(&self, fault: &Fault) {
        // How long a fault lasts is an input, not a wait for something.
        tokio::time::sleep(Duration::from_millis(fault.dwell_ms)).await;
    }

    /// One fault from its beginning to its end.
    pub(crate) async fn inflict(&mut self, fault: Fault) -> Done {
        let (leader, term) = self.leader(&self.all(), 0).await;
        let felt = self.links.felt();
        self.field.burst.send_modify(|n| *n += 1);
        tokio::time::sleep(Duration::from_millis(fault.lead_ms)).await;
        let begin = self.field.now();
        match fault.kind {
            Kind::KillLeader => self.kill(leader, leader, term).await,
            Kind::KillFollower => self.kill(self.follower(leader, &fault), leader, term).await,
            Kind::StopLeader => self.stop_leader(leader, term).await,
            Kind::KillAll => self.kill_all(&fault).await,
            Kind::PauseLeader => self.pause(&fault, &[leader], leader, term).await,
            Kind::PauseFollower => {
                let victim = self.follower(leader, &fault);
                self.pause(&fault, &[victim], leader, term).await;
            }
            Kind::PauseMost => {
                let victims = [leader, self.follower(leader, &fault)];
                self.pause(&fault, &victims, leader, term).await;
            }
            Kind::Transfer => self.transfer(&fault, leader, term).await,
            Kind::Replace => self.replace(&fault, leader).await,
            Kind::Blink => self.blink(&fault).await,
            Kind::Resize => self.resize(&fault).await,
            _ => self.cut(&fault, leader, term).await,
        }
        let after = self.leader(&self.all(), 0).await;
        Done {
            fault,
            begin,
            end: self.field.now(),
            terms: (term, after.1),
            felt: self.links.felt() - felt,
        }
    }

    fn follower(&self, leader: usize, fault: &Fault) -> usize {
        let others = self.but(leader);
        others[(fault.pick % others.len() as u64) as usize]
    }

    async fn kill(&mut self, victim: usize, leader: usize, term: u64) {
        self.cluster.kill(victim);
        let others = self.but(victim);
        if victim == leader {
            self.leader(&others, term).await;
        }
        self.progress(&others, 30).await;
        self.start(&[victim]).await;
    }

    async fn stop_leader(&mut self, leader: usize, term: u64) {
        self.cluster.stop(leader).await;
        let others = self.but(leader);
        self.leader(&others, term).await;
        self.progress(&others, 30).await;
        self.start(&[leader]).await;
    }

    async fn kill_all(&mut self, fault: &Fault) {
        let mut order = self.all();
        for &n in &order {
            self.cluster.kill(n);
        }
        let mut dice = Dice(fault.pick | 1);
        for last in (1..order.len()).rev() {
            order.swap(last, dice.below(last as u64 + 1) as usize);
        }
        for &n in &order {
            self.field.process[n].fetch_add(1, Ordering::SeqCst);
            self.cluster.start(n);
            let pause = Duration::from_millis(dice.below(300));
            tokio::time::sleep(pause).await;
        }
        self.cluster.wait_ready(&order).await;
    }

    async fn pause(&mut self, fault: &Fault, victims: &[usize], leader: usize, term: u64) {
        for &n in victims {
            self.cluster.signal(n, "STOP");
        }
        for &n in victims {
            let cluster = &*self.cluster;
            until("a paused process", PATIENCE, || async {
                cluster.paused(n).then_some(())
            })
            .await;
        }
        let others: Vec<_> = self.all();
        let others: Vec<_> = others
            .into_iter()
            .filter(|n| !victims.contains(n))
            .collect();
        if others.len() > victims.len() {
            if victims.contains(&leader) {
                self.leader(&others, term).await;
            }
            self.progress(&others, 30).await;
            self.dwell(fault).await;
        } else {
            self.dwell(fault).await;
            self.dwell(fault).await;
        }
        for &n in victims {
            self.cluster.signal(n, "CONT");
        }
    }

    /// Cut or slow links, until the others have a leader if they shall, and write.
    async fn cut(&mut self, fault: &Fault, leader: usize, term: u64) {
        let victim = match fault.kind {
            Kind::IsolateFollower => self.follower(leader, fault),
            _ => leader,
        };
        let other = self.follower(leader, fault);
        for a in self.all() {
            for b in self.but(a) {
                let link = match fault.kind {
                    Kind::Slow => Link::Slow(Duration::from_millis(5 + fault.pick % 60)),
                    Kind::LeaderDeaf if b == victim => Link::Cut,
                    Kind::LeaderMute if a == victim => Link::Cut,
                    Kind::IsolateLeader | Kind::IsolateFollower if a == victim || b == victim => {
                        Link::Cut
                    }
                    Kind::Bridge if [(leader, other), (other, leader)].contains(&(a, b)) => {
                        Link::Cut
                    }
                    _ => Link::Open,
                };
                self.links.set(a, b, link);
            }
        }
        let through = match fault.kind {
            Kind::Slow | Kind::Bridge => self.all(),
            _ => self.but(victim),
        };
        if fault.kind.deposes() {
            self.leader(&through, term).await;
        }
        self.progress(&through, 30).await;
        self.dwell(fault).await;
        self.links.heal(!fault.late);
    }

    async fn blink(&mut self, fault: &Fault) {
        let mut dice = Dice(fault.pick | 1);
        for _ in 0..8 {
            let from = dice.below(self.all().len() as u64) as usize;
            let to = self.but(from)[dice.below(self.all().len() as u64 - 1) as usize];
            self.links.set(from, to, Link::Cut);
            if dice.below(2) == 0 {
                self.links.set(to, from, Link::Cut);
            }
            let pause = Duration::from_millis(20 + dice.below(380));
            tokio::time::sleep(pause).await;
            self.links.heal(dice.below(2) == 0);
            let pause = Duration::from_millis(dice.below(150));
            tokio::time::sleep(pause).await;
        }
    }

    /// Ask until the lead has moved: a member that is behind is refused as the next leader.
    async fn transfer(&mut self, fault: &Fault, leader: usize, term: u64) {
        let ask = (fault.pick % self.all().len() as u64) as usize;
        let heir = self.follower(leader, fault);
        let body = json!({"name": self.cluster.members[heir].name});
        until("the lead moves", PATIENCE, || async {
            let path = "/api/v1/member/transfer-leader";
            let told = self.cluster.call(ask, "POST", path, Some(body.clone()));
            let _ = told.await;
            self.leads(&self.all()).await.filter(|(_, t)| *t > term)
        })
        .await;
    }

    async fn replace(&mut self, fault: &Fault, leader: usize) {
        let any = (fault.pick % self.all().len() as u64) as usize;
        let victim = if fault.late { leader } else { any };
        let name = self.cluster.members[victim].name.clone();
        self.cluster.kill(victim);
        std::fs::remove_dir_all(&self.cluster.members[victim].data).unwrap();
        let cluster = &*self.cluster;
        until("the dead member is taken out", PATIENCE, || async {
            let out = cluster.cli(&["member", "replace", &name]);
            let again = String::from_utf8_lossy(&out.stderr).contains("No such member");
            (out.status.success() || again).then_some(())
        })
        .await;
        self.progress(&self.but(victim), 30).await;
        self.start(&[victim]).await;
    }
}

impl Nemesis<'_> {
    /// Four vote, then three again; in between, writes need one more of them. The guest may have come to
    /// lead: then it hands over first.
    async fn resize(&mut self, fault: &Fault) {
        let guest = MEMBERS;
        let name = self.cluster.members[guest].name.clone();
        self.cluster.start(guest);
        self.cluster.wait_ready(&[guest]).await;
        self::name(self.cluster, self.links, &[guest]).await;
        let cluster = &*self.cluster;
        let part = async || {
            let list = cluster.call(0, "GET", "/api/v1/members", None).await.ok()?;
            let row = list.as_array()?.iter().find(|m| m["name"] == name.as_str());
            Some(row.map(|row| row["role"].clone()))
        };
        until("the guest votes", PATIENCE, || async {
            (part().await??.as_str()? == "voter").then_some(())
        })
        .await;
        self.progress(&self.all(), 30).await;
        self.dwell(fault).await;
        until("the guest is taken out", PATIENCE, || async {
            let out = cluster.cli(&["member", "remove", &name]);
            (out.status.success() && part().await?.is_none()).then_some(())
        })
        .await;
        self.progress(&self.all(), 30).await;
        self.cluster.kill(guest);
        std::fs::remove_dir_all(&self.cluster.members[guest].data).unwrap();
    }
}

/// A member's row of `mainstay status`, if it answers soon.
pub(crate) async fn row(cluster: &Cluster, n: usize) -> Option<Value> {
    if !cluster.running(n) {
        return None;
    }
    let asked = cluster.call(n, "GET", "/api/v1/cluster/status", None);
    tokio::time::timeout(ASK, asked).await.ok()?.ok()
}

/// Tell the links who these members are.
pub(crate) async fn name(cluster: &Cluster, links: &Links, which: &[usize]) {
    for &n in which {
        let id = until("a member says its id", PATIENCE, || async {
            let row = row(cluster, n).await?;
            u64::from_str_radix(row["id"].as_str()?, 16).ok()
        })
        .await;
        links.name(id, n);
    }
}
