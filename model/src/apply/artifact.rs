//! OCI artifacts are put, become visible when enough members hold their bytes, and are deleted. A
//! tag names an artifact only once that is visible; until then it names what it named before, and
//! of two puts that want one tag the later has it, whichever is copied first.
//!
//! An artifact that is a template tag as well is accepted with it and goes with it. Within one name a tag
//! is one thing: what is a template's tag names no other artifact, and the other way around.

use super::{Applied, check, template};
use crate::artifact::{self, Artifact, Repository, RepositoryTag};
use crate::command::ArtifactPut;
use crate::feature::ARTIFACT_ROOM;
use crate::ids::{Digest, MemberId, Sha256, TemplateId};
use crate::limits::{self, clip};
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn put(state: &mut State, put: &ArtifactPut) -> Applied {
    check_put(put)?;
    if state.retired.contains_key(&put.holder) {
        let text =
            "the member that holds the artifact was taken out of the cluster: push through another";
        return Err(Refusal::Conflict(text.to_owned()));
    }
    let name = put.repository.as_str();
    let (digest, needed) = (put.content.digest, put.copies_needed.max(1));
    let before = state.repositories.get(name);
    if before.is_none() {
        let repositories = state.repositories.len() + 1;
        check::count("repositories", repositories, limits::REPOSITORIES)?;
    }
    let known = before.and_then(|r| r.artifacts.get(&digest));
    check_room(before, known, put)?;
    if state.features >= ARTIFACT_ROOM {
        check_kind(known, put)?;
        check_bytes(state, before, known, put)?;
    }
    check_tags(state, known, put)?;
    let mut artifact = match known {
        Some(known) if stays(known, put) => known.clone(),
        _ => new_artifact(state, put, known),
    };
    // Last of what may refuse, first of what changes.
    artifact.template_tags.extend(link(state, put, needed)?);
    if artifact.content.bundle == put.content.bundle {
        artifact.holders.insert(put.holder);
    }
    let number = state.next_put(name);
    if !artifact.visible() {
        artifact.copies_needed = needed;
    }
    for tag in &put.tags {
        artifact.waiting_tags.insert(tag.clone(), number);
    }
    state.set_artifact(name, artifact);
    show(state, name, &digest, &put.voters);
    Ok(Outcome::Done)
}

/// The same bytes may be cut otherwise by another release: who is visible stays what it is.
fn stays(known: &Artifact, put: &ArtifactPut) -> bool {
    known.content.bundle == put.content.bundle || known.visible()
}

fn new_artifact(state: &State, put: &ArtifactPut, known: Option<&Artifact>) -> Artifact {
    Artifact {
        content: put.content.clone(),
        holders: BTreeSet::new(),
        copies_needed: 1,
        created_ms: state.clock_ms,
        visible_ms: None,
        waiting_tags: known.map(|k| k.waiting_tags.clone()).unwrap_or_default(),
        template_tags: known.map(|k| k.template_tags.clone()).unwrap_or_default(),
    }
}

fn check_put(put: &ArtifactPut) -> Result<(), Refusal> {
    let content = &put.content;
    check::name("repository name", &put.repository)?;
    check::count("tags of one put", put.tags.len(), limits::ARTIFACT_TAGS)?;
    let mut names = std::iter::once(&put.repository).chain(&put.tags);
    if names.any(|name| name.contains('\0')) {
        return Err(check::limit("a name with a zero byte"));
    }
    put.tags
        .iter()
        .try_for_each(|tag| check::name("tag name", tag))?;
    check::text("media type", &content.media_type, limits::NAME_BYTES)?;
    check::text("artifact type", &content.artifact_type, limits::NAME_BYTES)?;
    check::count(
        "blobs of an artifact",
        content.blobs.len(),
        limits::ARTIFACT_BLOBS,
    )
}

