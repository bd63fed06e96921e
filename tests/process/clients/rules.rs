//! What the contract's checklist asks for beyond single clients, over real sockets: exact texts, bodies of any
//! type, reads on the other members right after writes, the end of an instance, a leader that dies under a
//! start, and connections that were idle. Which test shows which point: docs/clients.md.

use super::read::{self, body, java_text};
use super::wire::{Load, Wire};
use super::{Patience, Site, over};
use crate::cluster::Cluster;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(10);
/// How long an instance is shown after its end.
const SHOWN: Duration = Duration::from_secs(60);
/// An idle connection is to be kept at least so long.
const IDLE_S: u64 = 120;

fn wire(at: &str) -> Wire {
    Wire::new(at, LIMIT, &[])
}

/// Text of the answer to a request as it is.
async fn said(wire: &mut Wire, method: &str, target: &str) -> String {
    let answer = wire.send(method, target, &[], &Load::Nothing).await;
    let answer = answer.unwrap_or_else(|why| panic!("{method} {target}: {why:?}"));
    assert_eq!(answer.status, 200, "{method} {target}: {answer:?}");
    answer.text
}

async fn json_of(at: &str, method: &str, target: &str, load: Load) -> Value {
    let answer = wire(at).send(method, target, &[], &load).await;
    read::sound(&answer.unwrap(), target)
}

fn whole(json: &Value) -> Load {
    Load::Whole(json.to_string().into_bytes())
}

