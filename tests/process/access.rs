//! Ways into a real VM through every member, also while its node's home is killed. One boot for all of it.

use crate::cluster::{Cluster, binary, until};
use crate::journey::{guest, wait_state};
use crate::push::template_id;
use crate::turn;
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use mainstay::cli::client::{ApiClient, Socket};
use serde_json::json;
use std::io::{Read as _, Write as _};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tokio_tungstenite::tungstenite::Message;

const LIMIT: Duration = Duration::from_secs(60);

/// A way into the VM through member `n`.
async fn open(cluster: &Cluster, n: usize, what: &str) -> Socket {
    let endpoint = format!("http://{}", cluster.members[n].api);
    let client = ApiClient::new(&[endpoint]).unwrap();
    client
        .socket(&format!("/api/v1/vm/{what}"))
        .await
        .unwrap_or_else(|e| panic!("{what} through {n}: {e}"))
}

async fn send(socket: &mut Socket, bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    socket.send(Message::Binary(bytes)).await.unwrap();
}

/// What comes, until `enough`.
async fn read(socket: &mut Socket, what: &str, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut got = Vec::new();
    let reads = async {
        while !enough(&got) {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => got.extend_from_slice(&bytes),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!(
                    "{what}: {other:?} after {:?}",
                    String::from_utf8_lossy(&got)
                ),
            }
        }
    };
    let done = tokio::time::timeout(LIMIT, reads).await;
    done.unwrap_or_else(|_| panic!("{what}: never"));
    got
}

fn holds(text: &'static str) -> impl Fn(&[u8]) -> bool {
    move |got| got.windows(text.len()).any(|w| w == text.as_bytes())
}

/// `mainstay instance exec`, not waited for.
fn exec(cluster: &Cluster, endpoints: &str, id: &str, flags: &[&str], argv: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["instance", "exec", id, "--endpoints", endpoints])
        .args(flags)
        .arg("--")
        .args(argv)
        .current_dir(cluster.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn texts(out: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&out.stdout), text(&out.stderr))
}