fn check_room(
    repository: Option<&Repository>,
    known: Option<&Artifact>,
    put: &ArtifactPut,
) -> Result<(), Refusal> {
    let Some(repository) = repository else {
        return Ok(());
    };
    if known.is_none() {
        let artifacts = repository.artifacts.len() + 1;
        check::count("artifacts of a repository", artifacts, limits::ARTIFACTS)?;
    }
    let waiting = known.map_or(0, |k| k.waiting_tags.len()) + put.tags.len();
    check::count(
        "tags that wait for an artifact",
        waiting,
        2 * limits::ARTIFACT_TAGS,
    )?;
    if let Some(known) = known {
        let mut holders = known.holders.clone();
        holders.insert(put.holder);
        check::count("holders of an artifact", holders.len(), limits::HOLDERS)?;
    }
    let fresh = put
        .tags
        .iter()
        .filter(|tag| !repository.tags.contains_key(*tag))
        .count();
    let tags = repository.tags.len() + fresh;
    check::count("tags of a repository", tags, limits::REPOSITORY_TAGS)
}

/// The same bytes under another media type are not what the first client put.
fn check_kind(known: Option<&Artifact>, put: &ArtifactPut) -> Result<(), Refusal> {
    let Some(known) = known.filter(|k| k.content.media_type != put.content.media_type) else {
        return Ok(());
    };
    let (digest, kind) = (known.content.digest, &known.content.media_type);
    let text = format!("manifest {digest} is here as {kind}: delete it, or put it as that");
    Err(Refusal::Conflict(text))
}

/// Room for what the put adds to all repositories. What adds nothing is never refused.
fn check_bytes(
    state: &State,
    repository: Option<&Repository>,
    known: Option<&Artifact>,
    put: &ArtifactPut,
) -> Result<(), Refusal> {
    let mut more = 0;
    if repository.is_none() {
        more += artifact::repository_weight(&put.repository);
    }
    if !known.is_some_and(|known| stays(known, put)) {
        let former = known.map_or(0, |known| known.content.weight());
        more += put.content.weight().saturating_sub(former);
    }
    let there = |tag: &String| {
        let named = repository.is_some_and(|r| r.tags.contains_key(tag));
        named || known.is_some_and(|k| k.waiting_tags.contains_key(tag))
    };
    let tags = put.tags.iter().filter(|tag| !there(tag));
    more += tags.map(|tag| artifact::tag_weight(tag)).sum::<u64>();
    let (now, most) = (state.repository_bytes(), limits::REPOSITORY_BYTES);
    if more == 0 || now.saturating_add(more) <= most {
        return Ok(());
    }
    Err(check::limit(format!(
        "the names of all artifacts take {now} bytes of every member's memory, this one {more} more, and at most {most} are allowed: delete manifests that nobody needs"
    )))
}

/// None of its tags is a tag of the template of this name, unless it is that tag.
fn check_tags(state: &State, known: Option<&Artifact>, put: &ArtifactPut) -> Result<(), Refusal> {
    let Some(template) = state.template_named(&put.repository) else {
        return Ok(());
    };
    let same = |number: u32| {
        let linked = (template.id.clone(), number);
        known.is_some_and(|k| k.template_tags.contains(&linked))
    };
    for tag in &put.tags {
        let becomes = put.template.as_ref().is_some_and(|t| t.tag == *tag);
        let found = template.tags.values().find(|t| t.name == *tag);
        if found.is_some_and(|t| !becomes && !same(t.number)) {
            return Err(Refusal::TagTaken(tag.clone()));
        }
    }
    Ok(())
}

/// The other way around: nothing but this template's tag has the name.
pub(super) fn check_free(state: &State, name: &str, tag: &str) -> Result<(), Refusal> {
    let Some(repository) = state.repositories.get(name) else {
        return Ok(());
    };
    let is_tag = |(id, number): &(TemplateId, u32)| {
        let known = state.templates.get(id).and_then(|t| t.tags.get(number));
        known.is_some_and(|t| t.name == tag)
    };
    let named = repository.tags.get(tag).map(|t| t.artifact);
    let other = |a: &Artifact| {
        let names = Some(a.content.digest) == named || a.waiting_tags.contains_key(tag);
        names && !a.template_tags.iter().any(is_tag)
    };
    if repository.artifacts.values().any(other) {
        return Err(Refusal::TagTaken(tag.to_owned()));
    }
    Ok(())
}

