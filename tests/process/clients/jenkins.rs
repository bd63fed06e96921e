//! Jenkins: a comma list of controllers, another one for each request; up to ten immediate attempts when a
//! connection breaks, of a POST too; bodies in Latin-1; instances are found in the list.
//!
//! Shortened: polls every 0.3 s instead of 5 s, and each asks for the list, which the plugin caches for 7 s.

use super::read::{self, body, java_text, java_text_if};
use super::wire::{Broken, Load, Wire};
use super::{HISTORY, Patience, Site, base64, forwarded, page, probe};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};

const HEADERS: [(&str, &str); 3] = [
    ("Connection", "Keep-Alive"),
    ("User-Agent", "Apache-HttpClient/4.5.14 (Java/17.0.12)"),
    ("Accept-Encoding", "gzip,deflate"),
];
/// Of each attempt.
const LIMIT: Duration = Duration::from_secs(30);
/// Of `status`.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
const ATTEMPTS: usize = 10;

/// The plugin's connection to its cloud.
struct Jenkins {
    wires: Vec<Wire>,
    turn: usize,
    /// Requests sent, attempts included.
    attempts: usize,
}

/// One byte for each character, `?` for those that have none: how the plugin encodes a body.
pub(super) fn latin1(text: &str) -> Vec<u8> {
    let byte = |c: char| u8::try_from(u32::from(c)).unwrap_or(b'?');
    text.chars().map(byte).collect()
}

impl Jenkins {
    /// With these controllers, the first one first.
    fn new(controllers: &[&str]) -> Self {
        let wire = |at: &&str| Wire::new(at, LIMIT, &HEADERS);
        Self {
            wires: controllers.iter().map(wire).collect(),
            turn: 0,
            attempts: 0,
        }
    }

    /// The answer, whatever its verdict. Fails where the plugin would: at a status other than 200, a
    /// controller that cannot be reached, and after the last attempt.
    async fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Value {
        // Its weights are equal as long as every controller answers.
        let at = self.turn % self.wires.len();
        self.turn += 1;
        let wire = &mut self.wires[at];
        wire.limit = match path {
            "/api/v1/status" => STATUS_LIMIT,
            _ => LIMIT,
        };
        let kind = [("Content-Type", "application/json")];
        let (more, load) = match body {
            Some(body) => (&kind[..], Load::Whole(latin1(&body.to_string()))),
            None => (&[][..], Load::Nothing),
        };
        for attempt in 1.. {
            self.attempts += 1;
            match wire.send(method, path, more, &load).await {
                Ok(answer) => {
                    assert_eq!(answer.status, 200, "{method} {path}: {answer:?}");
                    return read::sound(&answer, path);
                }
                Err(Broken::Connect(why)) => panic!("{method} {path}: {why}"),
                Err(why) if attempt == ATTEMPTS => panic!("{method} {path}: {why:?}"),
                Err(_) => {}
            }
        }
        unreachable!()
    }

    async fn get(&mut self, path: &str) -> Value {
        let json = self.ask("GET", path, None).await;
        body(&json).clone()
    }

    /// Start with the tag, or without it when there is no such tag.
    async fn start(&mut self, mut wanted: Value) -> String {
        loop {
            let json = self.ask("POST", "/api/v1/vm", Some(&wanted)).await;
            if java_text(&json, "status") == "OK" {
                let ids = read::items(&json["body"]);
                return ids[0].as_str().unwrap().to_owned();
            }
            let tag = wanted["tag"].as_str().unwrap_or_default().to_owned();
            let message = java_text(&json, "message");
            assert_eq!(message, format!("No such tag {tag}"));
            wanted.as_object_mut().unwrap().remove("tag");
        }
    }

    /// The whole list as the plugin takes it in: one item that it cannot read fails all of them.
    async fn list(&mut self) -> Vec<Value> {
        let list = self.get("/api/v1/vm").await;
        for wrapper in read::instances(&list) {
            java_text(wrapper, "instance_id");
            let vm = &wrapper["vm"];
            java_text(vm, "cr_time");
            java_text(vm, "instance_state");
            java_text(vm, "vmid");
            java_text_if(vm, "message");
            if let Some(info) = vm.get("vminfo") {
                java_text(info, "uuid");
                java_text(info, "status");
            }
        }
        read::items(&list).to_vec()
    }

    /// `None`: not in the list. The plugin forgives ten of these; there is to be none.
    async fn find(&mut self, id: &str) -> Option<Value> {
        let list = self.list().await;
        let found = list.iter().find(|one| one["instance_id"] == id);
        found.map(|wrapper| wrapper["vm"].clone())
    }

