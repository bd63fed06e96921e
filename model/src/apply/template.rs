//! Tags are published, become visible when enough members hold their bytes, and are deleted. A
//! number is never used twice within a template, so a late report about a deleted tag meets
//! nothing: a deleted tag never comes back. The bytes themselves are the registry's.

use super::{Applied, artifact, check, distribute, instance};
use crate::command::{TagContent, TagSelector};
use crate::ids::{Digest, InstanceId, MemberId, TemplateId};
use crate::limits::{self, clip};
use crate::outcome::{Outcome, Refusal};
use crate::state::State;
use crate::template::{Tag, Template};
use std::collections::{BTreeMap, BTreeSet};

/// Why an instance failed that waited for a node when its tag was deleted.
pub(super) const DELETED: &str = "the tag was deleted before the instance was placed";

/// A pushed tag.
pub(super) struct Push<'a> {
    pub(super) template: &'a str,
    pub(super) tag: &'a str,
    pub(super) content: &'a TagContent,
    pub(super) holder: MemberId,
    pub(super) copies_needed: u32,
    pub(super) voters: &'a BTreeSet<MemberId>,
}

/// Names and content within their bounds, on a member that is still one.
pub(super) fn check_push(state: &State, push: &Push<'_>) -> Result<(), Refusal> {
    check::name("template name", push.template)?;
    check::name("tag name", push.tag)?;
    check_content(push.content)?;
    if state.retired.contains_key(&push.holder) {
        let text =
            "the member that holds the tag was taken out of the cluster: push through another";
        return Err(Refusal::Conflict(text.to_owned()));
    }
    Ok(())
}

pub(super) fn publish(state: &mut State, new_id: &TemplateId, push: &Push<'_>) -> Applied {
    check_push(state, push)?;
    let Some(template) = state.template_named(push.template) else {
        return publish_first(state, new_id, push);
    };
    let id = template.id.clone();
    if let Some(tag) = template.tags.values().find(|t| t.name == push.tag) {
        if tag.content.manifest != push.content.manifest {
            return Err(Refusal::TagTaken(push.tag.to_owned()));
        }
        let number = tag.number;
        let needed = Some(push.copies_needed);
        return hold(state, &id, number, push.holder, push.voters, needed);
    }
    check::count("tags of a template", template.tags.len() + 1, limits::TAGS)?;
    let number = template.next_number;
    if number == u32::MAX {
        return Err(check::limit("the template has used up its tag numbers"));
    }
    let tag = new_tag(state, number, push);
    let visible = tag.visible;
    state.append_tag(&id, tag);
    Ok(Outcome::Published {
        template: id,
        number,
        visible,
    })
}

fn publish_first(state: &mut State, id: &TemplateId, push: &Push<'_>) -> Applied {
    check::id("template id", id.as_str())?;
    check::count("templates", state.templates.len() + 1, limits::TEMPLATES)?;
    if state.templates.contains_key(id) {
        return Err(Refusal::Conflict(format!("template id {id} is taken")));
    }
    let tag = new_tag(state, 0, push);
    let visible = tag.visible;
    state.insert_template(Template {
        id: id.clone(),
        name: push.template.to_owned(),
        tags: BTreeMap::from([(0, tag)]),
        next_number: 1,
        created_ms: state.clock_ms,
    });
    Ok(Outcome::Published {
        template: id.clone(),
        number: 0,
        visible,
    })
}

pub(super) fn new_tag(state: &State, number: u32, push: &Push<'_>) -> Tag {
    let holders = BTreeSet::from([push.holder]);
    let visible = enough(&holders, push.voters, push.copies_needed);
    Tag {
        number,
        name: push.tag.to_owned(),
        content: push.content.clone(),
        holders,
        copies_needed: push.copies_needed,
        visible,
        created_ms: state.clock_ms,
        visible_ms: visible.then_some(state.clock_ms),
    }
}

fn check_content(content: &TagContent) -> Result<(), Refusal> {
    for (what, value) in [
        ("architecture", &content.arch),
        ("disk name", &content.disk),
        ("disk format", &content.format),
    ] {
        check::text(what, value, limits::NAME_BYTES)?;
    }
    check::text("description", &content.description, limits::TEXT_BYTES)?;
    check::port_rules(&content.forwards)
}

/// Copies on members that left, or that have no vote yet, do not make a tag safe.
pub(super) fn enough(
    holders: &BTreeSet<MemberId>,
    voters: &BTreeSet<MemberId>,
    needed: u32,
) -> bool {
    holders.intersection(voters).count() as u64 >= u64::from(needed)
}

