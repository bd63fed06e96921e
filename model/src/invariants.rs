//! What must hold after every command. Tests and the simulator ask after each step; `check` reads
//! the whole state, so production asks seldom. Never repairs anything.

use crate::artifact::{Artifact, Repository};
use crate::command::TagContent;
use crate::distribution::Delivery;
use crate::ids::NodeId;
use crate::instance::{Instance, InstanceState};
use crate::limits;
use crate::save::Save;
use crate::state::{Owned, State};
use crate::template::{Tag, Template};
use std::collections::BTreeMap;

/// Check one state by itself.
pub fn check(state: &State) -> Result<(), String> {
    state.check_index()?;
    for (id, instance) in state.instances.iter() {
        ensure(id == &instance.id, || format!("instance {id}: other id"))?;
        check_instance(state, instance).map_err(|e| format!("instance {id}: {e}"))?;
    }
    for (id, template) in &state.templates {
        ensure(id == &template.id, || format!("template {id}: other id"))?;
        check_template(template).map_err(|e| format!("template {id}: {e}"))?;
    }
    for (name, repository) in &state.repositories {
        check_repository(state, repository).map_err(|e| format!("repository {name}: {e}"))?;
    }
    for (id, node) in &state.nodes {
        let ok = id == &node.id && !(node.reachable && node.lost);
        ensure(ok, || format!("node {id}: other id, or lost and reachable"))?;
    }
    for (id, left) in &state.left {
        // The record of an instance may be forgotten before what is left of it is gone.
        let fits = |i: &Instance| {
            i.ended_ms.is_some()
                && i.node.as_ref() == Some(&left.node)
                && i.generation == left.generation
        };
        ensure(state.instances.get(id).is_none_or(fits), || {
            format!("instance {id}: does not fit what is left of it")
        })?;
    }
    for (id, save) in &state.saves {
        ensure(id == &save.id, || format!("save {id}: other id"))?;
        check_save(state, save).map_err(|e| format!("save {id}: {e}"))?;
    }
    for (id, group) in &state.groups {
        ensure(id == &group.id, || format!("group {id}: other id"))?;
    }
    for (id, distribution) in &state.distributions {
        let deliveries = distribution.nodes.iter();
        let wanted = deliveries.filter(|(_, d)| **d == Delivery::Wanted);
        let wanted: Vec<_> = wanted.map(|(node, _)| node).collect();
        let counted = id == &distribution.id && wanted.len() == distribution.waiting;
        ensure(
            counted && wanted.is_empty() == distribution.ended_ms.is_some(),
            || {
                format!(
                    "distribution {id}: other id, or {} wait for it",
                    wanted.len()
                )
            },
        )?;
        let template = state.templates.get(&distribution.template);
        let there = template.is_some_and(|t| t.tags.contains_key(&distribution.number));
        let possible = |n: &&NodeId| there && state.nodes.contains_key(*n);
        ensure(wanted.iter().all(possible), || {
            format!("distribution {id}: waits for a node or a tag that has gone")
        })?;
    }
    for (id, templates) in &state.evictions {
        let images = state.nodes.get(id).map(|n| &n.images);
        let fits = images.is_some_and(|images| {
            templates.iter().all(|(of, numbers)| {
                let here = |n: &u32| images.contains(&(of.clone(), *n));
                !numbers.is_empty() && numbers.iter().all(here)
            })
        });
        ensure(fits && !templates.is_empty(), || {
            format!("node {id}: shall drop what it does not have")
        })?;
    }
    for (id, number) in state.pulls.keys() {
        let template = state.templates.get(id);
        let there = template.is_some_and(|t| t.tags.contains_key(number));
        ensure(there, || {
            format!("template {id}: a pull of tag {number}, which is not there")
        })?;
    }
    ensure(state.saves.len() <= limits::SAVES, || {
        "too many saves".into()
    })?;
    let bytes = state.saves_bytes();
    ensure(bytes <= limits::SAVES_BYTES, || {
        format!("saves of {bytes} bytes")
    })
}