/// The member that the node's stream is at: it alone logs nothing of this, so each is asked.
async fn home(cluster: &Cluster) -> usize {
    let client = &cluster.client;
    until("the node has a home", LIMIT, || async {
        for (n, member) in cluster.members.iter().enumerate() {
            if !cluster.running(n) {
                continue;
            }
            let log = cluster.log("node1");
            let line = log.lines().rev().find(|l| l.contains("registered"))?;
            let alive = client.get(format!("http://{}/livez", member.api)).send();
            if line.contains(&member.api) && alive.await.is_ok() {
                return Some(n);
            }
        }
        None
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_leads_into_a_vm() {
    let _turn = turn().await;
    let disk = guest();
    let mut cluster = Cluster::ready().await;
    let args = [
        "template",
        "push",
        "tiny",
        "--tag",
        "v1",
        "--forward",
        "http:80",
        "--disk",
    ];
    cluster.cli_ok(&[&args[..], &[disk.to_str().unwrap()]].concat());
    let template = template_id(&cluster, "tiny").await.unwrap();
    cluster.start_agent("node1", &["--driver", "qemu"]);
    let body = json!({"vmid": template, "count": 1});
    let ids = cluster.call(1, "POST", "/api/v1/vm", Some(body)).await;
    let id = ids.unwrap()[0].as_str().unwrap().to_owned();
    wait_state(&cluster, 0, &id, "Started").await;
    let home = home(&cluster).await;

    programs(&cluster, &id);
    for n in 0..3 {
        screen(&cluster, n, &id).await;
        ports(&cluster, n, &id).await;
    }
    console(&cluster, (home + 1) % 3, &id).await;
    viewer(&cluster, &id).await;
    home_dies(&mut cluster, home, &id).await;
    after_the_end(&cluster, &id).await;
}

/// Through the command line, as the other members do it.
fn programs(cluster: &Cluster, id: &str) {
    for member in &cluster.members {
        let run = |flags: &[&str], argv: &[&str], input: &[u8]| {
            let mut command = exec(cluster, &member.api, id, flags, argv);
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(input).unwrap();
            let out = tokio::task::block_in_place(|| child.wait_with_output()).unwrap();
            (out.status.code().unwrap(), texts(&out))
        };
        let script = "uname -s; echo oops >&2; echo \"$1\"; exit 7";
        let (code, (out, err)) = run(&[], &["sh", "-c", script, "sh", "a  'b'"], b"");
        assert_eq!(
            (code, out.as_str(), err.as_str()),
            (7, "Linux\na  'b'\n", "oops\n")
        );
        let input = vec![b'y'; 700_000];
        let (code, (out, err)) = run(&["-i"], &["wc", "-c"], &input);
        assert_eq!((code, out.trim(), err.as_str()), (0, "700000", ""));
        let (code, (_, err)) = run(&[], &["no-such-program"], b"");
        assert_eq!(code, 127, "{err}");
        let (code, (_, err)) = run(&["--timeout", "1"], &["sleep", "600"], b"");
        assert_eq!(code, 124, "{err}");
        assert!(err.contains("killed after 1 s"), "{err}");
        let (code, (_, err)) = run(&["-i"], &["cat"], &vec![b'z'; (1 << 20) + 1]);
        assert_eq!(code, 125, "{err}");
        assert!(err.contains("longer than"), "{err}");
    }
    let (code, (_, err)) = {
        let out = exec(cluster, &cluster.endpoints(), "none", &[], &["true"]).output();
        let out = out.unwrap();
        (out.status.code().unwrap(), texts(&out))
    };
    assert_eq!(code, 125);
    assert!(err.contains("instance none: Not found"), "{err}");
    // Nothing of what was killed runs on.
    let ps = exec(cluster, &cluster.endpoints(), id, &[], &["ps"]).output();
    let (out, _) = texts(&ps.unwrap());
    assert!(!out.contains("sleep 600"), "{out}");
}

/// As a VNC viewer begins: both versions, then the kinds of security that the screen has.
async fn screen(cluster: &Cluster, n: usize, id: &str) {
    let mut socket = open(cluster, n, &format!("vnc?id={id}")).await;
    let hello = read(&mut socket, "the version", |got| got.len() >= 12).await;
    assert_eq!(hello, b"RFB 003.008\n");
    send(&mut socket, &hello).await;
    let kinds = read(&mut socket, "security", |got| got.len() >= 2).await;
    assert_eq!(kinds, [1, 1], "one kind: none");
    send(&mut socket, &[1]).await;
    let accepted = read(&mut socket, "the result", |got| got.len() >= 4).await;
    assert_eq!(accepted, [0, 0, 0, 0]);
    send(&mut socket, &[1]).await;
    let size = read(&mut socket, "the screen's size", |got| got.len() >= 24).await;
    assert!(u16::from_be_bytes([size[0], size[1]]) >= 320, "{size:?}");
}

/// A forwarded port, and one that is not.
async fn ports(cluster: &Cluster, n: usize, id: &str) {
    let mut socket = open(cluster, n, &format!("tcp?id={id}&port=80")).await;
    send(&mut socket, b"GET /hostname HTTP/1.0\r\n\r\n").await;
    read(&mut socket, "a page", holds("200 OK")).await;
    let serve = "(echo hello from 7777 | nc -l -p 7777) >/dev/null 2>&1 &";
    let serve = format!("{serve} while ! netstat -ltn | grep -q :7777; do :; done");
    let listens = exec(
        cluster,
        &cluster.members[n].api,
        id,
        &[],
        &["sh", "-c", &serve],
    );
    let out = { listens }.output().unwrap();
    assert!(out.status.success(), "{:?}", texts(&out));
    let mut socket = open(cluster, n, &format!("tcp?id={id}&port=7777")).await;
    read(&mut socket, "a greeting", holds("hello from 7777\n")).await;
}

/// The console takes one at a time; what it said is kept.
async fn console(cluster: &Cluster, n: usize, id: &str) {
    let mut socket = open(cluster, n, &format!("console?id={id}")).await;
    send(&mut socket, b"\n").await;
    read(&mut socket, "a shell", holds("# ")).await;
    send(&mut socket, b"echo $((6 * 7))-on-the-console\n").await;
    read(&mut socket, "its answer", holds("42-on-the-console")).await;
    let second = cluster.cli(&["instance", "console", id]);
    let (_, err) = texts(&second);
    assert!(
        !second.status.success() && err.contains("somebody is at this console"),
        "{err}"
    );
    socket.close(None).await.unwrap();
    for n in 0..3 {
        let api = &cluster.members[n].api;
        let logs = Command::new(binary())
            .args(["instance", "logs", id, "--endpoints", api])
            .output();
        let (out, err) = texts(&logs.unwrap());
        assert!(out.contains("42-on-the-console"), "{n}: {out} {err}");
    }
    // And goes on, for who follows it.
    let mut follows = Command::new(binary())
        .args([
            "instance",
            "logs",
            "-f",
            id,
            "--endpoints",
            &cluster.endpoints(),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = follows.stdout.take().unwrap();
    let argv = ["sh", "-c", "echo and-goes-on >/dev/console"];
    let said = exec(cluster, &cluster.endpoints(), id, &[], &argv).output();
    assert!(said.unwrap().status.success());
    let (mut got, mut piece) = (Vec::new(), [0; 4096]);
    while !holds("and-goes-on")(&got) {
        let n = tokio::task::block_in_place(|| out.read(&mut piece)).unwrap();
        assert!(n > 0, "the log ended: {}", String::from_utf8_lossy(&got));
        got.extend_from_slice(&piece[..n]);
    }
    follows.kill().unwrap();
    follows.wait().unwrap();
}

/// A viewer on this machine finds the screen at a port of its own.
async fn viewer(cluster: &Cluster, id: &str) {
    let port = crate::cluster::free_port();
    let at = format!("127.0.0.1:{port}");
    let endpoints = cluster.endpoints();
    let mut serves = Command::new(binary())
        .args([
            "instance",
            "vnc",
            id,
            "--listen",
            &at,
            "--endpoints",
            &endpoints,
        ])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let hello = until("the screen", LIMIT, || async {
        use tokio::io::AsyncReadExt as _;
        let mut stream = tokio::net::TcpStream::connect(&at).await.ok()?;
        let mut hello = [0; 12];
        stream.read_exact(&mut hello).await.ok()?;
        Some(hello)
    })
    .await;
    assert_eq!(&hello, b"RFB 003.008\n");
    serves.kill().unwrap();
    serves.wait().unwrap();
}

/// A program is under way through a member that is not the home, and one through the home: when that is killed both
/// callers are told at once that the end is unknown, and a new one finds the new home.
async fn home_dies(cluster: &mut Cluster, home: usize, id: &str) {
    let other = (home + 1) % 3;
    let both = [home, other].map(|n| {
        let api = cluster.members[n].api.clone();
        let mark = format!("touch /tmp/runs-{n}; sleep 500");
        exec(cluster, &api, id, &[], &["sh", "-c", &mark])
            .spawn()
            .unwrap()
    });
    let marks = format!("ls /tmp/runs-{home} /tmp/runs-{other}");
    until("both run", LIMIT, || async {
        let looks = exec(
            cluster,
            &cluster.endpoints(),
            id,
            &[],
            &["sh", "-c", &marks],
        )
        .output();
        looks.unwrap().status.success().then_some(())
    })
    .await;
    let begun = Instant::now();
    cluster.kill(home);
    for child in both {
        let out = tokio::task::block_in_place(|| child.wait_with_output()).unwrap();
        let (_, err) = texts(&out);
        assert_eq!(out.status.code(), Some(125), "{err}");
        assert!(err.contains("how it ended, is unknown"), "{err}");
    }
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    // What had lost its caller is ended, not run to its end, and not run again.
    let looks = "ps | grep -v grep | grep -c 'sleep 500'; ls /tmp | grep -c runs";
    until("nothing of it is left", LIMIT, || async {
        let api = &cluster.members[other].api;
        let out = exec(cluster, api, id, &[], &["sh", "-c", looks])
            .output()
            .unwrap();
        let (text, err) = texts(&out);
        assert!(out.status.success(), "{text} {err}");
        (text == "0\n2\n").then_some(())
    })
    .await;
    screen(cluster, other, id).await;
}

/// The VM is gone: nothing leads to it, and what its console said is still there.
async fn after_the_end(cluster: &Cluster, id: &str) {
    let up = (0..3).find(|n| cluster.running(*n)).unwrap();
    let gone = cluster.call(up, "DELETE", "/api/v1/vm", Some(json!({"id": id})));
    gone.await.unwrap();
    wait_state(cluster, up, id, "Terminated").await;
    let (out, err) = texts(&cluster.cli(&["instance", "logs", id]));
    assert!(out.contains("42-on-the-console"), "{out} {err}");
    let out = exec(cluster, &cluster.endpoints(), id, &[], &["true"]).output();
    let (_, err) = texts(&out.unwrap());
    assert!(err.contains("is Terminated: programs"), "{err}");
    let out = cluster.cli(&["instance", "console", id]);
    let (_, err) = texts(&out);
    assert!(
        err.contains("there is no VM") || err.contains("has no VM"),
        "{err}"
    );
}
