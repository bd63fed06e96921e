//! What each command does to the state. Total: whatever a command says, the answer is an
//! [`Outcome`]; a refusal changes nothing. No clock but the state's, no choice that is not in the
//! command.

mod artifact;
mod bind;
mod check;
mod distribute;
mod evict;
mod group;
mod instance;
mod member;
mod node;
mod observe;
pub(crate) mod save;
mod template;

use crate::command::{Addition, Command};
use crate::ids::TemplateId;
use crate::outcome::{Outcome, Refusal};
use crate::state::State;

/// An outcome, or the reason why nothing changed.
type Applied = Result<Outcome, Refusal>;

pub(crate) fn run(state: &mut State, command: &Command) -> Outcome {
    dispatch(state, command).unwrap_or_else(Outcome::Refused)
}

fn dispatch(state: &mut State, command: &Command) -> Applied {
    match command {
        Command::StartInstances { ids, request } => instance::start(state, ids, request),
        Command::UpdateInstance {
            id,
            name,
            external_id,
            metadata,
        } => instance::update(state, id, name.as_ref(), external_id.as_ref(), metadata),
        Command::TerminateInstance { id } => instance::terminate(state, id),
        Command::RestartInstance { id } => instance::restart(state, id),
        Command::SaveInstance { id, request } => save::begin(state, id, request),
        Command::ReportSaves { node, reports } => save::report(state, node, reports),
        Command::PublishSaved { disk } => save::publish(state, disk),
        Command::ExpireSaves {
            ids,
            retention_ms,
            begin_ms,
        } => save::expire(state, ids, *retention_ms, *begin_ms),
        Command::Bind { bindings } => bind::bind(state, bindings),
        Command::Observe { node, changes } => observe::observe(state, node, changes),
        Command::ExpireInstances { ids, retention_ms } => {
            instance::expire(state, ids, *retention_ms)
        }
        Command::RegisterNode { id, spec } => node::register(state, id, spec),
        Command::ConfigureNode { id, config } => node::configure(state, id, config),
        Command::RemoveNode { id } => node::remove(state, id),
        Command::SetNodeReachability {
            id,
            reachable,
            lost,
        } => node::set_reachability(state, id, *reachable, *lost),
        Command::SetNodeImages { id, images } => node::set_images(state, id, images),
        Command::PublishTag {
            new_template_id,
            template,
            tag,
            content,
            holder,
            copies_needed,
            voters,
        } => {
            let push = template::Push {
                template,
                tag,
                content,
                holder: *holder,
                copies_needed: *copies_needed,
                voters,
            };
            publish(state, new_template_id, push)
        }
        Command::ReportHeld {
            template,
            number,
            manifest,
            member,
            held,
            voters,
        } => {
            let voters = held.then_some(voters);
            template::report_held(state, template, *number, manifest, *member, voters)
        }
        Command::DeleteTemplate { id } => template::delete(state, id),
        Command::RevertTemplate { id, selector } => template::revert(state, id, selector.as_ref()),
        Command::DeleteTag { id, selector } => template::delete_tag(state, id, selector),
        Command::Noop => Ok(Outcome::Done),
        Command::SetFeatures { level } => {
            state.raise_features(*level);
            Ok(Outcome::Done)
        }
        Command::PutGroup { group } => group::put(state, group),
        Command::DeleteGroup { id } => group::delete(state, id),
        Command::ChangeNodeGroups {
            nodes,
            groups,
            member,
        } => group::change_nodes(state, nodes, groups, *member),
        Command::RetireMember { id, name, voters } => member::retire(state, *id, name, voters),
        Command::PutArtifact { put } => artifact::put(state, put),
        Command::ReportArtifactHeld {
            repository,
            digest,
            bundle,
            member,
            held,
            voters,
        } => {
            let voters = held.then_some(voters);
            artifact::report_held(state, repository, digest, bundle, *member, voters)
        }
        Command::DeleteArtifact { repository, digest } => {
            artifact::delete(state, repository, digest)
        }
        Command::DeleteArtifactTag { repository, tag } => {
            artifact::delete_tag(state, repository, tag)
        }
        Command::DescribeTag {
            id,
            selector,
            arch,
            description,
        } => {
            let (arch, description) = (arch.as_deref(), description.as_deref());
            template::describe(state, id, selector.as_ref(), arch, description)
        }
        Command::NotePulls { pulls } => template::note_pulls(state, pulls),
        Command::SetQuota { template, bytes } => {
            template::set_quota(state, template.as_deref(), *bytes)
        }
        Command::AddWithin { named, what } => {
            if state.named(what.name()) != *named {
                return Err(Refusal::Stale);
            }
            add(state, what)
        }
        Command::Distribute {
            id,
            template,
            selector,
            nodes,
            group,
        } => {
            let whom = distribute::Whom {
                nodes,
                group: group.as_ref(),
            };
            distribute::distribute(state, id, template, selector.as_ref(), &whom)
        }
        Command::CancelDistribution { id } => distribute::cancel(state, id),
        Command::ExpireDistributions {
            ids,
            patience_ms,
            retention_ms,
        } => distribute::expire(state, ids, *patience_ms, *retention_ms),
        Command::EvictImages { template, nodes } => evict::evict(state, template, nodes),
    }
}

fn add(state: &mut State, what: &Addition) -> Applied {
    match what {
        Addition::Artifact(put) => artifact::put(state, put),
        Addition::Saved(disk) => save::publish(state, disk),
        Addition::Tag(tag) => {
            let push = template::Push {
                template: &tag.template,
                tag: &tag.tag,
                content: &tag.content,
                holder: tag.holder,
                copies_needed: tag.copies_needed,
                voters: &tag.voters,
            };
            publish(state, &tag.new_template_id, push)
        }
    }
}

fn publish(state: &mut State, new_id: &TemplateId, push: template::Push<'_>) -> Applied {
    artifact::check_free(state, push.template, push.tag)?;
    let copies_needed = push.copies_needed.max(1);
    let push = template::Push {
        copies_needed,
        ..push
    };
    template::publish(state, new_id, &push)
}
