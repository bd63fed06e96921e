//! Chunks that nothing needs go, chunks that something needs stay: pushes, pulls, deletions, claims,
//! collections and kills at once, everything accounted for in the end; and bits that flip on one
//! member's disk, made whole by itself.

use crate::cluster::{Cluster, until};
use crate::push::noise_file;
use crate::{Dice, rounds, turn};
use mainstay_agent::transfer::api::{
    CHUNKS_GET, CollectionStatus, Durability, GC, MISSING, Replica, SCRUB, ScrubStatus,
};
use mainstay_agent::transfer::{PushSpec, TransferError, WireRecord, pull_file, push_file};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Blocks that images are made of: few, so that they die and are wanted again all the time.
const BLOCKS: u64 = 120;
const BLOCK: usize = 64 << 10;
const GRACE: Duration = Duration::from_secs(3);
/// Live tags that are aimed at, and those that are left in the end.
const TAGS: usize = 12;
const KEPT: usize = 3;

fn block(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// What all workers share.
struct World {
    client: reqwest::Client,
    registries: Vec<String>,
    apis: Vec<String>,
    dir: PathBuf,
    stop: AtomicBool,
    /// Tags that were pushed and that nobody has begun to delete: blocks and manifest by name.
    live: Mutex<BTreeMap<String, (Vec<u64>, String)>>,
    names: AtomicU64,
    counts: Counts,
}

#[derive(Default, Debug)]
struct Counts {
    pushes: AtomicU64,
    refused_pushes: AtomicU64,
    pulls: AtomicU64,
    deletes: AtomicU64,
    claims: AtomicU64,
    claims_held: AtomicU64,
    collections: AtomicU64,
    kills: AtomicU64,
}

impl World {
    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// All registries, beginning at a random one.
    fn urls(&self, dice: &mut Dice) -> Vec<String> {
        let mut urls = self.registries.clone();
        let by = dice.below(urls.len() as u64) as usize;
        urls.rotate_left(by);
        urls
    }

    fn some_live(&self, dice: &mut Dice) -> Option<(String, Vec<u64>, String)> {
        let live = self.live.lock().unwrap();
        let at = dice.below(live.len().max(1) as u64) as usize;
        let (name, (blocks, manifest)) = live.iter().nth(at)?;
        Some((name.clone(), blocks.clone(), manifest.clone()))
    }

    fn is_live(&self, name: &str) -> bool {
        self.live.lock().unwrap().contains_key(name)
    }

    async fn push(&self, dice: &mut Dice) {
        let number = self.names.fetch_add(1, Relaxed);
        let name = format!("t{number}");
        let count = 4 + dice.below(20);
        let mut blocks: Vec<u64> = (0..count).map(|_| dice.below(BLOCKS)).collect();
        // One of its own now and then.
        if dice.below(3) == 0 {
            blocks.push(1_000_000 + number);
        }
        let path = self.dir.join(&name);
        let bytes: Vec<u8> = blocks.iter().flat_map(|b| block(*b)).collect();
        std::fs::write(&path, bytes).unwrap();
        let spec = PushSpec {
            template: name.clone(),
            tag: "v1".to_owned(),
            description: String::new(),
            arch: String::new(),
            format: Some("raw".to_owned()),
            beside: Vec::new(),
            forwards: Vec::new(),
            durability: Durability::Majority,
            wait: Duration::from_secs(20),
            save: String::new(),
        };
        let pushed = push_file(&self.client, &self.urls(dice), &path, &spec, &|_, _| ()).await;
        std::fs::remove_file(&path).unwrap();
        match pushed {
            Ok(published) if published.tag.visible => {
                self.counts.pushes.fetch_add(1, Relaxed);
                let entry = (blocks, published.tag.manifest);
                self.live.lock().unwrap().insert(name, entry);
            }
            // Slower than the grace, or nobody there: told so, and nothing is named that is not whole.
            Ok(_) | Err(TransferError::Unavailable(_)) => {
                self.counts.refused_pushes.fetch_add(1, Relaxed);
            }
            Err(other) => panic!("push of {name}: {other}"),
        }
    }

    /// A live tag can be pulled, whole, whatever else happens.
    async fn pull(&self, dice: &mut Dice, worker: u64) {
        let Some((name, blocks, manifest)) = self.some_live(dice) else {
            return;
        };
        let path = self.dir.join(format!("pull-{worker}"));
        let _ = std::fs::remove_file(&path);
        let pulled = pull_file(
            &self.client,
            &self.urls(dice),
            &manifest,
            0,
            &path,
            &|_, _| (),
        )
        .await;
        if !self.is_live(&name) {
            return;
        }
        if let Err(error) = pulled {
            panic!("{name} is live and cannot be pulled: {error}");
        }
        let expected: Vec<u8> = blocks.iter().flat_map(|b| block(*b)).collect();
        assert!(std::fs::read(&path).unwrap() == expected, "{name} differs");
        self.counts.pulls.fetch_add(1, Relaxed);
    }

    async fn delete(&self, dice: &mut Dice) {
        let Some((name, ..)) = self.some_live(dice) else {
            return;
        };
        // From here on it may go at any time.
        if self.live.lock().unwrap().remove(&name).is_none() {
            return;
        }
        self.delete_named(&name).await;
        self.counts.deletes.fetch_add(1, Relaxed);
    }

    async fn delete_named(&self, name: &str) {
        let begin = Instant::now();
        loop {
            for api in &self.apis {
                match self.try_delete(api, name).await {
                    Ok(()) => return,
                    Err(_) if begin.elapsed() < Duration::from_secs(60) => {}
                    Err(why) => panic!("{name} cannot be deleted: {why}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_delete(&self, api: &str, name: &str) -> Result<(), String> {
        let text = |e: reqwest::Error| e.to_string();
        let list = self
            .client
            .get(format!("{api}/api/v1/registry/vm?apiVer=v1"));
        let list: Value = list
            .send()
            .await
            .map_err(text)?
            .json()
            .await
            .map_err(text)?;
        let all = list["body"].as_array().ok_or("no list")?;
        let Some(found) = all.iter().find(|t| t["name"] == name) else {
            return Ok(());
        };
        let id = found["id"].as_str().unwrap_or_default();
        let delete = self
            .client
            .delete(format!("{api}/api/v1/registry/vm?id={id}"));
        let answer: Value = delete
            .send()
            .await
            .map_err(text)?
            .json()
            .await
            .map_err(text)?;
        match answer["status"] == "OK" || answer["message"] == "Not found" {
            true => Ok(()),
            false => Err(answer.to_string()),
        }
    }

    /// "Do you have it?" Told yes, it can be read from that very member for the grace.
    async fn claim(&self, dice: &mut Dice) {
        let id = WireRecord::encode(&block(dice.below(BLOCKS))).id;
        let registry = &self.registries[dice.below(self.registries.len() as u64) as usize];
        let told = Instant::now();
        let Ok(flags) = self.post(registry, MISSING, &id).await else {
            return;
        };
        self.counts.claims.fetch_add(1, Relaxed);
        if flags[..] != [0] {
            return;
        }
        let pause = dice.below(GRACE.as_millis() as u64 / 2);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let Ok(record) = self
            .post(registry, &format!("{CHUNKS_GET}?local=1"), &id)
            .await
        else {
            return;
        };
        let late = told.elapsed() >= GRACE;
        assert!(!record.is_empty() || late, "told to be there, and gone");
        self.counts.claims_held.fetch_add(1, Relaxed);
    }

    async fn post(&self, registry: &str, path: &str, id: &[u8; 32]) -> Result<Vec<u8>, ()> {
        let request = self
            .client
            .post(format!("{registry}{path}"))
            .body(id.to_vec());
        let answer = request.send().await.map_err(drop)?;
        if !answer.status().is_success() {
            return Err(());
        }
        answer.bytes().await.map(|b| b.to_vec()).map_err(drop)
    }
}

async fn work(world: Arc<World>, worker: u64, seed: u64) {
    let mut dice = Dice(seed.wrapping_add(worker * 7919) | 1);
    while !world.stopped() {
        let live = world.live.lock().unwrap().len();
        match dice.below(10) {
            0..=1 if live < 2 * TAGS => world.push(&mut dice).await,
            2 if live > TAGS => world.delete(&mut dice).await,
            3 => world.delete(&mut dice).await,
            4..=6 => world.pull(&mut dice, worker).await,
            _ => world.claim(&mut dice).await,
        }
    }
}

async fn collect_all_the_time(world: Arc<World>) {
    while !world.stopped() {
        for registry in &world.registries {
            let asked = world.client.post(format!("{registry}{GC}")).send().await;
            world
                .counts
                .collections
                .fetch_add(u64::from(asked.is_ok()), Relaxed);
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// `GET path` on a registry port; the envelope's body.
pub(crate) async fn asked<T: DeserializeOwned>(
    cluster: &Cluster,
    n: usize,
    path: &str,
) -> Option<T> {
    let url = format!("http://{}{path}", cluster.members[n].registry);
    let answer: Value = cluster
        .client
        .get(url)
        .send()
        .await
        .ok()?
        .json()
        .await
        .ok()?;
    serde_json::from_value(answer["body"].clone()).ok()
}

pub(crate) fn pack_files(data: &Path) -> Vec<PathBuf> {
    let mut packs = Vec::new();
    for entry in std::fs::read_dir(data.join("chunks")).unwrap().flatten() {
        packs.extend(Some(entry.path()).filter(|p| p.extension().is_some_and(|e| e == "mspk")));
    }
    packs.sort();
    packs
}

/// Names of all chunks that live tags reach.
fn needed(live: &BTreeMap<String, (Vec<u64>, String)>) -> BTreeSet<[u8; 32]> {
    let mut ids = BTreeSet::new();
    for (blocks, manifest) in live.values() {
        let names: Vec<[u8; 32]> = blocks
            .iter()
            .map(|b| WireRecord::encode(&block(*b)).id)
            .collect();
        ids.insert(WireRecord::encode(names.as_flattened()).id);
        ids.extend(names);
        ids.insert(mainstay_agent::transfer::hex_id(manifest).unwrap());
    }
    ids
}

/// `MAINSTAY_GC_RACE_SECONDS=1800` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collection_beside_pushes_pulls_and_deletions_loses_nothing_and_gives_all_room_back() {
    let _turn = turn().await;
    let seconds = rounds("MAINSTAY_GC_RACE_SECONDS", 8) as u64;
    let mut dice = Dice::new("collection race");
    let mut cluster = Cluster::new(3);
    cluster.flags = vec![
        "--gc-grace",
        "3s",
        "--gc-every",
        "1s",
        "--scrub-rate",
        "32MiB",
        "--scrub-every",
        "5s",
        "--snapshot-log",
        "256KiB",
    ];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let world = Arc::new(World {
        client: cluster.client.clone(),
        registries: cluster
            .members
            .iter()
            .map(|m| format!("http://{}", m.registry))
            .collect(),
        apis: cluster
            .members
            .iter()
            .map(|m| format!("http://{}", m.api))
            .collect(),
        dir: cluster.dir.path().to_owned(),
        stop: AtomicBool::new(false),
        live: Mutex::default(),
        names: AtomicU64::new(0),
        counts: Counts::default(),
    });
    let seed = dice.below(u64::MAX);
    let mut tasks: Vec<_> = (0..5)
        .map(|worker| tokio::spawn(work(Arc::clone(&world), worker, seed)))
        .collect();
    tasks.push(tokio::spawn(collect_all_the_time(Arc::clone(&world))));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(seconds) {
        // Between kills: long enough that collections run against old chunks as well.
        let pause = (seconds * 1000 / 2).clamp(1000, 25_000);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let victim = dice.below(3) as usize;
        cluster.kill(victim);
        world.counts.kills.fetch_add(1, Relaxed);
        cluster.start(victim);
        cluster.wait_ready(&[victim]).await;
        assert!(
            !tasks.iter().any(tokio::task::JoinHandle::is_finished),
            "a worker has failed"
        );
    }
    world.stop.store(true, Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let live = keep_some(&world).await;
    settle(&cluster, &world, &live).await;
    let removed = removed_by_all(&cluster).await;
    let counts = &world.counts;
    let operations: u64 = [
        &counts.pushes,
        &counts.pulls,
        &counts.deletes,
        &counts.claims,
        &counts.collections,
    ]
    .iter()
    .map(|c| c.load(Relaxed))
    .sum();
    eprintln!(
        "{operations} operations in {seconds} s: {counts:?}; {removed} chunks removed since the last starts; \
         0 chunks of live tags unknown"
    );
    let counted = |c: &AtomicU64| c.load(Relaxed) > 0;
    assert!(
        counted(&counts.pushes)
            && counted(&counts.pulls)
            && counted(&counts.deletes)
            && counted(&counts.claims_held),
        "a run without one of these proves nothing"
    );
    assert!(removed > 0, "nothing was collected");
}

/// Delete all live tags but a few, so that there is something to collect in the end.
async fn keep_some(world: &World) -> BTreeMap<String, (Vec<u64>, String)> {
    let mut kept = world.live.lock().unwrap().clone();
    while kept.len() > KEPT {
        if let Some((name, _)) = kept.pop_first() {
            world.delete_named(&name).await;
        }
    }
    kept
}

/// After the load: each member holds exactly what the live tags reach, whole, and its disk has not much more.
async fn settle(cluster: &Cluster, world: &World, live: &BTreeMap<String, (Vec<u64>, String)>) {
    let needed = needed(live).len() as u64;
    for n in 0..3 {
        let what = format!(
            "member {n} holds the {needed} chunks of {} live tags and no others",
            live.len()
        );
        let last = until(&what, Duration::from_secs(60), || async {
            // Pushes without an answer may have made a tag nevertheless: nobody counts on it.
            delete_strangers(world, live).await;
            let status: CollectionStatus = asked(cluster, n, GC).await?;
            let last = status.last?;
            let clean =
                last.refused.is_empty() && last.waiting_chunks == 0 && last.reclaimable_bytes == 0;
            (clean && last.live_chunks == needed).then_some(last)
        })
        .await;
        let on_disk: u64 = pack_files(&cluster.members[n].data)
            .iter()
            .map(|p| p.metadata().unwrap().len())
            .sum();
        assert_eq!(
            on_disk, last.pack_bytes,
            "member {n}: told and true size of the packs"
        );
        let live_bytes = last.live_bytes + 56 * last.live_chunks;
        // A quarter of a pack may be waste, or 1 MiB.
        let bound = live_bytes * 4 / 3 + last.packs * ((1 << 20) + 8192);
        assert!(
            on_disk <= bound,
            "member {n}: {on_disk} bytes on disk for {live_bytes} live ones"
        );
        eprintln!(
            "member {n}: {live_bytes} live bytes, {on_disk} on disk in {} packs",
            last.packs
        );
        for (name, (blocks, manifest)) in live {
            let copy = world.dir.join("copy");
            let _ = std::fs::remove_file(&copy);
            let url = &world.registries[n..=n];
            let pulled = pull_file(&world.client, url, manifest, 0, &copy, &|_, _| ()).await;
            assert!(pulled.is_ok(), "{name} from member {n}: {pulled:?}");
            let expected: Vec<u8> = blocks.iter().flat_map(|b| block(*b)).collect();
            assert!(
                std::fs::read(&copy).unwrap() == expected,
                "{name} from member {n} differs"
            );
        }
    }
}

async fn delete_strangers(world: &World, live: &BTreeMap<String, (Vec<u64>, String)>) {
    let list = world
        .client
        .get(format!("{}/api/v1/registry/vm?apiVer=v1", world.apis[0]));
    let list: Value = list.send().await.unwrap().json().await.unwrap();
    for template in list["body"].as_array().unwrap() {
        let name = template["name"].as_str().unwrap();
        if !live.contains_key(name) {
            world.delete_named(name).await;
        }
    }
}

async fn removed_by_all(cluster: &Cluster) -> u64 {
    let mut removed = 0;
    for n in 0..3 {
        let status: Option<CollectionStatus> = asked(cluster, n, GC).await;
        removed += status.map_or(0, |s| s.removed_chunks);
    }
    removed
}

/// Flip one bit in each of `count` stored chunks of noise; how many there were to choose from. Not in names of
/// chunks: whoever looks what a tag reaches reads those, and would find it before the scrubber does.
pub(crate) fn flip(data: &Path, count: usize, dice: &mut Dice) -> usize {
    let mut places = Vec::new();
    let mut ids = BTreeSet::new();
    for path in pack_files(data) {
        let bytes = std::fs::read(&path).unwrap();
        let mut at = 4096;
        // Records stand one after the other: 56 bytes of header, then the data.
        while at + 56 <= bytes.len() && bytes[at..].starts_with(b"MSCK") {
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let (raw, len) = (word(at + 8), word(at + 12) as usize);
            ids.insert(bytes[at + 16..at + 48].to_vec());
            // Noise is stored as it is.
            if bytes[at + 4] == 0 && raw as usize == BLOCK {
                let begin = bytes[at + 56..at + 88].to_vec();
                places.push((path.clone(), at + 56, len, begin));
            }
            at += 56 + len;
        }
    }
    places.retain(|(.., begin)| !ids.contains(begin));
    let all = places.len();
    for _ in 0..count {
        let (path, at, len, _) = places.swap_remove(dice.below(places.len() as u64) as usize);
        let at = at as u64 + dice.below(len as u64);
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << dice.below(8)], at)
            .unwrap();
    }
    all
}

/// `MAINSTAY_CHUNK_FLIPS=200` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_that_flip_on_one_member_are_found_and_made_whole_by_itself() {
    let _turn = turn().await;
    let flips = rounds("MAINSTAY_CHUNK_FLIPS", 20);
    let mut dice = Dice::new("flipped chunks");
    let mut cluster = Cluster::new(3);
    cluster.flags = vec!["--scrub-rate", "64MiB", "--scrub-every", "1s"];
    for n in 0..3 {
        cluster.start(n);
    }
    cluster.wait_ready(&[0, 1, 2]).await;
    let disk = cluster.dir.path().join("disk.raw");
    noise_file(&disk, 24 << 20, dice.below(u64::MAX));
    let path = disk.to_str().unwrap();
    cluster.cli_ok(&[
        "template",
        "push",
        "big",
        "--tag",
        "v1",
        "--disk",
        path,
        "--durability",
        "all",
    ]);
    let before: ScrubStatus = asked(&cluster, 1, SCRUB).await.unwrap();

    let begin = Instant::now();
    let all = flip(&cluster.members[1].data, flips, &mut dice);
    let found = until(
        "every flipped bit is found",
        Duration::from_secs(60),
        || async {
            let now: ScrubStatus = asked(&cluster, 1, SCRUB).await?;
            (now.damaged >= before.damaged + flips as u64).then_some(begin.elapsed())
        },
    )
    .await;
    let whole = until(
        "the member is whole again",
        Duration::from_secs(60),
        || async {
            let now: ScrubStatus = asked(&cluster, 1, SCRUB).await?;
            let rows: Vec<Replica> = asked(
                &cluster,
                0,
                "/registry/mainstay/v1/replicas?template=big&tag=v1",
            )
            .await?;
            let complete = rows.len() == 3 && rows.iter().all(|r| r.state == "complete");
            (complete && now.damaged_now == 0 && now.broken.is_empty()).then_some(begin.elapsed())
        },
    )
    .await;
    // As the operator looks.
    let scrubs = cluster.cli_json(&["registry", "scrub", "--now"]);
    for row in scrubs.as_array().unwrap() {
        assert_eq!(row["last_damaged"], 0, "{row}");
        assert!(row["last_chunks"].as_u64().unwrap() >= 386, "{row}");
    }
    let metrics = cluster
        .client
        .get(format!("http://{}/metrics", cluster.members[1].api));
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    assert!(
        metrics.contains(&format!("mainstay_scrub_damaged_total {flips}\n")),
        "{metrics}"
    );
    assert!(metrics.contains("mainstay_tags_broken 0\n"));
    let collected = cluster.cli_json(&["registry", "gc", "--dry-run", "--member", "c2"]);
    assert_eq!(collected[0]["live_chunks"], json!(386), "{collected}");
    let copy = cluster.dir.path().join("copy");
    cluster.cli_ok(&[
        "template",
        "pull",
        "big",
        "--tag",
        "v1",
        "--disk",
        copy.to_str().unwrap(),
    ]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&disk).unwrap());
    eprintln!(
        "{flips} of {all} chunks spoilt on one member: all found after {:.1} s, all whole after {:.1} s",
        found.as_secs_f64(),
        whole.as_secs_f64()
    );
}
