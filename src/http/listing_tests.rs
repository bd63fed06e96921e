//! The kept list is, after whatever happened, what would be rendered from nothing; and little is made anew.

use super::View;
use super::instances::Wrapper;
use super::listing::{Kept, takes_gzip};
use super::view_tests::{Cloud, vm};
use axum::response::Response;
use flate2::read::GzDecoder;
use futures::executor::block_on;
use http::{HeaderMap, HeaderValue, header};
use http_body_util::BodyExt as _;
use mainstay_agent::wire::NodeStats;
use mainstay_model::InstanceId;
use mainstay_model::command::Command;
use mainstay_model::instance::{InstanceState, ObservedPhase, StartRequest, Value};
use mainstay_model::node::NodeConfig;
use serde_json::Value as Json;
use std::io::Read as _;

fn body(response: Response) -> Vec<u8> {
    let told = response.headers()[header::CONTENT_LENGTH].clone();
    let bytes = block_on(response.into_body().collect()).unwrap().to_bytes();
    assert_eq!(told.to_str().unwrap(), bytes.len().to_string());
    bytes.to_vec()
}

/// Bring the list up to date, so many instances at a time; it is right, packed and plain. How many pages were made?
fn update(kept: &mut Kept, view: View<'_>, most: usize) -> usize {
    let mut made = 0;
    loop {
        let draft = kept.look(view, most);
        let packed = draft.pack().unwrap();
        let whole = draft.whole;
        assert!(whole || !packed.is_empty(), "each look gets on");
        made += packed.len();
        kept.keep(draft, packed);
        if whole {
            break;
        }
    }
    let all = view.state.instances.values();
    let all: Vec<_> = all.map(|i| Wrapper::new(view, i)).collect();
    let right = serde_json::to_string(&all).unwrap();
    let right = format!(r#"{{"status":"OK","message":"","body":{right}}}"#);
    let plain = body(kept.list().response(false));
    assert_eq!(String::from_utf8(plain).unwrap(), right);
    let packed = kept.list().response(true);
    assert_eq!(packed.headers()[header::CONTENT_ENCODING], "gzip");
    let packed = body(packed);
    let mut gzip = GzDecoder::new(packed.as_slice());
    let mut unpacked = Vec::new();
    gzip.read_to_end(&mut unpacked).unwrap();
    assert!(unpacked == right.as_bytes());
    assert!(
        gzip.into_inner().is_empty(),
        "one stream, and nothing after it"
    );
    made
}

/// The list's `body`.
pub(super) fn listed(view: View<'_>) -> Json {
    let mut kept = Kept::default();
    update(&mut kept, view, usize::MAX);
    let mut list: Json = serde_json::from_slice(&body(kept.list().response(false))).unwrap();
    list["body"].take()
}

/// As random as ids are, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
    fn id(&mut self) -> InstanceId {
        let (a, b) = (self.roll(u64::MAX), self.roll(1 << 48));
        format!("{:08x}-0000-4000-8000-{b:012x}", a >> 32).into()
    }
}

fn cloud(instances: usize, dice: &mut Dice) -> Cloud {
    let mut cloud = Cloud::default()
        .with_template("v1", "", 1)
        .with_node()
        .with_instance("seed", |_| {});
    let request = cloud.state.instances[&"seed".into()].request.clone();
    for n in (0..instances).step_by(100) {
        let ids = (n..instances.min(n + 100)).map(|_| dice.id()).collect();
        let request = Box::new(request.clone());
        cloud.apply(Command::StartInstances { ids, request });
    }
    cloud
}