/// Check one step: what no command may do.
pub fn check_step(before: &State, after: &State) -> Result<(), String> {
    ensure(after.clock_ms >= before.clock_ms, || {
        "the clock went back".into()
    })?;
    for node in after.nodes.values() {
        let (old, new) = (before.load(&node.id), after.load(&node.id));
        let grew = new.count > old.count && before.nodes.contains_key(&node.id);
        ensure(!grew || node.has_room_for(new), || {
            format!("node {} was given more than it has room for", node.id)
        })?;
        let generation = before
            .nodes
            .get(&node.id)
            .map_or(0, |n| n.desired_generation);
        ensure(node.desired_generation >= generation, || {
            format!("node {}: desired generation went back", node.id)
        })?;
    }
    for (id, old) in before.instances.iter() {
        match after.instances.get(id) {
            Some(new) => check_instance_step(old, new),
            None => ensure(old.ended_ms.is_some(), || "forgotten before its end".into()),
        }
        .map_err(|e| format!("instance {id}: {e}"))?;
    }
    for (id, old) in &before.left {
        ensure(after.left.get(id).is_none_or(|new| new == old), || {
            format!("instance {id}: what is left of it became another")
        })?;
    }
    for (id, old) in &before.templates {
        if let Some(new) = after.templates.get(id) {
            check_template_step(old, new).map_err(|e| format!("template {id}: {e}"))?;
        }
    }
    for (name, old) in &before.repositories {
        if let Some(new) = after.repositories.get(name) {
            check_repository_step(old, new).map_err(|e| format!("repository {name}: {e}"))?;
        }
    }
    for (id, old) in &before.saves {
        if let Some(new) = after.saves.get(id) {
            check_save_step(old, new).map_err(|e| format!("save {id}: {e}"))?;
        } else {
            ensure(!old.open(), || format!("save {id}: forgotten while open"))?;
        }
    }
    check_journal(before, after)
}

/// Whoever follows tags and artifacts by the journal misses none that changed.
fn check_journal(before: &State, after: &State) -> Result<(), String> {
    let (position, _) = before.owned_since(u64::MAX);
    let Some(noted) = after.owned_since(position).1 else {
        return Ok(());
    };
    let tags = |state: &State| {
        let all = state.templates.iter();
        let all = all.flat_map(|(id, t)| t.tags.values().map(move |tag| (id.clone(), tag.clone())));
        all.map(|(id, tag)| (Owned::Tag(id, tag.number), tag))
            .collect::<BTreeMap<_, _>>()
    };
    let artifacts = |state: &State| {
        let all = state.repositories.iter().flat_map(|(name, repository)| {
            let artifacts = repository.artifacts.values();
            artifacts.map(move |a| (Owned::Artifact(name.clone(), a.content.digest), a.clone()))
        });
        all.collect::<BTreeMap<_, _>>()
    };
    let missed = missed(&tags(before), &tags(after), &noted)
        .or_else(|| missed(&artifacts(before), &artifacts(after), &noted));
    ensure(missed.is_none(), || {
        format!("{missed:?} changed, and the journal does not say so")
    })
}

