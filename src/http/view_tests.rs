//! JSON to the byte where clients depend on it: presence, absence, types. The state is made by
//! commands, as in life.

use super::View;
use super::distributions::DistributionView;
use super::instances::InstanceView;
use super::listing_tests::listed;
use super::nodes::NodeList;
use super::templates::{TemplateList, TemplateView};
use crate::agents::liveness::{Heard, Liveness};
use mainstay_agent::wire::{ImagePull, NodeStats};
use mainstay_model::command::{Binding, Command, TagContent};
use mainstay_model::ids::Digest;
use mainstay_model::instance::{
    Observation, ObservedPhase, PortRule, Script, ScriptResult, StartRequest, Value, VmInfo,
};
use mainstay_model::node::{NodeConfig, NodeSpec};
use mainstay_model::{
    CommandId, DistributionId, Envelope, InstanceId, MemberId, NodeId, Outcome, State,
};
use serde_json::{Value as Json, json};

/// 2024-02-29T12:34:56.007Z
const T0: u64 = 1_709_210_096_007;
const T0_TEXT: &str = "2024-02-29T12:34:56.007Z";

#[derive(Default)]
pub(super) struct Cloud {
    pub(super) state: State,
    pub(super) soft: Liveness,
    commands: u128,
}

impl Cloud {
    pub(super) fn apply(&mut self, command: Command) -> Outcome {
        self.commands += 1;
        let id = CommandId(self.commands);
        let outcome = self.state.apply(&Envelope {
            id,
            stamp_ms: T0,
            command,
        });
        assert!(!matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
        outcome
    }
    pub(super) fn view(&self) -> View<'_> {
        View {
            state: &self.state,
            soft: &self.soft,
            registry_address: "http://r:8089",
        }
    }
    fn instance(&self, id: &str) -> Json {
        let view = self.view();
        let instance = &view.state.instances[&InstanceId::from(id)];
        serde_json::to_value(InstanceView::new(view, instance)).unwrap()
    }
    fn text(&self, id: &str) -> String {
        let view = self.view();
        let instance = &view.state.instances[&InstanceId::from(id)];
        serde_json::to_string(&InstanceView::new(view, instance)).unwrap()
    }
    pub(super) fn with_template(mut self, tag: &str, arch: &str, copies_needed: u32) -> Self {
        self.apply(Command::PublishTag {
            new_template_id: "t1".into(),
            template: "debian".into(),
            tag: tag.into(),
            content: TagContent {
                manifest: Digest([7; 32]),
                size: 1000,
                arch: arch.into(),
                description: "é".into(),
                disk: "disk.qcow2".into(),
                format: "qcow2".into(),
                forwards: Vec::new(),
            },
            holder: MemberId(1),
            copies_needed,
            voters: [MemberId(1)].into(),
        });
        self
    }
    pub(super) fn with_node(mut self) -> Self {
        let spec = NodeSpec {
            name: "mac1".into(),
            ip_address: "10.0.0.9".into(),
            arch: "arm64".into(),
            cpu_count: 8,
            ram_mb: 32_768,
            disk_bytes: 500,
            capacity: 2,
            agent_version: "0.1.0".into(),
            driver: "fake".into(),
            groups: Vec::new(),
        };
        self.apply(Command::RegisterNode {
            id: "n1".into(),
            spec: Box::new(spec),
        });
        self
    }
    pub(super) fn with_instance(
        mut self,
        id: &str,
        change: impl FnOnce(&mut StartRequest),
    ) -> Self {
        let mut request = StartRequest {
            template: "t1".into(),
            tag: None,
            version: None,
            name: None,
            name_template: None,
            external_id: None,
            node: None,
            group: None,
            priority: 1000,
            script: None,
            vcpu: None,
            vram_mb: None,
            metadata: Default::default(),
            port_forwarding: None,
        };
        change(&mut request);
        self.apply(Command::StartInstances {
            ids: vec![id.into()],
            request: Box::new(request),
        });
        self
    }
    pub(super) fn bound(mut self, id: &str) -> Self {
        let generation = self.state.instances[&InstanceId::from(id)].generation;
        let binding = Binding {
            instance: id.into(),
            node: "n1".into(),
            generation,
        };
        self.apply(Command::Bind {
            bindings: vec![binding],
        });
        self
    }
    pub(super) fn seen(
        mut self,
        id: &str,
        phase: ObservedPhase,
        vm: Option<VmInfo>,
        script: Option<ScriptResult>,
    ) -> Self {
        let generation = self.state.instances[&InstanceId::from(id)].generation;
        let change = Observation {
            id: id.into(),
            generation,
            phase,
            vm,
            script,
        };
        self.apply(Command::Observe {
            node: "n1".into(),
            changes: vec![change],
        });
        self
    }
}

