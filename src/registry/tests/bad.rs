//! What the registry's own calls answer to input that is wrong on purpose: the table of
//! docs/rest-dialect.md, row by row, and that none of it leaves anything on disk.

use super::collect::{ask, cluster_by_hand, gc};
use super::*;
use bytes::Bytes;
use futures::StreamExt;
use mainstay_agent::transfer::api::{ADMIT, CHUNKS, CHUNKS_GET, MISSING, PUBLISH, QUOTA, TAG};
use mainstay_agent::transfer::{
    CHUNK_LEN, FileEntry, Manifest, SEGMENT_CHUNKS, SIZE_MAX, WireRecord,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// One row of the table.
struct Row {
    /// As the page words it.
    input: &'static str,
    /// Status, or statuses where inputs of one kind have several.
    answer: &'static str,
}

/// The rows as the page has them; a row that is not there is a mistake in one of the two.
fn documented() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/rest-dialect.md");
    std::fs::read_to_string(path).unwrap()
}

struct Table {
    page: String,
    member: TestMember,
    rows: Vec<Row>,
}

impl Table {
    /// These answers were given to one kind of input.
    fn row(&mut self, input: &'static str, answer: &'static str, got: &[u16]) {
        for status in got {
            let wanted = answer.split(", ").any(|a| a == status.to_string());
            assert!(wanted, "{input}: {got:?}, the table says {answer}");
        }
        assert!(!got.is_empty(), "{input}");
        let line = format!("| {input} | {answer} |");
        assert!(
            self.page.contains(&line),
            "docs/rest-dialect.md lacks {line}"
        );
        let chunks = self.member.service.chunks().stats().chunks;
        assert_eq!(chunks, 0, "{input}: something was stored");
        self.rows.push(Row { input, answer });
    }

    async fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> u16 {
        let url = format!("{}{path}", self.member.url);
        let request = client().request(method.parse().unwrap(), url);
        let answer = request.body(body.into()).send().await.unwrap();
        answer.status().as_u16()
    }

    async fn json(&self, method: &str, path: &str, body: Value) -> u16 {
        self.send(method, path, body.to_string()).await
    }

    /// Bytes as they are, no client between; the status of the answer, 0 if there is none.
    async fn raw(&self, text: &[u8]) -> u16 {
        raw(&self.member.url, text).await
    }
}

async fn raw(url: &str, text: &[u8]) -> u16 {
    let mut stream = TcpStream::connect(url.trim_start_matches("http://"))
        .await
        .unwrap();
    stream.write_all(text).await.unwrap();
    let mut answer = Vec::new();
    let read = async {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            answer.extend_from_slice(&buffer[..n]);
            if answer.len() > 12 {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), read)
        .await
        .unwrap();
    let status = answer.get(9..12).and_then(|s| std::str::from_utf8(s).ok());
    status.and_then(|s| s.parse().ok()).unwrap_or(0)
}

fn record(seed: u64) -> WireRecord {
    // The first chunk of noise compresses.
    WireRecord::encode(&noise(seed, 2 << 16)[1 << 16..])
}

fn manifest(change: impl FnOnce(&mut Manifest)) -> String {
    let mut manifest = Manifest {
        version: 1,
        files: vec![FileEntry {
            name: "disk.img".to_owned(),
            format: "raw".to_owned(),
            size: CHUNK_LEN,
            segments: vec!["11".repeat(32)],
        }],
    };
    change(&mut manifest);
    serde_json::to_string(&manifest).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_has_the_documented_answer_and_leaves_nothing() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, true).await;
    let mut table = Table {
        page: documented(),
        member,
        rows: Vec::new(),
    };
    paths(&mut table).await;
    records(&mut table).await;
    names(&mut table).await;
    bodies(&mut table).await;
    let rows = table.rows.iter();
    let rows: Vec<String> = rows
        .map(|r| format!("| {} | {} |", r.input, r.answer))
        .collect();
    eprintln!("{}", rows.join("\n"));
    assert!(cluster.shared.state.lock().templates.is_empty());
    assert!(table.rows.len() >= 20, "{}", table.rows.len());
}

