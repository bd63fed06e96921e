//! Saves: asked for, reported, published, ended, forgotten. The bytes are the registry's, what a node does
//! for one is the agent's.
//!
//! Everything may come twice, late, or through another member: a request that repeats an open one is that
//! one; a tag is published once, and named in the save from then on, so that one that was deleted since does
//! not come back; reports about a save that is not open change nothing.

use super::{Applied, artifact, check, instance, template};
use crate::command::{TagContent, TagSelector};
use crate::ids::{InstanceId, NodeId, SaveId, TemplateId};
use crate::instance::{InstanceState, PortRule, ScriptResult};
use crate::limits::{self, clip, clip_front};
use crate::outcome::{Outcome, Refusal};
use crate::save::{Save, SaveEnd, SaveReport, SaveRequest, SaveSaid, SaveTarget, SavedDisk};
use crate::state::State;
use crate::template::Template;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn begin(state: &mut State, id: &SaveId, request: &SaveRequest) -> Applied {
    check::id("request id", id.as_str())?;
    if let Some(known) = state.saves.get(id) {
        return match known.request.instance == request.instance {
            true => Ok(Outcome::Saving(id.clone())),
            false => Err(Refusal::Conflict(format!("request id {id} is taken"))),
        };
    }
    check_request(request)?;
    let unknown = || {
        let id = clip(request.instance.as_str(), limits::NAME_BYTES);
        Refusal::InstanceUnknown(id.into())
    };
    let instance = state.instances.get(&request.instance).ok_or_else(unknown)?;
    if let Some(open) = state.save_of(&request.instance) {
        return match open.request.same_as(request) {
            true => Ok(Outcome::Saving(open.id.clone())),
            false => Err(Refusal::Conflict(format!(
                "the instance is being saved already, by request {}",
                open.id
            ))),
        };
    }
    let (InstanceState::Started, Some(node)) = (instance.state, instance.node.clone()) else {
        return Err(Refusal::Conflict(format!(
            "the instance is {}: only one that is Started can be saved",
            instance.state.as_str()
        )));
    };
    let (arch, forwards) = inherited(state, &request.instance, &node);
    check_target(state, request)?;
    make_room(state, request.script.len())?;
    state.insert_save(Save {
        id: id.clone(),
        request: request.clone(),
        node: node.clone(),
        arch,
        forwards,
        created_ms: state.clock_ms,
        begun_ms: None,
        published: None,
        end: None,
        script_result: None,
    });
    // At the same generation: what runs goes on as it is until the save stops it.
    state.edit_instance(&request.instance, |i| i.state = InstanceState::Pushing);
    state.bump_desired(&node);
    Ok(Outcome::Saving(id.clone()))
}

fn check_request(request: &SaveRequest) -> Result<(), Refusal> {
    check::name("tag name", &request.tag)?;
    check::text("description", &request.description, limits::TEXT_BYTES)?;
    check::count(
        "bytes of script",
        request.script.len(),
        limits::SCRIPT_BYTES,
    )?;
    if let Some(tag) = &request.revert_tag {
        check::name("name of the tag to revert", tag)?;
    }
    if let SaveTarget::New { name, id } = &request.target {
        check::name("template name", name)?;
        check::id("template id", id.as_str())?;
    }
    Ok(())
}

/// What the new tag has of the one that the instance was started from.
fn inherited(state: &State, id: &InstanceId, node: &NodeId) -> (String, Vec<PortRule>) {
    let instance = state.instances.get(id);
    let source = instance.and_then(|i| {
        let template = state.templates.get(&i.request.template)?;
        template.tags.get(&i.tag_number)
    });
    let forwards = source.map(|tag| tag.content.forwards.clone());
    let of_node = || state.nodes.get(node).map(|n| n.spec.arch.clone());
    let arch = instance.map(|i| i.arch.clone()).filter(|a| !a.is_empty());
    (
        arch.or_else(of_node).unwrap_or_default(),
        forwards.unwrap_or_default(),
    )
}

