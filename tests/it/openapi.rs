//! `/openapi.json` against the server: what is served is in it, and every answer is one that it describes,
//! whatever is sent. A longer search for the opposite, with a tool made for it: `tests/schemathesis.sh`.

use crate::cluster::{Answer, Cluster};
use mainstay_model::instance::ScriptResult;
use mainstay_model::save::SaveSaid;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// The document, and how answers are held against it.
struct Document(Value);

impl Document {
    async fn of(cluster: &Cluster) -> Self {
        let answer = cluster.get(0, "/openapi.json").await;
        assert_eq!(answer.headers["content-type"], "application/json");
        Self(answer.json())
    }

    /// Path, method and description of every call.
    fn calls(&self) -> Vec<(String, String, &Value)> {
        let paths = self.0["paths"].as_object().unwrap();
        let each = paths.iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap();
            methods
                .iter()
                .map(move |(method, call)| (path.clone(), method.to_uppercase(), call))
        });
        each.collect()
    }

    /// Is this one of the answers that the call may give?
    fn check(&self, call: &Value, answer: &Answer, what: &str) {
        let status = answer.status.as_u16();
        let described = &call["responses"][status.to_string()];
        assert!(described.is_object(), "{what}: {status} {}", answer.text());
        assert!(status < 500, "{what}: {status} {}", answer.text());
        let content = described["content"].as_object().unwrap();
        let (mime, form) = content.iter().next().unwrap();
        let sent = answer.headers["content-type"].to_str().unwrap();
        assert!(
            sent.starts_with(mime.as_str()),
            "{what}: {sent}, not {mime}"
        );
        if mime == "application/json" {
            let said = self.faults(&form["schema"], &answer.json(), "answer");
            assert!(said.is_empty(), "{what}: {said:?} in {}", answer.text());
        }
    }

    /// What of the value its schema does not say. Knows the words that our own document uses.
    fn faults(&self, schema: &Value, value: &Value, at: &str) -> Vec<String> {
        if let Some(name) = schema["$ref"].as_str() {
            let place = name.strip_prefix('#').unwrap();
            let meant = self
                .0
                .pointer(place)
                .unwrap_or_else(|| panic!("{name} is not there"));
            return self.faults(meant, value, at);
        }
        for word in ["oneOf", "anyOf"] {
            if let Some(choices) = schema[word].as_array() {
                let tried = choices.iter().map(|one| self.faults(one, value, at));
                let tried: Vec<Vec<String>> = tried.collect();
                let fits = tried.iter().any(Vec::is_empty);
                return if fits { Vec::new() } else { tried.concat() };
            }
        }
        let mut faults = Vec::new();
        let mut types = match &schema["type"] {
            Value::String(one) => vec![one.as_str()],
            Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
            _ => panic!("{at}: a schema without a type: {schema}"),
        };
        types.retain(|name| is_a(value, name));
        if types.is_empty() {
            return vec![format!("{at} is {value}, not {}", schema["type"])];
        }
        if let Some(words) = schema["enum"].as_array()
            && !words.contains(value)
        {
            faults.push(format!("{at} is {value}, none of {words:?}"));
        }
        if let Some(least) = schema["minimum"].as_f64()
            && value.as_f64().is_some_and(|n| n < least)
        {
            faults.push(format!("{at} is {value}, less than {least}"));
        }
        for item in value.as_array().into_iter().flatten() {
            faults.extend(self.faults(&schema["items"], item, &format!("{at}[]")));
        }
        for (key, inner) in value.as_object().into_iter().flatten() {
            let mut known = &schema["properties"][key];
            if known.is_null() {
                known = &schema["additionalProperties"];
            }
            if known.is_null() {
                faults.push(format!("{at}.{key} is not described"));
            } else if known.is_object() {
                faults.extend(self.faults(known, inner, &format!("{at}.{key}")));
            }
        }
        for key in schema["required"].as_array().into_iter().flatten() {
            if value.is_object() && value.get(key.as_str().unwrap()).is_none() {
                faults.push(format!("{at} lacks {key}"));
            }
        }
        faults
    }

    /// The members of a body.
    fn members(&self, call: &Value) -> Map<String, Value> {
        let schema = &call["requestBody"]["content"]["application/json"]["schema"];
        let name = schema["$ref"].as_str().unwrap_or_default();
        let name = name.rsplit('/').next().unwrap();
        let properties = &self.0["components"]["schemas"][name]["properties"];
        let properties = properties.as_object().cloned().unwrap_or_default();
        properties
            .into_iter()
            .map(|(key, _)| (key, Value::Null))
            .collect()
    }
}

fn is_a(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("an unknown type {other}"),
    }
}

