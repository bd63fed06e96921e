//! Where a repository's blob is: uploaded to this member, named by an artifact, or uploaded to another
//! member and not named yet. The last is asked of all others, and believed only once its bytes were
//! fetched and hashed.

use super::error::OciError;
use super::{file_of, route, serve};
use crate::app::Consistency;
use crate::registry::answer::{self, Params};
use crate::registry::{RegistryService, replicate, walk};
use crate::stamp;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::StatusCode;
use mainstay_agent::transfer::{FileEntry, Id, Manifest, hex_id};
use mainstay_model::MemberId;
use mainstay_model::ids::Sha256;
use mainstay_storage::blobs::BlobEntry;
use mainstay_storage::chunks::{ChunkId, Record};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Asked of a member: the blobs that only it knows.
pub(super) const PATH: &str = "/registry/mainstay/v1/blob";
/// Longest wait for a member's word; one that is down refuses at once.
const PEER_MAX: Duration = Duration::from_secs(2);
/// A name that was asked for is renewed once it is so old.
const RENEW_AFTER: Duration = Duration::from_secs(3600);

/// A blob that is somewhere.
pub(super) struct Located {
    /// Its segments.
    pub file: FileEntry,
    /// Members that should have its bytes, if this one lacks some.
    pub holders: Vec<MemberId>,
    pub origin: Origin,
}

/// How it was found.
pub(super) enum Origin {
    /// Uploaded here.
    Here(BlobEntry),
    /// Committed.
    Named,
    /// Uploaded to another member: so that one says.
    There,
}

/// What a member says of a blob.
#[derive(Serialize, Deserialize)]
struct Told {
    /// The chunk that describes it.
    chunk: String,
}

impl RegistryService {
    /// The blob with this digest in the repository `name`.
    pub(super) async fn locate(
        self: &Arc<Self>,
        name: &str,
        digest: &Sha256,
    ) -> Result<Option<Located>, OciError> {
        let mut unread = None;
        if let Some(entry) = self.names.get(name, &digest.0) {
            match self.described(entry.chunk.0, &[], digest).await {
                Ok(file) => {
                    return Ok(Some(Located {
                        file,
                        holders: Vec::new(),
                        origin: Origin::Here(entry),
                    }));
                }
                Err(why) if self.is_lost(entry.chunk.0).await => {
                    tracing::warn!(why, %digest, "a blob's description is lost; the blob is not known any more");
                    self.forget_here(name, digest).await?;
                }
                Err(why) => unread = Some(why),
            }
        }
        if let Some(found) = self.locate_named(name, digest).await? {
            return Ok(Some(found));
        }
        if let Some(why) = unread {
            // It was acknowledged: who cannot look does not say that it is not there.
            let text = format!("the blob is here, and cannot be read now: {why}");
            return Err(super::error::unavailable(text));
        }
        self.locate_there(name, digest).await
    }

    /// Is it certain that this member has not got it, nor its bucket? Not while a disk or the bucket does
    /// not answer.
    async fn is_lost(&self, id: Id) -> bool {
        if self.chunks.shared() {
            return matches!(self.see_shared(vec![id]).await, Ok(lacking) if !lacking.is_empty());
        }
        let chunks = self.chunks.clone();
        let got = tokio::task::spawn_blocking(move || walk::get(&chunks, &id)).await;
        matches!(got, Ok(Ok(None)))
    }

    async fn locate_named(
        self: &Arc<Self>,
        name: &str,
        digest: &Sha256,
    ) -> Result<Option<Located>, OciError> {
        let find = |state: &mainstay_model::State| {
            let artifacts = state.repositories.get(name)?.artifacts.values();
            let naming = artifacts.filter(|a| {
                a.content.digest == *digest || a.content.blobs.iter().any(|b| b.digest == *digest)
            });
            // One that this member holds, if there is one.
            let best = naming.max_by_key(|a| (a.holders.contains(&self.member), a.visible()))?;
            let holders: Vec<MemberId> = best.holders.iter().copied().collect();
            Some((best.content.bundle, holders))
        };
        let found = self.catalog.take(Consistency::Linearizable, find).await?;
        let Some((bundle, holders)) = found else {
            return Ok(None);
        };
        let file = self.described(bundle.0, &holders, digest).await;
        let file = file.map_err(super::error::unavailable)?;
        Ok(Some(Located {
            file,
            holders,
            origin: Origin::Named,
        }))
    }