/// The template that the tag goes to, if it can be there; `None`: a new one.
fn check_target<'a>(
    state: &'a State,
    request: &SaveRequest,
) -> Result<Option<&'a Template>, Refusal> {
    match &request.target {
        SaveTarget::Template(id) => {
            let unknown = || Refusal::TemplateUnknown(clip(id.as_str(), limits::NAME_BYTES));
            let template = state.templates.get(id).ok_or_else(unknown)?;
            let doomed = doomed(template, request)?;
            let same = |t: &&crate::template::Tag| t.name == request.tag;
            let taken = template.tags.values().find(same);
            if taken.is_some_and(|tag| !doomed.contains(&tag.number)) {
                return Err(Refusal::TagTaken(request.tag.clone()));
            }
            artifact::check_free(state, &template.name, &request.tag)?;
            Ok(Some(template))
        }
        SaveTarget::New { name, id } => {
            if state.template_named(name).is_some() {
                return Err(Refusal::Conflict(format!(
                    "a template named {name} exists: save into it, or choose another name"
                )));
            }
            if state.templates.contains_key(id) {
                return Err(Refusal::Conflict(format!("template id {id} is taken")));
            }
            artifact::check_free(state, name, &request.tag)?;
            Ok(None)
        }
    }
}

/// Numbers of the tags that go when the new one is there.
fn doomed(template: &Template, request: &SaveRequest) -> Result<BTreeSet<u32>, Refusal> {
    if !request.revert {
        return Ok(BTreeSet::new());
    }
    let first = match &request.revert_tag {
        Some(tag) => template::select(template, &TagSelector::Name(tag.clone()))?,
        None => template::newest(template),
    };
    Ok(template.tags.range(first..).map(|(n, _)| *n).collect())
}

/// Forget ended saves, the longest ago first, until one more of so many bytes fits.
fn make_room(state: &mut State, bytes: usize) -> Result<(), Refusal> {
    loop {
        let many = state.saves.len() >= limits::SAVES;
        let large = state.saves_bytes().saturating_add(bytes) > limits::SAVES_BYTES;
        if !many && !large {
            return Ok(());
        }
        let Some(oldest) = state.ended_saves().next().map(|(_, id)| id.clone()) else {
            return Err(check::limit(if many {
                format!(
                    "{} instances are being saved, no more can be",
                    limits::SAVES
                )
            } else {
                format!(
                    "scripts and outputs of saves have at most {} bytes together",
                    limits::SAVES_BYTES
                )
            }));
        };
        state.remove_save(&oldest);
    }
}

pub(super) fn report(state: &mut State, node: &NodeId, reports: &[SaveReport]) -> Applied {
    check::count("reports of saves", reports.len(), limits::BATCH)?;
    for report in reports {
        let save = state.saves.get(&report.id);
        if save.is_some_and(|save| save.open() && &save.node == node) {
            take(state, node, report);
        }
    }
    Ok(Outcome::Done)
}

fn take(state: &mut State, node: &NodeId, report: &SaveReport) {
    let id = &report.id;
    let Some(save) = state.saves.get(id) else {
        return;
    };
    let begins = save.begun_ms.is_none();
    let script = report.script.as_ref();
    let script = script.filter(|_| save.script_result.is_none());
    let script = script.map(|script| kept(state, script));
    if begins || script.is_some() {
        let now = state.clock_ms;
        state.edit_save(id, |save| {
            save.begun_ms = save.begun_ms.or(Some(now));
            if let Some(script) = script {
                save.script_result = Some(Box::new(script));
            }
        });
        state.bump_desired(node);
    }
    match &report.said {
        SaveSaid::Begun => {}
        SaveSaid::Pushed => match tag(state, id) {
            Tag::Visible => finish(state, id),
            Tag::Deleted => give_up(
                state,
                id,
                "the tag was deleted before the save had ended",
                true,
            ),
            Tag::Waits | Tag::None => {}
        },
        SaveSaid::Failed { why, stopped } => give_up(state, id, why, *stopped),
    }
}