/// Publish the template tag that the artifact is as well.
fn link(
    state: &mut State,
    put: &ArtifactPut,
    copies_needed: u32,
) -> Result<Option<(TemplateId, u32)>, Refusal> {
    let Some(wanted) = &put.template else {
        return Ok(None);
    };
    let push = template::Push {
        template: &put.repository,
        tag: &wanted.tag,
        content: &wanted.content,
        holder: put.holder,
        copies_needed,
        voters: &put.voters,
    };
    match template::publish(state, &wanted.new_template_id, &push)? {
        Outcome::Published {
            template, number, ..
        } => Ok(Some((template, number))),
        _ => Ok(None),
    }
}

/// Make it visible if enough of `voters` hold it, and let its tags name it.
fn show(state: &mut State, name: &str, digest: &Sha256, voters: &BTreeSet<MemberId>) {
    let Some(mut artifact) = find(state, name, digest).cloned() else {
        return;
    };
    if !artifact.visible() {
        if !template::enough(&artifact.holders, voters, artifact.copies_needed) {
            return;
        }
        artifact.visible_ms = Some(state.clock_ms);
    }
    let waiting: BTreeMap<String, u64> = std::mem::take(&mut artifact.waiting_tags);
    state.set_artifact(name, artifact);
    for (tag, put) in waiting {
        let earlier = state.repositories.get(name).and_then(|r| r.tags.get(&tag));
        if earlier.is_none_or(|earlier| earlier.put < put) {
            let names = RepositoryTag {
                artifact: *digest,
                put,
            };
            state.set_repository_tag(name, &tag, Some(names));
        }
    }
}

fn find<'a>(state: &'a State, name: &str, digest: &Sha256) -> Option<&'a Artifact> {
    state.repositories.get(name)?.artifacts.get(digest)
}

/// Gained, with the voters of now, or lost.
pub(super) fn report_held(
    state: &mut State,
    name: &str,
    digest: &Sha256,
    bundle: &Digest,
    member: MemberId,
    gained: Option<&BTreeSet<MemberId>>,
) -> Applied {
    let found = find(state, name, digest).filter(|a| a.content.bundle == *bundle);
    let Some(mut artifact) = found.cloned() else {
        return Ok(Outcome::Done);
    };
    if let Some(voters) = gained {
        // Said before its end, heard after it.
        if state.retired.contains_key(&member) {
            return Ok(Outcome::Done);
        }
        if artifact.holders.insert(member) {
            check::count(
                "holders of an artifact",
                artifact.holders.len(),
                limits::HOLDERS,
            )?;
            state.set_artifact(name, artifact);
        } else if artifact.visible() {
            return Ok(Outcome::Done);
        }
        show(state, name, digest, voters);
    } else if artifact.holders.remove(&member) {
        state.set_artifact(name, artifact);
    }
    Ok(Outcome::Done)
}

/// See [`template::drop_holder`]: the same for artifacts.
pub(super) fn drop_holder(state: &mut State, member: MemberId, voters: &BTreeSet<MemberId>) {
    let left = u32::try_from(voters.len()).unwrap_or(u32::MAX).max(1);
    let mut hidden: Vec<(String, Sha256)> = Vec::new();
    state.edit_artifacts(|name, artifact| {
        let held = artifact.holders.remove(&member);
        let eased = !artifact.visible() && artifact.copies_needed > left;
        if eased {
            artifact.copies_needed = left;
        }
        if (held || eased) && !artifact.visible() {
            hidden.push((name.to_owned(), artifact.content.digest));
        }
        held || eased
    });
    for (name, digest) in hidden {
        show(state, &name, &digest, voters);
    }
}

