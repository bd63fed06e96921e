//! Small values that tests share.

use mainstay_model::artifact::{ArtifactContent, Blob};
use mainstay_model::command::TagContent;
use mainstay_model::ids::{Digest, Sha256};
use mainstay_model::instance::{PortRule, StartRequest};
use mainstay_model::metadata::Metadata;
use mainstay_model::node::NodeSpec;

pub fn request(template: &str) -> StartRequest {
    StartRequest {
        template: template.into(),
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
        metadata: Metadata::default(),
        port_forwarding: None,
    }
}

pub fn digest(seed: u8) -> Digest {
    Digest([seed; 32])
}

pub fn sha256(seed: u8) -> Sha256 {
    Sha256([seed; 32])
}

/// An artifact of two blobs about artifact `seed + 1`.
pub fn artifact(seed: u8) -> ArtifactContent {
    ArtifactContent {
        digest: sha256(seed),
        size: 500,
        media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
        artifact_type: "application/vnd.example".to_owned(),
        subject: Some(sha256(seed + 1)),
        blobs: [100, 101]
            .map(|blob| Blob {
                digest: sha256(blob),
                size: u64::from(blob) << 20,
            })
            .into(),
        bundle: digest(seed),
    }
}

pub fn content(seed: u8, arch: &str) -> TagContent {
    TagContent {
        manifest: digest(seed),
        size: 1 << 30,
        arch: arch.to_owned(),
        description: String::new(),
        disk: "disk.qcow2".to_owned(),
        format: "qcow2".to_owned(),
        forwards: vec![PortRule {
            name: "ssh".to_owned(),
            guest_port: 22,
            host_port: 0,
        }],
    }
}

pub fn spec(name: &str, capacity: u32) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        ip_address: "192.0.2.1".to_owned(),
        arch: "amd64".to_owned(),
        cpu_count: 4,
        ram_mb: 16_384,
        disk_bytes: 1 << 40,
        capacity,
        groups: Vec::new(),
        agent_version: "0.1.0".to_owned(),
        driver: "fake".to_owned(),
    }
}

/// A small deterministic source of choices (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// 0..n
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}
