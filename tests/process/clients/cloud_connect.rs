//! The shell scripts that join machines (cloud-connect, getting-started): curl and jq, so that a body has the
//! content type of a form and the first answer that is no JSON ends the script. The node that joins and leaves
//! is a real agent without room for VMs.

use super::read::{self, body, java_text};
use super::rules::a_node_that_just_joined;
use super::wire::{Load, Wire};
use super::{Patience, Site};
use crate::cluster::binary;
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const CURL: [(&str, &str); 2] = [("User-Agent", "curl/8.7.1"), ("Accept", "*/*")];
/// It has none.
const LIMIT: Duration = Duration::from_secs(60);
const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");
const SERVICE: &str = "AWS Cloud Connect Service";

/// Ends with the test.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Agent {
    fn join(site: &Site, name: &str) -> Self {
        let child = Command::new(binary())
            .args(["node", "join", &site.cluster.endpoints()])
            .args(["--name", name, "--host", "127.0.0.1", "--capacity", "0"])
            .args(["--driver", "fake", "--data-dir"])
            .arg(site.cluster.dir.path().join(name))
            .env("MAINSTAY_NODE_RESERVE_SPACE", "1G")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

/// A process of its own each.
async fn curl(at: &str, method: &str, path: &str, sent: Option<(Value, (&str, &str))>) -> Value {
    let mut wire = Wire::new(at, LIMIT, &CURL).without_memory();
    let (kind, load) = match sent {
        Some((json, kind)) => (vec![kind], Load::Whole(json.to_string().into_bytes())),
        None => (Vec::new(), Load::Nothing),
    };
    let answer = wire.send(method, path, &kind, &load).await.unwrap();
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    read::sound(&answer, path)
}

async fn list(at: &str, path: &str) -> Vec<Value> {
    read::items(body(&curl(at, "GET", path, None).await)).to_vec()
}

/// `jq '.body[] | select(.node_name==..)'`
async fn node(at: &str, name: &str) -> Option<Value> {
    let mut nodes = list(at, "/api/v1/node").await.into_iter();
    nodes.find(|node| node["node_name"] == name)
}

async fn drain(at: &str, node: &str, on: bool) {
    let config = json!({"node_id": node, "drain_mode": on});
    body(&curl(at, "POST", "/api/v1/node/config", Some((config, FORM))).await);
}

/// Where the registry is, and what it says of itself and of its templates.
async fn registry(site: &Site, n: usize) {
    let status = curl(site.api(n), "GET", "/api/v1/status", None).await;
    let status = body(&status);
    let address = java_text(status, "registry_address");
    assert_eq!(address, format!("http://{}", site.registry(n)));
    let (numbers, suffix) = java_text(status, "version").split_once('-').unwrap();
    let bare: String = numbers.split('.').collect();
    assert!(
        bare.parse::<u64>().is_ok() && !suffix.is_empty(),
        "{status}"
    );
    // Does it listen? Then by name.
    let at = site.registry(n);
    let (root, named) = (
        curl(at, "GET", "/", None).await,
        curl(at, "GET", "//registry/status", None).await,
    );
    assert_eq!(root, named);
    assert_eq!(body(&named)["status"], "Running");
    // `.body[] | keys[]` and `.body[] | values[]`
    let maps = list(at, "/registry/vm").await;
    let mut names = Vec::new();
    for map in &maps {
        let map = map.as_object().unwrap();
        assert_eq!(map.len(), 1, "one entry each: {maps:?}");
        let (id, name) = map.iter().next().unwrap();
        names.push((id.clone(), name.as_str().unwrap().to_owned()));
    }
    assert!(names.contains(&(site.template.clone(), "tiny".to_owned())));
    let templates = list(site.api(n), "/api/v1/registry/vm").await;
    let objects = templates.iter().map(|one| {
        let text = |name| java_text(one, name).to_owned();
        (text("id"), text("name"))
    });
    assert_eq!(names, objects.collect::<Vec<_>>());
}

/// A line for the central log, and where it went.
async fn central_log(site: &Site, n: usize) {
    let at = site.registry(n);
    let mark = format!("i-0abc{n} | 5F1D-{n}");
    let line = json!({
        "machine_name": mark, "service": SERVICE, "host": "",
        "content": "fulfillment \"42\"\nline two",
    });
    body(&curl(at, "POST", "/log", Some((line, FORM))).await);
    let kept = list(at, "/log").await;
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0]["service"], SERVICE);
    let path = format!("/log?service={}", SERVICE.replace(' ', "+"));
    let mut wire = Wire::new(at, LIMIT, &CURL);
    let text = wire.send("GET", &path, &[], &Load::Nothing).await.unwrap();
    let told = text.text.lines().filter(|line| line.contains(&mark));
    let told: Vec<&str> = told.collect();
    assert_eq!(told.len(), 1, "{}", text.text);
    assert!(
        told[0].ends_with(r#"[] fulfillment "42"\nline two"#),
        "{told:?}"
    );
}

