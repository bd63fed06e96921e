//! One member grows to three, to five, and shrinks to three again, under load: clients that retry as
//! clients do see no failure, nothing acknowledged is lost, and what happens in between (a joiner killed
//! while it catches up, a leader killed right after it was asked for a change, the leader removed) leaves
//! exactly the members that were asked for.

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::{rounds, turn};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(60);

/// The members as one of them has them: name to role.
pub(crate) async fn roles(cluster: &Cluster, through: usize) -> Option<BTreeMap<String, String>> {
    let list = cluster.call(through, "GET", "/api/v1/members", None).await;
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let list = list.ok()?;
    let rows = list.as_array()?.iter();
    Some(rows.map(|m| (text(&m["name"]), text(&m["role"]))).collect())
}

/// Until these, and no others, are members, all of them voters, as each of them sees it.
pub(crate) async fn voters_are(cluster: &Cluster, which: &[usize]) {
    let wanted: BTreeMap<_, _> = which
        .iter()
        .map(|n| (cluster.members[*n].name.clone(), "voter".to_owned()))
        .collect();
    for n in which {
        until(&format!("{n} sees {wanted:?}"), LIMIT, || async {
            (roles(cluster, *n).await? == wanted).then_some(())
        })
        .await;
    }
}

/// Clients that send a write again, through the next member, after a 503 or a broken connection, and
/// take any other answer for what it is.
struct Strict {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    failures: Arc<parking_lot::Mutex<Vec<String>>>,
    clients: Vec<(String, JoinHandle<u64>)>,
}

impl Strict {
    async fn start(cluster: &Cluster, template: &str, apis: &[String], count: usize) -> Self {
        let body = json!({"vmid": template, "count": count, "external_id": "writers"});
        let ids = cluster
            .call(0, "POST", "/api/v1/vm", Some(body))
            .await
            .unwrap();
        let mut all = Self {
            stop: Arc::default(),
            acknowledged: Arc::default(),
            failures: Arc::default(),
            clients: Vec::new(),
        };
        for (n, id) in ids.as_array().unwrap().iter().enumerate() {
            let id = id.as_str().unwrap().to_owned();
            let (stop, acknowledged) = (Arc::clone(&all.stop), Arc::clone(&all.acknowledged));
            let failures = Arc::clone(&all.failures);
            let (apis, of) = (apis.to_vec(), id.clone());
            let task = tokio::spawn(async move {
                let client = reqwest::Client::builder()
                    .timeout(Duration::from_secs(12))
                    .build()
                    .unwrap();
                let (mut at, mut last) = (n, 0);
                while !stop.load(Ordering::SeqCst) {
                    let next = last + 1;
                    let url = format!("http://{}/api/v1/vm?id={of}", apis[at % apis.len()]);
                    let body = json!({"metadata": {"n": next}}).to_string();
                    let sent = async {
                        let answer = client.put(&url).body(body).send().await?;
                        Ok::<_, reqwest::Error>((answer.status().as_u16(), answer.text().await?))
                    };
                    match sent.await {
                        Ok((200, text)) if text.contains("\"status\":\"OK\"") => {
                            last = next;
                            acknowledged.fetch_add(1, Ordering::SeqCst);
                        }
                        Ok((503, _)) | Err(_) => {
                            at += 1;
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                        Ok(other) => {
                            failures.lock().push(format!("{url}: {other:?}"));
                            return last;
                        }
                    }
                }
                last
            });
            all.clients.push((id, task));
        }
        all
    }

    async fn progress(&self, more: u64) {
        let goal = self.acknowledged.load(Ordering::SeqCst) + more;
        until("writes go on", LIMIT, || async {
            let failed = self.failures.lock().clone();
            assert!(failed.is_empty(), "{failed:?}");
            (self.acknowledged.load(Ordering::SeqCst) >= goal).then_some(())
        })
        .await;
    }

    /// End, and look on each of these members whether all that was acknowledged is there.
    async fn check(self, cluster: &Cluster, which: &[usize]) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        let total = self.acknowledged.load(Ordering::SeqCst);
        for (id, task) in self.clients {
            let last = task.await.unwrap();
            assert!(last > 0, "a client wrote nothing: the run proves nothing");
            for n in which {
                let path = format!("/api/v1/vm?id={id}");
                let instance = cluster.call(*n, "GET", &path, None).await.unwrap();
                let seen = instance["metadata"]["n"].as_u64().unwrap_or(0);
                // The last one may have been sent again without an answer before the end.
                assert!(
                    seen == last || seen == last + 1,
                    "{id} on {n}: {last}, {seen}"
                );
            }
        }
        let failed = self.failures.lock().clone();
        assert!(failed.is_empty(), "{failed:?}");
        total
    }
}