#[test]
fn after_each_of_many_changes_the_list_is_right() {
    let mut dice = Dice(0x5eed);
    let mut cloud = cloud(150, &mut dice);
    let config = NodeConfig {
        capacity: Some(1000),
        ..NodeConfig::default()
    };
    let id = "n1".into();
    cloud.apply(Command::ConfigureNode { id, config });
    let (mut kept, mut coarse) = (Kept::default(), Kept::default());
    for step in 0..600 {
        let all: Vec<InstanceId> = cloud.state.instances.keys().cloned().collect();
        let id = all[usize::try_from(dice.roll(all.len() as u64)).unwrap()].clone();
        let instance = cloud.state.instances[&id].clone();
        let placed = instance.node.is_some() && instance.ended_ms.is_none();
        let name = id.to_string();
        match dice.roll(9) {
            0 => {
                cloud = cloud.with_instance(dice.id().as_str(), |r: &mut StartRequest| {
                    r.name = Some("new".into())
                })
            }
            1 | 2 if instance.waits() => cloud = cloud.bound(&name),
            3 if placed => cloud = cloud.seen(&name, ObservedPhase::Pulling, None, None),
            4 if placed => {
                let vm = vm(&[("ssh", 22, 10_000), ("vnc", 5900, 10_001)]);
                cloud = cloud.seen(&name, ObservedPhase::Running, Some(vm), None);
            }
            5 => {
                let metadata = [("step".to_owned(), Value::Int(step))].into();
                let (name, external_id) = (Some(format!("é{step}")), None);
                cloud.apply(Command::UpdateInstance {
                    id,
                    name,
                    external_id,
                    metadata,
                });
            }
            6 if placed => {
                cloud.apply(Command::TerminateInstance { id });
                cloud = cloud.seen(&name, ObservedPhase::Gone, None, None);
            }
            7 => {
                let host = Some(format!("10.0.0.{}", dice.roll(3)));
                let config = NodeConfig {
                    host,
                    ..NodeConfig::default()
                };
                let id = "n1".into();
                cloud.apply(Command::ConfigureNode { id, config });
            }
            8 if instance.state == InstanceState::Pulling => {
                let heard = crate::agents::liveness::Heard {
                    node: "n1".into(),
                    stats: NodeStats::default(),
                    progress: vec![(name, step as f32 / 600.0)],
                    ..Default::default()
                };
                cloud.soft.hear(&heard);
            }
            _ => continue,
        }
        update(&mut kept, cloud.view(), 1);
        if step % 7 == 0 {
            update(&mut coarse, cloud.view(), usize::MAX);
        }
    }
}

#[test]
fn what_did_not_change_is_not_made_again() {
    let mut dice = Dice(7);
    let mut cloud = cloud(2000, &mut dice);
    let mut kept = Kept::default();
    let pages = update(&mut kept, cloud.view(), 100);
    assert!((80..200).contains(&pages), "{pages} pages");
    assert_eq!(update(&mut kept, cloud.view(), 100), 0);
    let id = cloud.state.instances.keys().nth(700).unwrap().clone();
    let change = |id: &InstanceId, name: &str| Command::UpdateInstance {
        id: id.clone(),
        name: Some(name.into()),
        external_id: None,
        metadata: Default::default(),
    };
    cloud.apply(change(&id, "changed"));
    assert_eq!(update(&mut kept, cloud.view(), 100), 1);
    cloud = cloud.with_instance(dice.id().as_str(), |_| {});
    let made = update(&mut kept, cloud.view(), 100);
    assert!(made <= 2, "{made} pages for one more instance");
    // A state that takes the place of this one: whatever it holds, nothing of the old one is taken for it.
    let mut other = self::cloud(0, &mut Dice(9));
    for (n, name) in ["a", "b"].into_iter().enumerate() {
        let id = other.state.instances.keys().next().unwrap().clone();
        other.apply(change(&id, name));
        assert_eq!(update(&mut kept, other.view(), 100), 1, "{n}");
    }
}

#[test]
fn who_takes_gzip() {
    for (said, takes) in [
        ("gzip", true),
        ("deflate, gzip;q=1.0, *;q=0.5", true),
        ("br, x-gzip", true),
        ("*", true),
        ("identity", false),
        ("gzip;q=0", false),
        ("br;q=1.0, gzip; q=0.000", false),
        ("gzipped", false),
        ("", false),
    ] {
        let mut headers = HeaderMap::new();
        let value = HeaderValue::from_static(said);
        headers.insert(header::ACCEPT_ENCODING, value);
        assert_eq!(takes_gzip(&headers), takes, "{said}");
    }
    assert!(!takes_gzip(&HeaderMap::new()));
}
