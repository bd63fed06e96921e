//! The forked GitLab runner that the executor replaced: times are decoded, a connection is not used again, the
//! path of the address is replaced, and anything but success is tried up to seven times.
//!
//! Shortened: polls every 0.3 s instead of 2 s; waits between attempts of 10, 20 .. 60 ms instead of seconds.

use super::gitlab::{GO, go_json};
use super::read::{self, body, go_float, go_list, go_text, go_time, go_uint};
use super::wire::{Load, Wire};
use super::{Patience, Site, base64, probe};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(5);
const ATTEMPTS: u64 = 7;
const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

struct Runner(Wire);

impl Runner {
    /// Only the scheme, host and port of the address are left.
    fn new(url: &str) -> Self {
        let rest = url.strip_prefix("http://").unwrap();
        let at = rest.split('/').next().unwrap();
        Self(Wire::new(at, LIMIT, &GO).without_memory())
    }

    async fn ask(&mut self, method: &str, path: &str, sent: Option<&Value>) -> Value {
        let load = sent.map_or(Load::Nothing, go_json);
        for attempt in 0..ATTEMPTS {
            tokio::time::sleep(Duration::from_millis(10 * attempt)).await;
            if let Ok(answer) = self.0.send(method, path, &JSON, &load).await {
                return body(&read::sound(&answer, path)).clone();
            }
        }
        panic!("{method} {path}: no answer after {ATTEMPTS} attempts");
    }

    /// All that its types name is decoded, or nothing is.
    fn decoded(vm: &Value) {
        read::instance(vm);
        for name in ["ts", "cr_time"] {
            go_time(vm, name);
        }
        for name in ["message", "anka_registry", "vmid", "tag", "group_id"] {
            go_text(vm, name);
        }
        go_uint(vm, "version");
        go_float(vm, "progress");
        if let Some(info) = vm.get("vminfo") {
            for name in [
                "name",
                "ram",
                "node_id",
                "host_ip",
                "ip",
                "vnc_connection_string",
            ] {
                go_text(info, name);
            }
            go_uint(info, "cpu_cores");
            go_uint(info, "vnc_port");
        }
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let mut runner = Runner::new(&format!("http://{}/whatever", site.api(n)));
    let templates = runner.ask("GET", "/api/v1/registry/vm", None).await;
    let named = |one: &&Value| go_text(one, "name") == "tiny";
    let template = read::items(&templates).iter().find(named).unwrap();
    let groups = runner.ask("GET", "/api/v1/group", None).await;
    let named = |one: &&Value| go_text(one, "name") == "macs";
    let group = read::items(&groups).iter().find(named).unwrap();
    let script = "httpd -p 22 -h /srv/www </dev/null >/dev/null 2>&1";
    let wanted = json!({
        "vmid": go_text(template, "id"), "tag": "v1", "version": 0, "group_id": go_text(group, "id"),
        "name_template": format!("runner-{n}-project-1"), "name": format!("runner-{n}"),
        "external_id": format!("https://gitlab.example/jobs/{n}"), "priority": 1,
        "startup_script": base64(script), "startup_script_condition": 0, "count": 1,
    });
    let ids = runner.ask("POST", "/api/v1/vm", Some(&wanted)).await;
    let id = ids[0].as_str().unwrap().to_owned();
    let path = format!("/api/v1/vm?id={id}");
    let patience = Patience::new("the runner's instance has an address");
    let vm = loop {
        let vm = runner.ask("GET", &path, None).await;
        Runner::decoded(&vm);
        match go_text(&vm, "instance_state") {
            "Scheduling" | "Pulling" => {}
            // With an address within five minutes.
            "Started" if !go_text(&vm["vminfo"], "ip").is_empty() => break vm,
            "Started" => {}
            other => panic!("{other}: {vm}"),
        }
        patience.pause(&vm).await;
    };
    assert_eq!(go_uint(&vm, "version"), 0, "{vm}");
    let named = format!("mgmtManaged-runner-{n}-project-1");
    assert_eq!(go_text(&vm["vminfo"], "name"), named);
    let node = go_text(&vm, "node_id");
    let path = format!("/api/v1/node?id={node}");
    let nodes = runner.ask("GET", &path, None).await;
    let address = go_text(&nodes[0], "ip_address").to_owned();
    let mut rules = go_list(&vm["vminfo"], "port_forwarding").iter();
    let rule = rules
        .find(|rule| go_uint(rule, "guest_port") == 22)
        .unwrap();
    probe(&address, go_uint(rule, "host_port")).await;
    for wrapper in read::instances(&runner.ask("GET", "/api/v1/vm", None).await) {
        Runner::decoded(&wrapper["vm"]);
    }
    runner
        .ask("DELETE", "/api/v1/vm", Some(&json!({"id": id})))
        .await;
    site.ended(n + 1, &id).await;
}