/// Start this one and wait until it is a voter.
async fn join(cluster: &mut Cluster, n: usize, all: &[usize]) {
    cluster.start(n);
    cluster.wait_ready(&[n]).await;
    voters_are(cluster, all).await;
}

/// Ask for a removal again and again, as an operator does who got no answer.
async fn remove(cluster: &Cluster, name: &str) {
    until(&format!("{name} is removed"), LIMIT, || async {
        let out = cluster.cli(&["member", "remove", name]);
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        let later = [
            "no leader",
            "outcome is unknown",
            "recorded",
            "majority",
            "no member",
        ];
        assert!(
            out.status.success() || later.iter().any(|text| error.contains(text)),
            "{error}"
        );
        out.status.success().then_some(())
    })
    .await;
}

/// Its process says that it is out, serves nobody, and still runs.
async fn is_out(cluster: &mut Cluster, n: usize) {
    let url = format!("http://{}/readyz", cluster.members[n].api);
    until(&format!("{n} says that it was removed"), LIMIT, || async {
        let answer = cluster.client.get(&url).send().await.ok()?;
        let status = answer.status().as_u16();
        let text = answer.text().await.ok()?;
        (status == 503 && text.contains("was removed from the cluster")).then_some(())
    })
    .await;
    let list = cluster
        .call(n, "GET", "/api/v1/vm?consistency=stale", None)
        .await;
    assert!(list.unwrap_err().contains("was removed"));
    assert_eq!(cluster.exited(n), None);
}

/// Each of these holds every byte of the template, and nobody else is said to.
async fn held_by(cluster: &Cluster, which: &[usize]) {
    until("every member holds the template", LIMIT, || async {
        let rows = cluster.cli_json(&["template", "replicas", "load", "--tag", "v1"]);
        let rows = rows.as_array()?.clone();
        let whole = rows.iter().all(|r| r["state"] == "complete");
        (whole && rows.len() == which.len()).then_some(())
    })
    .await;
}

/// `MAINSTAY_GROW_ROUNDS=10` is the long form: the cluster breathes so often.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_grows_to_five_and_shrinks_to_three_under_load() {
    let _turn = turn().await;
    let mut cluster = Cluster::new(1);
    // What removals need is on at once, template or not.
    cluster.flags = vec!["--feature-grace-s", "0"];
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    let template = push_small_template(&cluster, "load").await;
    for through in [&[0][..], &[0, 1], &[1, 2], &[0, 1, 2]] {
        cluster.joiner(through);
    }
    let apis: Vec<String> = cluster.members.iter().map(|m| m.api.clone()).collect();
    let writers = Strict::start(&cluster, &template, &apis, 8).await;
    writers.progress(50).await;
    join(&mut cluster, 1, &[0, 1]).await;
    join(&mut cluster, 2, &[0, 1, 2]).await;
    writers.progress(50).await;
    let (mut inside, mut outside) = (vec![0, 1, 2], [3, 4]);
    for _ in 0..rounds("MAINSTAY_GROW_ROUNDS", 1) {
        grow(&mut cluster, &writers, &inside, outside).await;
        outside = shrink(&mut cluster, &writers).await;
        inside = (0..5).filter(|n| !outside.contains(n)).collect();
        // They take part again with empty directories, as other identities under the same names.
        for n in outside {
            cluster.stop(n).await;
            std::fs::remove_dir_all(&cluster.members[n].data).unwrap();
            let peers = inside.iter().map(|n| &cluster.members[*n].peer);
            cluster.members[n].join = peers.map(|peer| format!("http://{peer}")).collect();
        }
    }
    let total = writers.check(&cluster, &inside).await;
    eprintln!("1 -> 3 -> 5 -> 3 members, {total} acknowledged writes, none failed, none lost");
}

