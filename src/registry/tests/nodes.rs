//! Nodes that pull from members and from each other: real caches, real ports.

use super::*;
use axum::body::Body;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use axum::routing::post;
use mainstay_agent::cache::{Cache, Party, RegistryFetch, Reserve, Sources};
use mainstay_agent::share::{self, Key, Shares};
use mainstay_agent::transfer::api::CHUNKS_GET;
use mainstay_agent::transfer::{
    Company, MACHINE_FILE, MEMORY_FILE, WireRecord, content_of, pull_among,
};
use mainstay_agent::wire::ImageRef;

const KEY: &str = "the key of this cluster";

/// An image cache, and the port at which other nodes get what is in it.
struct Node {
    cache: Cache,
    url: String,
    task: JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    async fn new(cluster: &Cluster, name: &str, members: &[TestMember]) -> Self {
        let root = cluster.file(name).join("images");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (shares, key) = (Shares::new(&root), Key::default());
        key.set(KEY);
        let party = Party {
            shares: Arc::clone(&shares),
            key: key.clone(),
            address: url.clone(),
        };
        let sources = Sources::new(&urls(members));
        let fetch = Arc::new(RegistryFetch::new(client(), sources, party));
        let users: BTreeSet<String> = BTreeSet::new();
        let users = Arc::new(move || Some(users.clone()));
        let cache = Cache::open(&root, fetch, Reserve::Bytes(0), users).unwrap();
        let task = tokio::spawn(share::serve(listener, shares, key));
        Self { cache, url, task }
    }

    /// The pulled disk.
    async fn pull(&self, manifest: &str) -> PathBuf {
        let image = ImageRef {
            manifest: manifest.to_owned(),
            ..ImageRef::default()
        };
        self.cache.ensure(&image, &|_| ()).await.unwrap().disk
    }
}

fn urls(members: &[TestMember]) -> Vec<String> {
    members.iter().map(|m| m.url.clone()).collect()
}

/// Bytes that all members sent to clients and nodes.
fn sent(members: &[TestMember]) -> u64 {
    members.iter().map(|m| m.service.figures().sent.bytes).sum()
}

/// A pushed image that all members hold: its file and manifest.
async fn pushed(cluster: &Cluster, members: &[TestMember], seed: u64) -> (PathBuf, String) {
    let image = cluster.file(&format!("image{seed}"));
    write_image(&image, seed);
    let tag = spec("t", &format!("v{seed}"), Durability::All);
    let published = push(&[&members[0].url], &image, &tag).await.unwrap();
    (image, published.tag.manifest)
}