/// Every list of a cloud that has nothing is `[]`, on each member.
pub(super) async fn an_empty_cloud(cluster: &Cluster) {
    for member in &cluster.members {
        let mut api = wire(&member.api);
        for list in [
            "vm",
            "node",
            "group",
            "image",
            "registry/vm",
            "registry/vm?apiVer=v1",
        ] {
            let text = said(&mut api, "GET", &format!("/api/v1/{list}")).await;
            assert_eq!(text, r#"{"status":"OK","message":"","body":[]}"#, "{list}");
        }
        let mut registry = wire(&member.registry);
        for list in ["/registry/vm", "/registry/v2/vm", "/log"] {
            let text = said(&mut registry, "GET", list).await;
            assert_eq!(text, r#"{"status":"OK","body":[],"message":""}"#, "{list}");
        }
    }
}

/// A node that has just joined has a state and an architecture, and empty lists.
pub(super) fn a_node_that_just_joined(node: &Value) {
    read::node(node);
    assert_eq!(node["state"], "Active", "{node}");
    let arch = if cfg!(target_arch = "x86_64") {
        "amd64"
    } else {
        "arm64"
    };
    assert_eq!(node["host_arch"], arch, "{node}");
    assert_eq!(node["groups"], json!([]), "{node}");
    assert_eq!(node["templates"], json!([]), "{node}");
}

/// A connection to each port, used once, and again when it has been idle for a while.
pub(super) struct Idle {
    since: Instant,
    wires: Vec<(Wire, &'static str)>,
}

impl Idle {
    pub(super) async fn open(cluster: &Cluster) -> Self {
        let mut wires = Vec::new();
        for member in &cluster.members {
            wires.push((wire(&member.api), "/api/v1/status"));
            wires.push((wire(&member.registry), "/registry/status"));
        }
        for (wire, path) in &mut wires {
            let answer = wire.send("GET", path, &[], &Load::Nothing).await.unwrap();
            let hint = answer.header("keep-alive").unwrap_or_default();
            let seconds = hint.strip_prefix("timeout=").and_then(|s| s.parse().ok());
            let seconds: u64 = seconds.unwrap_or_else(|| panic!("{answer:?}"));
            assert!(seconds >= IDLE_S, "{seconds}");
        }
        Self {
            since: Instant::now(),
            wires,
        }
    }

    /// In the midst of everything else, after `MAINSTAY_IDLE_SECONDS`: members keep connections for 150 s.
    pub(super) async fn used_again(mut self) {
        let wanted = crate::rounds("MAINSTAY_IDLE_SECONDS", 45) as u64;
        let rest = Duration::from_secs(wanted).saturating_sub(self.since.elapsed());
        tokio::time::sleep(rest).await;
        eprintln!("idle for {:.0} s", self.since.elapsed().as_secs_f64());
        for (wire, path) in &mut self.wires {
            said(wire, "GET", path).await;
            assert_eq!(wire.reused, 1, "the same connection");
        }
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    texts(&site, n).await;
    bodies(&site, n).await;
    reads_after_writes(&site, n).await;
    terminated_while_it_starts(&site, n).await;
    if n == 0 {
        shown_for_a_minute(&site).await;
    }
}

/// Texts that clients compare, methods that do not hang, and answers as small as they were asked for.
async fn texts(site: &Site, n: usize) {
    let at = site.api(n);
    let mut wire = wire(at);
    for (method, target, message) in [
        ("GET", "/api/v1/vm?id=no", "Not found"),
        ("GET", "/api/v1/node?id=no", "Not found"),
        ("GET", "/api/v1/registry/vm?id=no", "Not found"),
        ("DELETE", "/api/v1/vm?id=no", "Not found"),
    ] {
        let expected = format!(r#"{{"status":"FAIL","message":"{message}"}}"#);
        assert_eq!(said(&mut wire, method, target).await, expected, "{target}");
    }
    for (wanted, message) in [
        (json!({"vmid": "no"}), "VM not in the registry"),
        (
            json!({"vmid": site.template, "tag": "v9+x"}),
            "No such tag v9+x",
        ),
    ] {
        let json = json_of(at, "POST", "/api/v1/vm", whole(&wanted)).await;
        assert_eq!(json, json!({"status": "FAIL", "message": message}));
    }
    let twice = said(&mut wire, "GET", "//api//v1/status").await;
    assert_eq!(twice, said(&mut wire, "GET", "/api/v1/status").await);
    let head = wire.send("HEAD", "/api/v1/status", &[], &Load::Nothing);
    let head = head.await.unwrap();
    assert_eq!((head.status, head.text.as_str()), (200, ""));
    for method in ["PATCH", "OPTIONS"] {
        let answer = wire.send(method, "/api/v1/vm", &[], &Load::Nothing).await;
        let answer = answer.unwrap();
        assert_eq!(answer.status, 405, "{answer:?}");
        read::sound(&answer, method);
    }
    let packs = [("Accept-Encoding", "gzip")];
    for (headers, wanted) in [(&packs[..], true), (&[][..], false)] {
        for path in ["/api/v1/vm", "/api/v1/status"] {
            let list = wire.send("GET", path, headers, &Load::Nothing).await;
            let list = list.unwrap();
            read::sound(&list, path);
            let long = list.text.len() > 1100;
            let short = list.text.len() < 1000;
            assert!(if list.packed {
                wanted && !short
            } else {
                !wanted || !long
            });
        }
    }
    assert_eq!(wire.reused, 12, "all over one connection");
}

/// Bodies of any content type and charset, whole and in chunks.
async fn bodies(site: &Site, n: usize) {
    let latin1 = [
        format!(r#"{{"vmid":"{}","name":"caf"#, site.foreign).into_bytes(),
        vec![0xe9],
        b"\"}".to_vec(),
    ];
    let chunked = Load::Chunked(latin1.to_vec());
    let length = Load::Whole(latin1.concat());
    let form = "application/x-www-form-urlencoded";
    for (kind, load) in [
        (None, &length),
        (None, &chunked),
        (Some(form), &length),
        (Some("application/json; charset=ISO-8859-1"), &length),
        (Some("text/plain"), &chunked),
    ] {
        let more: Vec<_> = kind
            .map(|kind| ("Content-Type", kind))
            .into_iter()
            .collect();
        let mut first = wire(site.api(n));
        let started = first.send("POST", "/api/v1/vm", &more, load).await;
        let json = read::sound(&started.unwrap(), "POST");
        let id = body(&json)[0].as_str().unwrap().to_owned();
        let path = format!("/api/v1/vm?id={id}");
        let seen = json_of(site.api(n + 1), "GET", &path, Load::Nothing).await;
        assert_eq!(body(&seen)["name"], "caf\u{fffd}", "{kind:?}");
        // The end, by the same kind of body.
        let end = json!({"id": id}).to_string().into_bytes();
        let load = match load {
            Load::Chunked(_) => Load::Chunked(vec![end[..9].to_vec(), end[9..].to_vec()]),
            _ => Load::Whole(end),
        };
        let mut last = wire(site.api(n + 2));
        let ended = last.send("DELETE", "/api/v1/vm", &more, &load).await;
        let text = ended.unwrap().text;
        assert_eq!(text, r#"{"status":"OK","message":""}"#, "{kind:?}");
    }
}

/// A write on one member is there on the others with the next request.
async fn reads_after_writes(site: &Site, n: usize) {
    let [first, second, third] = [0, 1, 2].map(|k| site.api(n + k));
    let wanted = json!({"vmid": site.foreign, "count": 2, "external_id": format!("after-{n}")});
    let json = json_of(first, "POST", "/api/v1/vm", whole(&wanted)).await;
    let ids: Vec<String> = read::items(body(&json))
        .iter()
        .map(|id| id.as_str().unwrap().to_owned())
        .collect();
    let list = json_of(second, "GET", "/api/v1/vm", Load::Nothing).await;
    for id in &ids {
        let found = read::instances(body(&list)).iter();
        let mine: Vec<_> = found
            .filter(|one| one["instance_id"] == id.as_str())
            .collect();
        assert_eq!(mine.len(), 1);
        assert!(mine[0]["name"].is_null(), "{}", mine[0]);
        let vm = &mine[0]["vm"];
        assert_eq!(vm["instance_state"], "Scheduling");
        for absent in ["vminfo", "message", "startup_script", "node_id", "name"] {
            assert!(vm.get(absent).is_none(), "{absent}: {vm}");
        }
        let path = format!("/api/v1/vm?id={id}");
        let one = json_of(third, "GET", &path, Load::Nothing).await;
        assert_eq!(body(&one)["external_id"], wanted["external_id"]);
        for (at, next, key) in [
            (second, third, "a"),
            (third, first, "b"),
            (first, second, "c"),
        ] {
            let put = whole(&json!({"metadata": {key: at}}));
            body(&json_of(at, "PUT", &path, put).await);
            let seen = json_of(next, "GET", &path, Load::Nothing).await;
            assert_eq!(body(&seen)["metadata"][key], at);
        }
        let end = whole(&json!({"id": id}));
        body(&json_of(third, "DELETE", "/api/v1/vm", end).await);
        let seen = json_of(second, "GET", &path, Load::Nothing).await;
        assert_eq!(body(&seen)["instance_state"], "Terminating");
    }
}

/// An end that comes while the image is pulled or the VM boots: never `Started` from then on.
async fn terminated_while_it_starts(site: &Site, n: usize) {
    let wanted = whole(&json!({"vmid": site.template, "vcpu": 1, "vram": 256}));
    let json = json_of(site.api(n), "POST", "/api/v1/vm", wanted).await;
    let id = body(&json)[0].as_str().unwrap().to_owned();
    let path = format!("/api/v1/vm?id={id}");
    let patience = Patience::new("an instance has a node");
    loop {
        let seen = json_of(site.api(n + 1), "GET", &path, Load::Nothing).await;
        if body(&seen).get("node_id").is_some() {
            break;
        }
        patience.pause(&seen).await;
    }
    // Twice, on two members.
    for k in 0..2 {
        let end = whole(&json!({"id": id}));
        body(&json_of(site.api(n + k), "DELETE", "/api/v1/vm", end).await);
    }
    let patience = Patience::new("an instance that was not up yet has ended");
    for k in 0.. {
        let seen = json_of(site.api(n + k), "GET", &path, Load::Nothing).await;
        if seen["message"] == "Not found" {
            break;
        }
        let state = java_text(body(&seen), "instance_state");
        assert!(["Terminating", "Terminated"].contains(&state), "{seen}");
        if over(body(&seen)) {
            break;
        }
        patience.pause(&seen).await;
    }
}

/// What has ended is shown for a minute, one that never ran as well; then it was never there.
async fn shown_for_a_minute(site: &Site) {
    let wanted = whole(&json!({"vmid": site.foreign}));
    let json = json_of(site.api(0), "POST", "/api/v1/vm", wanted).await;
    let id = body(&json)[0].as_str().unwrap().to_owned();
    let path = format!("/api/v1/vm?id={id}");
    let end = || whole(&json!({"id": id}));
    body(&json_of(site.api(1), "DELETE", "/api/v1/vm", end()).await);
    let ended = Instant::now();
    let patience = Patience::new("an instance is forgotten");
    for k in 0.. {
        let seen = json_of(site.api(k), "GET", &path, Load::Nothing).await;
        if seen["message"] == "Not found" {
            break;
        }
        assert_eq!(body(&seen)["instance_state"], "Terminating", "{seen}");
        // Again: as good as the first time, and no longer shown for it.
        body(&json_of(site.api(k + 1), "DELETE", "/api/v1/vm", end()).await);
        patience.pause(&seen).await;
    }
    let shown = ended.elapsed();
    let least = SHOWN.checked_sub(Duration::from_secs(2)).unwrap();
    assert!(shown >= least, "forgotten after {shown:?}");
    let again = json_of(site.api(2), "DELETE", "/api/v1/vm", end()).await;
    assert_eq!(again, json!({"status": "FAIL", "message": "Not found"}));
}

/// Starts of two under way on the followers while the leader is killed: each has one answer, over a connection
/// that was not reset, and there are two of it or none.
pub(super) async fn a_leader_dies_during_starts(site: &mut Site) {
    let leader = site.cluster.leader().await;
    let (stop, answered) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut clients = JoinSet::new();
    for client in 0..6 {
        let mut wire = wire(site.api(leader + 1 + client % 2));
        let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
        let foreign = site.foreign.clone();
        clients.spawn(async move {
            let (mut told, mut longest) = (BTreeMap::new(), Duration::ZERO);
            let mut number = 0;
            while !stop.load(Ordering::SeqCst) {
                number += 1;
                let name = format!("leader-{client}-{number}");
                let wanted = whole(&json!({"vmid": foreign, "count": 2, "external_id": name}));
                let begin = Instant::now();
                let answer = wire.send("POST", "/api/v1/vm", &[], &wanted).await;
                let answer = answer.unwrap_or_else(|why| panic!("{name}: {why:?}"));
                longest = longest.max(begin.elapsed());
                told.insert(name, (answer.status, answer.json()));
                answered.fetch_add(1, Ordering::SeqCst);
                // No more instances than it takes.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            (told, longest)
        });
    }
    more(&answered, 30).await;
    site.cluster.kill(leader);
    let new = site.cluster.leader().await;
    assert_ne!(new, leader);
    more(&answered, 30).await;
    stop.store(true, Ordering::SeqCst);
    let (mut told, mut longest) = (BTreeMap::new(), Duration::ZERO);
    while let Some(one) = clients.join_next().await {
        let (theirs, held) = one.unwrap();
        told.extend(theirs);
        longest = longest.max(held);
    }
    site.cluster.start(leader);
    site.cluster.wait_ready(&[leader]).await;
    for n in 0..3 {
        let list = json_of(site.api(n), "GET", "/api/v1/vm", Load::Nothing).await;
        for (name, (status, json)) in &told {
            let of = |one: &&Value| one["external_id"] == name.as_str();
            let found = read::items(body(&list)).iter().filter(of).count();
            let message = json["message"].as_str().unwrap();
            let fits = match status {
                200 => found == 2,
                503 if message.contains("nothing was changed") => found == 0,
                503 => found == 0 || found == 2,
                _ => false,
            };
            assert!(fits, "{found} of {name}, which was told {status} {json}");
        }
    }
    let refused = told.values().filter(|(status, _)| *status != 200).count();
    eprintln!(
        "leader killed under {} starts: {refused} refused, held for {longest:?} at most",
        told.len()
    );
    assert!(longest < LIMIT);
}

async fn more(answered: &AtomicUsize, by: usize) {
    let goal = answered.load(Ordering::SeqCst) + by;
    let what = "starts are answered";
    crate::cluster::until(what, Duration::from_secs(30), || async {
        (answered.load(Ordering::SeqCst) >= goal).then_some(())
    })
    .await;
}
