//! After the faults: everyone serves again, within a bound, and all members have the same state.

use super::MEMBERS;
use super::field::Field;
use super::nemesis::{Nemesis, row};
use crate::cluster::{Cluster, until};
use serde_json::Value;
use std::time::{Duration, Instant};

/// All must serve again within this.
const HEAL_MAX: Duration = Duration::from_secs(30);
/// Writes that each member must acknowledge afterwards.
const WRITES: u64 = 5;
/// What a client can see of the replicated state.
const VIEWS: [&str; 4] = [
    "/api/v1/vm",
    "/api/v1/registry/vm",
    "/api/v1/node",
    "/api/v1/group",
];

/// Wait until every member is a voter, ready, and acknowledges writes; how long that took.
pub(crate) async fn heal(nemesis: &mut Nemesis<'_>) -> Duration {
    let begin = Instant::now();
    nemesis.links.heal(true);
    let all: Vec<usize> = (0..MEMBERS).collect();
    nemesis.cluster.wait_ready(&all).await;
    let cluster = &*nemesis.cluster;
    until("all are voters again", HEAL_MAX, || async {
        let members = cluster.call(0, "GET", "/api/v1/members", None).await.ok()?;
        let members = members.as_array()?;
        let voter = |m: &Value| m["role"] == "voter";
        (members.len() == all.len() && members.iter().all(voter)).then_some(())
    })
    .await;
    for n in all {
        nemesis.progress(&[n], WRITES).await;
    }
    let took = begin.elapsed();
    assert!(took < HEAL_MAX, "healed only after {took:?}");
    took
}

/// Wait until all have applied the same, and compare everything that they show.
pub(crate) async fn equal(cluster: &Cluster, field: &Field) {
    until("equal states at an equal index", HEAL_MAX, || async {
        let mut seen = Vec::new();
        for n in 0..MEMBERS {
            let before = applied(cluster, n).await?;
            let views = views(field, cluster, n).await?;
            // Nothing was applied in between: the views belong to this index.
            (applied(cluster, n).await? == before).then_some(())?;
            seen.push((before, views));
        }
        let same_index = seen.windows(2).all(|w| w[0].0 == w[1].0);
        if same_index {
            for pair in seen.windows(2) {
                assert_eq!(pair[0].1, pair[1].1, "two members differ at one index");
            }
        }
        same_index.then_some(())
    })
    .await;
}

async fn applied(cluster: &Cluster, n: usize) -> Option<u64> {
    let row = row(cluster, n).await?;
    // A machine that also compiles has a slow disk now and then; saying so is right.
    let errors = row["errors"].as_array().expect("a list of errors");
    let slow = |error: &Value| {
        error
            .as_str()
            .is_some_and(|e| e.contains("its disk is slow"))
    };
    assert!(errors.iter().all(slow), "{row}");
    row["applied"].as_u64()
}

async fn views(field: &Field, cluster: &Cluster, n: usize) -> Option<Vec<Value>> {
    let mut views = Vec::new();
    for view in VIEWS {
        let path = format!("{view}?consistency=stale");
        let mut body = cluster.call(n, "GET", &path, None).await.ok()?;
        own_address_out(&mut body);
        views.push(body);
    }
    for (id, _) in &field.piles {
        let path = format!("/api/v1/registry/vm?id={id}&consistency=stale");
        views.push(cluster.call(n, "GET", &path, None).await.ok()?);
    }
    Some(views)
}

/// Each member tells its own registry.
fn own_address_out(body: &mut Value) {
    for item in body.as_array_mut().into_iter().flatten() {
        if let Some(vm) = item.get_mut("vm").and_then(Value::as_object_mut) {
            vm.remove("anka_registry");
        }
    }
}
