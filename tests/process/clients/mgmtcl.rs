//! mgmtcl, a Python command line: one request a process, an error for any status but 200, and tables that are
//! made from whatever the answer holds. A template may be named: the id is tried first, and what the answer
//! says decides. Its address is not trimmed.
//!
//! It does not wait by itself: whoever calls it looks again, here every 0.3 s.

use super::read::{self, body};
use super::wire::{Load, Wire};
use super::{Patience, Site, forwarded, page};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const REQUESTS: [(&str, &str); 4] = [
    ("User-Agent", "python-requests/2.32.3"),
    ("Accept-Encoding", "gzip, deflate"),
    ("Accept", "*/*"),
    ("Connection", "keep-alive"),
];
/// It has none.
const LIMIT: Duration = Duration::from_secs(120);

/// Nobody has that id.
#[derive(Debug, PartialEq)]
struct NotFound;

struct Mgmtcl {
    wire: Wire,
}

impl Mgmtcl {
    async fn ask(&mut self, method: &str, path: &str, sent: Option<&Value>) -> Value {
        let kind = [("Content-Type", "application/json")];
        let (more, load) = match sent {
            Some(json) => (&kind[..], Load::Whole(json.to_string().into_bytes())),
            None => (&[][..], Load::Nothing),
        };
        let path = format!("//{path}");
        let answer = self.wire.send(method, &path, more, &load).await.unwrap();
        assert_eq!(answer.status, 200, "raise_for_status: {answer:?}");
        read::sound(&answer, &path)
    }

    async fn list(&mut self, path: &str) -> Vec<Value> {
        let json = self.ask("GET", path, None).await;
        read::items(body(&json)).to_vec()
    }

    async fn show(&mut self, path: &str) -> Result<Value, NotFound> {
        let json = self.ask("GET", path, None).await;
        match json["message"].as_str() {
            Some("Not found") => Err(NotFound),
            _ => Ok(body(&json).clone()),
        }
    }

    async fn start(
        &mut self,
        template: &str,
        count: u64,
        node: Option<&str>,
    ) -> Result<Vec<String>, NotFound> {
        let mut wanted = json!({"vmid": template, "count": count});
        if let Some(node) = node {
            wanted["tag"] = "v1".into();
            wanted["node_id"] = node.into();
        }
        let json = self.ask("POST", "api/v1/vm", Some(&wanted)).await;
        if json["message"] == "VM not in the registry" {
            return Err(NotFound);
        }
        let ids = read::items(body(&json)).iter();
        Ok(ids.map(|id| id.as_str().unwrap().to_owned()).collect())
    }

    async fn template_of_name(&mut self, name: &str) -> String {
        let templates = self.list("api/v1/registry/vm").await;
        table(&templates);
        let found = templates.iter().find(|one| one["name"] == name);
        found.unwrap()["id"].as_str().unwrap().to_owned()
    }

    /// `vm list`.
    async fn instances(&mut self) -> Vec<Value> {
        let list = self.list("api/v1/vm").await;
        for wrapper in read::instances(&Value::from(list.clone())) {
            // Of an absent `vminfo` it asks nothing, of `null` it does.
            assert!(wrapper["vm"].get("vminfo").is_none_or(Value::is_object));
        }
        list
    }
}

/// Its table of a list: which members are lists says the first item, and then all must have them.
fn table(rows: &[Value]) {
    let Some(first) = rows.first().and_then(Value::as_object) else {
        return;
    };
    let lists = first.iter().filter(|(_, value)| value.is_array());
    for (key, _) in lists {
        let parts = rows.iter().flat_map(|row| {
            let list = row
                .get(key)
                .unwrap_or_else(|| panic!("KeyError: {key} of {row}"));
            let list = list.as_array();
            list.unwrap_or_else(|| panic!("TypeError: {key} of {row}"))
        });
        let parts: Vec<Value> = parts.cloned().collect();
        // Lists of texts are what tags have in the reference system too (their files).
        if !parts.iter().all(Value::is_string) {
            assert!(parts.iter().all(Value::is_object), "{key}: {parts:?}");
            table(&parts);
        }
    }
}

/// Its page of one object: lists of objects are tables, other lists must be texts.
fn sheet(object: &Value) {
    for (key, value) in object.as_object().expect("AttributeError") {
        match value {
            Value::Object(_) => sheet(value),
            Value::Array(items) if items.first().is_some_and(Value::is_object) => table(items),
            Value::Array(items) => {
                assert!(
                    items.iter().all(Value::is_string),
                    "TypeError: {key}: {value}"
                );
            }
            _ => {}
        }
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let wire = Wire::new(site.api(n), LIMIT, &REQUESTS);
    let mut mgmtcl = Mgmtcl {
        wire: wire.without_memory(),
    };
    // node list, node show, template list, template show, of what is there and of what is not.
    let nodes = mgmtcl.list("api/v1/node").await;
    table(&nodes);
    let path = format!("api/v1/node?id={}", site.node);
    let shown = mgmtcl.show(&path).await.unwrap();
    assert_eq!(read::items(&shown).len(), 1);
    table(read::items(&shown));
    for path in ["node?id=no", "vm?id=no", "registry/vm?id=tiny"] {
        let path = format!("api/v1/{path}");
        assert_eq!(mgmtcl.show(&path).await, Err(NotFound), "{path}");
    }
    let id = mgmtcl.template_of_name("tiny").await;
    let template = mgmtcl.show(&format!("api/v1/registry/vm?id={id}")).await;
    table(read::items(&template.unwrap()["versions"]));

    // vm start tiny --node ..: an id first, then a name.
    let node = Some(site.node.as_str());
    assert_eq!(mgmtcl.start("tiny", 1, node).await, Err(NotFound));
    let ids = mgmtcl.start(&id, 1, node).await.unwrap();
    let path = format!("api/v1/vm?id={}", ids[0]);
    let patience = Patience::new("mgmtcl's instance is started");
    let vm = loop {
        let vm = mgmtcl.show(&path).await.unwrap();
        sheet(&vm);
        mgmtcl.instances().await;
        match vm["instance_state"].as_str().unwrap() {
            "Started" => break vm,
            "Scheduling" | "Pulling" => patience.pause(&vm).await,
            other => panic!("{other}: {vm}"),
        }
    };
    assert_eq!(vm["node_id"], site.node.as_str());
    let host = vm["vminfo"]["host_ip"].as_str().unwrap();
    page(host, forwarded(&vm, 80), "/hostname").await;
    // Several at once, of a template that no node can run.
    let more = mgmtcl.start(&site.foreign, 3, None).await.unwrap();
    assert_eq!(more.len(), 3);
    // vm terminate: and shown right after.
    for id in ids.iter().chain(&more) {
        let end = json!({"id": id});
        body(&mgmtcl.ask("DELETE", "api/v1/vm", Some(&end)).await);
        let path = format!("api/v1/vm?id={id}");
        let vm = mgmtcl.show(&path).await.expect("shown for a minute");
        let state = vm["instance_state"].as_str().unwrap();
        assert!(["Terminating", "Terminated"].contains(&state), "{vm}");
        sheet(&vm);
    }
    site.ended(n, &ids[0]).await;
}
