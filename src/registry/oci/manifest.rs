//! OCI manifests over HTTP. A put is answered when a majority of the voters holds the manifest and
//! everything it names, and its tags name it.

use super::document::{Document, MANIFEST_MAX, lacks};
use super::error::{
    OciAnswer, OciError, bad_digest, bad_manifest, denied, full, method_not_allowed, no_manifest,
    no_repository, too_many, unavailable,
};
use super::ingest::Ingest;
use super::locate::Located;
use super::route::{self, Reference};
use super::template::{self, Derived};
use super::{CONTENT_DIGEST, STILL_MAX, document, file_of, serve, value};
use crate::app::{AppError, Consistency};
use crate::registry::catalog::voters;
use crate::registry::quota::NotAdded;
use crate::registry::roots::Lease;
use crate::registry::{RegistryService, answer, replicate};
use crate::stamp;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{HeaderName, Method, StatusCode, header};
use mainstay_agent::transfer::{FileEntry, Manifest};
use mainstay_model::artifact::{Artifact, ArtifactContent, Blob};
use mainstay_model::command::{Addition, ArtifactPut, ArtifactTemplate, TagSelector};
use mainstay_model::ids::{Digest, Sha256};
use mainstay_model::{Command, State, TemplateId, limits};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// A manifest must arrive within this.
const BODY_MAX: Duration = Duration::from_secs(60);
/// Blobs of a manifest that are looked for at once.
const LOCATED_AT_ONCE: usize = 16;
/// Longest wait for a majority's copies.
const VISIBLE_MAX: Duration = Duration::from_secs(120);
const SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const TAG: HeaderName = HeaderName::from_static("oci-tag");

impl RegistryService {
    /// Requests to a manifest.
    pub(super) async fn manifest(
        self: &Arc<Self>,
        name: &str,
        reference: &str,
        request: Request,
    ) -> OciAnswer {
        let parsed = route::reference(reference);
        match *request.method() {
            Method::GET | Method::HEAD => {
                let reference = parsed.ok_or_else(|| no_manifest(shown(reference)))?;
                let head = request.method() == Method::HEAD;
                self.show_manifest(name, &reference, head).await
            }
            Method::PUT => match parsed {
                Some(reference) => self.put_manifest(name, reference, request).await,
                None if reference.contains(':') => Err(route::digest(reference)
                    .err()
                    .unwrap_or_else(|| bad_digest("not a digest"))),
                None => Err(bad_manifest(format!(
                    "{:?} is neither a tag nor a digest",
                    shown(reference)
                ))),
            },
            Method::DELETE => {
                let reference = parsed.ok_or_else(|| no_manifest(shown(reference)))?;
                self.delete_manifest(name, reference).await
            }
            _ => Err(method_not_allowed()),
        }
    }

    /// The visible artifact that this names, by tag or digest.
    async fn find_artifact(&self, name: &str, reference: &Reference) -> Result<Artifact, OciError> {
        let find = |state: &State| {
            let Some(repository) = state.repositories.get(name) else {
                // A template alone: it has no artifact of its own.
                return template::named(state, name).map(|_| None);
            };
            Some(match reference {
                Reference::Tag(tag) => repository.tagged(tag).cloned(),
                Reference::Digest(digest) => repository.artifact(digest).cloned(),
            })
        };
        let found = self.catalog.take(Consistency::Linearizable, find).await?;
        let found = found.ok_or_else(|| no_repository(name))?;
        found.ok_or_else(|| match reference {
            Reference::Tag(tag) => no_manifest(tag),
            Reference::Digest(digest) => no_manifest(digest),
        })
    }

    /// A template tag under this name.
    async fn find_template(
        self: &Arc<Self>,
        name: &str,
        reference: &Reference,
    ) -> Result<Option<Derived>, OciError> {
        match reference {
            Reference::Tag(tag) => self.derive_tag(name, tag).await,
            Reference::Digest(digest) => self.derive_digest(name, digest).await,
        }
    }

