//! From chunks to a tag: the member checks that it holds everything a manifest reaches, then lets
//! the group commit the name. Nothing that the client claims is believed.

use super::RegistryService;
use super::answer::{self, Answer, Params, Refused, bad, fail, ok};
use super::catalog::voters;
use super::walk::{Reach, WalkError};
use crate::app::{AppError, Consistency};
use crate::stamp;
use axum::extract::{Request, State};
use http::StatusCode;
use mainstay_agent::transfer::api::{Durability, PublishRequest, TagInfo};
use mainstay_agent::transfer::{Manifest, hex_id};
use mainstay_model::command::{TagContent, TagSelector};
use mainstay_model::ids::Digest;
use mainstay_model::instance::PortRule;
use mainstay_model::template::{Tag, Template};
use mainstay_model::{Command, CommandId, Outcome, TemplateId};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Characters of a template's or tag's name.
const NAME_MAX: usize = 128;
/// Bytes of a description.
const DESCRIPTION_MAX: usize = 4096;
/// Port forwards of a tag.
const FORWARDS_MAX: usize = 64;
/// Longest wait for a tag to be visible, in seconds.
const WAIT_MAX_S: u32 = 30;

/// `POST publish`.
pub(super) async fn publish(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    service.publish(request).await.map(ok)
}

/// `GET tag`: one tag, visible or not; with `wait`, once it is visible or the time is over.
pub(super) async fn look_up(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    let params = Params::from_query(request.uri());
    let (which, wait) = (Which::from(&params)?, params.number("wait")?.unwrap_or(0));
    let tag = service
        .wait_visible(&which, wait, Consistency::Linearizable)
        .await?;
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

fn info(template: &Template, tag: &Tag) -> TagInfo {
    TagInfo {
        template_id: template.id.to_string(),
        template: template.name.clone(),
        tag: tag.name.clone(),
        number: tag.number,
        manifest: tag.content.manifest.to_string(),
        size: tag.content.size,
        visible: tag.visible,
        holders: tag.holders.iter().map(ToString::to_string).collect(),
        copies_needed: tag.copies_needed,
    }
}

impl RegistryService {
    async fn publish(&self, request: Request) -> Result<TagInfo, Refused> {
        let request: PublishRequest =
            answer::read_object(request.into_body(), "a publish request").await?;
        check(&request).map_err(bad)?;
        let id = command_id(&request)?;
        let digest = hex_id(&request.manifest).map_err(|e| bad(e.to_string()))?;
        // From here on the collector keeps all that it reaches; what was removed before is lacking now.
        let mut lease = self.leases.begin(self.collect.grace);
        lease.manifest(digest);
        let manifest = self.whole(digest).await?;
        let content = content(&request, Digest(digest), &manifest)?;
        let over = self.manifest_over_quota(&request.template, digest).await?;
        if let Some(why) = over {
            return Err(fail(StatusCode::OK, why));
        }
        let voters = voters(&self.catalog.members().await?);
        let copies_needed = copies_needed(request.durability, voters.len())?;
        let command = Command::PublishTag {
            new_template_id: stamp::template_id(),
            template: request.template.clone(),
            tag: request.tag.clone(),
            content,
            holder: self.member,
            copies_needed,
            voters,
        };
        lease.linger();
        let outcome = self.catalog.submit(id, command).await;
        if matches!(outcome, Ok(_) | Err(AppError::Refused(_))) {
            lease.settled();
        }
        let outcome = outcome?;
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
        let seen = self
            .wait_visible(&which, request.wait, Consistency::Linearizable)
            .await;
        let gone = || {
            fail(
                StatusCode::OK,
                "the tag was deleted right after it was published",
            )
        };
        seen?.ok_or_else(gone)
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

    /// A tag, once it is visible or `wait_s` seconds are over.
    async fn wait_visible(
        &self,
        which: &Which,
        wait_s: u32,
        consistency: Consistency,
    ) -> Result<Option<TagInfo>, AppError> {
        let until = Instant::now() + Duration::from_secs(wait_s.min(WAIT_MAX_S).into());
        let mut changes = self.catalog.watch();
        let find = |state: &mainstay_model::State| which.find(state).map(|(t, tag)| info(t, tag));
        let mut seen = self.catalog.take(consistency, find).await?;
        while seen.as_ref().is_some_and(|tag| !tag.visible) && Instant::now() < until {
            // Time over, or the group has stopped: what was seen last is the answer.
            if !matches!(
                tokio::time::timeout_at(until, changes.changed()).await,
                Ok(Ok(()))
            ) {
                break;
            }
            changes.borrow_and_update();
            seen = self.catalog.take(Consistency::Stale, find).await?;
        }
        Ok(seen)
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
    Ok(TagContent {
        manifest,
        size: files.size(),
        arch: request.arch.clone(),
        description: request.description.clone(),
        disk: disk.name.clone(),
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
fn check_name(what: &str, name: &str) -> Result<(), String> {
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