fn missed<T: PartialEq>(
    before: &BTreeMap<Owned, T>,
    after: &BTreeMap<Owned, T>,
    noted: &[Owned],
) -> Option<Owned> {
    let all = before.keys().chain(after.keys());
    let changed = all.filter(|key| before.get(key) != after.get(key));
    changed
        .into_iter()
        .find(|key| !noted.contains(key))
        .cloned()
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

fn check_instance(state: &State, i: &Instance) -> Result<(), String> {
    use InstanceState::{Error, Pulling, Pushing, Started, Stopped, Stopping, Terminated};
    let say = |s: &str| s.to_owned();
    let on_vm = matches!(i.state, Pulling | Started | Stopping | Stopped | Pushing);
    ensure(!on_vm || i.node.is_some(), || say("has a VM but no node"))?;
    if let Some(node) = i.node.as_ref().filter(|_| i.live()) {
        let node = state.nodes.get(node);
        ensure(node.is_some_and(|n| !n.lost), || {
            say("lives on a node that is gone")
        })?;
    }
    let ended = match i.state {
        Terminated => i.ended_ms.is_some(),
        InstanceState::Terminating => i.ended_ms.is_some() == i.node.is_none(),
        _ => i.ended_ms.is_none(),
    };
    ensure(ended, || say("its end does not fit its state"))?;
    ensure(i.state != Error || i.message.is_some(), || {
        say("no reason for Error")
    })?;
    ensure(!i.vm_gone || !i.live(), || say("lives without its VM"))?;
    ensure(
        i.updated_ms <= state.clock_ms && i.created_ms <= i.updated_ms,
        || say("times out of order"),
    )?;
    let saved = state.save_of(&i.id).is_some();
    ensure(saved == (i.state == Pushing), || {
        say("being saved does not fit its state")
    })?;
    ensure(i.rejections.len() <= limits::REJECTIONS, || {
        say("too many rejections")
    })?;
    if i.waits() {
        let template = state.templates.get(&i.request.template);
        let tag = template.and_then(|t| t.tags.get(&i.tag_number));
        ensure(tag.is_some(), || say("waits with a tag that is gone"))?;
    }
    Ok(())
}

/// An open save and an instance that is `Pushing` belong together.
fn check_save(state: &State, save: &Save) -> Result<(), String> {
    let say = |s: &str| s.to_owned();
    let instance = state.instances.get(&save.request.instance);
    let pushing =
        |i: &Instance| i.state == InstanceState::Pushing && i.node.as_ref() == Some(&save.node);
    ensure(!save.open() || instance.is_some_and(pushing), || {
        say("is open and its instance is not being saved")
    })?;
    ensure(save.open() || save.request.script.is_empty(), || {
        say("has ended and keeps its script")
    })?;
    ensure(
        save.end.as_ref().is_none_or(|e| e.at_ms <= state.clock_ms),
        || say("ends in the future"),
    )
}

fn check_template(template: &Template) -> Result<(), String> {
    ensure(!template.tags.is_empty(), || "has no tag".into())?;
    let mut names = std::collections::BTreeSet::new();
    for (number, tag) in &template.tags {
        let at = |what: &str| format!("tag {number}: {what}");
        ensure(number == &tag.number, || at("other number"))?;
        ensure(number < &template.next_number, || at("number is to come"))?;
        ensure(names.insert(&tag.name), || at("name used twice"))?;
        ensure(tag.copies_needed >= 1, || at("needs no copy"))?;
        ensure(tag.visible == tag.visible_ms.is_some(), || {
            at("visible since never")
        })?;
    }
    Ok(())
}

fn check_repository(state: &State, repository: &Repository) -> Result<(), String> {
    ensure(!repository.artifacts.is_empty(), || {
        "has no artifact".into()
    })?;
    for (digest, artifact) in &repository.artifacts {
        let at = |what: &str| format!("{digest}: {what}");
        ensure(*digest == artifact.content.digest, || at("other digest"))?;
        ensure(artifact.copies_needed >= 1, || at("needs no copy"))?;
        let waits = !artifact.waiting_tags.is_empty();
        ensure(!waits || !artifact.visible(), || {
            at("tags wait for nothing")
        })?;
        let mut puts = artifact.waiting_tags.values();
        ensure(puts.all(|put| *put <= repository.puts), || {
            at("a put to come")
        })?;
        let there = artifact.template_tags.iter().all(|(id, number)| {
            let template = state.templates.get(id);
            template.is_some_and(|t| t.tags.contains_key(number))
        });
        ensure(there, || at("its template tag is gone"))?;
    }
    for (name, tag) in &repository.tags {
        ensure(repository.artifact(&tag.artifact).is_some(), || {
            format!("tag {name} names nothing visible")
        })?;
        ensure(tag.put <= repository.puts, || {
            format!("tag {name} is of a put to come")
        })?;
    }
    Ok(())
}

fn check_repository_step(old: &Repository, new: &Repository) -> Result<(), String> {
    ensure(new.puts >= old.puts, || "puts went back".into())?;
    for (digest, artifact) in &new.artifacts {
        let was = old.artifacts.get(digest).filter(|was| was.visible());
        let kept = was.is_none_or(|was| {
            was.content == artifact.content && was.visible_ms == artifact.visible_ms
        });
        ensure(kept, || format!("{digest} became another"))?;
        ensure(was.is_some() || artifact_shown_rightly(artifact), || {
            format!("{digest} is visible with too few copies")
        })?;
    }
    for (name, tag) in &new.tags {
        let was = old.tags.get(name);
        ensure(was.is_none_or(|was| was.put <= tag.put), || {
            format!("tag {name} went back to an earlier put")
        })?;
    }
    Ok(())
}

fn artifact_shown_rightly(artifact: &Artifact) -> bool {
    !artifact.visible() || artifact.holders.len() as u64 >= u64::from(artifact.copies_needed)
}

fn check_instance_step(old: &Instance, new: &Instance) -> Result<(), String> {
    use InstanceState::{Error, Terminated, Terminating};
    let say = |s: &str| s.to_owned();
    ensure(new.generation >= old.generation, || {
        say("generation went back")
    })?;
    let moved = new.node != old.node;
    ensure(!moved || new.generation > old.generation, || {
        say("moved within one generation")
    })?;
    let allowed = match old.state {
        Terminated => new.state == Terminated,
        Terminating => matches!(new.state, Terminating | Terminated),
        Error => matches!(new.state, Error | Terminating | Terminated),
        _ => true,
    };
    ensure(allowed, || say("came back to life"))?;
    let end_kept = old.ended_ms.is_none() || old.ended_ms == new.ended_ms;
    ensure(end_kept, || say("ended twice"))?;
    ensure(
        new.tag_number == old.tag_number && new.tag == old.tag,
        || say("tag changed"),
    )
}

fn check_save_step(old: &Save, new: &Save) -> Result<(), String> {
    let say = |s: &str| s.to_owned();
    ensure(old.open() || old == new, || say("changed after its end"))?;
    ensure(
        old.published.is_none() || old.published == new.published,
        || say("became another tag"),
    )?;
    ensure(
        old.script_result.is_none() || old.script_result == new.script_result,
        || say("its script ended twice"),
    )
}

fn check_template_step(old: &Template, new: &Template) -> Result<(), String> {
    ensure(new.next_number >= old.next_number, || {
        "numbers went back".into()
    })?;
    for (number, tag) in &new.tags {
        match old.tags.get(number) {
            Some(was) => {
                // What is said of it may change, what it is not.
                let content = TagContent {
                    arch: was.content.arch.clone(),
                    description: was.content.description.clone(),
                    ..tag.content.clone()
                };
                let same = was.content == content && was.name == tag.name;
                ensure(same, || format!("tag {number} became another"))?;
                let kept = !was.visible || tag.visible_ms == was.visible_ms;
                ensure(kept, || format!("tag {number} lost its visibility"))?;
                ensure(was.visible || shown_rightly(tag), || {
                    format!("tag {number} is visible with too few copies")
                })?;
            }
            None => {
                ensure(*number >= old.next_number, || {
                    format!("tag {number} came back")
                })?;
                ensure(shown_rightly(tag), || {
                    format!("tag {number} was born visible with too few copies")
                })?;
            }
        }
    }
    Ok(())
}

/// When it becomes visible. Which holders count is known to the command alone.
fn shown_rightly(tag: &Tag) -> bool {
    !tag.visible || tag.holders.len() as u64 >= u64::from(tag.copies_needed)
}