async fn paths(table: &mut Table) {
    let mut got = Vec::new();
    for path in [
        "/registry/../../etc/passwd",
        "/registry/mainstay/v1/../../../etc/passwd",
        "/registry/mainstay/v1/%2e%2e/%2e%2e/etc/passwd",
        "/registry/vm/..%2f..%2fetc",
        "/registry/vm\\..\\..",
        "/%00",
        "/registry/mainstay/v1/chunks/../../x",
    ] {
        let text = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        got.push(table.raw(text.as_bytes()).await);
    }
    table.row(
        "`..`, `%2e%2e`, `%2f`, backslashes and zero bytes in a path",
        "400, 404",
        &got,
    );
    let mut got = Vec::new();
    for (method, path) in [
        ("PATCH", CHUNKS),
        ("DELETE", MISSING),
        ("GET", PUBLISH),
        ("POST", QUOTA),
    ] {
        got.push(table.send(method, path, "").await);
    }
    table.row("a method that a call does not have", "405", &got);
    let got = [
        table.raw(b"GET /registry/vm HTTP/9.9\r\n\r\n").await,
        table
            .raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
            .await,
    ];
    table.row("something that is not HTTP", "400, 0", &got);
    let long = format!(
        "GET /registry/vm?id={} HTTP/1.1\r\nHost: x\r\n\r\n",
        "x".repeat(1 << 20)
    );
    let got = [table.raw(long.as_bytes()).await];
    table.row("a line of 1 MiB in the head", "400, 414, 431, 0", &got);
}

async fn records(table: &mut Table) {
    let good = record(1);
    let body = WireRecord::frame_all([&good]);
    let mut lies = record(2);
    lies.id[0] ^= 1;
    let got = [table
        .send("PUT", CHUNKS, WireRecord::frame_all([&good, &lies]))
        .await];
    table.row(
        "a chunk that does not hash to its name, good ones before it",
        "400",
        &got,
    );
    let mut got = Vec::new();
    for raw_len in [good.raw_len - 1, good.raw_len + 1, 0] {
        let lies = WireRecord {
            raw_len,
            ..good.clone()
        };
        got.push(
            table
                .send("PUT", CHUNKS, WireRecord::frame_all([&lies]))
                .await,
        );
    }
    table.row("a chunk of another length than it claims", "400", &got);
    let mut got = Vec::new();
    for (at, value) in [(32, 7_u8), (36, 0xff), (40, 0xff)] {
        let mut lies = body.to_vec();
        lies[at] = value;
        got.push(table.send("PUT", CHUNKS, lies).await);
    }
    table.row(
        "a record of unknown form, or that claims to be over 8 MiB",
        "400",
        &got,
    );
    let bomb = WireRecord {
        id: [1; 32],
        codec: 1,
        raw_len: 65536,
        data: zstd_of(8 << 20),
    };
    let got = [table
        .send("PUT", CHUNKS, WireRecord::frame_all([&bomb]))
        .await];
    table.row(
        "compressed data that would expand beyond its chunk",
        "400",
        &got,
    );
    let mut got = Vec::new();
    for cut in [1, 40, 41, body.len() - 1] {
        got.push(table.send("PUT", CHUNKS, body.slice(..cut)).await);
    }
    table.row("a body that ends inside a record", "400", &got);
    let head = format!("PUT {CHUNKS} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n");
    let cut = [head.as_bytes(), &body[..50_000]].concat();
    let url = table.member.url.trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&url).await.unwrap();
    stream.write_all(&cut).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let got = match answer.get(9..12) {
        Some(status) => std::str::from_utf8(status).unwrap().parse().unwrap(),
        None => 0,
    };
    table.row("a connection that ends inside a body", "400, 0", &[got]);
}

