//! SIGTERM of one member after another under load: no client notices more than a closed port. Each
//! request that was sent is answered, and not with an error that the stop made.

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::{rounds, turn};
use serde_json::{Value, json};
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What became of the requests of all clients.
#[derive(Default)]
struct Tally {
    done: AtomicU64,
    /// The port was closed: nothing was sent.
    refused: AtomicU64,
    /// A member that starts says so itself.
    starting: AtomicU64,
    spoilt: parking_lot::Mutex<Vec<String>>,
    stop: AtomicBool,
}

impl Tally {
    async fn progress(&self, more: u64) {
        let goal = self.done.load(Ordering::SeqCst) + more;
        until("writes go on", Duration::from_secs(30), || async {
            (self.done.load(Ordering::SeqCst) >= goal).then_some(())
        })
        .await;
    }

    /// Was it done?
    fn count(&self, sent: Result<(u16, String), reqwest::Error>, api: &str) -> bool {
        let (counter, done) = match sent {
            Ok((200, text)) if text.contains("\"OK\"") => (&self.done, true),
            Ok((503, text)) if text.contains("this member is not ready") => (&self.starting, false),
            Err(e) if e.is_connect() => (&self.refused, false),
            Ok((status, text)) => {
                self.spoilt.lock().push(format!("{api}: {status} {text}"));
                return false;
            }
            Err(e) => {
                let why = e.source().map(ToString::to_string).unwrap_or_default();
                self.spoilt.lock().push(format!("{api}: {e}: {why}"));
                return false;
            }
        };
        counter.fetch_add(1, Ordering::SeqCst);
        done
    }
}

async fn write_on(apis: Vec<String>, mut at: usize, id: String, tally: Arc<Tally>) {
    // Of its own: its kept connections are the ones that a stop must not break.
    let client = reqwest::Client::builder()
        .timeout(Duration::from_secs(12))
        .build()
        .unwrap();
    let mut n = 0_u64;
    while !tally.stop.load(Ordering::SeqCst) {
        n += 1;
        // Members in turn, so that all of them always have requests in flight.
        at = (at + 1) % apis.len();
        let url = format!("http://{}/api/v1/vm?id={id}", apis[at]);
        let body = json!({"metadata": {"n": n}}).to_string();
        let sent = async {
            let answer = client.put(url).body(body).send().await?;
            Ok((answer.status().as_u16(), answer.text().await?))
        };
        if !tally.count(sent.await, &apis[at]) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// `MAINSTAY_STOP_ROUNDS=20` is the long form. Strictly none may be spoilt, although two moments of a
/// few microseconds remain by the nature of TCP: between the last accept and the closing of the port,
/// and between the last look at a connection that was idle for half a second and its closing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_stop_spoils_no_request() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "load").await;
    let body = json!({"vmid": template, "count": 8, "external_id": "writers"});
    let ids: Value = cluster
        .call(0, "POST", "/api/v1/vm", Some(body))
        .await
        .unwrap();
    let apis: Vec<String> = cluster.members.iter().map(|m| m.api.clone()).collect();
    let tally = Arc::new(Tally::default());
    let clients: Vec<_> = ids
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(n, id)| {
            let id = id.as_str().unwrap().to_owned();
            tokio::spawn(write_on(apis.clone(), n, id, Arc::clone(&tally)))
        })
        .collect();
    for _ in 0..rounds("MAINSTAY_STOP_ROUNDS", 1) {
        let leader = cluster.leader().await;
        for n in [leader, (leader + 1) % 3, (leader + 2) % 3] {
            tally.progress(60).await;
            cluster.stop(n).await;
            tally.progress(60).await;
            cluster.start(n);
            cluster.wait_ready(&[n]).await;
        }
    }
    tally.progress(60).await;
    tally.stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    eprintln!(
        "{} writes, {} times a closed port, {} times a member that starts",
        count(&tally.done),
        count(&tally.refused),
        count(&tally.starting)
    );
    assert!(count(&tally.refused) > 0, "no stop was noticed at all");
    let spoilt = tally.spoilt.lock();
    assert!(spoilt.is_empty(), "{} spoilt: {spoilt:#?}", spoilt.len());
    for member in &cluster.members {
        let log = cluster.log(&member.name);
        let error = log.lines().find(|line| line.contains(" ERROR "));
        assert_eq!(error, None, "{}: a clean stop is no error", member.name);
    }
}