pub(super) fn vm(ports: &[(&str, u16, u16)]) -> VmInfo {
    let rules = ports.iter().map(|&(name, guest_port, host_port)| PortRule {
        name: name.into(),
        guest_port,
        host_port,
    });
    VmInfo {
        uuid: "u1".into(),
        name: "vm1".into(),
        status: "running".into(),
        ip: "10.0.2.15".into(),
        host_ip: "10.0.0.9".into(),
        cpu_cores: 4,
        ram_mb: 8192,
        port_forwarding: rules.collect(),
        vnc_port: 0,
        created_ms: T0,
        started_ms: T0,
        accelerator: String::new(),
    }
}

#[test]
fn an_empty_cloud_lists_arrays() {
    let cloud = Cloud::default();
    let view = cloud.view();
    let text = |json: Result<String, _>| json.unwrap();
    assert_eq!(listed(view), json!([]));
    assert_eq!(
        text(serde_json::to_string(&NodeList { view, only: None })),
        "[]"
    );
    let list = TemplateList {
        state: view.state,
        short: false,
    };
    assert_eq!(text(serde_json::to_string(&list)), "[]");
}

#[test]
fn a_scheduling_instance_leaves_out_what_is_not_set() {
    let cloud = Cloud::default()
        .with_template("v1", "", 1)
        .with_instance("i1", |_| {});
    let expected = json!({
        "instance_id": "i1", "instance_state": "Scheduling", "anka_registry": "http://r:8089",
        "vmid": "t1", "tag": "v1", "ts": T0_TEXT, "cr_time": T0_TEXT, "progress": 0.0, "group_id": "",
        "vlan": "", "usb_device": "",
    });
    assert_eq!(cloud.instance("i1"), expected);
    assert!(
        cloud.text("i1").contains(r#""progress":0.0,"#),
        "a float, always"
    );
    let list = listed(cloud.view());
    let wrapper =
        json!([{ "instance_id": "i1", "external_id": null, "name": null, "vm": expected }]);
    assert_eq!(list, wrapper);
}

#[test]
fn a_pulling_instance_shows_how_far_it_is() {
    let mut cloud = Cloud::default().with_template("v1", "amd64", 1).with_node();
    cloud = cloud
        .with_instance("i1", |r| r.version = Some(0))
        .bound("i1");
    assert_eq!(cloud.instance("i1")["progress"], 0.0);
    cloud = cloud.seen("i1", ObservedPhase::Pulling, None, None);
    let hear = |progress: f32| Heard {
        node: "n1".into(),
        progress: vec![("i1".into(), progress)],
        ..Heard::default()
    };
    for (said, shown) in [(0.25, 0.25), (f32::NAN, 0.0), (7.0, 1.0)] {
        cloud.soft = Liveness::new();
        cloud.soft.hear(&hear(said));
        assert_eq!(cloud.instance("i1")["progress"], shown);
    }
    let shown = cloud.instance("i1");
    assert_eq!(
        (&shown["instance_state"], &shown["node_id"]),
        (&json!("Pulling"), &json!("n1"))
    );
    assert_eq!(
        (&shown["arch"], &shown["version"]),
        (&json!("amd64"), &json!(0))
    );
    assert!(shown.get("vminfo").is_none());
}

#[test]
fn a_started_instance_has_a_vm_with_ports_and_a_script_result() {
    let script = Script {
        monitored: true,
        timeout_s: 90,
        ..Script::default()
    };
    let result = ScriptResult {
        return_code: 3,
        did_timeout: true,
        stdout: "o".into(),
        stderr: "e".into(),
    };
    let cloud = Cloud::default()
        .with_template("v1", "", 1)
        .with_node()
        .with_instance("i1", |r| {
            r.name = Some("job".into());
            r.external_id = Some("http://ci".into());
            r.script = Some(Box::new(script));
            r.metadata = [
                ("a".into(), Value::Int(-1)),
                ("b".into(), Value::Bool(true)),
            ]
            .into_iter()
            .collect();
        })
        .bound("i1")
        .seen(
            "i1",
            ObservedPhase::Running,
            Some(vm(&[("ssh", 22, 10_000)])),
            Some(result),
        );
    let shown = cloud.instance("i1");
    let vminfo = json!({
        "uuid": "u1", "name": "vm1", "status": "running", "ip": "10.0.2.15", "host_ip": "10.0.0.9",
        "node_id": "n1", "cpu_cores": 4, "ram": "8G", "vnc_port": 0, "version": 0,
        "port_forwarding": [{
            "name": "ssh", "guest_port": 22, "host_port": 10_000, "host_ip": "10.0.0.9", "protocol": "tcp",
        }],
        "creation_date": T0_TEXT, "access_date": T0_TEXT, "start_date": T0_TEXT,
        "stop_date": "0001-01-01T00:00:00Z", "timestamp": T0_TEXT,
    });
    assert_eq!(shown["vminfo"], vminfo);
    assert_eq!(shown["instance_state"], "Started");
    assert_eq!(
        shown["arch"], "arm64",
        "the node's, when the tag does not say"
    );
    assert_eq!(shown["metadata"], json!({"a": -1, "b": true}));
    assert_eq!(
        (&shown["name"], &shown["external_id"]),
        (&json!("job"), &json!("http://ci"))
    );
    let errors = json!(["the script did not end in time"]);
    let script = json!({"return_code": 3, "errors": errors, "did_timeout": true, "stdout": "o", "stderr": "e"});
    assert_eq!(shown["startup_script"], script);
    let list = listed(cloud.view());
    assert_eq!(
        (&list[0]["name"], &list[0]["external_id"]),
        (&json!("job"), &json!("http://ci"))
    );
    assert_eq!(list[0]["vm"], shown);
    assert!(!cloud.text("i1").contains("null"), "nothing is null inside");
}

#[test]
fn ports_ram_and_host_override() {
    let mut odd = vm(&[("vnc", 5900, 10_001)]);
    odd.ram_mb = 1536;
    let cloud = Cloud::default()
        .with_template("v1", "", 1)
        .with_node()
        .with_instance("i1", |_| {});
    let mut cloud = cloud
        .bound("i1")
        .seen("i1", ObservedPhase::Running, Some(odd), None);
    assert_eq!(cloud.instance("i1")["vminfo"]["ram"], "1536M");
    let config = NodeConfig {
        host: Some("ci.example".into()),
        ..NodeConfig::default()
    };
    cloud.apply(Command::ConfigureNode {
        id: "n1".into(),
        config,
    });
    let info = cloud.instance("i1")["vminfo"].clone();
    assert_eq!(info["host_ip"], "ci.example");
    assert_eq!(info["vnc_connection_string"], "vnc://ci.example:10001");
    assert_eq!(nodes(&cloud)[0]["ip_address"], "ci.example");
}

#[test]
fn the_end_of_an_instance() {
    let cloud = Cloud::default().with_template("v1", "", 1).with_node();
    let cloud = cloud
        .with_instance("never", |_| {})
        .with_instance("ran", |_| {});
    let mut cloud = cloud
        .bound("ran")
        .seen("ran", ObservedPhase::Running, Some(vm(&[])), None);
    for id in ["never", "ran"] {
        cloud.apply(Command::TerminateInstance { id: id.into() });
        assert_eq!(cloud.instance(id)["instance_state"], "Terminating");
    }
    let cloud = cloud.seen("ran", ObservedPhase::Gone, None, None);
    let ended = cloud.instance("ran");
    assert_eq!(ended["instance_state"], "Terminated");
    assert_eq!(ended["vminfo"]["uuid"], "u1", "the last that was known");
    assert!(ended.get("message").is_none());
    assert!(cloud.instance("never").get("vminfo").is_none());
}

#[test]
fn a_failed_instance_says_why_and_keeps_its_vm() {
    let cloud = Cloud::default()
        .with_template("v1", "", 1)
        .with_node()
        .with_instance("i1", |_| {});
    let cloud = cloud
        .bound("i1")
        .seen("i1", ObservedPhase::Running, Some(vm(&[])), None);
    let cloud = cloud.seen(
        "i1",
        ObservedPhase::Failed("startup script exit code 3".into()),
        None,
        None,
    );
    let failed = cloud.instance("i1");
    assert_eq!(failed["instance_state"], "Error");
    assert_eq!(failed["message"], "startup script exit code 3");
    assert_eq!(failed["vminfo"]["uuid"], "u1");
}

fn nodes(cloud: &Cloud) -> Json {
    serde_json::to_value(NodeList {
        view: cloud.view(),
        only: None,
    })
    .unwrap()
}

#[test]
fn a_node_that_just_joined_has_every_member() {
    let cloud = Cloud::default().with_node();
    cloud.soft.hear(&Heard {
        node: "n1".into(),
        stats: NodeStats {
            cpu_util: 0.5,
            ram_util: f32::INFINITY,
            free_disk: 9,
            used_by_us: 4,
            vm_count: 0,
        },
        ..Heard::default()
    });
    let mut node = nodes(&cloud)[0].clone();
    assert!(node["timestamp"].is_u64() && node["last_updated"].is_string());
    for soft in ["timestamp", "last_updated"] {
        node.as_object_mut().unwrap().remove(soft);
    }
    let version = json!({
        "product": "Mainstay", "version": "0.1.0", "build": "", "license": "enterprise plus", "expires": "",
    });
    let expected = json!({
        "node_id": "n1", "node_name": "mac1", "ip_address": "10.0.0.9", "state": "Active", "capacity": 2,
        "capacity_mode": "number", "vm_count": 0, "vcpu_count": 0, "vram": 0, "cpu_count": 8,
        "cpu_util": 0.5, "ram": 32, "ram_util": 0.0, "disk_size": 500, "free_disk_space": 9,
        "anka_disk_usage": 4, "host_arch": "arm64", "groups": [], "templates": [], "usb_devices": null,
        "anka_version": version, "agent_version": "0.1.0", "driver": "fake",
    });
    assert_eq!(node, expected);
}

#[test]
fn node_states_groups_templates_and_load() {
    let cloud = Cloud::default()
        .with_template("v1", "", 1)
        .with_node()
        .with_instance("i1", |r| r.vcpu = Some(3));
    let mut cloud = cloud.bound("i1");
    let id = || NodeId::from("n1");
    cloud.apply(Command::SetNodeImages {
        id: id(),
        images: vec![("t1".into(), 0), ("gone".into(), 5)],
    });
    let node = nodes(&cloud)[0].clone();
    assert_eq!(
        node["templates"],
        json!([{"uuid": "t1", "name": "debian", "tag": "v1"}])
    );
    assert_eq!(
        (&node["vm_count"], &node["vcpu_count"]),
        (&json!(1), &json!(3))
    );
    let drain = NodeConfig {
        drain: Some(true),
        ram_override_mb: Some(4096),
        ..NodeConfig::default()
    };
    cloud.apply(Command::ConfigureNode {
        id: id(),
        config: drain,
    });
    assert_eq!(nodes(&cloud)[0]["state"], "Drain Mode");
    assert_eq!(nodes(&cloud)[0]["ram_override"], 4);
    let group = mainstay_model::group::Group {
        id: "g1".into(),
        name: "ios".into(),
        description: String::new(),
        fallback: None,
    };
    cloud.apply(Command::PutGroup { group });
    let join = Command::ChangeNodeGroups {
        nodes: vec![id()],
        groups: vec!["g1".into()],
        member: true,
    };
    cloud.apply(join);
    let groups = json!([{"id": "g1", "name": "ios", "description": "", "fallback_group_id": null}]);
    assert_eq!(nodes(&cloud)[0]["groups"], groups);
    cloud.apply(Command::SetNodeReachability {
        id: id(),
        reachable: false,
        lost: false,
    });
    assert_eq!(nodes(&cloud)[0]["state"], "Offline");
}

#[test]
fn templates_are_listed_once_a_tag_is_visible() {
    let hidden = Cloud::default().with_template("v1", "arm64", 2);
    let list = |cloud: &Cloud, short| {
        serde_json::to_value(TemplateList {
            state: &cloud.state,
            short,
        })
        .unwrap()
    };
    assert_eq!(list(&hidden, false), json!([]));
    assert!(TemplateView::new(&hidden.state, &hidden.state.templates[&"t1".into()]).is_none());
    let cloud = Cloud::default()
        .with_template("v1", "arm64", 1)
        .with_template("v2", "arm64", 1);
    let s = T0 / 1000;
    let long = json!({
        "id": "t1", "name": "debian", "size": 2000, "arch": "arm64", "last_pull": 0, "last_push": s,
    });
    assert_eq!(list(&cloud, false), json!([long]));
    let short = json!([{"id": "t1", "name": "debian", "last_pull": 0, "last_push": s}]);
    assert_eq!(list(&cloud, true), short);
    let view = TemplateView::new(&cloud.state, &cloud.state.templates[&"t1".into()]).unwrap();
    let shown = serde_json::to_value(view).unwrap();
    let tag = |number: u32, name: &str| {
        json!({
            "number": number, "tag": name, "config_file": "", "nvram": "", "images": ["disk.qcow2"],
            "state_files": [], "state_file": "", "description": "é", "size": 1000, "arch": "arm64",
            "last_pull": 0, "last_push": s, "creation_date": s, "manifest": "07".repeat(32),
            "holders": ["0000000000000001"],
        })
    };
    assert_eq!(shown["versions"], json!([tag(0, "v1"), tag(1, "v2")]));
    assert_eq!((&shown["id"], &shown["size"]), (&json!("t1"), &json!(2000)));
}

/// Ten thousand instances are all in the list.
#[test]
fn a_long_list_is_whole() {
    let mut cloud = Cloud::default().with_template("v1", "", 1).with_node();
    for batch in 0..10 {
        let ids = (0..1000)
            .map(|n| InstanceId::from(format!("i{batch}-{n}")))
            .collect();
        let first = cloud
            .state
            .instances
            .values()
            .next()
            .map(|i| i.request.clone());
        let request = first.unwrap_or_else(|| {
            cloud = std::mem::take(&mut cloud).with_instance("seed", |_| {});
            cloud.state.instances[&InstanceId::from("seed")]
                .request
                .clone()
        });
        cloud.apply(Command::StartInstances {
            ids,
            request: Box::new(request),
        });
    }
    assert_eq!(listed(cloud.view()).as_array().unwrap().len(), 10_001);
}

/// What is shown of `d1`, and of its only node.
fn distribution(cloud: &Cloud) -> (Json, Json) {
    let of = &cloud.state.distributions[&DistributionId::from("d1")];
    let shown = serde_json::to_value(DistributionView::new(cloud.view(), of)).unwrap();
    let node = shown["distribute_status"]["n1"].clone();
    (shown, node)
}

#[test]
fn a_distribution_is_at_one_exactly_when_it_is_done() {
    let mut cloud = Cloud::default().with_template("v1", "arm64", 1).with_node();
    cloud.apply(Command::Distribute {
        id: "d1".into(),
        template: "t1".into(),
        selector: None,
        nodes: Vec::new(),
        group: None,
    });
    let (shown, node) = distribution(&cloud);
    let request = json!({
        "request_id": "d1", "template_id": "t1", "tag": "v1", "version": 0, "time_requested": T0_TEXT,
    });
    assert_eq!(
        (&shown["request"], &shown["ended"]),
        (&request, &json!(false))
    );
    assert_eq!(
        node,
        json!({"status": false, "progress": 0.0, "node_name": "mac1"})
    );
    let hear = |cloud: &Cloud, pulls: Option<Vec<ImagePull>>| {
        cloud.soft.hear(&Heard {
            node: "n1".into(),
            pulls,
            ..Heard::default()
        });
        distribution(cloud).1
    };
    let pull = |number, progress, error: &str| ImagePull {
        template_id: "t1".into(),
        number,
        progress,
        error: error.into(),
    };
    for (said, shown) in [
        (0.25, 0.25),
        (f32::NAN, 0.0),
        (-1.0, 0.0),
        (1.0, 0.99),
        (7.0, 0.99),
    ] {
        let node = hear(&cloud, Some(vec![pull(1, 0.5, ""), pull(0, said, "")]));
        let progress = node["progress"].as_f64().unwrap();
        assert!((progress - shown).abs() < 0.001, "{said}: {node}");
        assert_eq!((&node["status"], node.get("error")), (&json!(false), None));
    }
    let node = hear(&cloud, Some(vec![pull(0, 0.0, "no room")]));
    assert_eq!(node["error"], "no room");
    // An agent of a release that does not know of it.
    let node = hear(&cloud, None);
    assert!(
        node["error"].as_str().unwrap().contains("(0.1.0) cannot"),
        "{node}"
    );
    cloud.apply(Command::SetNodeReachability {
        id: "n1".into(),
        reachable: false,
        lost: false,
    });
    let (_, node) = distribution(&cloud);
    assert!(node["error"].as_str().unwrap().contains("not reachable"));
    cloud.apply(Command::SetNodeImages {
        id: "n1".into(),
        images: vec![("t1".into(), 0)],
    });
    let (shown, node) = distribution(&cloud);
    assert_eq!(shown["ended"], true);
    assert_eq!(
        node,
        json!({"status": true, "progress": 1.0, "node_name": "mac1"})
    );
}

#[test]
fn a_distribution_that_was_given_up_says_why_on_each_node() {
    let mut cloud = Cloud::default().with_template("v1", "", 1).with_node();
    cloud.apply(Command::Distribute {
        id: "d1".into(),
        template: "t1".into(),
        selector: None,
        nodes: vec!["n1".into()],
        group: None,
    });
    cloud.apply(Command::RemoveNode { id: "n1".into() });
    let (shown, node) = distribution(&cloud);
    let wanted = json!({
        "status": false, "progress": 0.0, "error": "the node was removed", "node_name": "",
    });
    assert_eq!((&node, &shown["ended"]), (&wanted, &json!(true)));
}
