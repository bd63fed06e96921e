//! The registry's REST dialect, as third parties speak it. Field names and texts are the wire
//! contract's; the state decides, this only shows.

use super::answer::{Answer, Params, bad, done, fail, ok};
use super::{RegistryService, Service};
use crate::app::{AppError, Consistency};
use crate::http::templates::{TemplateList, TemplateView};
use crate::stamp;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use mainstay_model::command::TagSelector;
use mainstay_model::{self as model, Command, Refusal, TemplateId};
use serde::Serialize;
use serde_json::{Value, json};

/// The process answers.
pub(super) async fn livez() -> Response {
    (StatusCode::OK, "ok").into_response()
}

/// Reads see every acknowledged write.
pub(super) async fn readyz(State(service): Service) -> Response {
    match service
        .catalog
        .look(Consistency::Linearizable, &mut |_| ())
        .await
    {
        Ok(()) => (StatusCode::OK, "ok").into_response(),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, e.to_string()).into_response(),
    }
}

/// `GET /registry/status`
pub(super) async fn status(State(service): Service) -> Response {
    ok(json!({"status": "Running", "version": service.version}))
}

/// `GET /registry/vm`: the first version's list of one-entry maps, or one template by id.
pub(super) async fn list_v1(State(service): Service, request: Request) -> Answer {
    let list = |state: &model::State| {
        let shown = state.templates.values().filter(|t| t.latest().is_some());
        shown.map(|t| json!({t.id.as_str(): t.name})).collect()
    };
    service.list(&Params::from_query(request.uri()), list).await
}

/// `GET /registry/v2/vm`: objects.
pub(super) async fn list_v2(State(service): Service, request: Request) -> Answer {
    let list = |state: &model::State| {
        to_json(&TemplateList {
            state,
            short: false,
        })
    };
    service.list(&Params::from_query(request.uri()), list).await
}

impl RegistryService {
    async fn list(
        &self,
        params: &Params,
        list: impl Fn(&model::State) -> Value + Send + Sync,
    ) -> Answer {
        let Some(id) = params.get("id") else {
            return Ok(ok(self
                .catalog
                .take(Consistency::Linearizable, list)
                .await?));
        };
        let id = TemplateId::from(id);
        let find = |state: &model::State| {
            let template = state.templates.get(&id)?;
            TemplateView::new(state, template).as_ref().map(to_json)
        };
        let found = self.catalog.take(Consistency::Linearizable, find).await?;
        found
            .map(ok)
            .ok_or_else(|| fail(StatusCode::OK, "Not found"))
    }
}

/// Out of the state's lock as a value of its own.
fn to_json<T: Serialize>(view: &T) -> Value {
    // Plain structs with text keys always have a JSON form.
    serde_json::to_value(view).unwrap_or_default()
}

/// `GET /registry/vm/info?id=`: the machine that a tag describes; the latest tag if none is named.
pub(super) async fn info(State(service): Service, request: Request) -> Answer {
    let params = Params::from_query(request.uri());
    let id = params.get("id").ok_or_else(|| bad("id is missing"))?;
    let id = TemplateId::from(id);
    let number: Option<u32> = params.number("version")?.or(params.number("number")?);
    let name = params.get("tag");
    let find = |state: &model::State| {
        let template = state.templates.get(&id)?;
        template.latest()?;
        let fits = |tag: &&model::template::Tag| match (name, number) {
            (Some(name), _) => tag.name == name,
            (None, Some(number)) => tag.number == number,
            (None, None) => true,
        };
        let tag = template.visible_tags().rfind(fits);
        Some(tag.map(|tag| machine_of(template, tag)))
    };
    let found = service
        .catalog
        .take(Consistency::Linearizable, find)
        .await?;
    match found {
        None => Err(fail(StatusCode::OK, "Not found")),
        Some(None) => {
            let wanted = name.map_or_else(|| number.unwrap_or(0).to_string(), str::to_owned);
            Err(bad(format!("No such tag {wanted}")))
        }
        Some(Some(info)) => Ok(ok(info)),
    }
}

