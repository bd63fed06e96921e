//! Tunnels through one member: the real API on loopback, the agents' real end of it over VMs in name only, and
//! agents that do what none should.

use crate::cluster::Cluster;
use axum::Router;
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::{StatusCode, header};
use mainstay::agents::tunnels::NODE_TUNNELS_MAX;
use mainstay::agents::{AgentsConfig, AgentsState, Liveness, agents_router};
use mainstay::cli::client::{ApiClient, ClientError, Socket};
use mainstay::http::{ApiState, ExecAnswer, router};
use mainstay::peer::PeerClient;
use mainstay_agent::driver::fake::{FakeConfig, FakeDriver};
use mainstay_agent::driver::{Driver, VmSpec};
use mainstay_agent::tunnel::frame::{self, Kind};
use mainstay_agent::tunnel::{ID_HEADER, PATH, Tunnels, UPGRADE};
use mainstay_agent::wire::{DesiredSet, TunnelOrder};
use mainstay_model::Command;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

const LIMIT: Duration = Duration::from_secs(30);

/// A member on loopback with one started instance on node `n2`.
struct World {
    cluster: Cluster,
    url: String,
    id: String,
    client: ApiClient,
    http: reqwest::Client,
}

/// What a node's stream says besides sets.
type Orders = tokio::sync::mpsc::UnboundedReceiver<TunnelOrder>;

impl World {
    async fn new() -> Self {
        Self::with_cors(false).await
    }

    async fn with_cors(allow_cors: bool) -> Self {
        let cluster = Cluster::start(1).await;
        cluster.template(&["v1"]).await;
        cluster.raise_features().await;
        let id = cluster.started(1).await.remove(0);
        let app = &cluster.members[0].app;
        let peers = PeerClient::new("token", cluster.members[0].id).unwrap();
        let config = AgentsConfig {
            heartbeat: Duration::from_secs(600),
            exchange_every: Duration::from_millis(20),
            ..AgentsConfig::new("test", Duration::from_secs(20), Duration::from_secs(120))
        };
        let agents = AgentsState::new(app.clone(), Liveness::new(), peers, config);
        let mut about = crate::cluster::about(1);
        about.allow_cors = allow_cors;
        let api = ApiState::new(app.clone(), Liveness::new(), about);
        let api = api.with_tunnels(agents.tunnels().clone());
        let url = serve(router(api).merge(agents_router(agents))).await;
        Self {
            client: ApiClient::new(std::slice::from_ref(&url)).unwrap(),
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            cluster,
            url,
            id,
        }
    }

    /// The stream of desired sets, as an agent of this release (or an older one) opens it.
    async fn orders(&self, knows: bool) -> Orders {
        let flag = if knows { "&tunnels=1" } else { "" };
        let url = format!("{}/agent/v1/desired?node_id=n2{flag}", self.url);
        let answer = self.http.get(url).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let (give, take) = tokio::sync::mpsc::unbounded_channel();
        let mut body = answer.bytes_stream();
        let first = body.next().await.unwrap().unwrap();
        assert!(
            serde_json::from_slice::<DesiredSet>(&first)
                .unwrap()
                .tunnel
                .is_none()
        );
        tokio::spawn(async move {
            while let Some(Ok(piece)) = body.next().await {
                for line in piece.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                    if let Some(order) = serde_json::from_slice::<DesiredSet>(line).unwrap().tunnel
                    {
                        give.send(order).unwrap();
                    }
                }
            }
        });
        take
    }

    /// The node's agent, as far as tunnels go, on VMs in name only.
    async fn agent(&self) {
        let driver = FakeDriver::open(FakeConfig::default()).unwrap();
        let spec = VmSpec {
            id: self.id.clone(),
            ..VmSpec::default()
        };
        driver.start(&spec).await.unwrap();
        let tunnels = Tunnels::new(Arc::new(driver), self.http.clone(), "n2");
        let (mut orders, url) = (self.orders(true).await, self.url.clone());
        tokio::spawn(async move {
            while let Some(order) = orders.recv().await {
                tunnels.answer(&url, order);
            }
        });
    }

    /// An agent of our own making; `work` is given each tunnel after the first frame was read.
    async fn puppet<F: Future<Output = ()> + Send>(
        &self,
        work: impl Fn(reqwest::Upgraded) -> F + Send + 'static,
    ) {
        let mut orders = self.orders(true).await;
        let (http, url) = (self.http.clone(), self.url.clone());
        tokio::spawn(async move {
            while let Some(order) = orders.recv().await {
                let dialled = dial(&http, &url, "n2", &order.id).await;
                assert_eq!(dialled.status(), StatusCode::SWITCHING_PROTOCOLS);
                let mut stream = dialled.upgrade().await.unwrap();
                let open = frame::next(&mut stream).await.unwrap();
                assert_eq!(open.kind, Kind::Open);
                work(stream).await;
            }
        });
    }

    fn path(&self, what: &str) -> String {
        let sep = if what.contains('?') { '&' } else { '?' };
        format!("/api/v1/vm/{what}{sep}id={}", self.id)
    }

    async fn open(&self, what: &str) -> Result<Socket, ClientError> {
        self.client.socket(&self.path(what)).await
    }

    /// What is said to a client that gets no WebSocket.
    async fn refused(&self, what: &str) -> String {
        self.open(what).await.map(drop).unwrap_err().to_string()
    }
}