async fn names(table: &mut Table) {
    let got = [
        table.send("POST", MISSING, vec![1; 33]).await,
        table.send("POST", CHUNKS_GET, vec![1; 31]).await,
    ];
    table.row("chunk names that are not 32 bytes each", "400", &got);
    let got = [
        table.send("POST", MISSING, vec![1; 65537 * 32]).await,
        table.send("POST", CHUNKS_GET, vec![1; 65537 * 32]).await,
    ];
    table.row("more than 65536 chunk names at once", "400", &got);
    let got = [table.send("POST", CHUNKS_GET, vec![1; 64]).await];
    table.row("chunks that no member has are asked for", "200", &got);
    let mut got = Vec::new();
    for digest in ["", "xyz", &"1".repeat(63), &"1".repeat(66), "sha256:1111"] {
        let body = json!({"template": "t", "tag": "v1", "manifest": digest});
        got.push(table.json("POST", PUBLISH, body).await);
    }
    table.row("a digest that is none", "400", &got);
    let body = json!({"template": "t", "tag": "v1", "manifest": "11".repeat(32)});
    let got = [table.json("POST", PUBLISH, body).await];
    table.row("a manifest that was not sent", "409", &got);
    let mut got = Vec::new();
    for name in [
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        " x",
        "a\nb",
        &"x".repeat(129),
    ] {
        for (template, tag) in [(name, "v1"), ("t", name)] {
            let body = json!({"template": template, "tag": tag, "manifest": "11".repeat(32)});
            got.push(table.json("POST", PUBLISH, body).await);
        }
    }
    table.row("a template or tag named `..`, with a slash, backslash or control character, empty or over 128 characters", "400", &got);
    let mut got = Vec::new();
    for (key, value) in [
        ("arch", json!("vax")),
        ("durability", json!("most")),
        ("request_id", json!("1")),
        ("wait", json!(-1)),
        ("description", json!("x".repeat(4097))),
        ("forwards", json!([{"name": "ssh", "guest_port": 0}])),
        ("forwards", json!([{"name": "ssh", "guest_port": 70_000}])),
        (
            "forwards",
            json!(vec![json!({"name": "x", "guest_port": 1}); 65]),
        ),
    ] {
        let mut body = json!({"template": "t", "tag": "v1", "manifest": "11".repeat(32)});
        body[key] = value;
        got.push(table.json("POST", PUBLISH, body).await);
    }
    table.row("a publish with a member out of its range", "400", &got);
    let mut got = Vec::new();
    for query in [
        "",
        "template=t&number=x",
        "template=t&number=-1",
        "template=t&number=4294967296",
        "template=t&wait=x",
    ] {
        got.push(table.send("GET", &format!("{TAG}?{query}"), "").await);
    }
    table.row("a tag's number, or a wait, out of its range", "400", &got);
    let got = [table
        .send("GET", &format!("{TAG}?template=..%2f..&tag=%00"), "")
        .await];
    table.row("a tag that is not there, however it is named", "200", &got);
}