/// The node pulls a template ahead. The script looks two seconds later and ends if the node has no entry; here,
/// at once and at another member.
async fn distribute(site: &Site, n: usize, node: &str) {
    const PATH: &str = "/api/v1/registry/vm/distribute";
    let wanted = json!({"template_id": site.foreign, "node_ids": [node]});
    let asked = curl(site.api(n), "POST", PATH, Some((wanted, FORM))).await;
    let id = java_text(body(&asked), "request_id").to_owned();
    let path = format!("{PATH}?id={id}");
    let patience = Patience::new("the template is on the node");
    loop {
        let seen = curl(site.api(n + 1), "GET", &path, None).await;
        let entry = &body(&seen)["distribute_status"][node];
        let part = read::go_float(entry, "progress");
        assert_eq!(read::go_text(entry, "error"), "", "{seen}");
        match entry["status"].as_bool() {
            Some(true) => {
                assert!((part - 1.0).abs() < f64::EPSILON, "{seen}");
                break;
            }
            Some(false) => assert!(part < 1.0, "{seen}"),
            None => panic!("no entry of the node: {seen}"),
        }
        patience.pause(&seen).await;
    }
    let all = list(site.api(n + 2), PATH).await;
    let mine = all.iter().find(|one| one["request"]["request_id"] == id);
    let mine = mine.unwrap_or_else(|| panic!("{id} is not in {all:?}"));
    assert_eq!(mine["request"]["template_id"], site.foreign.as_str());
    read::go_time(&mine["request"], "time_requested");
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    registry(&site, n).await;
    central_log(&site, n).await;
    // There is no package: the machine runs `mainstay node join`.
    for package in ["AnkaAgent.pkg", "AnkaAgentArm.pkg"] {
        let mut wire = Wire::new(site.api(n), LIMIT, &CURL);
        let path = format!("/pkg/{package}");
        let answer = wire.send("GET", &path, &[], &Load::Nothing).await.unwrap();
        assert_eq!(
            (answer.status, answer.text.trim_end()),
            (404, "404 page not found")
        );
    }

    let name = format!("ip-10-0-0-{n}.ec2.internal");
    let agent = Agent::join(&site, &name);
    let patience = Patience::new("the machine has joined");
    let joined = loop {
        match node(site.api(n), &name).await {
            Some(joined) => break joined,
            None => patience.pause(&Value::Null).await,
        }
    };
    a_node_that_just_joined(&joined);
    let id = java_text(&joined, "node_id").to_owned();
    // Nothing is started there while templates are pulled.
    for (on, state) in [(true, "Drain Mode"), (false, "Active")] {
        drain(site.api(n), &id, on).await;
        let seen = node(site.api(n + 1), &name).await.unwrap();
        assert_eq!(java_text(&seen, "state"), state);
        if on {
            distribute(&site, n, &id).await;
        }
    }

    // The machine is shut down: its agent goes, then the node.
    drop(agent);
    let kind = ("Content-Type", "application/json");
    let gone = json!({"node_id": id});
    let at = site.api(n + 2);
    body(&curl(at, "DELETE", "/api/v1/node", Some((gone.clone(), kind))).await);
    for other in 0..3 {
        assert_eq!(node(site.api(other), &name).await, None);
    }
    let again = curl(at, "DELETE", "/api/v1/node", Some((gone, kind))).await;
    assert_eq!(again, json!({"status": "FAIL", "message": "Not found"}));
}
