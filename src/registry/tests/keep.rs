//! What is kept and told of tags: weights, quotas, room before a push, deletion of one tag, words, pulls.

use super::collect::{ask, cluster_by_hand, gc};
use super::*;
use mainstay_agent::transfer::api::{CHUNKS, PUBLISH, QUOTA, TAG, USAGE, Usage};
use mainstay_storage::chunks::ChunkStats;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;

async fn call(method: &str, url: &str, body: &Value) -> (u16, Value) {
    let request = client().request(method.parse().unwrap(), url);
    let answer = request.body(body.to_string()).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn usage(member: &TestMember) -> Usage {
    ask(false, format!("{}{USAGE}", member.url)).await
}

/// Two tags that share half, and a template that has one of them as well.
async fn push_three(cluster: &Cluster, member: &TestMember) {
    let image = cluster.file("image");
    let (shared, own) = (noise(1, 4 << 20), noise(2, 4 << 20));
    let other = noise(3, 4 << 20);
    for (template, tag, halves) in [
        ("a", "v1", [&shared, &own]),
        ("a", "v2", [&shared, &other]),
        ("b", "v1", [&shared, &own]),
    ] {
        std::fs::write(&image, halves.map(|h| &h[..]).concat()).unwrap();
        let spec = spec(template, tag, Durability::One);
        push(&[&member.url], &image, &spec).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tags_weigh_what_their_deletion_gives_back() {
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    push_three(&cluster, &member).await;
    let weighed = usage(&member).await;
    let stored = member.service.chunks().stats().stored_bytes;
    assert!(weighed.whole);
    assert_eq!(
        weighed.stored_bytes, stored,
        "all of it is needed by some tag"
    );
    let of = |name: &str| {
        let found = weighed.templates.iter().find(|t| t.name == name);
        found.unwrap().clone()
    };
    let (a, b) = (of("a"), of("b"));
    assert_eq!(a.logical_bytes, 16 << 20);
    assert_eq!(a.stored_bytes, stored, "b has nothing of its own");
    assert_eq!((b.unique_bytes, b.tags[0].unique_bytes), (0, 0));
    assert_eq!(b.stored_bytes, a.tags[0].stored_bytes);
    let gone = a.tags[1].unique_bytes;
    assert!(gone > 2 << 20 && gone < 5 << 20, "{weighed:?}");

    // Delete that one tag, and nothing later or earlier: exactly so much comes back.
    let url = format!("{}{TAG}?template=a&number=1", member.url);
    let (code, answer) = call("DELETE", &url, &json!({})).await;
    assert_eq!((code, &answer["status"]), (200, &json!("OK")), "{answer}");
    let after = usage(&member).await;
    assert_eq!(after.stored_bytes, stored - gone);
    cluster.pass(Duration::from_secs(1));
    gc(&member).await;
    cluster.pass(cluster.upkeep.collect.grace + Duration::from_secs(1));
    let collected = gc(&member).await;
    assert_eq!(collected.dead_bytes, gone);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_tag_is_deleted_and_no_other() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    let image = cluster.file("image");
    std::fs::write(&image, noise(1, 100_000)).unwrap();
    for tag in ["v0", "v1", "v2", "v3"] {
        let spec = spec("ci", tag, Durability::One);
        push(&[&member.url], &image, &spec).await.unwrap();
    }
    let url = |query: &str| format!("{}{TAG}?{query}", member.url);
    let (code, _) = call("DELETE", &url("template=ci"), &json!({})).await;
    assert_eq!(code, 400, "not by chance the latest");
    for (query, message) in [
        ("template=ci&tag=v9", "Not found"),
        ("template=x&tag=v1", "Not found"),
    ] {
        let (code, answer) = call("DELETE", &url(query), &json!({})).await;
        assert_eq!((code, &answer["message"]), (200, &json!(message)));
    }
    assert_eq!(
        call("DELETE", &url("template=ci&tag=v1"), &json!({}))
            .await
            .0,
        200
    );
    let numbers = || -> Vec<u32> {
        let state = cluster.shared.state.lock();
        let templates = state.templates.values();
        templates.flat_map(|t| t.tags.keys().copied()).collect()
    };
    assert_eq!(numbers(), [0, 2, 3]);
    // Twice is once.
    let (_, again) = call("DELETE", &url("template=ci&number=1"), &json!({})).await;
    assert_eq!(again["message"], json!("Not found"));
    assert_eq!(numbers(), [0, 2, 3]);
    // Its number is not used again.
    push(&[&member.url], &image, &spec("ci", "v1", Durability::One))
        .await
        .unwrap();
    assert_eq!(numbers(), [0, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_cannot_fit_is_refused_before_its_bytes_are_sent() {
    let cluster = Cluster::new(3);
    let members = cluster.serve_all().await;
    let image = cluster.file("image");
    // 24 MiB of data, two thirds of which does not compress.
    write_image(&image, 21);
    let majority = spec("t", "v1", Durability::Majority);
    let proxy = Proxy::new(&members[0].url, Vec::new()).await;
    let stored = |member: &TestMember| member.service.chunks().stats().stored_bytes;

    // This member alone: another may take it.
    cluster.shared.left.lock().insert(1, 5 << 20);
    let told = push(&[&proxy.url], &image, &majority).await.unwrap_err();
    assert!(told.to_string().contains("--low-disk"), "{told}");
    assert_eq!(stored(&members[0]), 0);

    // Too few of the three.
    cluster
        .shared
        .left
        .lock()
        .extend([(1, u64::MAX), (2, 1 << 20), (3, 1 << 20)]);
    let told = push(&[&proxy.url], &image, &majority).await.unwrap_err();
    let text = told.to_string();
    assert!(
        text.contains("2 members must hold it, and only 1"),
        "{text}"
    );
    assert!(text.contains("c2: ") && text.contains("c3: "), "{text}");
    assert_eq!(stored(&members[0]), 0);
    cluster.shared.left.lock().insert(2, u64::MAX);
    let all = spec("t", "v1", Durability::All);
    assert!(push(&[&proxy.url], &image, &all).await.is_err());
    assert_eq!(stored(&members[0]), 0);

    // What compresses, and what is there already, needs no room: 24 MiB do not fit, what is left does.
    cluster.shared.left.lock().insert(1, 23 << 20);
    let first = push(&[&proxy.url], &image, &majority).await.unwrap();
    assert!(first.tag.visible && first.sent_bytes < 23 << 20);
    cluster.shared.left.lock().insert(1, 1 << 20);
    let next = spec("t", "v2", Durability::Majority);
    assert!(
        push(&[&proxy.url], &image, &next)
            .await
            .unwrap()
            .tag
            .visible
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_refuses_growth_before_and_after_bytes_are_sent() {
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    push_three(&cluster, &member).await;
    let stored = usage(&member).await.stored_bytes;
    let quota = async |template: &str, bytes: Option<u64>| {
        let url = format!("{}{QUOTA}", member.url);
        let asked = json!({"template": template, "bytes": bytes});
        let (code, answer) = call("PUT", &url, &asked).await;
        assert_eq!((code, &answer["status"]), (200, &json!("OK")), "{answer}");
        answer["body"].clone()
    };
    let set = quota("", Some(stored + (1 << 20))).await;
    assert_eq!(set["quota"], json!(stored + (1 << 20)));
    let image = cluster.file("image");
    std::fs::write(&image, noise(77, 4 << 20)).unwrap();
    let chunks = || -> ChunkStats { member.service.chunks().stats() };
    let before = chunks();
    let told = push(&[&member.url], &image, &spec("c", "v1", Durability::One))
        .await
        .unwrap_err();
    assert!(
        told.to_string().contains("the quota of all templates"),
        "{told}"
    );
    assert_eq!(chunks(), before, "no byte was taken");

    // One template's own; others are free.
    quota("", None).await;
    quota("c", Some(1 << 20)).await;
    let told = push(&[&member.url], &image, &spec("c", "v1", Durability::One))
        .await
        .unwrap_err();
    assert!(told.to_string().contains("the quota of c is"), "{told}");
    assert_eq!(chunks(), before);
    let pushed = push(&[&member.url], &image, &spec("d", "v1", Durability::One))
        .await
        .unwrap();
    // A client that does not ask before is refused when it publishes.
    let publish = json!({
        "template": "c", "tag": "v1", "manifest": pushed.tag.manifest, "durability": "one",
    });
    let url = format!("{}{PUBLISH}", member.url);
    let (code, answer) = call("POST", &url, &publish).await;
    assert_eq!((code, &answer["status"]), (200, &json!("FAIL")));
    assert!(
        answer["message"]
            .as_str()
            .unwrap()
            .contains("the quota of c is")
    );
    quota("c", None).await;
    assert_eq!(call("POST", &url, &publish).await.1["status"], json!("OK"));
    // Below what is there: what adds nothing goes on.
    quota("c", Some(1)).await;
    assert_eq!(call("POST", &url, &publish).await.1["status"], json!("OK"));
    let url = format!("{}{QUOTA}", member.url);
    for bad in [
        json!({"bytes": -1}),
        json!({"bytes": "x"}),
        json!({"byte": 1}),
        json!([]),
    ] {
        assert_eq!(call("PUT", &url, &bad).await.0, 400, "{bad}");
    }
}

/// Room on the disk is promised once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_at_the_same_time_are_not_promised_the_same_room() {
    use mainstay_agent::transfer::WireRecord;
    use mainstay_agent::transfer::api::ADMIT;
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    let left = |bytes: u64| cluster.shared.left.lock().insert(1, bytes);
    let admit = async |push: &str, bytes: u64| {
        let asked = json!({"template": "t", "bytes": bytes, "push": push});
        let (_, answer) = call("POST", &format!("{}{ADMIT}", member.url), &asked).await;
        let why = answer["body"]["why"].as_str().unwrap().to_owned();
        (answer["body"]["fits"] == json!(true), why)
    };
    left(30 << 20);
    assert!(admit("one", 20 << 20).await.0);
    let (fits, why) = admit("two", 20 << 20).await;
    assert!(
        !fits && why.contains("20 MiB of them for pushes under way"),
        "{why}"
    );
    assert!(admit("one", 30 << 20).await.0, "its own room");
    assert!(!admit("two", 1 << 20).await.0);
    // What has come of it is on the disk.
    let record = WireRecord::encode(&noise(1, 130_000)[70_000..]);
    let put = client().put(format!("{}{CHUNKS}?push=one", member.url));
    let put = put.body(WireRecord::frame_all([&record]));
    assert_eq!(put.send().await.unwrap().status(), 200);
    assert!(admit("two", 10_000).await.0);

    // A push that has ended, well or not, keeps nothing.
    let reserved = &member.service.reserved;
    reserved.end("one");
    reserved.end("two");
    left(40 << 20);
    let image = cluster.file("image");
    write_image(&image, 31);
    let pushed = push(&[&member.url], &image, &spec("t", "v1", Durability::All)).await;
    pushed.unwrap();
    assert_eq!(reserved.take("", 40 << 20, 40 << 20), Ok(()));
}

/// However many push at once, through whichever members: together they keep to the quota.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_holds_for_pushes_at_the_same_time() {
    const PUSHES: usize = 9;
    let cluster = Cluster::of_artifacts(3).await;
    let members = cluster.serve_all().await;
    let image = cluster.file("image");
    let mut manifests = Vec::new();
    for n in 0..PUSHES {
        std::fs::write(&image, noise(100 + n as u64, 1 << 20)).unwrap();
        let spec = spec("d", &format!("v{n}"), Durability::All);
        let pushed = push(&[&members[0].url], &image, &spec).await.unwrap();
        manifests.push(pushed.tag.manifest);
    }
    let weighed = usage(&members[1]).await;
    assert!(weighed.whole);
    let one = weighed.templates[0].tags[0].stored_bytes;
    let asked = json!({"template": "q", "bytes": one * 5 / 2});
    let set = call("PUT", &format!("{}{QUOTA}", members[0].url), &asked).await;
    assert_eq!(set.0, 200);
    let pushes = manifests.iter().enumerate().map(|(n, manifest)| {
        let url = format!("{}{PUBLISH}", members[n % 3].url);
        let body = json!({
            "template": "q", "tag": format!("v{n}"), "manifest": manifest, "durability": "one",
        });
        async move { call("POST", &url, &body).await }
    });
    let answers = futures::future::join_all(pushes).await;
    let taken = answers
        .iter()
        .filter(|(_, a)| a["status"] == json!("OK"))
        .count();
    assert_eq!(taken, 2, "{answers:?}");
    for (code, answer) in &answers {
        let message = answer["message"].as_str().unwrap();
        let over = message.contains("the quota of q is");
        assert!(
            *code == 200 && (over || answer["status"] == json!("OK")),
            "{answer}"
        );
    }
}

/// OCI clients are held by the same quotas, and pull tags like anybody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas_and_pulls_count_oci_clients_as_well() {
    use super::oci::{digest, get, post_blob, put_image};
    let cluster = Cluster::of_artifacts(1).await;
    let member = cluster.serve(1, true).await;
    let quota = async |name: &str, bytes: Option<u64>| {
        let url = format!("{}{QUOTA}", member.url);
        let asked = json!({"template": name, "bytes": bytes});
        assert_eq!(call("PUT", &url, &asked).await.0, 200);
    };
    let image = async |name: &str, seed: u64| {
        let layer = noise(seed, 2 << 20);
        let posted = post_blob(&member, name, &layer, &digest(&layer)).await;
        assert_eq!(posted, 201, "a blob is nothing yet");
        put_image(&member, name, &layer).await
    };
    assert_eq!(image("a", 1).await.0, 201);
    let weighed = usage(&member).await;
    let a = &weighed.repositories[0];
    assert_eq!((a.name.as_str(), a.artifacts, a.quota), ("a", 1, None));
    assert_eq!(a.stored_bytes, weighed.stored_bytes);
    let enough = a.stored_bytes + 1000;
    for (name, all) in [("a", "the quota of a is"), ("", "the quota of all")] {
        quota(name, Some(enough)).await;
        let (code, text) = image("a", 2).await;
        assert_eq!(code, 403, "{text}");
        assert!(text.contains("DENIED") && text.contains(all), "{text}");
        assert_eq!(image("a", 1).await.0, 201, "it adds nothing");
        let other = if name.is_empty() { 403 } else { 201 };
        let (code, text) = image("b", 3).await;
        assert_eq!(code, other, "{text}");
        if code == 201 {
            let path = format!("{}/v2/b/manifests/v1", member.url);
            let found = client().get(&path).send().await.unwrap();
            let digest = found.headers()["docker-content-digest"].to_str().unwrap();
            let gone = path.replace("v1", digest);
            client().delete(gone).send().await.unwrap();
        }
        quota(name, None).await;
    }
    assert_eq!(image("a", 2).await.0, 201);

    // A template's tag, pulled by its OCI manifest.
    let file = cluster.file("image");
    std::fs::write(&file, noise(9, 100_000)).unwrap();
    let spec = spec("ci", "v1", Durability::One);
    let pushed = push(&[&member.url], &file, &spec).await.unwrap();
    assert_eq!(get(&member, "/v2/ci/manifests/v1").await.0, 200);
    let key = (
        mainstay_model::TemplateId::from(pushed.tag.template_id),
        pushed.tag.number,
    );
    eventually("the pull is known", || {
        cluster.shared.state.lock().pulls.contains_key(&key)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn words_of_a_tag_and_its_last_pull_are_told() {
    let cluster = Cluster::new(2);
    let members = cluster.serve_all().await;
    let url = |path: &str| format!("{}{path}", members[0].url);
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    std::fs::write(&image, noise(1, 3 << 20)).unwrap();
    let mut ports = spec("ci", "v1", Durability::All);
    ports.forwards = vec![mainstay_agent::transfer::api::Forward {
        name: "ssh".to_owned(),
        guest_port: 22,
        host_port: 0,
    }];
    let pushed = push(&[&members[0].url], &image, &ports).await.unwrap();
    let id = pushed.tag.template_id.clone();
    let by_id = url(&format!("/registry/v2/vm?id={id}"));
    let show = async || call("GET", &by_id, &json!({})).await.1["body"].clone();
    let shown = show().await;
    let begun = crate::stamp::now_ms() / 1000;
    assert!(shown["last_push"].as_u64().unwrap() + 60 > begun);
    assert_eq!(shown["last_pull"], json!(0));
    assert_eq!(shown["versions"][0]["last_pull"], json!(0));

    pull(&[&members[1].url], &pushed.tag.manifest, &copy)
        .await
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let shown = show().await;
        let at = shown["versions"][0]["last_pull"].as_u64().unwrap();
        assert_eq!(shown["last_pull"], json!(at));
        if at >= begun {
            break;
        }
        assert!(Instant::now() < until, "{shown}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let arch = url("/registry/vm/arch");
    for (body, code) in [
        (json!({"id": id, "arch": "arm64"}), 200),
        (json!({"id": id, "arch": "vax"}), 400),
        (json!({"id": id}), 400),
        (json!({"arch": "arm64"}), 400),
    ] {
        assert_eq!(call("PUT", &arch, &body).await.0, code, "{body}");
    }
    assert_eq!(show().await["arch"], json!("arm64"));
    let info = async |query: &str| {
        let url = url(&format!("/registry/vm/info?{query}"));
        call("GET", &url, &json!({})).await
    };
    let (code, answer) = info(&format!("id={id}&tag=v1")).await;
    let machine = &answer["body"];
    assert_eq!(code, 200);
    assert_eq!(machine["name"], json!("ci"));
    assert_eq!(machine["ram"], json!("4G"));
    assert_eq!(machine["hard_drives"][0]["size"], json!(3 << 20));
    let rule = &machine["network_cards"][0]["port_forwarding_rules"][0];
    assert_eq!(
        (&rule["rule_name"], &rule["guest_port"]),
        (&json!("ssh"), &json!(22))
    );
    assert_eq!(info(&format!("id={id}&tag=v9")).await.0, 400);
    assert_eq!(info("id=nothing").await.1["message"], json!("Not found"));
    assert_eq!(info("").await.0, 400);
}

/// What is told of the disk is what is on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_of_the_store_are_those_of_its_directory() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    push_three(&cluster, &member).await;
    // Bytes that are cut off, or refused, take no room either.
    for body in [vec![7_u8; 100_000], vec![0; 41]] {
        let request = client().put(format!("{}{CHUNKS}", member.url)).body(body);
        let _ = request.send().await.unwrap();
    }
    let stats = member.service.chunks().stats();
    let (mut packs, mut blocks) = (0, 0);
    for entry in std::fs::read_dir(cluster.chunk_dir(1)).unwrap() {
        let (path, facts) = {
            let entry = entry.unwrap();
            (entry.path(), entry.metadata().unwrap())
        };
        blocks += facts.blocks() * 512;
        if path.extension().is_some_and(|e| e == "mspk") {
            packs += facts.len();
        }
    }
    assert_eq!(stats.pack_bytes, packs);
    let off = blocks.abs_diff(stats.pack_bytes);
    assert!(off <= 64 << 10, "{blocks} bytes on disk, {stats:?}");
    let of = |url: String| async move { call("GET", &url, &json!({})).await.1["body"].clone() };
    let disk = of(format!("{}/registry/disk", member.url)).await;
    let stat = rustix::fs::statvfs(cluster.dir.path()).unwrap();
    let (free, total) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize);
    assert_eq!(disk["total"], json!(total));
    // Others write on this disk as well.
    let told = disk["free"].as_u64().unwrap();
    assert!(told.abs_diff(free) < 1 << 30, "{told} of {free}");
}
