//! Repositories of OCI artifacts: names, digests and who holds the bytes. Never the bytes.
//!
//! ```text
//! PutArtifact -> held by one, its tags wait -> held by enough: visible, its tags name it
//! ```

use crate::ids::{Digest, MemberId, Sha256, TemplateId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Artifacts and their tags under one name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Repository {
    /// By the digest of the OCI manifest.
    pub artifacts: BTreeMap<Sha256, Artifact>,
    /// Tags of visible artifacts, in ASCII order.
    pub tags: BTreeMap<String, RepositoryTag>,
    /// Puts so far: of two that want the same tag, the later one keeps it.
    pub puts: u64,
}

/// What a tag names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryTag {
    /// The OCI manifest.
    pub artifact: Sha256,
    /// Number of the put that said so.
    pub put: u64,
}

/// An OCI manifest with everything it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Artifact {
    /// What it is made of.
    pub content: ArtifactContent,
    /// Members with every byte, verified and durable.
    pub holders: BTreeSet<MemberId>,
    /// Verified copies that make it visible.
    pub copies_needed: u32,
    /// Accepted at.
    pub created_ms: u64,
    /// Was held by `copies_needed` voters of that time since then; never goes back.
    pub visible_ms: Option<u64>,
    /// Tags that will name it once it is visible, each with the number of the put that asked.
    pub waiting_tags: BTreeMap<String, u64>,
    /// The template tags that it is as well. They go with it, and it goes with the last of them.
    pub template_tags: BTreeSet<(TemplateId, u32)>,
}

/// What an artifact is made of, and what is worth finding without its bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArtifactContent {
    /// SHA-256 of the OCI manifest's bytes.
    pub digest: Sha256,
    /// Length of the OCI manifest.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
    /// Its artifact type, or its config's media type; empty if it has neither.
    pub artifact_type: String,
    /// The OCI manifest that it is about.
    pub subject: Option<Sha256>,
    /// The blobs that it names and that are kept here, each once.
    pub blobs: Vec<Blob>,
    /// BLAKE3 of the manifest (ours) with the OCI manifest and all blobs as files.
    pub bundle: Digest,
}

/// Bytes as OCI clients name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// SHA-256.
    pub digest: Sha256,
    /// Length.
    pub size: u64,
}

/// What a record costs beyond what it names: keys, pointers, holders, numbers.
const RECORD: u64 = 512;
/// What each thing costs that stands in a list of its own.
const ENTRY: u64 = 96;

impl Artifact {
    /// Enough members hold it.
    pub fn visible(&self) -> bool {
        self.visible_ms.is_some()
    }

    /// What it counts for in [`crate::limits::REPOSITORY_BYTES`]. A tag that waits counts as the tag that
    /// it will be, so that showing it never needs more room than there is. Template tags have bounds of
    /// their own.
    pub fn weight(&self) -> u64 {
        let waiting = self.waiting_tags.keys().map(|tag| tag_weight(tag));
        self.content.weight() + waiting.sum::<u64>()
    }
}

impl ArtifactContent {
    pub(crate) fn weight(&self) -> u64 {
        let texts = self.media_type.len() + self.artifact_type.len();
        RECORD + texts as u64 + 40 * self.blobs.len() as u64
    }
}

/// What a tag counts for; the name stands in it, and in its key.
pub(crate) fn tag_weight(name: &str) -> u64 {
    ENTRY + 2 * name.len() as u64
}

/// What a repository of this name counts for beside what is in it.
pub(crate) fn repository_weight(name: &str) -> u64 {
    ENTRY + name.len() as u64
}

impl Repository {
    /// What it counts for, all in all.
    pub(crate) fn weight(&self, name: &str) -> u64 {
        let artifacts = self.artifacts.values().map(Artifact::weight);
        let tags = self.tags.keys().map(|tag| tag_weight(tag));
        repository_weight(name) + artifacts.sum::<u64>() + tags.sum::<u64>()
    }

    /// The visible artifact with this digest.
    pub fn artifact(&self, digest: &Sha256) -> Option<&Artifact> {
        self.artifacts.get(digest).filter(|a| a.visible())
    }

    /// The artifact that this tag names.
    pub fn tagged(&self, tag: &str) -> Option<&Artifact> {
        self.artifact(&self.tags.get(tag)?.artifact)
    }
}