/// As much of a script's output as there is room for, once the longest ended are forgotten.
fn kept(state: &mut State, script: &ScriptResult) -> ScriptResult {
    let most = limits::SAVE_OUTPUT_BYTES;
    let wanted = script.stdout.len().min(most) + script.stderr.len().min(most);
    while state.saves_bytes().saturating_add(wanted) > limits::SAVES_BYTES {
        let Some(oldest) = state.ended_saves().next().map(|(_, id)| id.clone()) else {
            break;
        };
        state.remove_save(&oldest);
    }
    let room = limits::SAVES_BYTES.saturating_sub(state.saves_bytes());
    let stderr = clip_front(&script.stderr, most.min(room / 2));
    let stdout = clip_front(&script.stdout, most.min(room - stderr.len()));
    ScriptResult {
        return_code: script.return_code,
        did_timeout: script.did_timeout,
        stdout,
        stderr,
    }
}

/// What became of the tag of a save.
enum Tag {
    /// Not published.
    None,
    /// Too few members hold it.
    Waits,
    Visible,
    Deleted,
}

fn tag(state: &State, id: &SaveId) -> Tag {
    let published = state.saves.get(id).and_then(|s| s.published.as_ref());
    let Some((template, number)) = published else {
        return Tag::None;
    };
    let template = state.templates.get(template);
    match template.and_then(|t| t.tags.get(number)) {
        None => Tag::Deleted,
        Some(tag) if tag.visible => Tag::Visible,
        Some(_) => Tag::Waits,
    }
}

/// Would a report that it was pushed, or that it failed, end it?
pub(crate) fn settles(state: &State, save: &Save) -> bool {
    matches!(tag(state, &save.id), Tag::Visible | Tag::Deleted)
}

/// The tag is there: the instance has done its duty.
fn finish(state: &mut State, id: &SaveId) {
    let Some(instance) = end(state, id, None) else {
        return;
    };
    // Cannot be refused: the instance is there, and whatever it is, it may be terminated.
    let _ = instance::terminate(state, &instance);
}

/// It comes to nothing, unless the tag is there all the same: the instance goes on.
fn give_up(state: &mut State, id: &SaveId, why: &str, stopped: bool) {
    if matches!(tag(state, id), Tag::Visible) {
        return finish(state, id);
    }
    let Some(instance) = end(state, id, Some(why)) else {
        return;
    };
    let node = state.instances.get(&instance).and_then(|i| i.node.clone());
    state.edit_instance(&instance, |i| {
        if stopped {
            i.state = InstanceState::Stopping;
            i.generation = i.generation.saturating_add(1);
        } else {
            i.state = InstanceState::Started;
        }
    });
    if let Some(node) = node {
        state.bump_desired(&node);
    }
}

/// Something else is decided about an instance: a save that is open ends with it.
pub(super) fn abandon(state: &mut State, instance: &InstanceId, why: &str) {
    let Some(id) = state.save_of(instance).map(|s| s.id.clone()) else {
        return;
    };
    let there = matches!(tag(state, &id), Tag::Visible);
    end(state, &id, (!there).then_some(why));
}

/// The end of an open save; its instance.
fn end(state: &mut State, id: &SaveId, why: Option<&str>) -> Option<InstanceId> {
    let at_ms = state.clock_ms;
    let save = state.saves.get(id).filter(|s| s.open())?;
    let instance = save.request.instance.clone();
    let error = why.map(|why| match tag(state, id) {
        Tag::Waits => format!(
            "{why}; tag {} was published before, and becomes visible once enough members hold it",
            save.request.tag
        ),
        _ => why.to_owned(),
    });
    state.edit_save(id, |save| {
        save.request.script = Vec::new();
        save.end = Some(SaveEnd {
            at_ms,
            error: error.map(|why| clip(&why, limits::TEXT_BYTES)),
        });
    });
    Some(instance)
}

