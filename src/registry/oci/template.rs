//! Templates as OCI artifacts, both ways. A manifest of our artifact type is a template tag as well. A
//! template tag that was pushed otherwise is shown as such a manifest: made from the state and the
//! disk's SHA-256, the same bytes on every member, and kept as blobs for as long as somebody asks.
//!
//! The SHA-256 costs one pass over the whole disk. It is taken when a client first asks, by each member
//! for itself, and remembered while the tag lives.

use super::document::{Descriptor, Document, IMAGE};
use super::error::{OciError, bad_manifest, unavailable};
use super::ingest::Ingest;
use super::locate::Located;
use super::{file_name, route, serve};
use crate::app::Consistency;
use crate::registry::{RegistryService, replicate};
use mainstay_agent::transfer::{FileEntry, MACHINE_FILE, MEMORY_FILE, Manifest};
use mainstay_model::command::{ArtifactTemplate, TagContent};
use mainstay_model::ids::{Digest, Sha256};
use mainstay_model::instance::PortRule;
use mainstay_model::template::{Tag, Template};
use mainstay_model::{MemberId, State, limits};
use mainstay_storage::blobs::BlobEntry;
use mainstay_storage::chunks::ChunkId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Artifact type of a template tag.
pub(super) const TEMPLATE: &str = "application/vnd.mainstay.template.v1";
const CONFIG: &str = "application/vnd.mainstay.template.config.v1+json";
const QCOW2: &str = "application/vnd.mainstay.disk.v1.qcow2";
const RAW: &str = "application/vnd.mainstay.disk.v1.raw";
const MEMORY: &str = "application/vnd.mainstay.memory.v1";
const MACHINE: &str = "application/vnd.mainstay.machine.v1+json";
const TITLE: &str = "org.opencontainers.image.title";
/// Longest configuration that is read.
const CONFIG_MAX: u64 = 1 << 20;
/// Tags that are looked at for a digest that nobody knows any more.
const SEARCHED: usize = 64;
/// Scope of the remembered sums, before the digest of our manifest; of other files than the disk, `:` and the
/// file's place follow. No repository's name.
const SUMS: &str = "sum:";

/// What a template tag says beyond its disk.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Config {
    architecture: String,
    description: String,
    forwards: Vec<Forward>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Forward {
    name: String,
    guest_port: u16,
    host_port: u16,
}

/// The manifest of a template tag: member for member in this order, for its bytes have a digest.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    schema_version: u32,
    media_type: &'a str,
    artifact_type: &'a str,
    config: Part<'a>,
    layers: Vec<Part<'a>>,
}

#[derive(Serialize)]
struct Part<'a> {
    #[serde(rename = "mediaType")]
    media_type: &'a str,
    digest: String,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<&'a str, &'a str>>,
}

/// A template tag as an artifact.
pub(super) struct Derived {
    pub digest: Sha256,
    pub bytes: Vec<u8>,
    pub tag: String,
}

/// A visible tag, out of the state.
struct Source {
    tag: String,
    content: TagContent,
    holders: Vec<MemberId>,
}

impl Source {
    fn of(tag: &Tag) -> Self {
        Self {
            tag: tag.name.clone(),
            content: tag.content.clone(),
            holders: tag.holders.iter().copied().collect(),
        }
    }
}

/// The template of this name, if OCI clients can name it.
pub(super) fn named<'a>(state: &'a State, name: &str) -> Option<&'a Template> {
    let template = state.template_named(name)?;
    template.latest().is_some().then_some(template)
}

/// Its tags that OCI clients can name.
pub(super) fn tags(template: &Template) -> impl DoubleEndedIterator<Item = &Tag> {
    template.visible_tags().filter(|t| route::is_tag(&t.name))
}

