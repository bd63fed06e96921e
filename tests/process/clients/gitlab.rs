//! The GitLab custom executor: one process a stage of a job, so nothing is kept but the external id, which is
//! the job's address and the same when GitLab runs a stage again. It takes 200 and nothing else.
//!
//! Shortened: polls every 0.3 s instead of 10 s, and three stages instead of about ten.

use super::read::{self, body, go_float, go_list, go_text, go_uint};
use super::wire::{Answer, Broken, Load, Wire};
use super::{Patience, Site, base64, page};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// What Go's client sends of itself.
pub(super) const GO: [(&str, &str); 2] = [
    ("User-Agent", "Go-http-client/1.1"),
    ("Accept-Encoding", "gzip"),
];
/// With the body.
const LIMIT: Duration = Duration::from_secs(10);
const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

/// What Go's encoder makes: with an end of line.
pub(super) fn go_json(value: &Value) -> Load {
    Load::Whole(format!("{value}\n").into_bytes())
}

/// One process of the executor.
struct Stage(Wire);

impl Stage {
    /// A trailing slash of the address is cut off.
    fn new(url: &str) -> Self {
        let at = url.strip_prefix("http://").unwrap().trim_end_matches('/');
        Self(Wire::new(at, LIMIT, &GO))
    }

    /// The envelope is decoded before anyone looks at the status.
    fn taken(answer: &Answer, path: &str) -> Value {
        let json = read::sound(answer, path);
        assert_eq!(answer.status, 200, "{path}: {json}");
        body(&json).clone()
    }

    async fn get(&mut self, path: &str) -> Value {
        // The list and the end are tried three times when they take too long.
        for _ in 0..3 {
            match self.0.send("GET", path, &[], &Load::Nothing).await {
                Ok(answer) => return Self::taken(&answer, path),
                Err(Broken::Late) => {}
                Err(why) => panic!("{path}: {why:?}"),
            }
        }
        panic!("{path}: no answer in time");
    }

    /// Without a content type, and never again by itself.
    async fn start(&mut self, wanted: &Value) -> String {
        let load = go_json(wanted);
        let sent = self.0.send("POST", "/api/v1/vm", &[], &load);
        let ids = Self::taken(&sent.await.unwrap(), "POST");
        read::items(&ids)[0].as_str().unwrap().to_owned()
    }

    async fn terminate(&mut self, id: &str) {
        let load = go_json(&json!({"id": id}));
        let sent = self.0.send("DELETE", "/api/v1/vm", &JSON, &load);
        Self::taken(&sent.await.unwrap(), "DELETE");
    }

    /// The job's instance: the first one that lives. An error when there are none but dead ones.
    async fn ours(&mut self, job: &str) -> Option<Value> {
        let list = self.get("/api/v1/vm").await;
        let found = read::instances(&list).iter().map(|wrapper| {
            // A pointer, followed unseen.
            assert!(wrapper["vm"].is_object(), "panic: {wrapper}");
            &wrapper["vm"]
        });
        let mut of_job = found.filter(|vm| go_text(vm, "external_id") == job);
        let lives = ["Started", "Scheduling", "Pulling"];
        let first = of_job.find(|vm| lives.contains(&go_text(vm, "instance_state")));
        first.cloned()
    }

    /// Where SSH goes: the node's address, and the port of the rule for 22.
    async fn target(&mut self, job: &str) -> (String, u64) {
        let vm = self.ours(job).await.expect("the job's instance");
        let node = go_text(&vm, "node_id");
        assert!(!node.is_empty(), "{vm}");
        let nodes = self.get(&format!("/api/v1/node?id={node}")).await;
        let nodes = read::items(&nodes);
        assert_eq!(nodes.len(), 1, "an array of one");
        let fits =
            |rule: &&Value| go_uint(rule, "guest_port") == 22 && go_text(rule, "protocol") == "tcp";
        let rule = go_list(&vm["vminfo"], "port_forwarding").iter().find(fits);
        let port = go_uint(rule.expect("a rule for 22"), "host_port");
        (go_text(&nodes[0], "ip_address").to_owned(), port)
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let url = format!("http://{}/", site.api(n));
    let job = format!("https://gitlab.example/group/app/-/jobs/{n}");

    // prepare: the template by name.
    let mut prepare = Stage::new(&url);
    let templates = prepare.get("/api/v1/registry/vm?apiVer=v1").await;
    let of_name = |one: &&Value| {
        go_uint(one, "size");
        go_text(one, "arch");
        go_text(one, "name") == "tiny"
    };
    let template = read::items(&templates).iter().find(of_name).unwrap();
    let script =
        "httpd -p 22 -h /srv/www </dev/null >/dev/null 2>&1; echo $((6 * 7)) >/srv/www/job";
    let wanted = json!({
        "vmid": go_text(template, "id"), "tag": "v1", "external_id": job, "group_id": site.group,
        "priority": 1000, "startup_script": base64(script), "startup_script_condition": 0,
        "script_monitoring": true, "script_timeout": 300, "vcpu": 1, "vram": 256,
    });
    // GitLab runs prepare again after a failure, with the same job: an attempt before this one has left a
    // dead instance behind.
    let dead = prepare.start(&wanted).await;
    prepare.terminate(&dead).await;
    assert!(prepare.ours(&job).await.is_none(), "none but a dead one");
    let id = prepare.start(&wanted).await;
    let patience = Patience::new("GitLab's instance is started");
    loop {
        let vm = prepare.get(&format!("/api/v1/vm?id={id}")).await;
        read::instance(&vm);
        match go_text(&vm, "instance_state") {
            "Scheduling" => {}
            "Pulling" => assert!(go_float(&vm, "progress") <= 1.0),
            "Started" => break,
            other => panic!("{other}: {vm}"),
        }
        patience.pause(&vm).await;
    }

    // run, twice, each a process of its own; the script has opened port 22 before it was Started.
    for _ in 0..2 {
        let mut run = Stage::new(&url);
        let (host, port) = run.target(&job).await;
        assert_eq!(page(&host, port, "/job").await, "42\n");
    }

    // cleanup, twice, as when its answer was lost.
    let mut cleanup = Stage::new(&url);
    let vm = cleanup.ours(&job).await.unwrap();
    assert_eq!(go_text(&vm, "instance_id"), id);
    cleanup.terminate(&id).await;
    cleanup.terminate(&id).await;
    assert!(cleanup.ours(&job).await.is_none());
    site.ended(n + 2, &id).await;
    site.ended(n + 1, &dead).await;
}