/// What an instance of it is given unless it asks for something else.
fn machine_of(template: &model::template::Template, tag: &model::template::Tag) -> Value {
    let rule = |rule: &model::instance::PortRule| {
        json!({
            "rule_name": rule.name, "guest_port": rule.guest_port, "host_port": rule.host_port,
            "protocol": "tcp",
        })
    };
    let rules: Vec<Value> = tag.content.forwards.iter().map(rule).collect();
    json!({
        "name": template.name,
        "uuid": template.id.as_str(),
        "version": tag.name,
        "arch": tag.content.arch,
        "ram": format!("{}G", model::limits::DEFAULT_VRAM_MB / 1024),
        "cpu": {"cores": model::limits::DEFAULT_VCPU},
        "hard_drives": [{"file": tag.content.disk(), "format": tag.content.format, "size": tag.content.size}],
        "network_cards": [{"mode": "shared", "port_forwarding_rules": rules}],
        "display": {},
        "nvram": false,
        "state_file": tag.content.memory().unwrap_or_default(),
        "firmware": "",
        "usb": [],
    })
}

/// `PUT /registry/vm/arch`: the architecture of the latest tag, by hand.
pub(super) async fn set_arch(State(service): Service, request: Request) -> Answer {
    let params = Params::read(request).await?;
    let id = params.get("id").ok_or_else(|| bad("id is missing"))?;
    let arch = params.get("arch").ok_or_else(|| bad("arch is missing"))?;
    if !matches!(arch, "amd64" | "arm64") {
        return Err(bad(format!(
            "arch {arch:?} is not known, amd64 and arm64 are"
        )));
    }
    service
        .submit(Command::DescribeTag {
            id: TemplateId::from(id),
            selector: None,
            arch: Some(arch.to_owned()),
            description: None,
        })
        .await
}

/// `DELETE /registry/vm?id=`: the template with all its tags.
pub(super) async fn delete(State(service): Service, request: Request) -> Answer {
    let params = Params::read(request).await?;
    let id = params.get("id").ok_or_else(|| bad("id is missing"))?;
    service
        .submit(Command::DeleteTemplate {
            id: TemplateId::from(id),
        })
        .await
}

/// `DELETE /registry/revert?id=`: a tag and every later one; the latest if none is named.
pub(super) async fn revert(State(service): Service, request: Request) -> Answer {
    let params = Params::read(request).await?;
    let id = params.get("id").ok_or_else(|| bad("id is missing"))?;
    let number = params.number("version")?.or(params.number("number")?);
    let name = params
        .get("tag")
        .map(|tag| TagSelector::Name(tag.to_owned()));
    let selector = name.or(number.map(TagSelector::Number));
    service
        .submit(Command::RevertTemplate {
            id: TemplateId::from(id),
            selector,
        })
        .await
}

impl RegistryService {
    async fn submit(&self, command: Command) -> Answer {
        match self.catalog.submit(stamp::command_id(), command).await {
            Ok(_) => Ok(done()),
            // The vendor's registry answers this one with 400.
            Err(AppError::Refused(Refusal::TagUnknown(tag))) => {
                Err(bad(format!("No such tag {tag}")))
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// `GET /registry/disk`: bytes of the file system with the chunks.
pub(super) async fn disk(State(service): Service) -> Answer {
    let chunks = service.chunks.clone();
    match tokio::task::spawn_blocking(move || chunks.disk()).await {
        Ok(Ok((free, total))) => Ok(ok(json!({"free": free, "total": total}))),
        Ok(Err(e)) => Err(fail(StatusCode::OK, super::answer::chain(&e))),
        Err(e) => Err(fail(StatusCode::SERVICE_UNAVAILABLE, e.to_string())),
    }
}