/// One more verified copy of a tag that exists. A newer push knows the newer member list, so its
/// number of copies replaces the former one while the tag is not visible.
pub(super) fn hold(
    state: &mut State,
    id: &TemplateId,
    number: u32,
    member: MemberId,
    voters: &BTreeSet<MemberId>,
    copies_needed: Option<u32>,
) -> Applied {
    let now = state.clock_ms;
    let tag = |s: &State| s.templates.get(id)?.tags.get(&number).cloned();
    let Some(before) = tag(state) else {
        return Ok(Outcome::Done);
    };
    let mut after = before.clone();
    after.holders.insert(member);
    check::count("holders of a tag", after.holders.len(), limits::HOLDERS)?;
    if !after.visible {
        after.copies_needed = copies_needed.unwrap_or(after.copies_needed);
    }
    if !after.visible && enough(&after.holders, voters, after.copies_needed) {
        after.visible = true;
        after.visible_ms = Some(now);
    }
    let visible = after.visible;
    if after != before {
        state.edit_tag(id, number, |t| *t = after);
    }
    Ok(Outcome::Published {
        template: id.clone(),
        number,
        visible,
    })
}

/// Gained, with the voters of now, or lost.
pub(super) fn report_held(
    state: &mut State,
    id: &TemplateId,
    number: u32,
    manifest: &Digest,
    member: MemberId,
    gained: Option<&BTreeSet<MemberId>>,
) -> Applied {
    let tag = state.templates.get(id).and_then(|t| t.tags.get(&number));
    let Some(tag) = tag.filter(|t| &t.content.manifest == manifest) else {
        return Ok(Outcome::Done);
    };
    if let Some(voters) = gained {
        // Said before its end, heard after it.
        if state.retired.contains_key(&member) {
            return Ok(Outcome::Done);
        }
        hold(state, id, number, member, voters, None)?;
    } else if tag.holders.contains(&member) {
        state.edit_tag(id, number, |t| {
            t.holders.remove(&member);
        });
    }
    Ok(Outcome::Done)
}

/// A member is gone for good, and `voters` are left: what it held is not held any more, and a tag
/// that waits for more copies than they can hold waits for as many as they can.
pub(super) fn drop_holder(state: &mut State, member: MemberId, voters: &BTreeSet<MemberId>) {
    let now = state.clock_ms;
    let left = u32::try_from(voters.len()).unwrap_or(u32::MAX).max(1);
    let touched = |t: &Tag| t.holders.contains(&member) || (!t.visible && t.copies_needed > left);
    let tags = state.templates.values().flat_map(|template| {
        let touched = template.tags.values().filter(|t| touched(t));
        touched.map(|t| (template.id.clone(), t.number))
    });
    for (id, number) in tags.collect::<Vec<_>>() {
        state.edit_tag(&id, number, |t| {
            t.holders.remove(&member);
            if t.visible {
                return;
            }
            t.copies_needed = t.copies_needed.min(left);
            if enough(&t.holders, voters, t.copies_needed) {
                t.visible = true;
                t.visible_ms = Some(now);
            }
        });
    }
}

pub(super) fn delete(state: &mut State, id: &TemplateId) -> Applied {
    known(state, id)?;
    drop_template(state, id);
    Ok(Outcome::Done)
}

/// The named tag and every later one, those not visible yet included.
pub(super) fn revert(
    state: &mut State,
    id: &TemplateId,
    selector: Option<&TagSelector>,
) -> Applied {
    let template = known(state, id)?;
    let first = match selector {
        Some(selector) => select(template, selector)?,
        None => newest(template),
    };
    let gone = template.tags.range(first..).map(|(n, _)| *n).collect();
    drop_tags(state, id, gone);
    Ok(Outcome::Done)
}

/// What a revert means that names no tag: the latest visible one, else the last.
pub(super) fn newest(template: &Template) -> u32 {
    let newest = template.latest().or(template.tags.values().next_back());
    newest.map_or(0, |t| t.number)
}

pub(super) fn delete_tag(state: &mut State, id: &TemplateId, selector: &TagSelector) -> Applied {
    let template = known(state, id)?;
    let number = select(template, selector)?;
    drop_tags(state, id, BTreeSet::from([number]));
    Ok(Outcome::Done)
}

