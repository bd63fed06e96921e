//! Members in one process: the real API over the real consensus, memory in place of disks and wires.
//! Nothing here listens on a port.
#![allow(
    unreachable_pub,
    reason = "a test binary exports nothing, its modules share this one"
)]

use axum::Router;
use axum::body::{Body, Bytes};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use mainstay::agents::liveness::Liveness;
use mainstay::app::App;
use mainstay::http::{About, ApiState, router};
use mainstay::machine::ModelMachine;
use mainstay::registry::Figures;
use mainstay::space::Room;
use mainstay_model::command::{Binding, Command, TagContent};
use mainstay_model::feature::SUPPORTED;
use mainstay_model::ids::Digest;
use mainstay_model::instance::{Observation, ObservedPhase, ScriptResult, VmInfo};
use mainstay_model::node::NodeSpec;
use mainstay_model::save::{SaveReport, SaveSaid};
use mainstay_model::{MemberId, Outcome, State};
use mainstay_raft::transport::memory::Switchboard;
use mainstay_raft::{Group, GroupConfig, Member};
use mainstay_storage::chunks::ChunkStats;
use mainstay_storage::engine::MemoryEngine;
use mainstay_storage::log::MemoryLog;
use mainstay_storage::snapshot::SnapshotDir;
use parking_lot::RwLock;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tower::ServiceExt as _;

/// Members 1 to n.
pub struct Cluster {
    pub network: Switchboard,
    pub members: Vec<Peer>,
    _dir: tempfile::TempDir,
}

/// One member: its group and its API.
pub struct Peer {
    pub id: u64,
    pub group: Group,
    /// What it applies to and reads.
    pub state: Arc<RwLock<State>>,
    pub app: App,
    pub api: Router,
}

/// An answer, read to its end.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: Bytes,
}

impl Answer {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.bytes).unwrap()
    }
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes)
            .unwrap_or_else(|e| panic!("{} {:?}: {e}", self.status, self.text()))
    }
    /// The body of an `OK` envelope; `null` when there is none.
    pub fn body(&self) -> Value {
        let json = self.json();
        assert_eq!(
            (self.status, &json["status"]),
            (StatusCode::OK, &Value::from("OK")),
            "{json}"
        );
        assert_eq!(json["message"], "", "{json}");
        json["body"].clone()
    }
    /// The message of a `FAIL` envelope, which has no body.
    pub fn refusal(&self) -> (u16, String) {
        let json = self.json();
        assert_eq!(json["status"], "FAIL", "{json}");
        assert_eq!(json.as_object().unwrap().len(), 2, "no body: {json}");
        (
            self.status.as_u16(),
            json["message"].as_str().unwrap().to_owned(),
        )
    }
}

/// What a test member says of itself.
pub fn about(id: u64) -> About {
    About {
        cluster_id: "test".to_owned(),
        name: format!("c{id}"),
        version: "0.1.0-abcdef12".to_owned(),
        registry_address: format!("http://c{id}:8089"),
        allow_cors: false,
        db_size: Arc::new(|| 4096),
        disk: Arc::new(|| {
            Some(Room {
                free: 40,
                total: 100,
            })
        }),
        complaint: Arc::new(|| None),
        registry: Arc::new(|| Figures {
            chunks: ChunkStats {
                chunks: 3,
                stored_bytes: 30,
                ..ChunkStats::default()
            },
            ..Figures::default()
        }),
    }
}

/// Where member `id` is said to be.
pub fn member(id: u64) -> Member {
    let url = |port: u16| format!("http://c{id}:{port}");
    Member {
        name: format!("c{id}"),
        peer_url: url(8091),
        api_url: url(8090),
        registry_url: url(8089),
    }
}

impl Cluster {
    /// `n` voters with a leader.
    pub async fn start(n: u64) -> Self {
        let cluster = Self::uninitialised(n).await;
        let founders: BTreeMap<u64, Member> = (1..=n).map(|id| (id, member(id))).collect();
        cluster.members[0].group.initialize(founders).await.unwrap();
        cluster.leader().await;
        cluster
    }

    /// `n` members that are not a cluster yet.
    pub async fn uninitialised(n: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let network = Switchboard::new();
        let mut members = Vec::new();
        for id in 1..=n {
            let state = Arc::new(RwLock::new(State::default()));
            let snapshots = SnapshotDir::open(&dir.path().join(id.to_string())).unwrap();
            let group = Group::start(
                GroupConfig::new(id, "test"),
                Arc::new(MemoryLog::new()),
                Arc::new(MemoryEngine::default()),
                snapshots,
                Arc::new(ModelMachine::new(Arc::clone(&state))),
                network.dialer(id),
            )
            .await
            .unwrap();
            network.attach(id, group.clone());
            let app = App::new(group.clone(), Arc::clone(&state));
            let api = router(ApiState::new(app.clone(), Liveness::new(), about(id)));
            members.push(Peer {
                id,
                group,
                state,
                app,
                api,
            });
        }
        Self {
            network,
            members,
            _dir: dir,
        }
    }

