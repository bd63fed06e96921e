//! The library of the GitHub actions, over axios: bodies of a POST have the content type of a form, because they
//! are sent as text; the instance is found by the external id of the list's wrapper, in whatever state. One run
//! is the older library, without a look at the startup script; one is the newer; in one the script fails.
//!
//! Shortened: polls every 0.3 s instead of 5 s.

use super::read::{self, body};
use super::wire::{Load, Wire};
use super::{Patience, Site, base64, forwarded, page};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const AXIOS: [(&str, &str); 3] = [
    ("Accept", "application/json, text/plain, */*"),
    ("User-Agent", "axios/1.7.9"),
    ("Accept-Encoding", "gzip, compress, deflate, br"),
];
/// It has none: the job's own ends it.
const LIMIT: Duration = Duration::from_secs(120);

struct Library(Wire);

impl Library {
    /// Anything but 2xx throws, and so does a member of what is not there.
    async fn ask(&mut self, method: &str, path: &str, more: &[(&str, &str)], load: Load) -> Value {
        let answer = self.0.send(method, path, more, &load).await.unwrap();
        let json = read::sound(&answer, path);
        assert!((200..300).contains(&answer.status), "{path}: {json}");
        json
    }

    async fn start(&mut self, wanted: &Value) -> String {
        let form = [("Content-Type", "application/x-www-form-urlencoded")];
        let load = Load::Whole(wanted.to_string().into_bytes());
        let json = self.ask("POST", "/api/v1/vm", &form, load).await;
        let ids = read::items(body(&json));
        assert!(!ids.is_empty(), "{json}");
        ids[0].as_str().unwrap().to_owned()
    }

    async fn state(&mut self, id: &str) -> Result<(String, Value), String> {
        let path = format!("/api/v1/vm?id={id}");
        let json = self.ask("GET", &path, &[], Load::Nothing).await;
        let vm = body(&json);
        read::instance(vm);
        let state = vm["instance_state"].as_str().unwrap();
        if state != "Error" {
            return Ok((state.to_owned(), vm.clone()));
        }
        let message = vm["message"].as_str().expect("undefined");
        let script = vm.get("startup_script");
        let said = script.map(|script| script["stderr"].as_str().expect("undefined"));
        Err(format!("{message}: {}", said.unwrap_or_default()))
    }

    /// The first with this mark, in whatever state.
    async fn find(&mut self, action: &str) -> Option<String> {
        let json = self.ask("GET", "/api/v1/vm", &[], Load::Nothing).await;
        let mut list = read::instances(body(&json)).iter();
        let first = list.find(|wrapper| wrapper["external_id"] == action)?;
        Some(first["instance_id"].as_str().unwrap().to_owned())
    }

    async fn terminate(&mut self, id: &str) {
        let kind = [("Content-Type", "application/json")];
        let load = Load::Whole(json!({"id": id}).to_string().into_bytes());
        body(&self.ask("DELETE", "/api/v1/vm", &kind, load).await);
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    // Node before 19 closes each connection, later ones keep them and do not send again when one breaks.
    let keeps = n > 0;
    let mut wire = Wire::new(site.api(n), LIMIT, &AXIOS);
    wire.keeps = keeps;
    wire.headers
        .push(("Connection", if keeps { "keep-alive" } else { "close" }));
    let mut up = Library(wire);
    let action = format!("3f0c4c8e-6d3b-4a38-9a53-00000000000{n}");
    let failing = n == 2;
    let script = if failing {
        "echo to tell >&2; exit 7"
    } else {
        "echo registered >/srv/www/runner"
    };
    let mut wanted = json!({
        "vmid": site.template, "tag": "v1", "external_id": action, "count": 1,
        "startup_script": base64(script),
    });
    if n > 0 {
        let newer = json!({"script_monitoring": true, "script_fail_handler": 1, "startup_script_condition": 1});
        let members = newer.as_object().unwrap().clone();
        wanted.as_object_mut().unwrap().extend(members);
    }
    let id = up.start(&wanted).await;
    let patience = Patience::new("the action's instance is up");
    let vm = loop {
        match up.state(&id).await {
            Ok((state, vm)) => match state.as_str() {
                "Scheduling" | "Pulling" => patience.pause(&vm).await,
                "Started" => break Some(vm),
                other => panic!("{other}: {vm}"),
            },
            Err(why) => {
                assert!(failing, "{why}");
                assert_eq!(why, "startup script exit code 7: to tell\n");
                break None;
            }
        }
    };
    assert_eq!(vm.is_none(), failing);
    if let Some(vm) = vm {
        let host = vm["vminfo"]["host_ip"].as_str().unwrap();
        let said = page(host, forwarded(&vm, 80), "/runner").await;
        assert_eq!(said, "registered\n");
    }

    // The other action, at the end of the workflow: a process of its own, through another member here.
    let mut down = Library(Wire::new(site.api(n + 1), LIMIT, &AXIOS));
    assert_eq!(down.find(&action).await.as_ref(), Some(&id));
    assert_eq!(down.find("of nobody").await, None);
    down.terminate(&id).await;
    let (state, vm) = down.state(&id).await.unwrap();
    let over = ["Terminating", "Terminated"].contains(&state.as_str());
    assert!(over, "{vm}");
    assert_eq!(down.0.reused, 3, "its connection is kept");
    site.ended(n, &id).await;
}