    async fn show_manifest(
        self: &Arc<Self>,
        name: &str,
        reference: &Reference,
        head: bool,
    ) -> OciAnswer {
        let artifact = match self.find_artifact(name, reference).await {
            Ok(artifact) => artifact,
            Err(unknown) if unknown.is_unknown() => {
                let derived = self.find_template(name, reference).await?;
                let derived = derived.ok_or(unknown)?;
                if !head {
                    self.note_pull(name, &derived.tag).await?;
                }
                let size = derived.bytes.len() as u64;
                let body = if head { Vec::new() } else { derived.bytes };
                return Ok(shown_as(
                    document::IMAGE,
                    size,
                    &derived.digest,
                    body.into(),
                ));
            }
            Err(other) => return Err(other),
        };
        let content = &artifact.content;
        let body = match head {
            true => Body::empty(),
            false => {
                for tag in &artifact.template_tags {
                    self.pulls.note(tag.clone());
                }
                let bytes = self.manifest_bytes(&artifact).await;
                Body::from(bytes.map_err(unavailable)?)
            }
        };
        let (kind, size) = (&content.media_type, content.size);
        Ok(shown_as(kind, size, &content.digest, body))
    }

    /// A template's tag is pulled by its OCI manifest.
    async fn note_pull(&self, name: &str, tag: &str) -> Result<(), OciError> {
        let find = |state: &State| {
            let template = template::named(state, name)?;
            let number = template.tag(tag)?.number;
            Some((template.id.clone(), number))
        };
        if let Some(tag) = self.catalog.take(Consistency::Stale, find).await? {
            self.pulls.note(tag);
        }
        Ok(())
    }

    /// The OCI manifest's own bytes.
    pub(super) async fn manifest_bytes(
        self: &Arc<Self>,
        artifact: &Artifact,
    ) -> Result<Vec<u8>, String> {
        let content = &artifact.content;
        let holders: Vec<_> = artifact.holders.iter().copied().collect();
        let bundle = self.chunk(content.bundle.0, &holders).await?;
        let bundle = Manifest::parse(&bundle).map_err(|e| e.to_string())?;
        let file = file_of(&bundle.files, &content.digest)
            .filter(|file| file.size <= MANIFEST_MAX as u64)
            .ok_or("the bundle does not hold its manifest")?;
        serve::whole(self, file.clone(), holders).await
    }

    async fn put_manifest(
        self: &Arc<Self>,
        name: &str,
        reference: Reference,
        request: Request,
    ) -> OciAnswer {
        (self.room)().map_err(full)?;
        let mut tags = query_tags(&request)?;
        let content_type = content_type(&request);
        let (bytes, room) = self.read_manifest(request).await?;
        let document = Document::parse(&bytes, &content_type)?;
        let (digest, own) = self.ingest_manifest(&bytes).await?;
        match reference {
            Reference::Digest(named) if named != digest => {
                let text = format!("the manifest is {digest}, not {named}");
                return Err(bad_digest(text));
            }
            Reference::Digest(_) => {}
            Reference::Tag(tag) => tags = vec![tag],
        }
        self.check_kind(name, &digest, &document.media_type).await?;
        let mut lease = self.leases.begin(self.collect.grace);
        let (content, found) = self.bundle(name, &document, digest, own, &lease).await?;
        let template = self.template_of(&document, &tags, &found).await?;
        if let Some(template) = &template {
            lease.manifest(template.content.manifest.0);
        }
        let subject = document.subject;
        // What took room is not kept while members copy.
        drop((bytes, document, found, room));
        lease.linger();
        self.commit(name, &tags, content, template, lease).await?;
        tracing::info!(repository = name, %digest, ?tags, "OCI manifest put");
        let mut response = StatusCode::CREATED.into_response();
        let headers = response.headers_mut();
        let location = format!("/v2/{name}/manifests/{digest}");
        headers.insert(header::LOCATION, value(&location));
        headers.insert(CONTENT_DIGEST, value(&digest.to_string()));
        if let Some(subject) = subject {
            headers.insert(SUBJECT, value(&subject.to_string()));
        }
        if !tags.is_empty() {
            headers.insert(TAG, value(&tags.join(", ")));
        }
        Ok(response)
    }