    /// Position of the leader, once every reachable member knows it.
    pub async fn leader(&self) -> usize {
        let mut watch = self.members[0].group.watch();
        let led = watch.wait_for(|s| s.leader.is_some());
        let status = tokio::time::timeout(Duration::from_secs(20), led).await;
        let leader = status.expect("a leader in time").unwrap().leader.unwrap();
        self.members.iter().position(|m| m.id == leader).unwrap()
    }

    /// A template `debian` with these visible tags; its id is `t1`.
    pub async fn template(&self, tags: &[&str]) {
        for (n, tag) in tags.iter().enumerate() {
            let content = TagContent {
                manifest: Digest([n as u8; 32]),
                size: 1000,
                arch: "amd64".into(),
                description: String::new(),
                disk: "disk.qcow2".into(),
                format: "qcow2".into(),
                forwards: Vec::new(),
            };
            let command = Command::PublishTag {
                new_template_id: "t1".into(),
                template: "debian".into(),
                tag: (*tag).into(),
                content,
                holder: MemberId(1),
                copies_needed: 1,
                voters: [MemberId(1)].into(),
            };
            self.members[0].app.submit(command).await.unwrap();
        }
    }

    /// A node `n1` with room for two.
    pub async fn node(&self) {
        let spec = NodeSpec {
            name: "mac1".into(),
            ip_address: "10.0.0.9".into(),
            arch: "arm64".into(),
            cpu_count: 8,
            ram_mb: 32_768,
            capacity: 2,
            ..NodeSpec::default()
        };
        let command = Command::RegisterNode {
            id: "n1".into(),
            spec: Box::new(spec),
        };
        self.members[0].app.submit(command).await.unwrap();
    }

    /// All that this release can.
    pub async fn raise_features(&self) {
        let level = Command::SetFeatures { level: SUPPORTED };
        self.members[0].app.submit(level).await.unwrap();
    }

    /// So many instances of template `t1` that run on a node `n2`, which takes no more.
    pub async fn started(&self, count: usize) -> Vec<String> {
        let app = &self.members[0].app;
        let spec = NodeSpec {
            name: "pc1".into(),
            arch: "amd64".into(),
            capacity: u32::try_from(count).unwrap(),
            ..NodeSpec::default()
        };
        let command = Command::RegisterNode {
            id: "n2".into(),
            spec: Box::new(spec),
        };
        app.submit(command).await.unwrap();
        let start = serde_json::json!({"vmid": "t1", "count": count});
        let ids = self.call(0, "POST", "/api/v1/vm", start).await.body();
        let ids: Vec<String> = serde_json::from_value(ids).unwrap();
        for id in &ids {
            let bindings = vec![Binding {
                instance: id.as_str().into(),
                node: "n2".into(),
                generation: 1,
            }];
            let bound = app.submit(Command::Bind { bindings }).await.unwrap();
            assert_eq!(bound, Outcome::Bound(1));
            let changes = vec![Observation {
                id: id.as_str().into(),
                generation: 2,
                phase: ObservedPhase::Running,
                vm: Some(VmInfo {
                    uuid: id.clone(),
                    status: "running".to_owned(),
                    ..VmInfo::default()
                }),
                script: None,
            }];
            let node = "n2".into();
            let seen = Command::Observe { node, changes };
            app.submit(seen).await.unwrap();
        }
        ids
    }

    /// What node `n2` says of a save.
    pub async fn report_save(&self, id: &str, said: SaveSaid, script: Option<ScriptResult>) {
        let command = Command::ReportSaves {
            node: "n2".into(),
            reports: vec![SaveReport {
                id: id.into(),
                said,
                script,
            }],
        };
        self.members[0].app.submit(command).await.unwrap();
    }

    /// Ask member `n` (from 0).
    pub async fn send(&self, n: usize, request: Request<Body>) -> Answer {
        let response = self.members[n].api.clone().oneshot(request).await.unwrap();
        read(response).await
    }
    pub async fn get(&self, n: usize, path: &str) -> Answer {
        self.send(n, Request::get(path).body(Body::empty()).unwrap())
            .await
    }
    pub async fn call(&self, n: usize, method: &str, path: &str, body: Value) -> Answer {
        let request = Request::builder().method(method).uri(path);
        self.send(n, request.body(Body::from(body.to_string())).unwrap())
            .await
    }

    pub async fn stop(self) {
        for member in &self.members {
            member.group.shutdown().await;
        }
    }
}

async fn read(response: Response<Body>) -> Answer {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    Answer {
        status: parts.status,
        headers: parts.headers,
        bytes,
    }
}