pub(super) fn publish(state: &mut State, disk: &SavedDisk) -> Applied {
    let Some(save) = state.saves.get(&disk.save).filter(|save| save.open()) else {
        let why = "the instance is not being saved any more";
        return Err(Refusal::Conflict(why.to_owned()));
    };
    let save = save.clone();
    let content = TagContent {
        manifest: disk.manifest,
        size: disk.size,
        arch: save.arch.clone(),
        description: save.request.description.clone(),
        disk: disk.disk.clone(),
        format: disk.format.clone(),
        forwards: save.forwards.clone(),
    };
    let push = template::Push {
        template: &disk.template,
        tag: &save.request.tag,
        content: &content,
        holder: disk.holder,
        copies_needed: disk.copies_needed.max(1),
        voters: &disk.voters,
    };
    template::check_push(state, &push)?;
    match &save.published {
        Some((id, number)) => again(state, id, *number, &push),
        None => first(state, &save, &push),
    }
}

/// Another copy of what was published.
fn again(state: &mut State, id: &TemplateId, number: u32, push: &template::Push<'_>) -> Applied {
    let tag = state.templates.get(id).and_then(|t| t.tags.get(&number));
    match tag {
        None => Err(Refusal::Conflict(
            "the tag was deleted after it was published".to_owned(),
        )),
        Some(tag) if tag.content.manifest != push.content.manifest => {
            Err(Refusal::TagTaken(push.tag.to_owned()))
        }
        Some(_) => {
            let needed = Some(push.copies_needed);
            template::hold(state, id, number, push.holder, push.voters, needed)
        }
    }
}

fn first(state: &mut State, save: &Save, push: &template::Push<'_>) -> Applied {
    let target = check_target(state, &save.request).map_err(|refusal| match refusal {
        Refusal::TemplateUnknown(_) => {
            Refusal::Conflict("the template was deleted while the instance was saved".to_owned())
        }
        other => other,
    })?;
    let Some(template) = target else {
        let SaveTarget::New { name, id } = &save.request.target else {
            return Err(Refusal::Conflict("there is no such template".to_owned()));
        };
        check::count("templates", state.templates.len() + 1, limits::TEMPLATES)?;
        let tag = template::new_tag(state, 0, push);
        let visible = tag.visible;
        state.insert_template(Template {
            id: id.clone(),
            name: name.clone(),
            tags: BTreeMap::from([(0, tag)]),
            next_number: 1,
            created_ms: state.clock_ms,
        });
        return Ok(published(state, save, id.clone(), 0, visible));
    };
    let id = template.id.clone();
    let doomed = doomed(template, &save.request)?;
    let left = template.tags.len() - doomed.len();
    check::count("tags of a template", left + 1, limits::TAGS)?;
    let number = template.next_number;
    if number == u32::MAX {
        return Err(check::limit("the template has used up its tag numbers"));
    }
    let tag = template::new_tag(state, number, push);
    let visible = tag.visible;
    // In this order: a template without a tag would go.
    state.append_tag(&id, tag);
    template::drop_tags(state, &id, doomed);
    Ok(published(state, save, id, number, visible))
}

fn published(
    state: &mut State,
    save: &Save,
    id: TemplateId,
    number: u32,
    visible: bool,
) -> Outcome {
    let tag = Some((id.clone(), number));
    state.edit_save(&save.id, |save| save.published = tag);
    Outcome::Published {
        template: id,
        number,
        visible,
    }
}

pub(super) fn expire(
    state: &mut State,
    ids: &[SaveId],
    retention_ms: u64,
    begin_ms: u64,
) -> Applied {
    check::count("saves to forget", ids.len(), limits::BATCH)?;
    for id in ids {
        let Some(save) = state.saves.get(id) else {
            continue;
        };
        match &save.end {
            Some(end) if end.at_ms.saturating_add(retention_ms) <= state.clock_ms => {
                state.remove_save(id);
            }
            None if save.late(begin_ms, state.clock_ms) => {
                let why = format!(
                    "its node did not begin within {} s: is its agent of an older release?",
                    begin_ms / 1_000
                );
                give_up(state, id, &why, false);
            }
            _ => {}
        }
    }
    Ok(Outcome::Done)
}