    /// Bytes are one thing: those that are known are not known as something else as well.
    async fn check_kind(&self, name: &str, digest: &Sha256, kind: &str) -> Result<(), OciError> {
        let known = |state: &State| {
            let artifact = state.repositories.get(name)?.artifacts.get(digest)?;
            let known = &artifact.content.media_type;
            (known != kind).then(|| known.clone())
        };
        let known = self.catalog.take(Consistency::Linearizable, known).await?;
        known.map_or(Ok(()), |known| {
            let text = format!("manifest {digest} is here as {known}, not {kind}: delete that first, or write mediaType into it");
            Err(bad_manifest(text))
        })
    }

    async fn ingest_manifest(
        self: &Arc<Self>,
        bytes: &[u8],
    ) -> Result<(Sha256, FileEntry), OciError> {
        let mut ingest = Ingest::default();
        ingest.append(self, bytes).await?;
        ingest.finish(self).await
    }

    /// Everything that the manifest names, on this disk, listed in one bundle.
    async fn bundle(
        self: &Arc<Self>,
        name: &str,
        document: &Document,
        digest: Sha256,
        own: FileEntry,
        lease: &Lease,
    ) -> Result<(ArtifactContent, Vec<(Sha256, Located)>), OciError> {
        let size = own.size;
        let mut found: Vec<(Sha256, Located)> = Vec::with_capacity(document.blobs.len());
        let questions = document.blobs.clone().into_iter().map(|named| {
            let (service, name) = (Arc::clone(self), name.to_owned());
            async move {
                let located = service.locate(&name, &named.digest).await;
                (named, located)
            }
        });
        let mut answers = futures::stream::iter(questions).buffered(LOCATED_AT_ONCE);
        while let Some((named, located)) = answers.next().await {
            match located? {
                Some(located) if located.file.size == named.size => {
                    found.push((named.digest, located));
                }
                Some(located) => {
                    let text = format!(
                        "blob {} has {} bytes, the manifest says {}",
                        named.digest, located.file.size, named.size
                    );
                    return Err(bad_manifest(text));
                }
                None if named.foreign => {}
                None => return Err(lacks(&named.digest)),
            }
        }
        if let Some(child) = self.lacking_child(name, document).await? {
            return Err(lacks(&child));
        }
        let others = found.iter().filter(|(blob, _)| *blob != digest);
        let files = std::iter::once(own).chain(others.map(|(_, f)| f.file.clone()));
        let bundle = Manifest {
            version: 1,
            files: files.collect(),
        };
        let bundle = bundle.to_bytes().map_err(|e| bad_manifest(e.to_string()))?;
        let bundle = self.put_chunk(bundle).await?;
        // From here on the collector keeps all that it reaches; what was removed before is fetched now.
        lease.manifest(bundle);
        let holders = Self::holders_of(&found);
        let brought = replicate::bring(self, bundle, &holders, None).await;
        brought.map_err(|why| unavailable(format!("a blob cannot be had: {why}")))?;
        for (blob, located) in &found {
            self.check(blob, located).await.map_err(|why| {
                tracing::error!(why, "a blob of another member is not what it is called");
                lacks(blob)
            })?;
        }
        let blobs = found.iter().map(|(digest, located)| Blob {
            digest: *digest,
            size: located.file.size,
        });
        let content = ArtifactContent {
            digest,
            size,
            media_type: document.media_type.clone(),
            artifact_type: document.artifact_type.clone(),
            subject: document.subject,
            blobs: blobs.collect(),
            bundle: Digest(bundle),
        };
        Ok((content, found))
    }

    /// A manifest that an index names and the repository does not have.
    async fn lacking_child(
        &self,
        name: &str,
        document: &Document,
    ) -> Result<Option<Sha256>, OciError> {
        let lacking = |state: &State| {
            let repository = state.repositories.get(name);
            let there = |child: &Sha256| repository.is_some_and(|r| r.artifact(child).is_some());
            document
                .children
                .iter()
                .copied()
                .find(|child| !there(child))
        };
        Ok(self
            .catalog
            .take(Consistency::Linearizable, lacking)
            .await?)
    }