impl RegistryService {
    /// The template side of a manifest that is put under `tags`, if it has one.
    pub(super) async fn template_of(
        self: &Arc<Self>,
        document: &Document,
        tags: &[String],
        found: &[(Sha256, Located)],
    ) -> Result<Option<ArtifactTemplate>, OciError> {
        let is_template = document.media_type == IMAGE
            && (document.artifact_type == TEMPLATE || document.artifact_type == CONFIG);
        let (true, Some(tag)) = (is_template, tags.first()) else {
            return Ok(None);
        };
        if tags.len() > 1 {
            return Err(bad_manifest("a template is put under one tag at a time"));
        }
        let (layer, saved) = match document.layers.as_slice() {
            [disk] => (disk, None),
            [disk, memory, machine]
                if memory.media_type == MEMORY && machine.media_type == MACHINE =>
            {
                (disk, Some([memory, machine]))
            }
            _ => {
                let text = "a template has one layer, its disk; a suspended one has memory and machine behind it";
                return Err(bad_manifest(text));
            }
        };
        let format = match layer.media_type.as_str() {
            QCOW2 => "qcow2",
            RAW => "raw",
            other => {
                let text = format!("{other:?} is not a disk: {QCOW2} and {RAW} are");
                return Err(bad_manifest(text));
            }
        };
        let config = self.read_config(document, found).await?;
        let file = |layer: &Descriptor, name: &str, format: &str| {
            let digest = route::digest(&layer.digest)?;
            let blob = found.iter().find(|(blob, _)| *blob == digest);
            let (_, blob) = blob.ok_or_else(|| super::document::lacks(&digest))?;
            Ok::<_, OciError>(FileEntry {
                name: name.to_owned(),
                format: format.to_owned(),
                ..blob.file.clone()
            })
        };
        let title = layer.annotations.as_ref().and_then(|a| a.get(TITLE));
        let name = title.cloned().unwrap_or_else(|| {
            let ending = if format == "qcow2" { "qcow2" } else { "img" };
            format!("disk.{ending}")
        });
        let mut files = vec![file(layer, &name, format)?];
        if let Some([memory, machine]) = saved {
            files.push(file(memory, MEMORY_FILE, "raw")?);
            files.push(file(machine, MACHINE_FILE, "raw")?);
        }
        let manifest = Manifest { version: 1, files };
        let size = manifest.size();
        let saved = manifest.saved().map_err(|e| bad_manifest(e.to_string()))?;
        let memory = saved.map(|_| MEMORY_FILE);
        let bytes = manifest.to_bytes();
        let bytes = bytes.map_err(|e| bad_manifest(e.to_string()))?;
        let content = TagContent {
            manifest: Digest(self.put_chunk(bytes).await?),
            size,
            arch: config.architecture,
            description: config.description,
            disk: TagContent::file_names(&name, memory),
            format: format.to_owned(),
            forwards: config.forwards.iter().map(rule).collect(),
        };
        if let Some(why) = self.unknown_memory(&content).await? {
            return Err(bad_manifest(why));
        }
        Ok(Some(ArtifactTemplate {
            new_template_id: crate::stamp::template_id(),
            tag: tag.clone(),
            content,
        }))
    }

    async fn read_config(
        self: &Arc<Self>,
        document: &Document,
        found: &[(Sha256, Located)],
    ) -> Result<Config, OciError> {
        let described = document.config.as_ref().filter(|c| c.media_type == CONFIG);
        let Some(described) = described else {
            return Ok(Config::default());
        };
        let digest = route::digest(&described.digest)?;
        let blob = found.iter().find(|(blob, _)| *blob == digest);
        let (_, blob) = blob.ok_or_else(|| super::document::lacks(&digest))?;
        if blob.file.size > CONFIG_MAX {
            return Err(bad_manifest("the template's configuration is over 1 MiB"));
        }
        let bytes = serve::whole(self, blob.file.clone(), blob.holders.clone()).await;
        let config: Config = serde_json::from_slice(&bytes.map_err(unavailable)?)
            .map_err(|e| bad_manifest(format!("the template's configuration: {e}")))?;
        let known = matches!(config.architecture.as_str(), "" | "amd64" | "arm64");
        let good = |f: &Forward| f.guest_port != 0 && !f.name.chars().any(char::is_control);
        if !known || config.forwards.len() > limits::PORT_RULES || !config.forwards.iter().all(good)
        {
            let text = "the template's configuration: architecture or forwards are not valid";
            return Err(bad_manifest(text));
        }
        Ok(config)
    }

    /// The template tag of this name as an artifact.
    pub(super) async fn derive_tag(
        self: &Arc<Self>,
        name: &str,
        tag: &str,
    ) -> Result<Option<Derived>, OciError> {
        let find = |state: &State| {
            let found = named(state, name)?.tag(tag)?;
            Some(Source::of(found))
        };
        match self.catalog.take(Consistency::Linearizable, find).await? {
            Some(source) => self.derive(name, source).await.map(Some),
            None => Ok(None),
        }
    }

    /// The template tag whose artifact has this digest.
    pub(super) async fn derive_digest(
        self: &Arc<Self>,
        name: &str,
        digest: &Sha256,
    ) -> Result<Option<Derived>, OciError> {
        let all = |state: &State| {
            let template = named(state, name)?;
            let newest = tags(template).rev().take(SEARCHED);
            Some(newest.map(Source::of).collect::<Vec<_>>())
        };
        let all = self.catalog.take(Consistency::Linearizable, all).await?;
        for source in all.into_iter().flatten() {
            let derived = self.derive(name, source).await?;
            if derived.digest == *digest {
                return Ok(Some(derived));
            }
        }
        Ok(None)
    }

