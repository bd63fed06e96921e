//! Any start order, minutes or milliseconds apart: one working cluster each time.

use crate::cluster::{Cluster, until};
use crate::push::push_small_template;
use crate::{Dice, rounds, turn};
use std::time::Duration;

const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];

/// `MAINSTAY_START_ROUNDS=20` is the long form: every order that often.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_start_order_makes_one_cluster() {
    let _turn = turn().await;
    let mut dice = Dice::new("start order");
    for round in 0..rounds("MAINSTAY_START_ROUNDS", 1) {
        for order in ORDERS {
            let mut cluster = Cluster::new(3);
            for n in order {
                // The pause is the input of this test, not a wait for something.
                tokio::time::sleep(Duration::from_millis(dice.below(1500))).await;
                cluster.start(n);
            }
            cluster.wait_ready(&[0, 1, 2]).await;
            let ids = until(
                "three voters, seen alike by all",
                Duration::from_secs(30),
                || async {
                    let mut seen = Vec::new();
                    for n in 0..3 {
                        let list = cluster.call(n, "GET", "/api/v1/members", None).await.ok()?;
                        let list = list.as_array()?.clone();
                        if list.len() != 3 || list.iter().any(|m| m["role"] != "voter") {
                            return None;
                        }
                        let mut ids: Vec<_> = list
                            .iter()
                            .filter_map(|m| m["id"].as_str().map(str::to_owned))
                            .collect();
                        ids.sort();
                        seen.push(ids);
                    }
                    seen.windows(2)
                        .all(|w| w[0] == w[1])
                        .then(|| seen.swap_remove(0))
                },
            )
            .await;
            assert_eq!(ids.len(), 3, "round {round}, order {order:?}");
            let template = push_small_template(&cluster, "any").await;
            for n in 0..3 {
                let path = format!("/api/v1/registry/vm?id={template}");
                cluster
                    .call(n, "GET", &path, None)
                    .await
                    .expect("visible on every member");
            }
        }
    }
}