    /// Let the group commit it, and wait until it and its tags are visible.
    async fn commit(
        &self,
        name: &str,
        tags: &[String],
        content: ArtifactContent,
        template: Option<ArtifactTemplate>,
        lease: Lease,
    ) -> Result<(), OciError> {
        let voters = voters(&self.catalog.members().await?);
        let count = u32::try_from(voters.len()).unwrap_or(u32::MAX);
        if count == 0 {
            return Err(unavailable("the member list is not known yet: try again"));
        }
        let digest = content.digest;
        let put = ArtifactPut {
            repository: name.to_owned(),
            tags: tags.to_vec(),
            content,
            template,
            holder: self.member,
            copies_needed: count / 2 + 1,
            voters,
        };
        let named = (name, put.content.bundle.0);
        let what = Addition::Artifact(Box::new(put));
        let outcome = self.add(stamp::command_id(), named, what).await;
        if !matches!(outcome, Err(NotAdded::App(AppError::Group(_)))) {
            lease.settled();
        }
        outcome.map_err(|error| match error {
            NotAdded::Over(why) => denied(why),
            NotAdded::Unweighed(refused) => unavailable(refused.message()),
            NotAdded::App(error) => error.into(),
        })?;
        self.wait_shown(name, &digest, tags).await
    }

    async fn wait_shown(
        &self,
        name: &str,
        digest: &Sha256,
        tags: &[String],
    ) -> Result<(), OciError> {
        let until = Instant::now() + VISIBLE_MAX;
        let mut changes = self.catalog.watch();
        let shown = |state: &State| {
            let repository = state.repositories.get(name)?;
            let artifact = repository.artifacts.get(digest)?;
            let waits = |tag: &String| artifact.waiting_tags.contains_key(tag);
            let template = |(id, number): &(TemplateId, u32)| {
                let tag = state.templates.get(id).and_then(|t| t.tags.get(number));
                tag.is_none_or(|t| t.visible)
            };
            let whole = artifact.template_tags.iter().all(template);
            Some(artifact.visible() && whole && !tags.iter().any(waits))
        };
        let mut consistency = Consistency::Linearizable;
        loop {
            match self.catalog.take(consistency, shown).await? {
                Some(true) => return Ok(()),
                Some(false) => {}
                None => {
                    let text = "the manifest was deleted right after it was put";
                    return Err(OciError::new(StatusCode::CONFLICT, "DENIED", text));
                }
            }
            let changed = tokio::time::timeout_at(until, changes.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                let text = "the manifest is stored and committed, but not yet held by a majority of the members; it becomes visible by itself, or put it again";
                return Err(unavailable(text));
            }
            changes.borrow_and_update();
            consistency = Consistency::Stale;
        }
    }

    async fn delete_manifest(self: &Arc<Self>, name: &str, reference: Reference) -> OciAnswer {
        let repository = name.to_owned();
        let command = match reference.clone() {
            Reference::Tag(tag) => Command::DeleteArtifactTag { repository, tag },
            Reference::Digest(digest) => Command::DeleteArtifact { repository, digest },
        };
        let deleted = self.catalog.submit(stamp::command_id(), command).await;
        match deleted.map_err(OciError::from) {
            Err(unknown) if unknown.is_unknown() => {
                self.delete_template_tag(name, &reference, unknown).await?;
            }
            other => {
                other?;
            }
        }
        Ok(StatusCode::ACCEPTED.into_response())
    }

    /// A tag that is a template's only.
    async fn delete_template_tag(
        self: &Arc<Self>,
        name: &str,
        reference: &Reference,
        unknown: OciError,
    ) -> Result<(), OciError> {
        let tag = match reference {
            Reference::Tag(tag) => tag.clone(),
            Reference::Digest(digest) => match self.derive_digest(name, digest).await? {
                Some(derived) => derived.tag,
                None => return Err(unknown),
            },
        };
        let id = |state: &State| {
            let found = template::named(state, name)?;
            found.tag(&tag).map(|_| found.id.clone())
        };
        let id = self.catalog.take(Consistency::Linearizable, id).await?;
        let command = Command::DeleteTag {
            id: id.ok_or(unknown)?,
            selector: TagSelector::Name(tag),
        };
        self.catalog.submit(stamp::command_id(), command).await?;
        Ok(())
    }
}