async fn bodies(table: &mut Table) {
    let mut got = Vec::new();
    for body in ["{", "[]", "7", "\"x\"", "{\"template\": 7}", ""] {
        got.push(table.send("POST", PUBLISH, body).await);
        got.push(table.send("POST", ADMIT, body).await);
        got.push(table.send("PUT", QUOTA, body).await);
    }
    table.row("a body that is not the JSON of its call", "400", &got);
    let giant = format!("{{\"template\": \"{}\"}}", "x".repeat(2 << 20));
    let got = [
        table.send("POST", PUBLISH, giant.clone()).await,
        table.send("PUT", QUOTA, giant).await,
    ];
    table.row("a JSON body over 1 MiB", "400", &got);
    // Open and silent, each of them at once.
    let slow = |method: &str, path: &str| {
        let text =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{{");
        let url = table.member.url.clone();
        async move { raw(&url, text.as_bytes()).await }
    };
    let got = futures::future::join_all([
        slow("PUT", CHUNKS),
        slow("POST", MISSING),
        slow("POST", CHUNKS_GET),
        slow("POST", PUBLISH),
        slow("PUT", QUOTA),
        slow("DELETE", "/registry/revert"),
    ])
    .await;
    table.row(
        "a body that stalls (60 s for chunks and their names, 30 s for JSON)",
        "408",
        &got,
    );
}

/// Zeros, compressed.
fn zstd_of(len: usize) -> Bytes {
    let zeros = WireRecord::encode(&vec![0; len]);
    assert!(zeros.codec == 1 && zeros.data.len() < 65536);
    zeros.data
}

/// Manifests that claim too much are chunks like others until someone wants to make a tag of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn giant_and_lying_manifests_are_refused_and_forgotten() {
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    let page = documented();
    let full = SEGMENT_CHUNKS as u64 * CHUNK_LEN;
    let spoil: Vec<(&str, String)> = vec![
        ("no JSON", "x".repeat(100)),
        ("other version", manifest(|m| m.version = 2)),
        ("no file", manifest(|m| m.files.clear())),
        (
            "1025 files",
            manifest(|m| {
                let one = m.files[0].clone();
                m.files = (0..1025)
                    .map(|n| FileEntry {
                        name: format!("f{n}"),
                        ..one.clone()
                    })
                    .collect();
            }),
        ),
        ("too large", manifest(|m| m.files[0].size = SIZE_MAX + 1)),
        ("u64::MAX", manifest(|m| m.files[0].size = u64::MAX)),
        (
            "segments do not fit the size",
            manifest(|m| m.files[0].size = 2 * full),
        ),
        (
            "path",
            manifest(|m| m.files[0].name = "../../etc/passwd".to_owned()),
        ),
        (
            "format",
            manifest(|m| m.files[0].format = "vmdk".to_owned()),
        ),
        (
            "digest",
            manifest(|m| m.files[0].segments[0] = "zz".repeat(32)),
        ),
    ];
    let line = "| a manifest that is none, of over 1024 files, over its largest size, with names as paths, or whose segments do not fit its size | 400 |";
    assert!(page.contains(line), "docs/rest-dialect.md lacks {line}");
    for (what, text) in spoil {
        let record = WireRecord::encode(text.as_bytes());
        let url = format!("{}{CHUNKS}", member.url);
        let put = client().put(url).body(WireRecord::frame_all([&record]));
        assert_eq!(put.send().await.unwrap().status(), 200, "{what}");
        let body = json!({"template": "t", "tag": "v1", "manifest": hex::encode(record.id)});
        let url = format!("{}{PUBLISH}", member.url);
        let answer = client()
            .post(url)
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        assert_eq!(
            answer.status(),
            400,
            "{what}: {}",
            answer.text().await.unwrap()
        );
    }
    forgotten(&cluster, &member).await;
}

/// After the grace nothing of what was sent for no tag is needed, and all is given back that is worth the
/// rewriting of a pack (1 MiB).
async fn forgotten(cluster: &Cluster, member: &TestMember) {
    cluster.pass(Duration::from_secs(1));
    gc(member).await;
    cluster.pass(cluster.upkeep.collect.grace + Duration::from_secs(1));
    let collected = gc(member).await;
    let left = (collected.live_chunks, collected.waiting_chunks);
    assert_eq!(left, (0, 0), "{collected:?}");
    assert!(collected.dead_chunks > 0);
    let on_disk: u64 = std::fs::read_dir(cluster.chunk_dir(1))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(
        on_disk <= (1 << 20) + (16 << 10),
        "{on_disk} bytes are left on disk"
    );
}

/// `MAINSTAY_ABANDONED=10000` is the long form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_uploads_that_nobody_ends_leave_nothing() {
    let count = std::env::var("MAINSTAY_ABANDONED").ok();
    let count: u64 = count.and_then(|v| v.parse().ok()).unwrap_or(400);
    let cluster = cluster_by_hand(1);
    let member = cluster.serve(1, true).await;
    let (url, client) = (format!("{}{CHUNKS}", member.url), client());
    let cut = member.url.trim_start_matches("http://").to_owned();
    let begun = Instant::now();
    let uploads = (0..count).map(|n| {
        let (client, url, cut) = (client.clone(), url.clone(), cut.clone());
        async move {
            let record = WireRecord::encode(&noise(n + 1, 100));
            let body = WireRecord::frame_all([&record]);
            if n % 2 == 0 {
                let put = client.put(url).body(body);
                assert_eq!(put.send().await.unwrap().status(), 200);
                return;
            }
            // Half of them hang up in the middle.
            let head = format!("PUT {CHUNKS} HTTP/1.1\r\nHost: x\r\nContent-Length: 141\r\n\r\n");
            let mut stream = TcpStream::connect(&cut).await.unwrap();
            let half = [head.as_bytes(), &body[..70]].concat();
            stream.write_all(&half).await.unwrap();
        }
    });
    futures::stream::iter(uploads)
        .buffer_unordered(32)
        .collect::<Vec<_>>()
        .await;
    let stats = member.service.chunks().stats();
    assert_eq!(
        stats.chunks,
        count / 2,
        "those that were answered, and no other"
    );
    let status: CollectionStatus = ask(false, format!("{}{}", member.url, api::GC)).await;
    assert_eq!(status.removed_chunks, 0);
    eprintln!(
        "{count} uploads begun and abandoned in {:.1} s, {} bytes of packs",
        begun.elapsed().as_secs_f64(),
        stats.pack_bytes
    );
    forgotten(&cluster, &member).await;
    // It goes on.
    let image = cluster.file("image");
    std::fs::write(&image, noise(4, 1 << 20)).unwrap();
    push(&[&member.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
}
