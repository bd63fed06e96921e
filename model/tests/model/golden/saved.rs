//! Stored values of instances that are being saved as tags, and that were.

use super::{full_observation, sample_history, state_after, stored};
use crate::{sample, saves};
use mainstay_model::command::{Binding, Command};
use mainstay_model::instance::{Observation, ObservedPhase};
use mainstay_model::save::{SaveReport, SaveRequest, SaveSaid};

/// With saves: one that failed, and an open one with a script, its output and a tag.
#[test]
fn stored_values_at_level_14() {
    let mut history = sample_history(14);
    let named = |name: &str| {
        let found = saves::samples().into_iter().find(|(n, _)| *n == name);
        found.unwrap().1
    };
    let start = Command::StartInstances {
        ids: vec!["i4".into(), "i5".into()],
        request: Box::new(sample::request("t1")),
    };
    let to = |id: &str| Binding {
        instance: id.into(),
        node: "n1".into(),
        generation: 1,
    };
    let running = |id: &str| Observation {
        id: id.into(),
        ..full_observation(ObservedPhase::Running)
    };
    let fails = Command::ReportSaves {
        node: "n1".into(),
        reports: vec![SaveReport {
            id: "s2".into(),
            said: SaveSaid::Failed {
                why: "no room".into(),
                stopped: true,
            },
            script: None,
        }],
    };
    let open = SaveRequest {
        script: b"sync".to_vec(),
        ..saves::request("i5")
    };
    let back = Command::SetNodeReachability {
        id: "n1".into(),
        reachable: true,
        lost: false,
    };
    history.extend([
        back,
        start,
        Command::Bind {
            bindings: vec![to("i4"), to("i5")],
        },
        Command::Observe {
            node: "n1".into(),
            changes: vec![running("i4"), running("i5")],
        },
        named("save-bare"),
        fails,
        Command::SaveInstance {
            id: "s1".into(),
            request: Box::new(open),
        },
        named("report-save-script"),
        named("publish-saved"),
    ]);
    let state = state_after(&history);
    assert_eq!(state.saves.len(), 2);
    stored("stored-level-14.txt", &state, "cfghijlmnopqrstuvwx");
}
