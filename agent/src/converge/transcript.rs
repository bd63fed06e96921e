//! The pure core as a table of situations: what is wanted, what is known, what is there, what follows.
//! One line each; the whole table is compared, so that a changed rule shows as a changed line.

use super::{Action, Doing, Job, plan};
use crate::wire::{DesiredInstance, DesiredSet, SaveOrder};
use std::collections::BTreeMap;

const TRANSCRIPT: &str = "\
-       | -              | -  | nothing
-       | -              | v5 | nothing
-       | 5 idle         | -  | forget
-       | 5 idle         | v5 | nothing
-       | 5 start        | -  | cancel
-       | 5 start        | v5 | cancel
-       | 5 start,up     | v5 | nothing
-       | 5 cancel       | -  | nothing
-       | 5 delete       | v5 | nothing
-       | 5 up           | v5 | nothing
-       | 5 up           | -  | forget
-       | 5 gone         | -  | forget
run 5   | -              | -  | start
run 5   | -              | v5 | start
run 5   | -              | v4 | delete
run 5   | -              | v6 | nothing
run 5   | 5 idle         | -  | start
run 5   | 5 idle         | v5 | start
run 5   | 5 start        | -  | nothing
run 5   | 4 start        | -  | delete
run 5   | 5 cancel       | v5 | nothing
run 5   | 4 delete       | v4 | nothing
run 5   | 5 up           | v5 | nothing
run 5   | 5 up           | -  | nothing
run 5   | 4 up           | v4 | delete
run 5   | 4 up           | -  | delete
run 5   | 4 gone         | -  | start
run 5   | 5 gone         | -  | nothing
run 5   | 6 up           | v6 | nothing
run 5   | 6 idle         | v6 | nothing
keep 5  | -              | -  | nothing
keep 5  | -              | v4 | nothing
keep 5  | 4 start        | -  | cancel
keep 5  | 5 start        | v5 | cancel
keep 5  | 5 start,up     | v5 | nothing
keep 5  | 4 cancel       | -  | nothing
keep 5  | 4 idle         | v4 | nothing
keep 5  | 5 up           | v5 | nothing
keep 5  | 5 up           | -  | nothing
keep 5  | 4 up           | v4 | nothing
again 5 | -              | -  | restart
again 5 | -              | v4 | restart
again 5 | -              | v5 | restart
again 5 | -              | v6 | nothing
again 5 | 4 up           | v4 | restart
again 5 | 4 up           | -  | restart
again 5 | 4 start,up     | v4 | restart
again 5 | 4 start        | v4 | restart
again 5 | 4 delete       | v4 | nothing
again 5 | 4 gone         | -  | restart
again 5 | 5 idle         | v4 | restart
again 5 | 5 idle         | v5 | restart
again 5 | 5 start        | v4 | nothing
again 5 | 5 up           | v5 | nothing
again 5 | 5 cancel       | v5 | nothing
again 5 | 6 up           | v6 | nothing
save 5  | -              | -  | save
save 5  | -              | v5 | save
save 5  | 5 up           | v5 | save
save 5  | 5 up           | -  | save
save 5  | 5 start        | v5 | nothing
save 5  | 5 start,up     | v5 | save
save 5  | 5 save,up      | v5 | nothing
save 5  | 5 cancel,up    | v5 | nothing
save 5  | 5 delete       | v5 | nothing
save 5  | 5 up,saved     | v5 | nothing
save 5  | 5 up,other     | v5 | save
save 5  | 6 up           | v6 | nothing
wait 5  | 5 up           | v5 | nothing
wait 5  | -              | v5 | nothing
-       | 5 save,up      | v5 | cancel
run 5   | 5 save,up      | v5 | cancel
run 5   | 5 up,saved     | v5 | nothing
keep 6  | 5 save,up      | v5 | cancel
again 6 | 5 save,up      | v5 | restart
again 6 | 5 up,saved     | v5 | restart
stop 6  | 5 save,up      | v5 | delete
stop 5  | -              | -  | delete
stop 5  | -              | v4 | delete
stop 5  | 4 start        | -  | delete
stop 5  | 4 start,up     | v4 | delete
stop 5  | 4 cancel       | v4 | delete
stop 5  | 4 up           | v4 | delete
stop 5  | 5 delete       | v4 | nothing
stop 5  | 5 gone         | -  | nothing
stop 5  | 4 gone         | -  | delete
stop 5  | 6 up           | v6 | nothing
";

