//! From chunks to a tag: the member checks that it holds everything a manifest reaches, then lets
//! the group commit the name. Nothing that the client claims is believed.

use super::RegistryService;
use super::answer::{self, Answer, Params, Refused, bad, fail, ok};
use super::catalog::voters;
use super::quota::NotAdded;
use super::walk::{Reach, WalkError};
use crate::app::{AppError, Consistency};
use crate::stamp;
use axum::extract::{Request, State};
use http::StatusCode;
use mainstay_agent::transfer::api::{Durability, PublishRequest, TagInfo};
use mainstay_agent::transfer::{Manifest, hex_id};
use mainstay_model::command::{Addition, TagContent, TagPush, TagSelector};
use mainstay_model::ids::Digest;
use mainstay_model::instance::PortRule;
use mainstay_model::save::SavedDisk;
use mainstay_model::template::{Tag, Template};
use mainstay_model::{Command, CommandId, MemberId, Outcome, SaveId, TemplateId};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Characters of a template's or tag's name.
const NAME_MAX: usize = 128;
/// Bytes of a description.
const DESCRIPTION_MAX: usize = 4096;
/// Port forwards of a tag.
const FORWARDS_MAX: usize = 64;
/// Longest wait for a tag to be held, in seconds.
const WAIT_MAX_S: u32 = 30;

/// `POST publish`.
pub(super) async fn publish(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    service.publish(request).await.map(ok)
}

/// `GET tag`: one tag, visible or not; with `wait`, once it is visible, and `copies` voters hold it, or the
/// time is over.
pub(super) async fn look_up(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    let params = Params::from_query(request.uri());
    let (which, wait) = (Which::from(&params)?, params.number("wait")?.unwrap_or(0));
    let copies = params.number("copies")?.unwrap_or(0);
    let tag = service.wait_held(&which, wait, copies).await?;
    tag.map(ok).ok_or_else(|| fail(StatusCode::OK, "Not found"))
}

/// `DELETE tag`: one tag, visible or not, and no other.
pub(super) async fn delete_tag(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    let params = Params::read(request).await?;
    let which = Which::from(&params)?;
    if which.tag.is_none() && which.number.is_none() {
        return Err(bad("tag or number is missing: which tag shall go?"));
    }
    let find = |state: &mainstay_model::State| {
        let (template, tag) = which.find(state)?;
        Some((template.id.clone(), tag.number))
    };
    let found = service
        .catalog
        .take(Consistency::Linearizable, find)
        .await?;
    let (id, number) = found.ok_or_else(|| fail(StatusCode::OK, "Not found"))?;
    let selector = TagSelector::Number(number);
    let command = Command::DeleteTag { id, selector };
    service.catalog.submit(stamp::command_id(), command).await?;
    Ok(answer::done())
}

/// How a request names a tag.
#[derive(Clone, Debug)]
pub(super) struct Which {
    /// Id or name.
    template: String,
    tag: Option<String>,
    number: Option<u32>,
}

impl Which {
    /// `template` and `tag` or `number`; the newest tag if neither is there.
    pub(super) fn from(params: &Params) -> Result<Self, Refused> {
        let template = params
            .get("template")
            .ok_or_else(|| bad("template is missing"))?;
        let number = params.number("number")?;
        Ok(Self {
            template: template.to_owned(),
            tag: params.get("tag").map(str::to_owned),
            number,
        })
    }

    /// The tag, visible or not.
    pub(super) fn find<'a>(
        &self,
        state: &'a mainstay_model::State,
    ) -> Option<(&'a Template, &'a Tag)> {
        let by_id = state
            .templates
            .get(&TemplateId::from(self.template.as_str()));
        let template =
            by_id.or_else(|| state.templates.values().find(|t| t.name == self.template))?;
        let fits = |tag: &&Tag| {
            self.number.is_none_or(|n| tag.number == n)
                && self.tag.as_ref().is_none_or(|name| tag.name == *name)
        };
        let tag = template.tags.values().rfind(fits)?;
        Some((template, tag))
    }
}

/// `copies` are asked for, if it is visible already.
fn info(template: &Template, tag: &Tag, voters: &BTreeSet<MemberId>, copies: u32) -> TagInfo {
    let held = tag.holders.intersection(voters).count();
    TagInfo {
        copies: Some(u32::try_from(held).unwrap_or(u32::MAX)),
        template_id: template.id.to_string(),
        template: template.name.clone(),
        tag: tag.name.clone(),
        number: tag.number,
        manifest: tag.content.manifest.to_string(),
        size: tag.content.size,
        visible: tag.visible,
        holders: tag.holders.iter().map(ToString::to_string).collect(),
        copies_needed: match tag.visible && copies > 0 {
            true => copies,
            false => tag.copies_needed,
        },
    }
}