pub(super) fn delete(state: &mut State, name: &str, digest: &Sha256) -> Applied {
    let repository = known(state, name)?;
    let artifact = repository.artifacts.get(digest);
    let artifact = artifact.ok_or(Refusal::ArtifactUnknown(*digest))?;
    let linked = artifact.template_tags.clone();
    drop_artifact(state, name, digest);
    for (id, number) in linked {
        template::drop_tags(state, &id, BTreeSet::from([number]));
    }
    Ok(Outcome::Done)
}

pub(super) fn delete_tag(state: &mut State, name: &str, tag: &str) -> Applied {
    let repository = known(state, name)?;
    let named = repository.tags.get(tag).map(|t| t.artifact);
    let touched: Vec<Artifact> = repository
        .artifacts
        .values()
        .filter(|a| Some(a.content.digest) == named || a.waiting_tags.contains_key(tag))
        .cloned()
        .collect();
    if touched.is_empty() {
        return Err(Refusal::TagUnknown(clip(tag, limits::NAME_BYTES)));
    }
    if named.is_some() {
        state.set_repository_tag(name, tag, None);
    }
    let mut linked = BTreeSet::new();
    for mut artifact in touched {
        linked.extend(artifact.template_tags.iter().cloned());
        if artifact.waiting_tags.remove(tag).is_some() {
            state.set_artifact(name, artifact);
        }
    }
    for (id, number) in linked {
        let known = state.templates.get(&id).and_then(|t| t.tags.get(&number));
        if known.is_some_and(|t| t.name == tag) {
            template::drop_tags(state, &id, BTreeSet::from([number]));
        }
    }
    Ok(Outcome::Done)
}

/// Tags of a template are about to go: the repository's tags of these names go with them where they
/// are the same, and artifacts that were nothing else.
pub(super) fn drop_linked(state: &mut State, id: &TemplateId, gone: impl Fn(u32) -> bool) {
    let Some(template) = state.templates.get(id) else {
        return;
    };
    let Some(repository) = state.repositories.get(&template.name) else {
        return;
    };
    let name = template.name.clone();
    let gone: BTreeMap<(TemplateId, u32), String> = template
        .tags
        .values()
        .filter(|t| gone(t.number))
        .map(|t| ((id.clone(), t.number), t.name.clone()))
        .collect();
    let linked = |a: &&Artifact| a.template_tags.iter().any(|tag| gone.contains_key(tag));
    let linked = repository.artifacts.values().filter(linked);
    let linked: Vec<Sha256> = linked.map(|a| a.content.digest).collect();
    for digest in linked {
        let Some(mut artifact) = find(state, &name, &digest).cloned() else {
            continue;
        };
        let former = std::mem::take(&mut artifact.template_tags);
        let (dropped, kept) = former.into_iter().partition(|tag| gone.contains_key(tag));
        artifact.template_tags = kept;
        if artifact.template_tags.is_empty() {
            drop_artifact(state, &name, &digest);
            continue;
        }
        let dropped: BTreeSet<(TemplateId, u32)> = dropped;
        for tag in dropped.iter().filter_map(|tag| gone.get(tag)) {
            artifact.waiting_tags.remove(tag);
            let named = state.repositories.get(&name).and_then(|r| r.tags.get(tag));
            if named.is_some_and(|t| t.artifact == digest) {
                state.set_repository_tag(&name, tag, None);
            }
        }
        state.set_artifact(&name, artifact);
    }
}

fn drop_artifact(state: &mut State, name: &str, digest: &Sha256) {
    let Some(repository) = state.repositories.get(name) else {
        return;
    };
    let tags = repository
        .tags
        .iter()
        .filter(|(_, t)| t.artifact == *digest);
    for tag in tags.map(|(tag, _)| tag.clone()).collect::<Vec<_>>() {
        state.set_repository_tag(name, &tag, None);
    }
    state.remove_artifact(name, digest);
    state.remove_empty_repository(name);
}

fn known<'a>(state: &'a State, name: &str) -> Result<&'a Repository, Refusal> {
    let unknown = || Refusal::RepositoryUnknown(clip(name, limits::NAME_BYTES));
    state.repositories.get(name).ok_or_else(unknown)
}