/// A cloud with one of everything.
async fn cloud() -> Cluster {
    let cluster = Cluster::start(1).await;
    let level = mainstay_model::feature::SUPPORTED;
    let raise = mainstay_model::Command::SetFeatures { level };
    cluster.members[0].app.submit(raise).await.unwrap();
    cluster.template(&["v1", "v2"]).await;
    cluster.node().await;
    let path = "/api/v1/registry/vm/distribute";
    let wish = json!({"template_id": "t1", "node_ids": ["n1"]});
    cluster.call(0, "POST", path, wish).await.body();
    let group = json!({"name": "g", "description": "d"});
    cluster.call(0, "POST", "/api/v1/group", group).await.body();
    let start = json!({
        "vmid": "t1", "name": "one", "metadata": {"k": "v", "n": 1, "b": true}, "priority": 7,
        "startup_script": "ZXhpdCA3", "script_monitoring": true,
        "port_forwarding_override": [{"name": "ssh", "guest_port": 22}],
    });
    cluster.call(0, "POST", "/api/v1/vm", start).await.body();
    cluster.raise_features().await;
    let ids = cluster.started(2).await;
    let save = |id: &str| json!({"id": id, "target_vm_id": "t1", "tag": format!("saved-{id}"), "script": "c3luYw=="});
    let first = cluster.call(0, "POST", "/api/v1/image", save(&ids[0]));
    let first = first.await.body()["request_id"].clone();
    let first = first.as_str().unwrap();
    let script = ScriptResult {
        did_timeout: true,
        ..ScriptResult::default()
    };
    let why = "no room".to_owned();
    let failed = SaveSaid::Failed {
        why,
        stopped: false,
    };
    cluster.report_save(first, failed, Some(script)).await;
    let second = cluster.call(0, "POST", "/api/v1/image", save(&ids[1]));
    second.await.body();
    cluster
}

#[tokio::test]
async fn every_answer_is_one_that_the_document_describes() {
    let cluster = cloud().await;
    let document = Document::of(&cluster).await;
    assert!(document.0["openapi"].as_str().unwrap().starts_with("3.1"));
    let mut names = BTreeSet::new();
    let wrong = [
        Value::Null,
        json!(""),
        json!("no such thing"),
        json!(-1),
        json!(1e300),
        json!(u64::MAX),
        json!(true),
        json!([{}]),
        json!({"a": [1.5]}),
    ];
    let mut asked = 0;
    for (path, method, call) in document.calls() {
        assert!(
            names.insert(call["operationId"].to_string()),
            "{path} twice"
        );
        assert!(call["summary"].is_string(), "{method} {path}");
        // It would send the whole state, and is asked elsewhere.
        if path == "/api/v1/snapshot" || path.starts_with("/api/v1/member/") {
            continue;
        }
        if method == "GET" {
            for query in [
                "",
                "?id=t1",
                "?id=n1",
                "?id=nothing",
                "?id=",
                "?consistency=stale",
                "?consistency=no",
            ] {
                let answer = cluster.get(0, &format!("{path}{query}")).await;
                document.check(call, &answer, &format!("{method} {path}{query}"));
                asked += 1;
            }
            continue;
        }
        let whole = document.members(call);
        let mut bodies = vec![json!({}), json!([]), json!("text")];
        for member in whole.keys() {
            bodies.extend(wrong.iter().map(|value| json!({member: value})));
            let all = |value: &Value| {
                whole
                    .keys()
                    .map(|key| (key.clone(), value.clone()))
                    .collect()
            };
            bodies.extend(wrong.iter().map(|value| Value::Object(all(value))));
        }
        for body in bodies {
            let answer = cluster.call(0, &method, &path, body.clone()).await;
            document.check(call, &answer, &format!("{method} {path} {body}"));
            asked += 1;
        }
    }
    assert!(asked > 300, "{asked}");
    // The lists are still there to be described, and none of that was a valid change.
    let list = cluster.get(0, "/api/v1/vm").await;
    assert!(!list.body().as_array().unwrap().is_empty());
    cluster.stop().await;
}

/// Each row of the routes that this test knows of is described: none is served in secret.
#[tokio::test]
async fn what_is_served_is_described() {
    let cluster = cloud().await;
    let document = Document::of(&cluster).await;
    let described: BTreeSet<String> = document
        .calls()
        .into_iter()
        .map(|(path, method, _)| format!("{method} {path}"))
        .collect();
    let page = include_str!("../../docs/rest-dialect.md");
    for call in &described {
        let path = call.split_once(' ').unwrap().1;
        let last = path.rsplit('/').next().unwrap();
        assert!(
            page.contains(path) || page.contains(&format!("`{last}`")),
            "docs/rest-dialect.md lacks {call}"
        );
    }
    for path in [
        "/api/v1/vm",
        "/api/v1/rpc/vm/restart",
        "/api/v1/registry/vm/distribute",
        "/api/v1/registry/vm/remove",
        "/api/v1/node/config",
        "/readyz",
    ] {
        assert!(described.iter().any(|call| call.ends_with(path)), "{path}");
    }
    cluster.stop().await;
}