    /// Make it, and keep its parts as blobs of the repository.
    async fn derive(self: &Arc<Self>, name: &str, source: Source) -> Result<Derived, OciError> {
        let content = &source.content;
        let files = self.files_of(content, &source.holders).await?;
        let mut sums = Vec::new();
        for (at, file) in files.iter().enumerate() {
            sums.push(self.sum(content, at, file, &source.holders).await?);
        }
        let config = Config {
            architecture: content.arch.clone(),
            description: content.description.clone(),
            forwards: content.forwards.iter().map(forward).collect(),
        };
        let config = serde_json::to_vec(&config).unwrap_or_default();
        let config_digest = self.keep(name, &config).await?;
        let disk = if content.format == "qcow2" {
            QCOW2
        } else {
            RAW
        };
        let layers = [disk, MEMORY, MACHINE].into_iter().zip(&files).zip(&sums);
        let layers = layers.map(|((media_type, file), sum)| Part {
            media_type,
            digest: sum.to_string(),
            size: file.size,
            annotations: Some(BTreeMap::from([(TITLE, file.name.as_str())])),
        });
        let shown = Shown {
            schema_version: 2,
            media_type: IMAGE,
            artifact_type: TEMPLATE,
            config: Part {
                media_type: CONFIG,
                digest: config_digest.to_string(),
                size: config.len() as u64,
                annotations: None,
            },
            layers: layers.collect(),
        };
        let bytes = serde_json::to_vec(&shown).unwrap_or_default();
        for (file, sum) in files.into_iter().zip(&sums) {
            let layer = FileEntry {
                name: file_name(sum),
                format: "raw".to_owned(),
                ..file
            };
            self.name_once(name, sum, layer).await?;
        }
        Ok(Derived {
            digest: self.keep(name, &bytes).await?,
            bytes,
            tag: source.tag,
        })
    }

    /// The tag's disk and, of a suspended VM, its memory and its machine.
    async fn files_of(
        &self,
        content: &TagContent,
        holders: &[MemberId],
    ) -> Result<Vec<FileEntry>, OciError> {
        let bytes = self.chunk(content.manifest.0, holders).await;
        let manifest = Manifest::parse(&bytes.map_err(unavailable)?);
        let manifest = manifest.map_err(|e| unavailable(e.to_string()))?;
        let saved = manifest.saved().map_err(|e| unavailable(e.to_string()))?;
        let saved = saved.map_or(vec![], |(memory, machine)| vec![memory, machine]);
        let files = std::iter::once(0).chain(saved);
        Ok(files.map(|at| manifest.files[at].clone()).collect())
    }

    /// A file's SHA-256, remembered or taken. The disk is the file 0.
    async fn sum(
        self: &Arc<Self>,
        content: &TagContent,
        at: usize,
        file: &FileEntry,
        holders: &[MemberId],
    ) -> Result<Sha256, OciError> {
        let mut scope = format!("{SUMS}{}", content.manifest);
        if at > 0 {
            scope = format!("{scope}:{at}");
        }
        let known = || self.names.first_in(&scope).map(|(name, _)| Sha256(name));
        if let Some(known) = known() {
            return Ok(known);
        }
        // One at a time: it costs a core and the disk.
        let turn = self.sums.acquire().await;
        let _turn = turn.map_err(|e| unavailable(e.to_string()))?;
        if let Some(known) = known() {
            return Ok(known);
        }
        let manifest = content.manifest.0;
        let brought = replicate::bring(self, manifest, holders, None).await;
        brought.map_err(unavailable)?;
        let (chunks, hashed) = (self.chunks.clone(), file.clone());
        let hashed = tokio::task::spawn_blocking(move || serve::hash(&chunks, &hashed)).await;
        let hashed = hashed.map_err(|e| unavailable(e.to_string()))?;
        let sum = hashed.map_err(unavailable)?;
        let entry = BlobEntry {
            size: file.size,
            chunk: ChunkId(manifest),
            // Not a matter of time: `forget_sums`.
            seen_ms: u64::MAX,
        };
        self.set_name(&scope, &sum, entry).await?;
        Ok(sum)
    }

    /// Small bytes as a blob of the repository.
    async fn keep(self: &Arc<Self>, name: &str, bytes: &[u8]) -> Result<Sha256, OciError> {
        let mut ingest = Ingest::default();
        ingest.append(self, bytes).await?;
        let (digest, file) = ingest.finish(self).await?;
        self.name_once(name, &digest, file).await?;
        Ok(digest)
    }

    async fn name_once(
        &self,
        name: &str,
        digest: &Sha256,
        file: FileEntry,
    ) -> Result<(), OciError> {
        let named = match self.names.get(name, &digest.0) {
            Some(entry) => self.renew_name(name, digest, &entry).await?,
            None => false,
        };
        if named {
            return Ok(());
        }
        self.name_blob(name, digest, file).await
    }

    /// Forget the sums of disks that no tag has any more.
    pub(super) async fn forget_sums(&self) -> Result<(), OciError> {
        let live = |state: &State| {
            let tags = state.templates.values().flat_map(|t| t.tags.values());
            let live = tags.map(|t| t.content.manifest.to_string());
            live.collect::<BTreeSet<String>>()
        };
        let live = self.catalog.take(Consistency::Stale, live).await?;
        for (scope, name, _) in self.names.all() {
            let of = scope.strip_prefix(SUMS).and_then(|s| s.split(':').next());
            if of.is_some_and(|manifest| !live.contains(manifest)) {
                self.forget_here(&scope, &Sha256(name)).await?;
            }
        }
        Ok(())
    }
}

fn rule(forward: &Forward) -> PortRule {
    PortRule {
        name: forward.name.clone(),
        guest_port: forward.guest_port,
        host_port: forward.host_port,
    }
}

fn forward(rule: &PortRule) -> Forward {
    Forward {
        name: rule.name.clone(),
        guest_port: rule.guest_port,
        host_port: rule.host_port,
    }
}
