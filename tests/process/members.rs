//! Joining by an address, step by step: what is refused and with which words; learners; members that
//! move; what survives a restart.

use crate::cluster::{Cluster, until};
use crate::membership::{roles, voters_are};
use crate::refused::says;
use crate::turn;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

/// A member alone.
async fn one() -> Cluster {
    let mut cluster = Cluster::new(1);
    // What removals need is on at once, template or not.
    cluster.flags = vec!["--feature-grace-s", "0"];
    cluster.start(0);
    cluster.wait_ready(&[0]).await;
    cluster
}

fn error(out: &std::process::Output) -> String {
    assert!(!out.status.success());
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_join_is_told_what_to_do() {
    let _turn = turn().await;
    let mut cluster = one().await;
    // The wrong port of the right member: the words name the right one.
    let lost = cluster.joiner(&[0]);
    let api = format!("http://{}", cluster.members[0].api);
    let right = std::mem::replace(&mut cluster.members[lost].join, vec![api]);
    cluster.start(lost);
    says(&cluster, "c2", &["a member's API", &right[0]]).await;
    cluster.kill(lost);
    // Nobody there: says so, and goes on when somebody is.
    cluster.members[lost].join = vec!["http://127.0.0.1:9".to_owned()];
    cluster.start(lost);
    says(&cluster, "c2", &["nobody answers at http://127.0.0.1:9"]).await;
    cluster.kill(lost);
    // The wrong token.
    cluster.members[lost].join = right;
    let token = std::mem::replace(&mut cluster.token, "another".to_owned());
    cluster.start(lost);
    says(&cluster, "c2", &["--cluster-token"]).await;
    cluster.kill(lost);
    cluster.token = token;
    // None of these has let it in.
    assert_eq!(roles(&cluster, 0).await.unwrap().len(), 1);
    cluster.start(lost);
    voters_are(&cluster, &[0, lost]).await;
    // A name that another one has; `member add` says the same.
    let twin = cluster.joiner(&[0]);
    cluster.members[twin].name = "c2".to_owned();
    cluster.members[twin].data = cluster.dir.path().join("twin");
    cluster.start(twin);
    says(&cluster, "c2", &["mainstay member replace c2"]).await;
    cluster.kill(twin);
    let said = error(&cluster.cli(&["member", "add", "c2"]));
    assert!(
        said.contains("in the cluster already, as a voter"),
        "{said}"
    );
    // A directory of another cluster.
    let mut other = Cluster::new(1);
    other.members[0].name = "c9".to_owned();
    other.start(0);
    other.wait_ready(&[0]).await;
    other.kill(0);
    let stray = cluster.joiner(&[0]);
    cluster.members[stray].name = "c9".to_owned();
    cluster.members[stray].data = other.members[0].data.clone();
    cluster.start(stray);
    says(
        &cluster,
        "c9",
        &["data directory of member c9 belongs to cluster", "--join"],
    )
    .await;
    cluster.kill(stray);
    voters_are(&cluster, &[0, lost]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_restarts_without_those_it_joined_through_and_a_wiped_one_is_refused() {
    let _turn = turn().await;
    let mut cluster = one().await;
    let said = cluster.cli_ok(&["member", "add", "c2"]);
    let join = format!("--join http://{}", cluster.members[0].peer);
    assert!(
        said.contains("mainstay server --name c2") && said.contains(&join),
        "{said}"
    );
    let [second, third] = [cluster.joiner(&[0]), cluster.joiner(&[0])];
    cluster.start(second);
    cluster.start(third);
    voters_are(&cluster, &[0, second, third]).await;
    // Its only address to join through is gone, and so is the one who let it in.
    cluster.cli_ok(&["member", "remove", "c1"]);
    cluster.stop(0).await;
    for n in [second, third] {
        cluster.stop(n).await;
    }
    for n in [second, third] {
        cluster.start(n);
    }
    cluster.wait_ready(&[second, third]).await;
    voters_are(&cluster, &[second, third]).await;
    // Wiped, it never votes under its old identity: its name is taken.
    cluster.kill(third);
    std::fs::remove_dir_all(&cluster.members[third].data).unwrap();
    cluster.members[third].join = vec![format!("http://{}", cluster.members[second].peer)];
    cluster.start(third);
    says(&cluster, "c3", &["mainstay member replace c3"]).await;
    // Without it there is no majority: neither can be taken out now, and the words say who is missing.
    let said = error(&cluster.cli(&["member", "replace", "c3"]));
    assert!(
        said.contains("no leader") || said.contains("majority"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_stays_one_until_it_is_promoted_and_does_not_come_back_when_removed() {
    let _turn = turn().await;
    let mut cluster = one().await;
    let said = cluster.cli_ok(&["member", "add", "c2", "--learner"]);
    assert!(
        said.contains("--learner") && said.contains("member promote c2"),
        "{said}"
    );
    let learner = cluster.joiner(&[0]);
    cluster.members[learner].extra = vec!["--learner".to_owned()];
    cluster.start(learner);
    cluster.wait_ready(&[learner]).await;
    // It serves reads and forwards writes; time enough to promote one that wants a vote.
    let rest = cluster.joiner(&[0]);
    cluster.start(rest);
    until("the other has its vote", LIMIT, || async {
        let roles = roles(&cluster, 0).await?;
        (roles.get("c3")? == "voter").then_some(())
    })
    .await;
    assert_eq!(roles(&cluster, 0).await.unwrap()["c2"], "learner");
    let rows = cluster.cli_json(&["member", "list"]);
    let row = |name: &str| {
        let rows = rows.as_array().unwrap().iter();
        rows.clone().find(|r| r["name"] == name).unwrap().clone()
    };
    assert_eq!(
        (&row("c2")["answers"], &row("c2")["role"]),
        (&true.into(), &"learner".into())
    );
    assert!(row("c2")["matched"].as_u64().unwrap() > 0 && row("c2")["lag"].is_u64());
    cluster.cli_ok(&["member", "promote", "c2"]);
    voters_are(&cluster, &[0, learner, rest]).await;
    // Its flags still say --learner: no reason to give its vote back.
    cluster.stop(learner).await;
    cluster.start(learner);
    cluster.wait_ready(&[learner]).await;
    voters_are(&cluster, &[0, learner, rest]).await;
    // A learner that never voted, removed while it runs: it would ask to join again at once.
    let guest = cluster.joiner(&[0]);
    cluster.members[guest].extra = vec!["--learner".to_owned()];
    cluster.start(guest);
    cluster.wait_ready(&[guest]).await;
    let said = cluster.cli_ok(&["member", "remove", "c4"]);
    assert!(said.contains("member c4 was removed"), "{said}");
    let again = cluster.cli_ok(&["member", "remove", "c4"]);
    assert!(again.contains("has been removed already"), "{again}");
    says(&cluster, "c4", &["was removed from the cluster"]).await;
    voters_are(&cluster, &[0, learner, rest]).await;
    let said = error(&cluster.cli(&["member", "remove", "c9"]));
    assert!(
        said.contains("No such member c9: the members are c1, c2, c3"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_moves_by_its_flags_or_by_a_command() {
    let _turn = turn().await;
    let mut cluster = one().await;
    let [second, third] = [cluster.joiner(&[0]), cluster.joiner(&[0])];
    for n in [second, third] {
        cluster.start(n);
    }
    voters_are(&cluster, &[0, second, third]).await;
    let known = async |cluster: &Cluster, name: &str, url: &str| {
        until(&format!("{name} is known at {url}"), LIMIT, || async {
            let list = cluster.call(0, "GET", "/api/v1/members", None).await.ok()?;
            let row = list.as_array()?.iter().find(|m| m["name"] == name)?.clone();
            (row["peer_url"] == url).then_some(row)
        })
        .await
    };
    // Other flags: it announces itself.
    cluster.stop(second).await;
    cluster.members[second].move_house();
    cluster.start(second);
    let peer = format!("http://{}", cluster.members[second].peer);
    let row = known(&cluster, "c2", &peer).await;
    assert_eq!(
        row["api_url"],
        format!("http://{}", cluster.members[second].api)
    );
    cluster.wait_ready(&[second]).await;
    // A command: refused where nobody, or somebody else, answers, unless forced.
    let api = "http://cloud.example:80";
    let said = cluster.cli_ok(&["member", "update", "c3", "--api-url", api]);
    assert!(said.contains(api), "{said}");
    let nowhere = ["member", "update", "c3", "--peer-url", "http://127.0.0.1:9"];
    let said = error(&cluster.cli(&nowhere));
    assert!(
        said.contains("does not answer at http://127.0.0.1:9"),
        "{said}"
    );
    let said = error(&cluster.cli(&["member", "update", "c3", "--peer-url", &peer]));
    assert!(
        said.contains("member c2 is not the member that was meant"),
        "{said}"
    );
    // What the operator said holds, although the member's own flags say otherwise, and after its restart.
    cluster.stop(third).await;
    cluster.start(third);
    cluster.wait_ready(&[third]).await;
    let home = format!("http://{}", cluster.members[third].peer);
    let row = known(&cluster, "c3", &home).await;
    assert_eq!(row["api_url"], api);
    // Forced to a wrong one, the group still finds it where it was seen; and the right one is taken.
    cluster.cli_ok(&[&nowhere[..], &["--force"]].concat());
    known(&cluster, "c3", "http://127.0.0.1:9").await;
    cluster.cli_ok(&["member", "update", "c3", "--peer-url", &home]);
    known(&cluster, "c3", &home).await;
    until("c3 answers", LIMIT, || async {
        let rows = cluster.cli_json(&["member", "list"]);
        let row = rows.as_array()?.iter().find(|m| m["name"] == "c3")?.clone();
        (row["answers"] == true).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_members_move_at_once() {
    let _turn = turn().await;
    let mut cluster = Cluster::ready().await;
    voters_are(&cluster, &[0, 1, 2]).await;
    let body = serde_json::json!({"name": "kept"});
    cluster
        .call(1, "POST", "/api/v1/group", Some(body))
        .await
        .unwrap();
    for n in 0..3 {
        cluster.stop(n).await;
    }
    // The group's own list is wrong for everybody, and without a majority it cannot be corrected.
    for n in 0..3 {
        cluster.members[n].move_house();
    }
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    for n in 0..3 {
        let known = format!("{n} knows where all are now");
        until(&known, LIMIT, || async {
            let list = cluster.call(n, "GET", "/api/v1/members", None).await.ok()?;
            let urls = list.as_array()?.iter().map(|m| m["peer_url"].clone());
            let mut urls: Vec<_> = urls.map(|u| u.as_str().unwrap().to_owned()).collect();
            let mut wanted: Vec<_> = cluster
                .members
                .iter()
                .map(|m| format!("http://{}", m.peer))
                .collect();
            urls.sort();
            wanted.sort();
            (urls == wanted).then_some(())
        })
        .await;
    }
    let groups = cluster.call(2, "GET", "/api/v1/group", None).await.unwrap();
    assert!(groups.to_string().contains("kept"), "{groups}");
}