fn shown_as(kind: &str, size: u64, digest: &Sha256, body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, value(kind)),
        (header::CONTENT_LENGTH, size.into()),
        (CONTENT_DIGEST, value(&digest.to_string())),
    ];
    (StatusCode::OK, headers, body).into_response()
}

/// What a client called it, short enough for an answer.
fn shown(reference: &str) -> String {
    reference.chars().take(200).collect()
}

/// Tags that shall name it as well.
fn query_tags(request: &Request) -> Result<Vec<String>, OciError> {
    let query = request.uri().query().unwrap_or_default();
    let pairs = form_urlencoded::parse(query.as_bytes());
    let tags = pairs.filter(|(name, _)| name == "tag");
    let tags: Vec<String> = tags.map(|(_, tag)| tag.into_owned()).collect();
    if tags.len() > limits::ARTIFACT_TAGS {
        let text = format!("at most {} tags at once", limits::ARTIFACT_TAGS);
        return Err(OciError::new(
            StatusCode::URI_TOO_LONG,
            "TOOMANYREQUESTS",
            text,
        ));
    }
    match tags.iter().find(|tag| !route::is_tag(tag)) {
        Some(bad) => Err(bad_manifest(format!("{:?} is not a tag", shown(bad)))),
        None => Ok(tags),
    }
}

fn content_type(request: &Request) -> String {
    let value = request.headers().get(header::CONTENT_TYPE);
    let text = value.and_then(|v| v.to_str().ok()).unwrap_or_default();
    let bare = text.split(';').next().unwrap_or_default();
    bare.trim().to_owned()
}

/// Counts every KiB of a body against what all manifests may take together, as it comes: one that sends
/// nothing holds nothing.
struct Reading {
    budget: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    bytes: Vec<u8>,
}

impl Reading {
    fn take(&mut self, piece: &[u8]) -> Result<(), OciError> {
        let len = self.bytes.len() + piece.len();
        if len > MANIFEST_MAX {
            return Err(too_long());
        }
        let held = self
            .held
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits);
        let more = (len / 1024 + 1).saturating_sub(held);
        let budget = Arc::clone(&self.budget);
        let more = budget.try_acquire_many_owned(u32::try_from(more).unwrap_or(u32::MAX));
        let more = more.map_err(|_| too_many("too many manifests at once: try again", 1))?;
        match &mut self.held {
            Some(held) => held.merge(more),
            None => self.held = Some(more),
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }
}

fn too_long() -> OciError {
    let text = format!("a manifest has at most {MANIFEST_MAX} bytes");
    OciError::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", text)
}

impl RegistryService {
    /// A manifest's bytes, and the room that they take.
    async fn read_manifest(
        &self,
        request: Request,
    ) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), OciError> {
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|len| len > MANIFEST_MAX) {
            return Err(too_long());
        }
        let until = Instant::now() + BODY_MAX;
        let mut reading = Reading {
            budget: Arc::clone(&self.uploads.manifests),
            held: None,
            bytes: Vec::new(),
        };
        let mut stream = request.into_body().into_data_stream();
        loop {
            let still = (Instant::now() + STILL_MAX).min(until);
            match tokio::time::timeout_at(still, stream.next()).await {
                Ok(Some(Ok(piece))) => reading.take(&piece)?,
                Ok(None) => return Ok((reading.bytes, reading.held)),
                Ok(Some(Err(e))) => {
                    let why = answer::chain(&e);
                    return Err(bad_manifest(format!("the body was cut off: {why}")));
                }
                Err(_) => {
                    let text = "the body is too slow, or stalled";
                    let (status, code) = (StatusCode::REQUEST_TIMEOUT, "MANIFEST_INVALID");
                    return Err(OciError::new(status, code, text));
                }
            }
        }
    }
}