    async fn locate_there(
        self: &Arc<Self>,
        name: &str,
        digest: &Sha256,
    ) -> Result<Option<Located>, OciError> {
        let path = path(name, digest);
        let asked = self.sources(&[], 0).into_iter().map(|member| {
            let request = self.peers.request(reqwest::Method::GET, member, &path);
            async move {
                let answer = request?.timeout(PEER_MAX).send().await.ok()?;
                let answer = answer.error_for_status().ok()?;
                let told: Told = answer.json().await.ok()?;
                Some((member, hex_id(&told.chunk).ok()?))
            }
        });
        let told = futures::future::join_all(asked).await;
        let told: Vec<(MemberId, Id)> = told.into_iter().flatten().collect();
        let holders: Vec<MemberId> = told.iter().map(|(member, _)| *member).collect();
        let mut unread = None;
        for (member, chunk) in told {
            match self.described(chunk, &holders, digest).await {
                Ok(file) => {
                    return Ok(Some(Located {
                        file,
                        holders,
                        origin: Origin::There,
                    }));
                }
                Err(why) => {
                    tracing::warn!(%member, why, "a member knows a blob that cannot be read");
                    // Bytes that nobody can send are not there; a bucket that does not answer has them.
                    if self.chunks.shared() && !self.is_lost(chunk).await {
                        unread = Some(why);
                    }
                }
            }
        }
        unread.map_or(Ok(None), |why| {
            let text = format!("another member has the blob, and it cannot be read now: {why}");
            Err(super::error::unavailable(text))
        })
    }

    /// The file of this blob in a description or bundle.
    async fn described(
        &self,
        chunk: Id,
        holders: &[MemberId],
        digest: &Sha256,
    ) -> Result<FileEntry, String> {
        let bytes = self.chunk(chunk, holders).await?;
        let manifest = Manifest::parse(&bytes).map_err(|e| e.to_string())?;
        let file = file_of(&manifest.files, digest).cloned();
        file.ok_or_else(|| format!("{} does not name {digest}", hex::encode(chunk)))
    }

    /// A chunk's bytes, from here or from other members.
    pub(super) async fn chunk(&self, id: Id, holders: &[MemberId]) -> Result<Bytes, String> {
        for _ in 0..2 {
            let chunks = self.chunks.clone();
            let got = tokio::task::spawn_blocking(move || walk::get(&chunks, &id)).await;
            let got = got.map_err(|e| e.to_string())?;
            if let Some(bytes) = got.map_err(|e| answer::chain(&e))? {
                return Ok(bytes);
            }
            let (rest, said) = self.fetch(&[id], &self.sources(holders, 0)).await;
            if !rest.is_empty() {
                return Err(format!("no member has it: {}", said.join("; ")));
            }
        }
        Err("it does not stay: see the log for damage on this disk".to_owned())
    }

    /// Store small bytes as one chunk.
    pub(super) async fn put_chunk(&self, bytes: Vec<u8>) -> Result<Id, OciError> {
        let chunks = self.chunks.clone();
        let put = move || {
            let record = Record::encode(&bytes)?;
            let id = record.id.0;
            chunks.put(vec![record])?;
            Ok::<_, mainstay_storage::StorageError>(id)
        };
        let stored = tokio::task::spawn_blocking(put).await;
        Ok(stored.map_err(|e| super::error::unavailable(e.to_string()))??)
    }

    /// Give a blob whose bytes are all on this disk its name; durable on return.
    pub(super) async fn name_blob(
        &self,
        name: &str,
        digest: &Sha256,
        file: FileEntry,
    ) -> Result<(), OciError> {
        let size = file.size;
        let manifest = Manifest {
            version: 1,
            files: vec![file],
        };
        let bytes = manifest.to_bytes();
        let bytes = bytes.map_err(|e| super::error::bad_size(e.to_string()))?;
        let entry = BlobEntry {
            size,
            chunk: ChunkId(self.put_chunk(bytes).await?),
            seen_ms: stamp::now_ms(),
        };
        self.set_name(name, digest, entry).await
    }

    pub(super) async fn set_name(
        &self,
        name: &str,
        digest: &Sha256,
        entry: BlobEntry,
    ) -> Result<(), OciError> {
        let (names, scope, digest) = (self.names.clone(), name.to_owned(), digest.0);
        let put = move || names.put(&scope, digest, entry);
        let stored = tokio::task::spawn_blocking(put).await;
        Ok(stored.map_err(|e| super::error::unavailable(e.to_string()))??)
    }

    /// A client has asked for it, and may be about to name it: its time begins anew. Where another member
    /// has it, that one has done so when it was asked. `false`: it was deleted meanwhile.
    pub(super) async fn renew(
        &self,
        name: &str,
        digest: &Sha256,
        found: &Located,
    ) -> Result<bool, OciError> {
        match &found.origin {
            Origin::Here(entry) => self.renew_name(name, digest, entry).await,
            Origin::Named | Origin::There => Ok(true),
        }
    }

    pub(super) async fn renew_name(
        &self,
        name: &str,
        digest: &Sha256,
        entry: &BlobEntry,
    ) -> Result<bool, OciError> {
        let now = stamp::now_ms();
        if u128::from(now.saturating_sub(entry.seen_ms)) <= RENEW_AFTER.as_millis() {
            return Ok(true);
        }
        let (names, scope, digest) = (self.names.clone(), name.to_owned(), digest.0);
        let renew = move || names.renew(&scope, &digest, now);
        let renewed = tokio::task::spawn_blocking(renew).await;
        Ok(renewed.map_err(|e| super::error::unavailable(e.to_string()))??)
    }