    async fn terminate(&mut self, id: &str) {
        let ended = json!({"id": id});
        let json = self.ask("DELETE", "/api/v1/vm", Some(&ended));
        body(&json.await);
    }
}

/// What the cloud's page of settings asks for, and how many VMs the plugin thinks there is room for.
async fn look_around(jenkins: &mut Jenkins, site: &Site) {
    let status = jenkins.get("/api/v1/status").await;
    assert_eq!(java_text(&status, "status").to_lowercase(), "running");
    for name in ["version", "registry_address", "registry_status", "license"] {
        java_text(&status, name);
    }
    // Under 400, or saving images is hidden; `null` is dereferenced.
    read::items(&jenkins.get("/api/v1/image").await);
    let templates = jenkins.get("/api/v1/registry/vm").await;
    let named = |one: &&Value| java_text(one, "name") == "tiny";
    let tiny = read::items(&templates).iter().find(named).unwrap();
    let id = java_text(tiny, "id");
    assert_eq!(id, site.template);
    let whole = jenkins.get(&format!("/api/v1/registry/vm?id={id}")).await;
    let tags = read::items(&whole["versions"]).iter();
    assert_eq!(
        tags.map(|t| java_text(t, "tag")).collect::<Vec<_>>(),
        ["v1"]
    );
    let groups = jenkins.get("/api/v1/group").await;
    read::items(&groups).iter().for_each(read::group);
    let named = |one: &&Value| java_text(one, "name") == "macs" || java_text(one, "id") == "macs";
    let group = read::items(&groups).iter().find(named).unwrap();
    assert_eq!(java_text(group, "id"), site.group);
    let nodes = jenkins.get("/api/v1/node").await;
    let mut room = 0;
    for node in read::items(&nodes) {
        read::node(node);
        if java_text(node, "state").eq_ignore_ascii_case("active") {
            let half = java_text(node, "capacity_mode") == "resource";
            room += read::java_int(node, "capacity") / if half { 2 } else { 1 };
        }
    }
    assert!(room > 0, "nothing would be started: {nodes}");
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let controllers = [site.api(n), site.api(n + 1), site.api(n + 2)];
    let mut jenkins = Jenkins::new(&controllers);
    look_around(&mut jenkins, &site).await;

    // Its node in Jenkins is the name and the external id. One run launches over SSH, the others by a script.
    let (by_script, name) = (n > 0, format!("macOS caf\u{e9} \u{2603} {n}"));
    let mut wanted = json!({
        "vmid": site.template, "tag": if n == 1 { "no-such-tag" } else { "v1" },
        "name_template": "$template_name-$node_name-$ts", "group_id": site.group, "priority": 900,
        "vcpu": 1, "vram": 256, "name": name,
        "external_id": mark(n),
    });
    if by_script {
        wanted["startup_script"] = base64("echo launched >/srv/www/agent").into();
    }
    let id = jenkins.start(wanted).await;
    let vm = started(&mut jenkins, &id).await;
    let kept = java_text(&vm, "name");
    assert_eq!(kept, format!("macOS caf\u{fffd} ? {n}"), "bytes of Latin-1");
    let info = &vm["vminfo"];
    let host = java_text(info, "host_ip");
    assert!(!host.is_empty(), "{vm}");
    assert!(java_text(info, "name").starts_with("mgmtManaged-tiny-node1-"));
    let port = forwarded(&vm, 22);
    if by_script {
        let said = page(host, forwarded(&vm, 80), "/agent").await;
        assert_eq!(said, "launched\n");
    } else {
        probe(host, port).await;
        page(host, forwarded(&vm, 80), "/hostname").await;
    }

    let mut jenkins = built_and_ended(&mut jenkins, &site, n, &id).await;
    revert(&mut jenkins, &site, n).await;
    let reused: u64 = jenkins.wires.iter().map(|wire| wire.reused).sum();
    assert!(reused > 0, "connections are kept");
    broken_connections(&site, n).await;
}

/// External id of its instance: the address of its node in Jenkins.
fn mark(n: usize) -> String {
    format!("http://jenkins.example:8080/computer/mac-{n}/")
}