impl RegistryService {
    async fn publish(&self, request: Request) -> Result<TagInfo, Refused> {
        let request: PublishRequest =
            answer::read_object(request.into_body(), "a publish request").await?;
        check(&request).map_err(bad)?;
        let save = (!request.save.is_empty()).then(|| SaveId::from(request.save.as_str()));
        let id = command_id(&request)?;
        let digest = hex_id(&request.manifest).map_err(|e| bad(e.to_string()))?;
        // From here on the collector keeps all that it reaches; what was removed before is lacking now.
        let mut lease = self.leases.begin(self.collect.grace);
        lease.manifest(digest);
        let manifest = self.whole(digest).await?;
        // All of it is on the disk.
        self.reserved.end(&request.request_id);
        let content = content(&request, Digest(digest), &manifest)?;
        if let Some(why) = self.unknown_memory(&content).await? {
            return Err(fail(StatusCode::OK, why));
        }
        let voters = voters(&self.catalog.members().await?);
        let copies_needed = copies_needed(request.durability, voters.len())?;
        let holder = self.member;
        let what = match save {
            Some(save) => Addition::Saved(Box::new(SavedDisk {
                save,
                template: request.template.clone(),
                manifest: content.manifest,
                size: content.size,
                disk: content.disk,
                format: content.format,
                holder,
                copies_needed,
                voters,
            })),
            None => Addition::Tag(Box::new(TagPush {
                new_template_id: stamp::template_id(),
                template: request.template.clone(),
                tag: request.tag.clone(),
                content,
                holder,
                copies_needed,
                voters,
            })),
        };
        lease.linger();
        let named = (request.template.as_str(), digest);
        let outcome = self.add(id, named, what).await;
        if !matches!(outcome, Err(NotAdded::App(AppError::Group(_)))) {
            lease.settled();
        }
        let outcome = outcome.map_err(|error| match error {
            NotAdded::Over(why) => fail(StatusCode::OK, why),
            NotAdded::Unweighed(refused) => refused,
            NotAdded::App(error) => error.into(),
        })?;
        let Outcome::Published {
            template,
            number,
            visible,
        } = outcome
        else {
            return Err(fail(
                StatusCode::INTERNAL_SERVER_ERROR,
                "publishing answered otherwise",
            ));
        };
        tracing::info!(%template, number, tag = request.tag, visible, "tag published");
        let which = Which {
            template: template.to_string(),
            tag: None,
            number: Some(number),
        };
        let seen = self.wait_held(&which, request.wait, copies_needed).await;
        let gone = || {
            fail(
                StatusCode::OK,
                "the tag was deleted right after it was published",
            )
        };
        seen?.ok_or_else(gone)
    }

    /// Why a tag like this cannot be published now: there is a member that does not know what the memory of a
    /// suspended VM is.
    pub(super) async fn unknown_memory(
        &self,
        content: &TagContent,
    ) -> Result<Option<&'static str>, AppError> {
        if content.memory().is_none() {
            return Ok(None);
        }
        let level = |state: &mainstay_model::State| state.features;
        let level = self.catalog.take(Consistency::Linearizable, level).await?;
        Ok((level < mainstay_model::feature::SUSPENDED).then_some(
            "a member of this cluster is of a release that knows no suspended templates: upgrade it first",
        ))
    }

    /// The manifest, if this member holds everything it reaches.
    async fn whole(&self, digest: [u8; 32]) -> Result<Manifest, Refused> {
        let walked = self.walk(digest).await;
        let lacking = |count: usize| {
            let text = format!("this member lacks {count} chunks of it: send them first");
            fail(StatusCode::CONFLICT, text)
        };
        match walked {
            Ok(Reach::Known(known)) if known.lacking.is_empty() => Ok(known.manifest),
            Ok(Reach::Known(known)) => Err(lacking(known.lacking.len())),
            Ok(Reach::Names(names)) => Err(lacking(names.len())),
            Err(WalkError::Invalid(e)) => Err(bad(e.to_string())),
            Err(WalkError::Storage(e)) => Err(answer::storage(&e)),
        }
    }

    /// A tag, once it is visible and held by `copies` voters, or `wait_s` seconds are over.
    async fn wait_held(
        &self,
        which: &Which,
        wait_s: u32,
        copies: u32,
    ) -> Result<Option<TagInfo>, AppError> {
        let until = Instant::now() + Duration::from_secs(wait_s.min(WAIT_MAX_S).into());
        let mut changes = self.catalog.watch();
        let mut consistency = Consistency::Linearizable;
        loop {
            let voters = voters(&changes.borrow_and_update());
            let find = |state: &mainstay_model::State| {
                let (template, tag) = which.find(state)?;
                Some(info(template, tag, &voters, copies))
            };
            let seen = self.catalog.take(consistency, find).await?;
            let lacks = |tag: &TagInfo| !tag.visible || tag.copies.is_some_and(|c| c < copies);
            if !seen.as_ref().is_some_and(lacks) || Instant::now() >= until {
                return Ok(seen);
            }
            // Time over, or the group has stopped: what was seen last is the answer.
            let changed = tokio::time::timeout_at(until, changes.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return Ok(seen);
            }
            consistency = Consistency::Stale;
        }
    }
}