    /// Bring a blob's bytes here, and name it in this repository.
    pub(super) async fn adopt(
        self: &Arc<Self>,
        name: &str,
        digest: &Sha256,
        found: Located,
    ) -> Result<(), String> {
        let manifest = Manifest {
            version: 1,
            files: vec![found.file.clone()],
        };
        let bytes = manifest.to_bytes().map_err(|e| e.to_string())?;
        let stored = self.put_chunk(bytes).await;
        let id = stored.map_err(|e| format!("could not store its description: {e:?}"))?;
        // Held until it has its name.
        let lease = self.leases.begin(self.collect.grace);
        lease.manifest(id);
        replicate::bring(self, id, &found.holders, None).await?;
        self.check(digest, &found).await?;
        let named = self.name_blob(name, digest, found.file).await;
        named.map_err(|e| format!("could not name it: {e:?}"))
    }

    /// Hash what another member said is this blob; its chunks are here.
    pub(super) async fn check(&self, digest: &Sha256, found: &Located) -> Result<(), String> {
        if !matches!(found.origin, Origin::There) {
            return Ok(());
        }
        let (chunks, file) = (self.chunks.clone(), found.file.clone());
        let hash = move || serve::hash(&chunks, &file);
        let hashed = tokio::task::spawn_blocking(hash).await;
        match hashed.map_err(|e| e.to_string())?? {
            hashed if hashed == *digest => Ok(()),
            other => Err(format!("what another member calls {digest} is {other}")),
        }
    }

    pub(super) async fn forget_here(&self, name: &str, digest: &Sha256) -> Result<bool, OciError> {
        let (names, scope, digest) = (self.names.clone(), name.to_owned(), digest.0);
        let forget = move || names.remove(&scope, &digest);
        let forgotten = tokio::task::spawn_blocking(forget).await;
        Ok(forgotten.map_err(|e| super::error::unavailable(e.to_string()))??)
    }

    /// Forget an unnamed blob on every member; `false`: nobody knew it. One that does not answer may
    /// know it, and bring it back: 503, until all have answered.
    pub(super) async fn forget_everywhere(
        &self,
        name: &str,
        digest: &Sha256,
    ) -> Result<bool, OciError> {
        let mut known = self.forget_here(name, digest).await?;
        let path = path(name, digest);
        let members = self.sources(&[], 0);
        let asked = members.iter().map(|member| {
            let request = self.peers.request(reqwest::Method::DELETE, *member, &path);
            async move {
                let answer = request?.timeout(PEER_MAX).send().await.ok()?;
                let status = answer.status();
                (status.is_success() || status == StatusCode::NOT_FOUND).then_some(status)
            }
        });
        let said = futures::future::join_all(asked).await;
        let mut silent = Vec::new();
        for (member, said) in members.iter().zip(said) {
            match said {
                Some(status) => known |= status.is_success(),
                None => silent.push(member),
            }
        }
        if silent.is_empty() {
            return Ok(known);
        }
        let status = self.catalog.watch().borrow().clone();
        let name_of = |id: &&MemberId| status.members.get(&id.0).map(|m| m.member.name.as_str());
        let silent: Vec<&str> = silent.iter().filter_map(name_of).collect();
        Err(super::error::unavailable(format!(
            "deleted where it could be, but {} did not answer and may still have it: delete it again, or it goes by itself 24 hours after it was last asked for",
            silent.join(", ")
        )))
    }

    /// Members that should have the bytes of any of these.
    pub(super) fn holders_of(found: &[(Sha256, Located)]) -> Vec<MemberId> {
        let all = found.iter().flat_map(|(_, f)| f.holders.iter().copied());
        all.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

fn path(name: &str, digest: &Sha256) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("repository", name);
    query.append_pair("digest", &digest.to_string());
    format!("{PATH}?{}", query.finish())
}

/// Which blob a member asks about.
fn asked(request: &Request) -> Result<(String, Sha256), OciError> {
    let params = Params::from_query(request.uri());
    let name = params.get("repository").unwrap_or_default();
    route::check_name(name)?;
    let digest = route::digest(params.get("digest").unwrap_or_default())?;
    Ok((name.to_owned(), digest))
}

/// `GET`: does this member know the blob by an upload? Members ask because a client has: it is renewed.
pub(super) async fn answer(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Response {
    let (name, digest) = match asked(&request) {
        Ok(asked) => asked,
        Err(error) => return error.into_response(),
    };
    let Some(entry) = service.names.get(&name, &digest.0) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    match service.renew_name(&name, &digest, &entry).await {
        Ok(true) => {}
        Ok(false) => return StatusCode::NOT_FOUND.into_response(),
        // Here it is, until its time is over.
        Err(error) => tracing::warn!(?error, %digest, "could not renew a blob's name"),
    }
    let told = Told {
        chunk: entry.chunk.to_string(),
    };
    axum::Json(told).into_response()
}

/// `DELETE`: forget it.
pub(super) async fn forget(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Response {
    let forgotten = match asked(&request) {
        Ok((name, digest)) => service.forget_here(&name, &digest).await,
        Err(error) => Err(error),
    };
    match forgotten {
        Ok(true) => StatusCode::OK.into_response(),
        Ok(false) => StatusCode::NOT_FOUND.into_response(),
        Err(error) => error.into_response(),
    }
}