/// From the build on the instance to its end; Jenkins is restarted between them, and the new one is returned.
async fn built_and_ended(jenkins: &mut Jenkins, site: &Site, n: usize, id: &str) -> Jenkins {
    // A build lands there.
    let build = json!({"metadata": {"jenkins-job-id": format!("job/app/{n}")}});
    let path = format!("/api/v1/vm?id={id}");
    body(&jenkins.ask("PUT", &path, Some(&build)).await);
    // Jenkins restarts: every instance is looked for again, with no connection of before.
    let mut jenkins = Jenkins::new(&[site.api(n + 2), site.api(n), site.api(n + 1)]);
    let again = jenkins.find(id).await.unwrap();
    assert_eq!(again["metadata"], build["metadata"]);
    assert_eq!(again["external_id"], mark(n));

    // The node in Jenkins goes when the instance is absent or at its end.
    jenkins.terminate(id).await;
    let patience = Patience::new("the end of Jenkins' instance");
    loop {
        match jenkins.find(id).await {
            None => break,
            Some(vm) if java_text(&vm, "instance_state") == "Terminated" => break,
            Some(vm) => {
                assert_eq!(java_text(&vm, "instance_state"), "Terminating");
                patience.pause(&vm).await;
            }
        }
    }
    jenkins.terminate(id).await;
    jenkins
}

/// The plugin's loop. A state that it does not know would make it ask without a pause.
async fn started(jenkins: &mut Jenkins, id: &str) -> Value {
    let patience = Patience::new("Jenkins' instance is started");
    loop {
        // The next controller, at once after the start on the one before.
        let vm = jenkins.find(id).await.expect("just started and not listed");
        match java_text(&vm, "instance_state") {
            "Scheduling" | "Pulling" => patience.pause(&vm).await,
            "Started" => return vm,
            other => panic!("{other}: {vm}"),
        }
    }
}

/// Before a push the plugin reverts to the tag before the latest one.
async fn revert(jenkins: &mut Jenkins, site: &Site, n: usize) {
    let id = &site.histories["of-jenkins"];
    let path = format!("/api/v1/registry/revert?id={id}");
    body(&jenkins.ask("DELETE", &path, None).await);
    let whole = jenkins.get(&format!("/api/v1/registry/vm?id={id}")).await;
    let tags = read::items(&whole["versions"]);
    assert_eq!(tags.len(), HISTORY - 1 - n);
}

/// Connections that break under a POST: it is sent again at once, and each that came in is a request.
async fn broken_connections(site: &Site, n: usize) {
    let wanted = |name: &str| json!({"vmid": site.foreign, "name": name, "external_id": format!("{name}-{n}")});
    let theirs = |list: &[Value], name: &str| {
        let mark = format!("{name}-{n}");
        let of = |one: &&Value| one["external_id"] == mark.as_str();
        let ids = list.iter().filter(of).map(|one| one["instance_id"].clone());
        ids.collect::<Vec<_>>()
    };
    // Nine break before the member hears of it: one instance.
    let near = line(site.api(n), ATTEMPTS - 1, 0).await;
    let mut jenkins = Jenkins::new(&[&near]);
    let id = jenkins.start(wanted("cut-before")).await;
    assert_eq!(jenkins.attempts, ATTEMPTS);
    let mut other = Jenkins::new(&[site.api(n + 1)]);
    assert_eq!(theirs(&other.list().await, "cut-before"), [id.as_str()]);
    other.terminate(&id).await;
    // The answer is lost: nothing on the wire says that the second is the first again. Both are there, to be
    // found by what the plugin called them, and it knows the second.
    let near = line(site.api(n), 0, 1).await;
    let mut jenkins = Jenkins::new(&[&near]);
    let id = jenkins.start(wanted("cut-after")).await;
    assert_eq!(jenkins.attempts, 2);
    let both = theirs(&other.list().await, "cut-after");
    assert_eq!(both.len(), 2);
    assert!(both.contains(&Value::from(id)));
    for id in &both {
        other.terminate(id.as_str().unwrap()).await;
    }
}

/// A line to a member that breaks: its first connections before a request gets through, the next ones
/// before the answer comes back. Address of its near end.
async fn line(member: &str, before: usize, after: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = listener.local_addr().unwrap().to_string();
    let (far, seen) = (member.to_owned(), AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let nth = seen.fetch_add(1, Ordering::Relaxed);
            let mut some = [0; 4096];
            if nth < before {
                // The request has left the client.
                drop(client.read(&mut some).await);
                continue;
            }
            let mut server = TcpStream::connect(&far).await.unwrap();
            if nth < before + after {
                let len = client.read(&mut some).await.unwrap();
                tokio::io::AsyncWriteExt::write_all(&mut server, &some[..len])
                    .await
                    .unwrap();
                assert_ne!(server.read(&mut some).await.unwrap(), 0, "an answer");
                continue;
            }
            tokio::spawn(async move {
                tokio::io::copy_bidirectional(&mut client, &mut server)
                    .await
                    .ok();
            });
        }
    });
    near
}
