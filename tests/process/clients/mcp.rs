//! The MCP server, over `fetch`: every template is asked for by its id at once, ports are asked for as texts, and
//! an instance is ready when its VM says `running` and SSH is forwarded. An answer without a body means that
//! the thing is not there.
//!
//! Shortened: polls every 0.3 s; agents are told 30 s.

use super::read::{self, body};
use super::wire::{Load, Wire};
use super::{Patience, Site, base64, probe};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const FETCH: [(&str, &str); 7] = [
    ("connection", "keep-alive"),
    ("Content-Type", "application/json"),
    ("accept", "*/*"),
    ("accept-language", "*"),
    ("sec-fetch-mode", "cors"),
    ("user-agent", "node"),
    ("accept-encoding", "gzip, deflate"),
];
const LIMIT: Duration = Duration::from_secs(300);

async fn ask(wire: &mut Wire, method: &str, path: &str, sent: Option<Value>) -> Option<Value> {
    let load = sent.map_or(Load::Nothing, |json| {
        Load::Whole(json.to_string().into_bytes())
    });
    let answer = wire.send(method, path, &[], &load).await.unwrap();
    let json = read::sound(&answer, path);
    assert_eq!(answer.status, 200, "{path}: {json}");
    let there = body(&json).clone();
    (!there.is_null()).then_some(there)
}

/// Where SSH goes, once it can.
fn endpoint(vm: &Value) -> Option<(&str, u64)> {
    let info = vm.get("vminfo")?;
    let ready = vm["instance_state"] == "Started" && info["status"] == "running";
    let host = info["host_ip"].as_str().filter(|host| !host.is_empty());
    let rules = read::go_list(info, "port_forwarding");
    let rule = rules.iter().find(|rule| rule["guest_port"] == 22)?;
    let port = rule["host_port"].as_u64().filter(|port| *port > 0);
    ready.then_some((host?, port?))
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let mut wire = Wire::new(site.api(n), LIMIT, &FETCH);
    let templates = ask(&mut wire, "GET", "/api/v1/registry/vm", None).await;
    let templates = templates.unwrap();
    let mut at_once = tokio::task::JoinSet::new();
    for template in read::items(&templates) {
        let id = template["id"].as_str().unwrap().to_owned();
        let mut wire = Wire::new(site.api(n), LIMIT, &FETCH);
        at_once.spawn(async move {
            let path = format!("/api/v1/registry/vm?id={id}");
            let whole = ask(&mut wire, "GET", &path, None).await.expect("not found");
            assert!(!read::items(&whole["versions"]).is_empty(), "{whole}");
        });
    }
    while let Some(one) = at_once.join_next().await {
        one.unwrap();
    }

    // Rules of its own take the place of the template's; the port is a text.
    let wanted = json!({
        "vmid": site.template, "count": 1, "tag": "v1", "name": format!("agent {n}"),
        "external_id": format!("mcp-{n}"),
        "port_forwarding_override": [{"name": "ssh", "guest_port": "22"}],
        "startup_script": base64("echo a key >/root/key"), "startup_script_condition": 1,
    });
    let ids = ask(&mut wire, "POST", "/api/v1/vm", Some(wanted)).await;
    let id = ids.unwrap()[0].as_str().unwrap().to_owned();
    let path = format!("/api/v1/vm?id={id}");
    let patience = Patience::new("the MCP server's instance is ready");
    let vm = loop {
        let vm = ask(&mut wire, "GET", &path, None).await.expect("not found");
        read::instance(&vm);
        match vm["instance_state"].as_str().unwrap() {
            "Pulling" | "Scheduling" => {}
            "Started" if endpoint(&vm).is_some() => break vm,
            "Started" => {}
            other => panic!("{other}: {vm}"),
        }
        patience.pause(&vm).await;
    };
    let rules = read::items(&vm["vminfo"]["port_forwarding"]);
    assert_eq!(rules.len(), 1, "the template's are gone: {vm}");
    assert_eq!(rules[0]["guest_port"], 22, "a number again");
    let (host, port) = endpoint(&vm).unwrap();
    probe(host, port).await;

    let end = Some(json!({"id": id}));
    assert_eq!(ask(&mut wire, "DELETE", "/api/v1/vm", end).await, None);
    site.ended(n + 1, &id).await;
    assert!(wire.reused > 3, "one connection: {}", wire.reused);
}