/// What is said of a tag. Only its words: which bytes it names never changes.
pub(super) fn describe(
    state: &mut State,
    id: &TemplateId,
    selector: Option<&TagSelector>,
    arch: Option<&str>,
    description: Option<&str>,
) -> Applied {
    let template = known(state, id)?;
    let number = match selector {
        Some(selector) => select(template, selector)?,
        None => {
            let latest = template.latest().map(|t| t.number);
            latest.ok_or_else(|| Refusal::TagUnknown(String::new()))?
        }
    };
    if let Some(arch) = arch {
        check::text("architecture", arch, limits::NAME_BYTES)?;
    }
    if let Some(text) = description {
        check::text("description", text, limits::TEXT_BYTES)?;
    }
    state.edit_tag(id, number, |tag| {
        if let Some(arch) = arch {
            arch.clone_into(&mut tag.content.arch);
        }
        if let Some(text) = description {
            text.clone_into(&mut tag.content.description);
        }
    });
    Ok(Outcome::Done)
}

pub(super) fn note_pulls(state: &mut State, pulls: &[(TemplateId, u32, u64)]) -> Applied {
    check::count("pulls in a command", pulls.len(), limits::BATCH)?;
    for (id, number, at_ms) in pulls {
        let template = state.templates.get(id);
        let there = template.is_some_and(|t| t.tags.contains_key(number));
        let known = state.pulls.get(&(id.clone(), *number)).copied();
        if there && known.is_none_or(|known| known < *at_ms) {
            state.set_pull(id, *number, *at_ms);
        }
    }
    Ok(Outcome::Done)
}

pub(super) fn set_quota(state: &mut State, template: Option<&str>, bytes: Option<u64>) -> Applied {
    if let Some(name) = template {
        check::name("template name", name)?;
        let more = usize::from(bytes.is_some() && !state.quotas.contains_key(name));
        check::count("quotas", state.quotas.len() + more, limits::TEMPLATES)?;
    }
    state.set_quota(template.unwrap_or_default(), bytes);
    Ok(Outcome::Done)
}

/// A tag that can be fetched; the latest when none is named.
pub(super) fn visible<'a>(
    state: &'a State,
    id: &TemplateId,
    selector: Option<&TagSelector>,
) -> Result<&'a Tag, Refusal> {
    let template = known(state, id)?;
    let (found, text) = match selector {
        Some(TagSelector::Number(n)) => (
            template.visible_tags().find(|t| t.number == *n),
            n.to_string(),
        ),
        Some(TagSelector::Name(name)) => (template.tag(name), clip(name, limits::NAME_BYTES)),
        None => (template.latest(), String::new()),
    };
    found.ok_or(match template.latest() {
        None => Refusal::TemplateUnknown(clip(id.as_str(), limits::NAME_BYTES)),
        Some(_) => Refusal::TagUnknown(text),
    })
}

/// Any tag, visible or not.
pub(super) fn select(template: &Template, selector: &TagSelector) -> Result<u32, Refusal> {
    let (found, text) = match selector {
        TagSelector::Number(n) => (template.tags.get(n), n.to_string()),
        TagSelector::Name(name) => (
            template.tags.values().find(|t| &t.name == name),
            clip(name, limits::NAME_BYTES),
        ),
    };
    found.map(|t| t.number).ok_or(Refusal::TagUnknown(text))
}

/// A template without a tag would only block its name: it goes with its last tag.
pub(super) fn drop_tags(state: &mut State, id: &TemplateId, gone: BTreeSet<u32>) {
    artifact::drop_linked(state, id, |number| gone.contains(&number));
    for number in &gone {
        state.remove_tag(id, *number);
    }
    if state.templates.get(id).is_some_and(|t| t.tags.is_empty()) {
        state.remove_template(id);
    }
    distribute::tags_gone(state, id, |number| gone.contains(&number));
    fail_waiting(state, id, |number| gone.contains(&number));
}

fn drop_template(state: &mut State, id: &TemplateId) {
    let numbers: Vec<u32> = match state.templates.get(id) {
        Some(t) => t.tags.keys().copied().collect(),
        None => return,
    };
    artifact::drop_linked(state, id, |_| true);
    for number in numbers {
        state.remove_tag(id, number);
    }
    state.remove_template(id);
    distribute::tags_gone(state, id, |_| true);
    fail_waiting(state, id, |_| true);
}

/// Instances on a node keep running; those that still wait for one can never start.
fn fail_waiting(state: &mut State, id: &TemplateId, gone: impl Fn(u32) -> bool) {
    let ids: Vec<InstanceId> = state
        .waiting()
        .filter(|i| &i.request.template == id && gone(i.tag_number))
        .map(|i| i.id.clone())
        .collect();
    for id in &ids {
        instance::fail_for_good(state, id, DELETED);
    }
}

fn known<'a>(state: &'a State, id: &TemplateId) -> Result<&'a Template, Refusal> {
    let unknown = || Refusal::TemplateUnknown(clip(id.as_str(), limits::NAME_BYTES));
    state.templates.get(id).ok_or_else(unknown)
}