/// Bytes that the members send for one copy of it.
async fn one_copy(cluster: &Cluster, members: &[TestMember], manifest: &str) -> u64 {
    let before = sent(members);
    let all: Vec<&str> = members.iter().map(|m| m.url.as_str()).collect();
    let copy = cluster.file("one-copy");
    pull(&all, manifest, &copy).await.unwrap();
    std::fs::remove_file(copy).unwrap();
    sent(members) - before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_pull_at_once_take_little_more_than_one_copy() {
    let cluster = Cluster::new(3);
    let members = cluster.serve_all().await;
    let (image, manifest) = pushed(&cluster, &members, 21).await;
    let copy = one_copy(&cluster, &members, &manifest).await;
    let before = sent(&members);
    let mut nodes = Vec::new();
    for n in 0..6 {
        nodes.push(Node::new(&cluster, &format!("n{n}"), &members).await);
    }
    let pulls = nodes.iter().map(|node| node.pull(&manifest));
    for disk in futures::future::join_all(pulls).await {
        assert_same(&image, &disk);
    }
    let used = sent(&members) - before;
    assert!(used >= copy, "{used} of {copy} bytes");
    assert!(
        used < copy * 2,
        "six nodes took {used} bytes, one copy is {copy}"
    );
    // One that comes later finds them all.
    let late = Node::new(&cluster, "late", &members).await;
    assert_same(&image, &late.pull(&manifest).await);
    let later = sent(&members) - before - used;
    assert!(later < copy / 10, "{later} bytes for one that came later");
}

/// What an untrustworthy node answers.
fn liar(lie: &'static str, asked: Arc<AtomicU64>) -> Router {
    let answer = move |names: axum::body::Bytes| {
        let asked = Arc::clone(&asked);
        async move {
            asked.fetch_add(1, Ordering::Relaxed);
            let (ids, _) = names.as_chunks::<32>();
            let bad = |id: &[u8; 32]| WireRecord {
                id: *id,
                ..WireRecord::encode(&[1; 65536])
            };
            let body = match lie {
                "wrong bytes" => WireRecord::frame_all(&ids.iter().map(bad).collect::<Vec<_>>()),
                "something else" => WireRecord::frame_all(&[WireRecord::encode(b"else")]),
                "half a record" => WireRecord::frame_all(&[bad(&ids[0])]).slice(..60),
                _ => return StatusCode::NOT_FOUND.into_response(),
            };
            Body::from(body).into_response()
        }
    };
    Router::new().route(CHUNKS_GET, post(answer))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lies_or_has_gone_is_found_out_and_passed_over() {
    let cluster = Cluster::new(3);
    let members = cluster.serve_all().await;
    let lies = [
        "wrong bytes",
        "something else",
        "half a record",
        "nothing",
        "gone",
    ];
    for (seed, lie) in (30..).step_by(2).zip(lies) {
        let (image, manifest) = pushed(&cluster, &members, seed).await;
        let asked = Arc::new(AtomicU64::new(0));
        let (url, task) = serve_router(liar(lie, Arc::clone(&asked))).await;
        if lie == "gone" {
            task.abort();
            let _ = task.await;
        }
        // It is the first that gets everything.
        let company = Company {
            address: url,
            key: KEY.to_owned(),
            seed: 1,
            images: Vec::new(),
            offer: &|_| (),
        };
        let scratch = cluster.file("scratch");
        let told = |_, _| ();
        pull_among(
            &client(),
            &urls(&members),
            &manifest,
            &scratch,
            &told,
            &company,
        )
        .await
        .unwrap();
        std::fs::remove_file(scratch).unwrap();
        let before = sent(&members);
        let names = [format!("a{seed}"), format!("b{seed}")];
        let one = Node::new(&cluster, &names[0], &members).await;
        let two = Node::new(&cluster, &names[1], &members).await;
        let (a, b) = tokio::join!(one.pull(&manifest), two.pull(&manifest));
        assert_same(&image, &a);
        assert_same(&image, &b);
        let asked = asked.load(Ordering::Relaxed);
        // Each node has four requests under way when it finds out.
        assert!(asked <= 8, "{lie}: asked {asked} times");
        assert!(lie == "gone" || asked >= 1, "{lie}: never asked");
        assert!(sent(&members) > before, "{lie}: nobody else had it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_tag_moves_only_what_is_new_also_after_a_restart() {
    let cluster = Cluster::new(1);
    let members = cluster.serve_all().await;
    let (image, manifest) = pushed(&cluster, &members, 41).await;
    let node = Node::new(&cluster, "n", &members).await;
    node.pull(&manifest).await;
    drop(node);
    let next = cluster.file("next");
    std::fs::copy(&image, &next).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&next).unwrap();
    file.write_all_at(&noise(5, 300_000), 3 << 20).unwrap();
    file.set_len((200 << 20) + 99_999).unwrap();
    let tag = spec("t", "next", Durability::All);
    let published = push(&[&members[0].url], &next, &tag).await.unwrap();
    let before = sent(&members);
    let node = Node::new(&cluster, "n", &members).await;
    assert_same(&next, &node.pull(&published.tag.manifest).await);
    let used = sent(&members) - before;
    assert!(used < 1 << 20, "{used} bytes for 300,000 new ones");
    assert_eq!(node.cache.images().len(), 2);
}

/// A tag of a suspended VM: its memory, a few pages of which differ from that of `seed`, and its machine.
async fn suspended(
    cluster: &Cluster,
    members: &[TestMember],
    tag: &str,
    seed: u64,
) -> (Vec<PathBuf>, String) {
    let files: Vec<PathBuf> = ["disk", "memory", "machine"]
        .iter()
        .map(|name| cluster.file(&format!("{tag}-{name}")))
        .collect();
    write_image(&files[0], seed);
    write_image(&files[1], seed + 1);
    let memory = std::fs::OpenOptions::new()
        .write(true)
        .open(&files[1])
        .unwrap();
    memory.write_all_at(tag.as_bytes(), 70 << 20).unwrap();
    std::fs::write(&files[2], format!("{{\"tag\":{tag:?}}}")).unwrap();
    let beside = [(MEMORY_FILE, &files[1]), (MACHINE_FILE, &files[2])];
    let beside = beside.map(|(name, path)| (name.to_owned(), path.clone()));
    let spec = PushSpec {
        beside: beside.to_vec(),
        ..spec("t", tag, Durability::All)
    };
    let published = push(&[&members[0].url], &files[0], &spec).await.unwrap();
    (files, published.tag.manifest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_memory_goes_the_way_of_its_disk() {
    let cluster = Cluster::new(3);
    let members = cluster.serve_all().await;
    let early = PushSpec {
        beside: [MEMORY_FILE, MACHINE_FILE]
            .map(|name| (name.to_owned(), cluster.file("small")))
            .to_vec(),
        ..spec("t", "early", Durability::All)
    };
    std::fs::write(cluster.file("small"), b"small").unwrap();
    let early = push(&[&members[0].url], &cluster.file("small"), &early)
        .await
        .unwrap_err();
    assert!(early.to_string().contains("upgrade it first"), "{early}");
    know_suspended(&cluster);
    let (files, manifest) = suspended(&cluster, &members, "first", 61).await;
    let copy = one_copy(&cluster, &members, &manifest).await * 2;
    let before = sent(&members);
    let mut nodes = Vec::new();
    for n in 0..4 {
        nodes.push(Node::new(&cluster, &format!("n{n}"), &members).await);
    }
    let whole = async |node: &Node, manifest: &str, files: &[PathBuf]| {
        let image = ImageRef {
            manifest: manifest.to_owned(),
            ..ImageRef::default()
        };
        let image = node.cache.ensure(&image, &|_| ()).await.unwrap();
        let saved = image.saved.as_ref().unwrap();
        for (file, pulled) in files
            .iter()
            .zip([&image.disk, &saved.memory, &saved.machine])
        {
            assert_same(file, pulled);
        }
        assert_eq!(saved.disk, content_of(&files[0]).unwrap());
    };
    let pulls = nodes.iter().map(|node| whole(node, &manifest, &files));
    futures::future::join_all(pulls).await;
    let used = sent(&members) - before;
    assert!(
        used < copy * 2,
        "four nodes took {used} bytes, one copy is {copy}"
    );

    // After a restart it is still there, and only what differs of the next one is fetched.
    let n0 = nodes.remove(0);
    drop(n0);
    let n0 = Node::new(&cluster, "n0", &members).await;
    whole(&n0, &manifest, &files).await;
    let (next, manifest) = suspended(&cluster, &members, "second", 61).await;
    let before = sent(&members);
    whole(&n0, &manifest, &next).await;
    let used = sent(&members) - before;
    assert!(used < 1 << 20, "{used} bytes for a page");
    // What it serves after that restart is taken by others.
    let late = Node::new(&cluster, "late", &members).await;
    whole(&late, &manifest, &next).await;

    // Half of it is refused.
    let half = PushSpec {
        beside: vec![(MEMORY_FILE.to_owned(), files[1].clone())],
        ..spec("t", "half", Durability::All)
    };
    let refused = push(&[&members[0].url], &files[0], &half)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("come together"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_serves_who_shows_the_key_and_what_it_has() {
    let cluster = Cluster::new(1);
    let members = cluster.serve_all().await;
    let (_, manifest) = pushed(&cluster, &members, 51).await;
    let node = Node::new(&cluster, "n", &members).await;
    let ask = async |path: &str, key: &str, body: Vec<u8>| {
        let request = client().post(format!("{}{path}", node.url));
        let answer = request.bearer_auth(key).body(body).send().await.unwrap();
        answer.status().as_u16()
    };
    let path = format!("{CHUNKS_GET}?manifest={manifest}");
    let id = vec![1; 32];
    assert_eq!(ask(&path, KEY, id.clone()).await, 404, "nothing of it yet");
    node.pull(&manifest).await;
    assert_eq!(ask(&path, KEY, id.clone()).await, 200);
    assert_eq!(ask(&path, "another", id.clone()).await, 401);
    assert_eq!(ask(&path, "", id.clone()).await, 401);
    assert_eq!(ask(&path, KEY, vec![1; 31]).await, 400);
    assert_eq!(ask(&path, KEY, vec![1; 4097 * 32]).await, 400);
    assert_eq!(ask(CHUNKS_GET, KEY, id.clone()).await, 400);
    let outside = format!("{CHUNKS_GET}?manifest=..%2f..");
    assert_eq!(ask(&outside, KEY, id.clone()).await, 404);
    assert_eq!(ask("/registry/vm", KEY, id).await, 404);
    let get = client().get(format!("{}{path}", node.url));
    assert_eq!(get.send().await.unwrap().status().as_u16(), 405);
}