fn wanted(text: &str) -> DesiredSet {
    let instances = match text.split_once(' ') {
        None => Vec::new(),
        Some((verb, generation)) => vec![DesiredInstance {
            id: "i".to_owned(),
            generation: generation.parse().unwrap(),
            run: verb != "stop",
            keep: ["keep", "again", "save", "wait"].contains(&verb),
            restart: verb == "again",
            save: ["save", "wait"].contains(&verb).then(|| SaveOrder {
                id: "s".to_owned(),
                go: verb == "save",
                ..SaveOrder::default()
            }),
            ..DesiredInstance::default()
        }],
    };
    DesiredSet {
        instances,
        ..DesiredSet::default()
    }
}

fn doing(text: &str) -> BTreeMap<String, Doing> {
    let Some((generation, words)) = text.split_once(' ') else {
        return BTreeMap::new();
    };
    let mut doing = Doing {
        generation: generation.parse().unwrap(),
        ..Doing::default()
    };
    for word in words.split(',') {
        match word {
            "start" => doing.job = Some(Job::Start),
            "save" => doing.job = Some(Job::Save),
            "saved" => doing.saved = Some("s".to_owned()),
            "other" => doing.saved = Some("before".to_owned()),
            "cancel" => doing.job = Some(Job::Cancel),
            "delete" => doing.job = Some(Job::Delete),
            "up" => doing.settled = true,
            "gone" => doing.gone = true,
            "idle" => {}
            other => panic!("{other}"),
        }
    }
    BTreeMap::from([("i".to_owned(), doing)])
}

fn vms(text: &str) -> BTreeMap<String, u64> {
    text.strip_prefix('v')
        .map(|g| ("i".to_owned(), g.parse().unwrap()))
        .into_iter()
        .collect()
}

fn say(actions: &[Action]) -> &'static str {
    match actions {
        [] => "nothing",
        [Action::Start(_)] => "start",
        [Action::Restart(_)] => "restart",
        [Action::Save(_)] => "save",
        [Action::Cancel(_)] => "cancel",
        [Action::Delete(_)] => "delete",
        [Action::Forget(_)] => "forget",
        more => panic!("more than one action: {more:?}"),
    }
}

#[test]
fn every_situation_has_its_action() {
    let mut told = String::new();
    for line in TRANSCRIPT.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let actions = plan(&wanted(cells[0]), &doing(cells[1]), &vms(cells[2]));
        told += &format!(
            "{:<7} | {:<14} | {:<2} | {}\n",
            cells[0],
            cells[1],
            cells[2],
            say(&actions)
        );
    }
    assert_eq!(told, TRANSCRIPT);
}

/// Nothing that the controller does not name is ever deleted, whatever else is the case.
#[test]
fn nothing_unnamed_is_deleted() {
    let jobs = [
        None,
        Some(Job::Start),
        Some(Job::Cancel),
        Some(Job::Save),
        Some(Job::Delete),
    ];
    for job in jobs {
        for bits in 0..4 {
            for vm in [None, Some(3), Some(5), Some(9)] {
                let doing = Doing {
                    generation: 5,
                    job,
                    settled: bits & 1 == 1,
                    gone: bits & 2 == 2,
                    saved: None,
                };
                let actions = plan(
                    &DesiredSet::default(),
                    &BTreeMap::from([("i".to_owned(), doing.clone())]),
                    &vm.map(|g| ("i".to_owned(), g)).into_iter().collect(),
                );
                assert!(
                    !actions.iter().any(|a| matches!(a, Action::Delete(_))),
                    "{doing:?} {vm:?}"
                );
            }
        }
    }
}
