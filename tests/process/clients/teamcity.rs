//! TeamCity: one controller of whose address the path is dropped; up to seven attempts when a connection breaks
//! or an answer cannot be read, of a POST too; all its instances have one external id, the cloud profile's.
//!
//! Shortened: polls every 0.3 s instead of 4 s on a list cached for 7 s; waits between attempts of 10, 20,
//! 40 ms .. instead of 1, 2, 4 s ...

use super::jenkins::latin1;
use super::read::{self, body, java_text, java_text_if};
use super::wire::{Broken, Load, Wire};
use super::{Patience, Site, forwarded, page, probe};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const HEADERS: [(&str, &str); 3] = [
    ("Connection", "Keep-Alive"),
    ("User-Agent", "Apache-HttpClient/4.5.13 (Java/11.0.22)"),
    ("Accept-Encoding", "gzip,deflate"),
];
const LIMIT: Duration = Duration::from_secs(30);
const STATUS_LIMIT: Duration = Duration::from_secs(5);
const ATTEMPTS: u32 = 7;
/// Of every instance, whoever started it.
const PROFILE: &str = "PROFILE_EXT_7";

struct TeamCity(Wire);

impl TeamCity {
    /// As configured: scheme, host and port count.
    fn new(url: &str) -> Self {
        let rest = url.strip_prefix("http://").unwrap();
        let at = rest.split('/').next().unwrap();
        Self(Wire::new(at, LIMIT, &HEADERS))
    }

    async fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Value {
        self.0.limit = match path {
            "/api/v1/status" => STATUS_LIMIT,
            _ => LIMIT,
        };
        let kind = [("Content-Type", "application/json")];
        let (more, load) = match body {
            Some(body) => (&kind[..], Load::Whole(latin1(&body.to_string()))),
            None => (&[][..], Load::Nothing),
        };
        for attempt in 0..ATTEMPTS {
            match self.0.send(method, path, more, &load).await {
                Ok(answer) => {
                    assert_eq!(answer.status, 200, "{method} {path}: {answer:?}");
                    return read::sound(&answer, path);
                }
                Err(Broken::Connect(why)) => panic!("{method} {path}: {why}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10 << attempt)).await,
            }
        }
        panic!("{method} {path}: no answer after {ATTEMPTS} attempts");
    }

    async fn get(&mut self, path: &str) -> Value {
        let json = self.ask("GET", path, None).await;
        body(&json).clone()
    }

    /// What the profile takes for its own: by the external id inside, a text where there is one.
    async fn instances(&mut self) -> Vec<Value> {
        let list = self.get("/api/v1/vm").await;
        let wrappers = read::instances(&list).iter();
        let inner = wrappers.map(|wrapper| {
            let vm = &wrapper["vm"];
            java_text(vm, "cr_time");
            java_text(vm, "vmid");
            java_text_if(vm, "message");
            if let Some(info) = vm.get("vminfo") {
                java_text(info, "uuid");
                java_text(info, "status");
            }
            vm.clone()
        });
        let ours = inner.filter(|vm| java_text_if(vm, "external_id") == Some(PROFILE));
        ours.collect()
    }

    async fn find(&mut self, id: &str) -> Option<Value> {
        let mut ours = self.instances().await.into_iter();
        ours.find(|vm| vm["instance_id"] == id)
    }

    /// The status of the profile, which hides groups for a basic license.
    async fn status(&mut self) {
        let status = self.get("/api/v1/status").await;
        assert_eq!(java_text(&status, "status").to_lowercase(), "running");
        assert_ne!(java_text(&status, "license"), "basic");
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let mut teamcity = TeamCity::new(&format!("http://{}/some/page/", site.api(n)));
    teamcity.status().await;
    // The page of the profile: images, tags, groups.
    let templates = teamcity.get("/api/v1/registry/vm").await;
    for template in read::items(&templates) {
        java_text(template, "name");
        let id = java_text(template, "id");
        let whole = teamcity.get(&format!("/api/v1/registry/vm?id={id}")).await;
        for tag in read::items(&whole["versions"]) {
            java_text(tag, "tag");
        }
    }
    let groups = teamcity.get("/api/v1/group").await;
    read::items(&groups).iter().for_each(read::group);

    let wanted = json!({
        "vmid": site.template, "tag": "v1", "name_template": "$ts", "external_id": PROFILE,
        "group_id": site.group, "priority": 1000, "vcpu": 1, "vram": 256,
    });
    let json = teamcity.ask("POST", "/api/v1/vm", Some(&wanted)).await;
    let id = read::items(body(&json))[0].as_str().unwrap().to_owned();

    let patience = Patience::new("TeamCity's instance is started");
    let vm = loop {
        teamcity.status().await;
        let vm = teamcity.find(&id).await.expect("NullPointerException");
        match java_text(&vm, "instance_state") {
            "Scheduling" | "Pulling" => patience.pause(&vm).await,
            "Started" => break vm,
            // Stopping, Stopped, Pushing and unknown ones: terminated, and UNKNOWN means no more starts.
            other => panic!("{other}: {vm}"),
        }
    };
    // Read without a look whether it is there; the address must come within two minutes.
    let mut vm = vm;
    let patience = Patience::new("TeamCity's instance has an address");
    while java_text(&vm["vminfo"], "ip").is_empty() {
        patience.pause(&vm).await;
        vm = teamcity.find(&id).await.expect("NullPointerException");
    }
    // Its agent is installed over SSH, through the forwarded port only.
    let host = java_text(&vm["vminfo"], "host_ip").to_owned();
    probe(&host, forwarded(&vm, 22)).await;
    page(&host, forwarded(&vm, 80), "/hostname").await;
    let build = json!({"metadata": {"teamcity-build-id": format!("{n}")}});
    let path = format!("/api/v1/vm?id={id}");
    body(&teamcity.ask("PUT", &path, Some(&build)).await);
    let seen = teamcity.find(&id).await.unwrap();
    assert_eq!(seen["metadata"], build["metadata"]);

    let end = json!({"id": id});
    body(&teamcity.ask("DELETE", "/api/v1/vm", Some(&end)).await);
    let seen = teamcity.find(&id).await.expect("shown for a minute");
    let state = java_text(&seen, "instance_state");
    assert!(["Terminating", "Terminated"].contains(&state), "{seen}");
    site.ended(n + 1, &id).await;
}