pub(super) fn copies_needed(durability: Durability, voters: usize) -> Result<u32, Refused> {
    let voters = u32::try_from(voters).unwrap_or(u32::MAX);
    if voters == 0 {
        let text = "the member list is not known yet: try again";
        return Err(fail(StatusCode::SERVICE_UNAVAILABLE, text));
    }
    Ok(match durability {
        Durability::Majority => voters / 2 + 1,
        Durability::All => voters,
        Durability::One => 1,
    })
}

fn command_id(request: &PublishRequest) -> Result<CommandId, Refused> {
    if request.request_id.is_empty() {
        return Ok(stamp::command_id());
    }
    let uuid = uuid::Uuid::parse_str(&request.request_id)
        .map_err(|_| bad(format!("request_id {:?} is not a UUID", request.request_id)))?;
    Ok(CommandId(uuid.as_u128()))
}

fn content(
    request: &PublishRequest,
    manifest: Digest,
    files: &Manifest,
) -> Result<TagContent, Refused> {
    let disk = files
        .files
        .first()
        .ok_or_else(|| bad("the manifest has no file"))?;
    let forward = |f: &mainstay_agent::transfer::api::Forward| PortRule {
        name: f.name.clone(),
        guest_port: f.guest_port,
        host_port: f.host_port,
    };
    let saved = files.saved().map_err(|e| bad(e.to_string()))?;
    let memory = saved.map(|(memory, _)| files.files[memory].name.as_str());
    Ok(TagContent {
        manifest,
        size: files.size(),
        arch: request.arch.clone(),
        description: request.description.clone(),
        disk: TagContent::file_names(&disk.name, memory),
        format: disk.format.clone(),
        forwards: request.forwards.iter().map(forward).collect(),
    })
}

fn check(request: &PublishRequest) -> Result<(), String> {
    check_name("template", &request.template)?;
    check_name("tag", &request.tag)?;
    if request.description.len() > DESCRIPTION_MAX {
        return Err(format!("the description is over {DESCRIPTION_MAX} bytes"));
    }
    if !matches!(request.arch.as_str(), "" | "amd64" | "arm64") {
        return Err(format!(
            "arch {:?} is not known, amd64 and arm64 are",
            request.arch
        ));
    }
    if request.forwards.len() > FORWARDS_MAX {
        return Err(format!("more than {FORWARDS_MAX} port forwards"));
    }
    let bad = |f: &&mainstay_agent::transfer::api::Forward| {
        f.guest_port == 0 || f.name.len() > NAME_MAX || f.name.chars().any(char::is_control)
    };
    match request.forwards.iter().find(bad) {
        Some(f) => Err(format!("port forward {:?}: port 0 or a bad name", f.name)),
        None => Ok(()),
    }
}

/// Names appear in paths, URLs, terminals and logs.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), String> {
    let bad = |c: char| c.is_control() || c == '/' || c == '\\';
    let fits = !name.is_empty()
        && name.chars().count() <= NAME_MAX
        && name.trim() == name
        && name != "."
        && name != ".."
        && !name.chars().any(bad);
    if fits {
        return Ok(());
    }
    Err(format!(
        "{what} {name:?} is refused: 1 to {NAME_MAX} characters, no '/', '\\' or control characters, \
         no space at the ends, not '.' or '..'"
    ))
}
