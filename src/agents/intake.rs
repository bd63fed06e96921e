//! Reports become commands: only where something differs from the state, and at most one command of
//! a node is under way; newer reports wait and replace each other. Nothing is lost by dropping one:
//! an agent says everything again with every heartbeat.

use super::translate;
use crate::app::{App, Consistency};
use mainstay_agent::wire::{ImageRef, Report};
use mainstay_model::codec::encoded_len;
use mainstay_model::instance::Observation;
use mainstay_model::limits::{BATCH, NODE_IMAGES};
use mainstay_model::{Command, NodeId, State, TemplateId, plan};
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Most encoded bytes of observations, or of what is said of saves, in one command: half of what the log takes. One observation
/// is far smaller, for its texts are cut before.
pub(super) const OBSERVE_BYTES: usize = 4 << 20;

/// Nodes with a command under way, each with the report that waits behind it.
type Busy = Arc<Mutex<BTreeMap<String, Option<Report>>>>;

pub(super) struct Intake {
    app: App,
    busy: Busy,
}

impl Intake {
    pub(super) fn new(app: App) -> Self {
        Self {
            app,
            busy: Busy::default(),
        }
    }

    /// Returns at once.
    pub(super) fn take(&self, report: Report) {
        {
            let mut busy = self.busy.lock();
            if let Some(waiting) = busy.get_mut(&report.node_id) {
                *waiting = Some(report);
                return;
            }
            busy.insert(report.node_id.clone(), None);
        }
        tokio::spawn(work(self.app.clone(), Arc::clone(&self.busy), report));
    }
}

async fn work(app: App, busy: Busy, mut report: Report) {
    loop {
        let commands = match app.read(Consistency::Stale).await {
            Ok(state) => commands(&state, &report),
            Err(_) => Vec::new(),
        };
        for command in commands {
            if let Err(error) = app.submit(command).await {
                tracing::debug!(node = report.node_id, %error, "a report was not taken; the next one will say it again");
            }
        }
        let mut busy = busy.lock();
        match busy.get_mut(&report.node_id).and_then(Option::take) {
            Some(newer) => report = newer,
            None => {
                busy.remove(&report.node_id);
                return;
            }
        }
    }
}

/// What must be said to the log so that the state agrees with the report.
pub(super) fn commands(state: &State, report: &Report) -> Vec<Command> {
    let id = NodeId::from(report.node_id.clone());
    let Some(node) = state.nodes.get(&id) else {
        return Vec::new();
    };
    let mut commands = Vec::new();
    let changes: Vec<Observation> = report
        .observed
        .iter()
        .filter_map(translate::observation)
        .filter(|seen| plan::is_news(state, &id, seen))
        .take(BATCH)
        .collect();
    commands.extend(split(changes).into_iter().map(|changes| Command::Observe {
        node: id.clone(),
        changes,
    }));
    let saves = report.observed.iter().filter_map(translate::save_report);
    let saves = saves.filter(|said| plan::is_save_news(state, &id, said));
    commands.extend(
        split(saves.take(BATCH).collect())
            .into_iter()
            .map(|reports| Command::ReportSaves {
                node: id.clone(),
                reports,
            }),
    );
    let images = images(&report.images);
    if images != node.images {
        let images = images.into_iter().collect();
        commands.push(Command::SetNodeImages { id, images });
    }
    commands
}

/// In order, into parts that the log takes.
fn split<T: Serialize>(changes: Vec<T>) -> Vec<Vec<T>> {
    let mut parts: Vec<Vec<T>> = Vec::new();
    let mut size = OBSERVE_BYTES;
    for seen in changes {
        let more = encoded_len(&seen);
        match parts.last_mut().filter(|_| size + more <= OBSERVE_BYTES) {
            Some(part) => {
                part.push(seen);
                size += more;
            }
            None => {
                parts.push(vec![seen]);
                size = more;
            }
        }
    }
    parts
}

fn images(images: &[ImageRef]) -> BTreeSet<(TemplateId, u32)> {
    let all = images.iter().filter(|i| !i.template_id.is_empty());
    all.map(|i| (TemplateId::from(i.template_id.clone()), i.number))
        .take(NODE_IMAGES)
        .collect()
}
