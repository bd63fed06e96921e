//! kill -9 of one member after another under load: nothing acknowledged is lost, every open succeeds.

use crate::cluster::{Cluster, until};
use crate::load::Writers;
use crate::push::push_small_template;
use crate::{Dice, rounds, turn};
use std::time::Duration;

/// `MAINSTAY_KILL_CYCLES=200` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_cycles_lose_nothing() {
    let _turn = turn().await;
    let cycles = rounds("MAINSTAY_KILL_CYCLES", 8);
    let mut dice = Dice::new("kill cycles");
    let mut cluster = Cluster::ready().await;
    let template = push_small_template(&cluster, "load").await;
    let writers = Writers::start(&cluster, &template, 8).await;
    let mut leaders = 0;
    for cycle in 0..cycles {
        writers.progress(20 + dice.below(200)).await;
        let leader = cluster.leader().await;
        // Every other cycle hits the leader, so that both parts are exercised whatever the dice say.
        let victim = if cycle % 2 == 0 {
            leader
        } else {
            dice.below(3) as usize
        };
        leaders += usize::from(victim == leader);
        cluster.kill(victim);
        writers.progress(20).await;
        cluster.start(victim);
        cluster.wait_ready(&[victim]).await;
    }
    assert!(
        leaders * 2 >= cycles,
        "the leader was hit {leaders} times in {cycles}"
    );
    let told = writers.stop_only().await;
    for n in 0..3 {
        told.check(&cluster, n).await;
    }
    let total = told.check(&cluster, 0).await;
    eprintln!("{cycles} kills ({leaders} of the leader), {total} acknowledged writes, 0 lost");
    all_members_agree(&cluster).await;
}

/// All members reach the same applied index.
pub(crate) async fn all_members_agree(cluster: &Cluster) {
    until(
        "equal applied index on all members",
        Duration::from_secs(20),
        || async {
            let rows = cluster.cli_json(&["status"]);
            let rows = rows.as_array()?;
            let first = rows.first()?["applied"].as_u64()?;
            let equal =
                rows.len() == 3 && rows.iter().all(|r| r["applied"].as_u64() == Some(first));
            equal.then_some(())
        },
    )
    .await;
}
