//! Writers that remember what was acknowledged: each client owns one instance and writes rising
//! numbers into its metadata; at the end no acknowledged number may be gone.

use crate::cluster::Cluster;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Clients at work.
pub(crate) struct Writers {
    stop: Arc<AtomicBool>,
    clients: Vec<(String, Arc<Progress>, JoinHandle<()>)>,
}

#[derive(Default)]
struct Progress {
    acknowledged: AtomicU64,
    last: AtomicU64,
}

impl Writers {
    /// `count` clients, each with its own instance of `template` (which nothing runs).
    pub(crate) async fn start(cluster: &Cluster, template: &str, count: usize) -> Self {
        let body = json!({"vmid": template, "count": count, "external_id": "writers"});
        let ids = cluster
            .call(0, "POST", "/api/v1/vm", Some(body))
            .await
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let apis: Vec<String> = cluster.members.iter().map(|m| m.api.clone()).collect();
        let mut clients = Vec::new();
        for (n, id) in ids.as_array().unwrap().iter().enumerate() {
            let id = id.as_str().unwrap().to_owned();
            let progress = Arc::new(Progress::default());
            let task = tokio::spawn(write_on(
                cluster.client.clone(),
                apis.clone(),
                n,
                id.clone(),
                Arc::clone(&progress),
                Arc::clone(&stop),
            ));
            clients.push((id, progress, task));
        }
        Self { stop, clients }
    }

    /// Acknowledged writes so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.clients
            .iter()
            .map(|(_, p, _)| p.acknowledged.load(Ordering::SeqCst))
            .sum()
    }

    /// Wait for `more` further acknowledgements: the cluster accepts writes.
    pub(crate) async fn progress(&self, more: u64) {
        let goal = self.acknowledged() + more;
        crate::cluster::until("writes go on", Duration::from_secs(30), || async {
            (self.acknowledged() >= goal).then_some(())
        })
        .await;
    }

    /// What the clients were told so far, while they go on.
    pub(crate) fn told(&self) -> Acknowledged {
        let last = |p: &Progress| p.last.load(Ordering::SeqCst);
        Acknowledged {
            all: self
                .clients
                .iter()
                .map(|(id, progress, _)| (id.clone(), last(progress)))
                .collect(),
            total: self.acknowledged(),
        }
    }

    /// Stop the clients; what they were told can be checked later, e.g. after a restart of all.
    pub(crate) async fn stop_only(self) -> Acknowledged {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Vec::new();
        let mut total = 0;
        for (id, progress, task) in self.clients {
            task.await.unwrap();
            total += progress.acknowledged.load(Ordering::SeqCst);
            all.push((id, progress.last.load(Ordering::SeqCst)));
        }
        Acknowledged { all, total }
    }
}

/// What the clients were told.
pub(crate) struct Acknowledged {
    all: Vec<(String, u64)>,
    total: u64,
}

impl Acknowledged {
    /// Every acknowledged write is visible through member `n`.
    pub(crate) async fn check(&self, cluster: &Cluster, n: usize) -> u64 {
        assert!(
            self.total > 0,
            "no write was acknowledged: the run proves nothing"
        );
        for (id, last) in &self.all {
            let instance = cluster
                .call(n, "GET", &format!("/api/v1/vm?id={id}"), None)
                .await
                .unwrap_or_else(|e| panic!("instance {id} is lost: {e}"));
            // A later write without an answer may also have happened: equal or greater is right.
            let seen = instance["metadata"]["n"].as_u64().unwrap_or(0);
            assert!(
                seen >= *last,
                "{id}: {last} was acknowledged, {seen} is there"
            );
        }
        self.total
    }
}

async fn write_on(
    client: reqwest::Client,
    apis: Vec<String>,
    mut at: usize,
    id: String,
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
) {
    let mut n = 0_u64;
    while !stop.load(Ordering::SeqCst) {
        n += 1;
        let url = format!("http://{}/api/v1/vm?id={id}", apis[at % apis.len()]);
        let body = json!({"metadata": {"n": n}}).to_string();
        let answer = client.put(url).body(body).send().await;
        let text = match answer {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        let ok = serde_json::from_str::<Value>(&text).is_ok_and(|v| v["status"] == "OK");
        if ok {
            progress.last.store(n, Ordering::SeqCst);
            progress.acknowledged.fetch_add(1, Ordering::SeqCst);
        } else {
            // Unknown outcome: go on through the next member with a greater number.
            at += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
