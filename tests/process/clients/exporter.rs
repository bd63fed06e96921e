//! The Prometheus exporter: five lists and the status, over one client without a limit of time; its address is
//! not trimmed, so every path begins with two slashes. It decodes into unsigned numbers, counts into a map by
//! architecture that has two keys, and asks for a template's tags only when its size has changed.
//!
//! Shortened: a round every 0.5 s instead of 15 s, while the other replays change what there is.

use super::Site;
use super::gitlab::GO;
use super::read::{self, body, go_float, go_list, go_text, go_uint};
use super::wire::{Load, Wire};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Rounds against each member: while VMs boot and end.
const ROUNDS: usize = 12;
const PAUSE: Duration = Duration::from_millis(500);
/// It has none; one that hangs would stop all of them.
const LIMIT: Duration = Duration::from_secs(15);

struct Exporter {
    wire: Wire,
    /// Size and number of tags of each template, as last seen.
    sizes: BTreeMap<String, (u64, usize)>,
    asked_for_tags: usize,
    /// Answers that came packed.
    packed: usize,
}

impl Exporter {
    /// HTTP statuses are not looked at.
    async fn get(&mut self, path: &str) -> Value {
        let answer = self.wire.send("GET", path, &[], &Load::Nothing).await;
        let answer = answer.unwrap_or_else(|why| panic!("{path}: {why:?}"));
        self.packed += usize::from(answer.packed);
        body(&read::sound(&answer, path)).clone()
    }

    async fn round(&mut self) {
        let status = self.get("//api/v1/status").await;
        assert_eq!(go_text(&status, "status"), "Running");
        let registry = go_text(&status, "registry_status");
        assert!(["Running", "FAIL"].contains(&registry), "{status}");
        let nodes = self.get("//api/v1/node").await;
        self.nodes(&nodes);
        let list = self.get("//api/v1/vm").await;
        for wrapper in read::instances(&list) {
            let vm = &wrapper["vm"];
            go_text(vm, "node_id");
            go_text(vm, "group_id");
            read::go_time(vm, "cr_time");
            read::go_time(vm, "ts");
        }
        let disk = self.get("//api/v1/registry/disk").await;
        assert!(go_uint(&disk, "total") >= go_uint(&disk, "free"), "{disk}");
        self.templates().await;
    }

    fn nodes(&self, nodes: &Value) {
        let mut by_arch = BTreeMap::from([("amd64", 0), ("arm64", 0)]);
        for node in read::items(nodes) {
            read::node(node);
            let arch = go_text(node, "host_arch");
            *by_arch
                .get_mut(arch)
                .expect("assignment to entry in nil map") += 1;
            for name in [
                "cpu_count",
                "vm_count",
                "vcpu_count",
                "vram",
                "ram",
                "disk_size",
                "free_disk_space",
                "anka_disk_usage",
                "capacity",
            ] {
                go_uint(node, name);
            }
            for name in ["cpu_util", "ram_util"] {
                assert!((0.0..=1.0).contains(&go_float(node, name)), "{node}");
            }
            for group in go_list(node, "groups") {
                assert!(!go_text(group, "id").is_empty() && !go_text(group, "name").is_empty());
            }
        }
    }

    async fn templates(&mut self) {
        let list = self.get("//api/v1/registry/vm").await;
        for template in read::items(&list) {
            let id = go_text(template, "id").to_owned();
            let size = go_uint(template, "size");
            if self.sizes.get(&id).is_some_and(|(known, _)| *known == size) {
                continue;
            }
            self.asked_for_tags += 1;
            let path = format!("//api/v1/registry/vm?id={id}");
            let answer = self.wire.send("GET", &path, &[], &Load::Nothing).await;
            let json = read::sound(&answer.unwrap(), &path);
            // Between the list and this, its last tag may have been deleted.
            if json["message"] == "Not found" {
                continue;
            }
            let tags = go_list(body(&json), "versions");
            assert!(tags.iter().all(|tag| !go_text(tag, "tag").is_empty()));
            let sum: u64 = tags.iter().map(|tag| go_uint(tag, "size")).sum();
            let same = go_uint(body(&json), "size") == sum;
            assert!(same, "a change of its tags shows in its size: {json}");
            self.sizes.insert(id, (size, tags.len()));
        }
    }
}

pub(super) async fn replay(site: Arc<Site>, n: usize) {
    let mut exporter = Exporter {
        wire: Wire::new(site.api(n), LIMIT, &GO),
        sizes: BTreeMap::new(),
        asked_for_tags: 0,
        packed: 0,
    };
    for _ in 0..ROUNDS {
        exporter.round().await;
        tokio::time::sleep(PAUSE).await;
    }
    let templates = exporter.sizes.len();
    assert!(templates >= 4, "{:?}", exporter.sizes);
    let asked = exporter.asked_for_tags;
    assert!(asked < templates * ROUNDS, "only when sizes change");
    assert!(exporter.packed > 0, "lists of some length are packed");
    let requests = ROUNDS * 5 + asked;
    assert_eq!(
        exporter.wire.reused as usize,
        requests - 1,
        "one connection"
    );
}