/// From three members to five.
async fn grow(cluster: &mut Cluster, writers: &Strict, inside: &[usize], new: [usize; 2]) {
    // One that is killed as soon as it is let in, while it catches up, and comes back.
    cluster.start(new[0]);
    let name = cluster.members[new[0]].name.clone();
    until("it is let in", LIMIT, || async {
        roles(cluster, inside[0])
            .await?
            .contains_key(&name)
            .then_some(())
    })
    .await;
    cluster.kill(new[0]);
    writers.progress(20).await;
    let four = [inside, &new[..1]].concat();
    join(cluster, new[0], &four).await;
    // A leader that is killed while it lets one in.
    cluster.start(new[1]);
    let name = cluster.members[new[1]].name.clone();
    until("it asks", LIMIT, || async {
        let found = cluster.log(&name).contains("found the cluster");
        found.then_some(())
    })
    .await;
    let leader = cluster.leader().await;
    cluster.kill(leader);
    writers.progress(20).await;
    cluster.start(leader);
    cluster.wait_ready(&[leader, new[1]]).await;
    let five = [inside, &new].concat();
    voters_are(cluster, &five).await;
    held_by(cluster, &five).await;
}

/// From five members to three; who has gone.
async fn shrink(cluster: &mut Cluster, writers: &Strict) -> [usize; 2] {
    // A leader that is killed right after it was asked to let one go; asked again, it is done once.
    let leader = cluster.leader().await;
    let first = (leader + 1) % 5;
    let name = cluster.members[first].name.clone();
    let asked = format!("http://{}", cluster.members[leader].api);
    let mut asking = Command::new(crate::cluster::binary())
        .args(["member", "remove", &name, "--endpoints", &asked])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it is recorded, or done", LIMIT, || async {
        let list = cluster.call(leader, "GET", "/api/v1/members", None).await;
        let list = list.ok()?;
        let row = list.as_array()?.iter().find(|m| m["name"] == name.as_str());
        row.is_none_or(|row| row["leaving"] == true).then_some(())
    })
    .await;
    cluster.kill(leader);
    asking.wait().unwrap();
    remove(cluster, &name).await;
    remove(cluster, &name).await;
    cluster.start(leader);
    is_out(cluster, first).await;
    let four: Vec<usize> = (0..5).filter(|n| *n != first).collect();
    voters_are(cluster, &four).await;
    writers.progress(20).await;
    // The leader itself.
    let second = cluster.leader().await;
    let left: Vec<usize> = (0..5).filter(|n| ![first, second].contains(n)).collect();
    let said = cluster.cli_ok(&["member", "remove", &cluster.members[second].name]);
    assert!(said.contains("Left are 3 voters"), "{said}");
    assert!(said.contains("one of them may fail"), "{said}");
    is_out(cluster, second).await;
    voters_are(cluster, &left).await;
    held_by(cluster, &left).await;
    writers.progress(20).await;
    // A removed identity stays out, also when it is started again.
    cluster.stop(second).await;
    cluster.start(second);
    is_out(cluster, second).await;
    voters_are(cluster, &left).await;
    [first, second]
}