async fn serve(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

async fn dial(http: &reqwest::Client, url: &str, node: &str, id: &str) -> reqwest::Response {
    let call = http.get(format!("{url}{PATH}?node_id={node}"));
    let call = call
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, UPGRADE)
        .header(ID_HEADER, id);
    call.send().await.unwrap()
}

async fn next(socket: &mut Socket) -> Message {
    loop {
        let next = tokio::time::timeout(LIMIT, socket.next()).await;
        match next.expect("a message in time").expect("no end").unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

/// Code and reason with which the member ends a session.
async fn closed(socket: &mut Socket) -> (CloseCode, String) {
    loop {
        if let Message::Close(Some(frame)) = next(socket).await {
            return (frame.code, frame.reason.to_string());
        }
    }
}

/// Run a program; its standard output, standard error, and end.
async fn run(mut socket: Socket, request: &str, input: &[&[u8]]) -> (Vec<u8>, Vec<u8>, ExecAnswer) {
    socket.send(Message::Text(request.into())).await.unwrap();
    for piece in input {
        let piece = Bytes::copy_from_slice(piece);
        socket.send(Message::Binary(piece)).await.unwrap();
    }
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match next(&mut socket).await {
            Message::Binary(bytes) if bytes[0] == 1 => out.extend_from_slice(&bytes[1..]),
            Message::Binary(bytes) => err.extend_from_slice(&bytes[1..]),
            Message::Text(text) => return (out, err, serde_json::from_str(&text).unwrap()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_go_both_ways_and_a_direction_ends_by_itself() {
    let world = World::new().await;
    world.agent().await;
    let mut socket = world.open("tcp?port=80").await.unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
    let (mut sink, mut source) = socket.split();
    let bytes = sent.clone();
    let writes = tokio::spawn(async move {
        for piece in bytes.chunks(250_001) {
            let piece = Bytes::copy_from_slice(piece);
            sink.send(Message::Binary(piece)).await.unwrap();
        }
        sink.send(Message::Binary(Bytes::new())).await.unwrap();
        sink
    });
    let mut got = Vec::new();
    // What was sent before the end of one direction comes back after it, and then the connection ends.
    while let Some(message) = source.next().await {
        match message.unwrap() {
            Message::Binary(bytes) => got.extend_from_slice(&bytes),
            Message::Close(frame) => {
                assert_eq!(frame.unwrap().code, CloseCode::Normal);
                break;
            }
            _ => {}
        }
    }
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    drop(writes.await.unwrap());
    // A client that closes is let go, and its places are there again.
    for _ in 0..NODE_TUNNELS_MAX + 3 {
        socket = world.open("vnc").await.unwrap();
        socket.send(Message::Binary("RFB".into())).await.unwrap();
        assert_eq!(next(&mut socket).await, Message::Binary("RFB".into()));
        socket.close(None).await.unwrap();
        while let Some(Ok(_)) = socket.next().await {}
    }
    let log = world.client.stream(&world.path("logs")).await.unwrap();
    let said = log.bytes().await.unwrap();
    assert_eq!(said, format!("console of {}\n", world.id));
    world.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_have_input_outputs_and_an_end() {
    let world = World::new().await;
    world.agent().await;
    let exec = || async { world.open("exec").await.unwrap() };
    let (out, err, end) = run(exec().await, r#"{"argv":["echo","a  b",">&2"]}"#, &[]).await;
    assert_eq!(
        (out.len(), &err[..], end.exit_code),
        (0, &b"a b\n"[..], Some(0))
    );
    let (.., end) = run(exec().await, r#"{"argv":["exit","7"]}"#, &[]).await;
    assert_eq!(end.exit_code, Some(7));
    let input = vec![b'x'; 250_000];
    let pieces = [&input[..], &input[..], &input[..], &input[..], b""];
    let (out, _, end) = run(exec().await, r#"{"argv":["cat"],"stdin":true}"#, &pieces).await;
    assert_eq!((out.len(), end.exit_code), (1_000_000, Some(0)));
    let (.., end) = run(exec().await, r#"{"argv":["sleep","60"],"timeout":1}"#, &[]).await;
    assert!(end.timed_out, "{end:?}");
    // What cannot be run, is not.
    let many = format!(r#"{{"argv":["{}"]}}"#, "x".repeat(70_000));
    let long = [&input[..]; 5];
    let cases: [(&str, &[&[u8]], &str); 6] = [
        ("{}", &[], "names no program"),
        (r#"{"argv":[""]}"#, &[], "names no program"),
        ("nonsense", &[], "cannot be read"),
        (r#"{"argv":"ls"}"#, &[], "cannot be read"),
        (&many, &[], "more than 65536 bytes"),
        (
            r#"{"argv":["cat"],"stdin":true}"#,
            &long,
            "longer than 1048576 bytes",
        ),
    ];
    for (request, input, why) in cases {
        let (.., end) = run(exec().await, request, input).await;
        assert!(end.error.contains(why), "{request}: {end:?}");
        assert!(!end.unknown && end.exit_code.is_none(), "{end:?}");
    }
    world.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_breaks_says_whether_anything_was_done() {
    let world = World::new().await;
    world
        .puppet(|mut stream| async move {
            frame::write(&mut stream, Kind::Ready, b"").await.unwrap();
            while frame::next(&mut stream).await.unwrap().kind != Kind::Run {}
        })
        .await;
    // Its agent is gone before the end of its input: it cannot have run. After that it may have.
    let socket = world.open("exec").await.unwrap();
    let (.., end) = run(socket, r#"{"argv":["x"],"stdin":true}"#, &[]).await;
    assert!(end.error.ends_with("the program was not run"), "{end:?}");
    assert!(!end.unknown);
    let socket = world.open("exec").await.unwrap();
    let (.., end) = run(socket, r#"{"argv":["x"]}"#, &[]).await;
    assert!(end.error.ends_with("is unknown") && end.unknown, "{end:?}");
    world.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_slows_the_guest_and_fills_no_memory() {
    let world = World::new().await;
    let written = Arc::new(AtomicU64::new(0));
    let counts = Arc::clone(&written);
    const TOTAL: u64 = 200 << 20;
    world
        .puppet(move |stream| {
            let counts = Arc::clone(&counts);
            async move {
                let (mut from, mut to) = tokio::io::split(stream);
                frame::write(&mut to, Kind::Ready, b"").await.unwrap();
                // It reads what it is sent, or the member would be the slow one.
                let reads =
                    tokio::spawn(async move { while frame::next(&mut from).await.is_ok() {} });
                let piece = vec![7; frame::BODY_MAX];
                while counts.load(Ordering::Relaxed) < TOTAL {
                    frame::write(&mut to, Kind::Data, &piece).await.unwrap();
                    counts.fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
                frame::write(&mut to, Kind::End, b"").await.unwrap();
                reads.await.unwrap();
            }
        })
        .await;
    let mut socket = world.open("vnc").await.unwrap();
    // Until it stands still: what is under way then is what sockets hold.
    let mut before = u64::MAX;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = written.load(Ordering::Relaxed);
        if now == before && now > 0 {
            break;
        }
        before = now;
    }
    assert!(
        before < 48 << 20,
        "{before} bytes are on their way to nobody"
    );
    let mut got = 0;
    while let Message::Binary(bytes) = next(&mut socket).await {
        got += bytes.len() as u64;
    }
    assert_eq!(got, TOTAL);
    world.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_is_taken_once_by_the_node_that_was_told() {
    let world = World::new().await;
    let mut orders = world.orders(true).await;
    let opening = world.open("vnc");
    let attack = async {
        let id = orders.recv().await.unwrap().id;
        assert_eq!(id.len(), 32, "a secret");
        for (node, guess) in [
            ("n2", "0"),
            ("n2", ""),
            ("n1", id.as_str()),
            ("n2", &id[1..]),
        ] {
            let answer = dial(&world.http, &world.url, node, guess).await;
            assert_eq!(answer.status(), StatusCode::NOT_FOUND, "{node} {guess}");
        }
        let plain = format!("{}{PATH}?node_id=n2", world.url);
        let plain = world.http.get(plain).header(ID_HEADER, &id).send().await;
        assert_eq!(plain.unwrap().status(), StatusCode::UPGRADE_REQUIRED);
        let first = dial(&world.http, &world.url, "n2", &id).await;
        assert_eq!(first.status(), StatusCode::SWITCHING_PROTOCOLS);
        let second = dial(&world.http, &world.url, "n2", &id).await;
        assert_eq!(second.status(), StatusCode::NOT_FOUND);
        let mut stream = first.upgrade().await.unwrap();
        frame::next(&mut stream).await.unwrap();
        frame::write(&mut stream, Kind::Ready, b"").await.unwrap();
        stream
    };
    let (socket, stream) = tokio::join!(opening, attack);
    drop(stream);
    let (code, why) = closed(&mut socket.unwrap()).await;
    assert_eq!(code, CloseCode::Error);
    assert!(why.starts_with("the connection to the node broke"), "{why}");
    // Who is told and does not come is waited for, but not for ever; what comes too late finds nobody.
    let late = world.refused("vnc").await;
    assert!(
        late.contains("the agent of node n2 does not answer"),
        "{late}"
    );
    while let Ok(order) = orders.try_recv() {
        let answer = dial(&world.http, &world.url, "n2", &order.id).await;
        assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    }
    world.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_opened_is_refused_with_its_reason() {
    let world = World::new().await;
    let away = world.refused("vnc").await;
    assert!(away.contains("node n2 is connected to no member"), "{away}");
    let judge = async |reachable| {
        let verdict = Command::SetNodeReachability {
            id: "n2".into(),
            reachable,
            lost: false,
        };
        world.cluster.members[0].app.submit(verdict).await.unwrap();
    };
    judge(false).await;
    let begun = std::time::Instant::now();
    let lost = world.refused("vnc").await;
    assert!(
        lost.contains("503") && lost.contains("is not reachable"),
        "{lost}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "nobody waits for it"
    );
    judge(true).await;
    let old = world.orders(false).await;
    let older = world.refused("exec").await;
    assert!(older.contains("older release"), "{older}");
    drop(old);
    world.agent().await;
    for (what, why) in [
        ("tcp", "port must be"),
        ("tcp?port=0", "port must be"),
        ("tcp?port=65536", "port must be"),
        ("tcp?port=ssh", "port must be"),
    ] {
        let said = world.refused(what).await;
        assert!(said.contains(why), "{what}: {said}");
    }
    // Of no instance, and of one that has no VM.
    for path in ["/api/v1/vm/exec?id=none", "/api/v1/vm/logs?id=none"] {
        let said = world.client.stream(path).await.unwrap_err().to_string();
        let expected = if path.contains("exec") {
            "WebSocket"
        } else {
            "Not found"
        };
        assert!(said.contains(expected), "{path}: {said}");
    }
    let said = world.client.socket("/api/v1/vm/exec?id=none").await;
    assert_eq!(said.map(drop).unwrap_err().to_string(), "Not found");
    let said = world.client.socket("/api/v1/vm/exec").await;
    assert!(
        said.map(drop)
            .unwrap_err()
            .to_string()
            .contains("id is required")
    );
    let start = json!({"vmid": "t1", "count": 1, "node_id": "n2"});
    let ids = world
        .cluster
        .call(0, "POST", "/api/v1/vm", start)
        .await
        .body();
    for (kind, why) in [("exec", "is Scheduling: programs"), ("vnc", "it has no VM")] {
        let path = format!("/api/v1/vm/{kind}?id={}", ids[0].as_str().unwrap());
        let said = world.client.socket(&path).await.map(drop).unwrap_err();
        assert!(said.to_string().contains(why), "{said}");
    }
    // Without a WebSocket, and by a page of somebody else.
    let plain = world
        .http
        .get(format!("{}{}", world.url, world.path("vnc")));
    let plain = plain.send().await.unwrap();
    assert_eq!(plain.status(), StatusCode::UPGRADE_REQUIRED);
    assert_eq!(plain.headers()[header::UPGRADE], "websocket");
    assert!(plain.text().await.unwrap().contains("\"FAIL\""));
    let (own, other) = (world.url.clone(), "http://evil.example".to_owned());
    let open = World::with_cors(true).await;
    for (world, origin, status) in [
        (&world, own, 101),
        (&world, other.clone(), 403),
        (&world, "null".to_owned(), 403),
        (&open, other, 503),
    ] {
        let call = world
            .http
            .get(format!("{}{}", world.url, world.path("vnc")));
        let call = call
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, "AAAAAAAAAAAAAAAAAAAAAA==")
            .header(header::SEC_WEBSOCKET_PROTOCOL, "binary, base64")
            .header(header::ORIGIN, &origin);
        let answer = call.send().await.unwrap();
        assert_eq!(answer.status(), status, "{origin}");
        if status == 101 {
            assert_eq!(answer.headers()[header::SEC_WEBSOCKET_PROTOCOL], "binary");
        }
    }
    // Messages of the wrong kind or size.
    let wrong = [
        (Message::Text("hello".into()), CloseCode::Unsupported),
        (Message::Binary(vec![0; 10 << 20].into()), CloseCode::Size),
    ];
    for (message, code) in wrong {
        let socket = world.open("tcp?port=80").await.unwrap();
        let (mut sink, mut source) = socket.split();
        let sends = tokio::spawn(async move {
            // It is cut off in the middle of a message that is far too long.
            sink.send(message).await.ok();
            sink
        });
        let told = loop {
            match source.next().await {
                Some(Ok(Message::Close(Some(frame)))) => break Some(frame.code),
                Some(Ok(_)) => {}
                _ => break None,
            }
        };
        drop(sends);
        assert!(told.is_none_or(|told| told == code), "{told:?}");
        assert!(told.is_some() || code == CloseCode::Size);
    }
    open.cluster.stop().await;
    world.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_so_many_tunnels_and_no_more() {
    let world = World::new().await;
    world.agent().await;
    let mut held = Vec::new();
    for _ in 0..NODE_TUNNELS_MAX {
        held.push(world.open("tcp?port=80").await.unwrap());
    }
    let page = world
        .http
        .get(format!("{}/metrics", world.url))
        .send()
        .await;
    let page = page.unwrap().text().await.unwrap();
    let open = format!("\nmainstay_tunnels {NODE_TUNNELS_MAX}\n");
    assert!(page.contains(&open), "{page}");
    let over = world.refused("tcp?port=80").await;
    assert!(
        over.contains("503") && over.contains("overloaded"),
        "{over}"
    );
    // The others are none the worse, and a place that is given back is taken.
    let mut last = held.pop().unwrap();
    last.send(Message::Binary("still".into())).await.unwrap();
    assert_eq!(next(&mut last).await, Message::Binary("still".into()));
    last.close(None).await.unwrap();
    while let Some(Ok(_)) = last.next().await {}
    let begun = std::time::Instant::now();
    while world.open("tcp?port=80").await.is_err() {
        assert!(begun.elapsed() < LIMIT);
    }
    world.cluster.stop().await;
}
