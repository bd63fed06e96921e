//! The network between members: every byte from one member to another passes here, and each
//! direction of each pair can be cut or made slow. Knows of what passes only who dialled (the first
//! request of a connection names the member).
//!
//! A cut holds bytes back, as a network does whose sender tries again: they arrive late when the cut
//! heals, unless the connection was broken meanwhile. Nothing is refused: who dials into a cut waits.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Members that a run can have.
pub(crate) const MEMBERS_MAX: usize = 5;
/// Most bytes read before the dialling member must have been named.
const HEAD_MAX: usize = 8 << 10;
/// The header that names it (see `src/peer/auth.rs`).
const FROM: &str = "x-mainstay-from:";

/// One direction of one pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Link {
    /// As fast as it goes.
    #[default]
    Open,
    /// Every read of bytes waits so long before it goes on.
    Slow(Duration),
    /// Nothing passes.
    Cut,
}

#[derive(Clone, Default)]
struct Table {
    links: [[Link; MEMBERS_MAX]; MEMBERS_MAX],
    /// Grows when the connections of a pair are broken.
    broken: [[u64; MEMBERS_MAX]; MEMBERS_MAX],
    /// Index by member id: ids are known only once members run.
    names: HashMap<u64, usize>,
}

struct Shared {
    table: watch::Sender<Table>,
    /// Times that bytes were held back or slowed.
    felt: [[AtomicU64; MEMBERS_MAX]; MEMBERS_MAX],
}

/// The network; it ends with this.
pub(crate) struct Links {
    shared: Arc<Shared>,
    _doors: JoinSet<()>,
}

impl Links {
    /// A door before each of these peer ports; the addresses that the members shall be told.
    pub(crate) async fn before(ports: &[String]) -> (Self, Vec<String>) {
        let shared = Arc::new(Shared {
            table: watch::Sender::default(),
            felt: Default::default(),
        });
        let mut doors = JoinSet::new();
        let mut addresses = Vec::new();
        for (to, port) in ports.iter().enumerate() {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap().to_string());
            let real: SocketAddr = port.parse().unwrap();
            doors.spawn(accept(Arc::clone(&shared), listener, real, to));
        }
        let links = Self {
            shared,
            _doors: doors,
        };
        (links, addresses)
    }

    /// The member with this id is number `n`.
    pub(crate) fn name(&self, id: u64, n: usize) {
        self.shared.table.send_modify(|table| {
            table.names.insert(id, n);
        });
    }

    /// Set the direction `from` -> `to`.
    pub(crate) fn set(&self, from: usize, to: usize, link: Link) {
        self.shared
            .table
            .send_modify(|table| table.links[from][to] = link);
    }

    /// Open everything. With `broken`, connections that something had happened to are broken;
    /// without, what was held back arrives now.
    pub(crate) fn heal(&self, broken: bool) {
        self.shared.table.send_modify(|table| {
            for from in 0..MEMBERS_MAX {
                for to in 0..MEMBERS_MAX {
                    if broken && table.links[from][to] != Link::Open {
                        table.broken[from][to] += 1;
                    }
                    table.links[from][to] = Link::Open;
                }
            }
        });
    }

    /// How often bytes were held back or slowed so far.
    pub(crate) fn felt(&self) -> u64 {
        let all = self.shared.felt.iter().flatten();
        all.map(|count| count.load(Ordering::SeqCst)).sum()
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, real: SocketAddr, to: usize) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((dialled, _)) = accepted {
                    connections.spawn(carry(Arc::clone(&shared), dialled, real, to));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, from the first byte to the last. Any error ends it: the members see that.
async fn carry(shared: Arc<Shared>, mut dialled: TcpStream, real: SocketAddr, to: usize) {
    let Ok((head, id)) = head(&mut dialled).await else {
        return;
    };
    let Ok(target) = TcpStream::connect(real).await else {
        return;
    };
    let _ = (dialled.set_nodelay(true), target.set_nodelay(true));
    let (from_dialled, to_dialled) = dialled.into_split();
    let (from_target, to_target) = target.into_split();
    let there = Way {
        shared: Arc::clone(&shared),
        id,
        to,
        back: false,
    };
    let back = Way {
        back: true,
        ..there.clone()
    };
    let both = async {
        tokio::try_join!(
            there.pump(head, from_dialled, to_target),
            back.pump(Vec::new(), from_target, to_dialled)
        )
    };
    tokio::select! {
        _ = both => {}
        () = there.broken() => {}
    }
}

/// Read until the dialling member is named; what was read, and its id.
async fn head(stream: &mut TcpStream) -> io::Result<(Vec<u8>, u64)> {
    let mut head = Vec::new();
    loop {
        if stream.read_buf(&mut head).await? == 0 || head.len() > HEAD_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let Some(end) = text.find("\r\n\r\n") else {
            continue;
        };
        let named = text[..end].lines().find_map(|line| line.strip_prefix(FROM));
        let id = named.and_then(|id| id.trim().parse().ok()).unwrap_or(0);
        return Ok((head, id));
    }
}

/// One direction of one connection.
#[derive(Clone)]
struct Way {
    shared: Arc<Shared>,
    /// The dialling member.
    id: u64,
    /// The member that was dialled.
    to: usize,
    /// From the dialled member to the dialling one.
    back: bool,
}

impl Way {
    /// The pair, once the dialling member has a number.
    fn pair(&self, table: &Table) -> Option<(usize, usize)> {
        let from = *table.names.get(&self.id)?;
        Some(if self.back {
            (self.to, from)
        } else {
            (from, self.to)
        })
    }

    /// Wait as long as the link says.
    async fn pass(&self) {
        let mut table = self.shared.table.subscribe();
        let (link, felt) = {
            let table = table.borrow_and_update();
            let pair = self.pair(&table);
            let link = pair.map_or(Link::Open, |(from, to)| table.links[from][to]);
            (link, pair.map(|(from, to)| &self.shared.felt[from][to]))
        };
        if let Some(felt) = felt.filter(|_| link != Link::Open) {
            felt.fetch_add(1, Ordering::SeqCst);
        }
        if let Link::Slow(delay) = link {
            tokio::time::sleep(delay).await;
        }
        let open = |table: &Table| {
            self.pair(table)
                .is_none_or(|(from, to)| table.links[from][to] != Link::Cut)
        };
        // The sender lives in `self`.
        let _ = table.wait_for(open).await;
    }

    async fn pump(
        &self,
        mut bytes: Vec<u8>,
        mut read: OwnedReadHalf,
        mut write: OwnedWriteHalf,
    ) -> io::Result<()> {
        loop {
            if !bytes.is_empty() {
                self.pass().await;
                write.write_all(&bytes).await?;
                bytes.clear();
            }
            bytes.reserve(64 << 10);
            if read.read_buf(&mut bytes).await? == 0 {
                self.pass().await;
                return write.shutdown().await;
            }
        }
    }

    /// Returns when the connections of this pair are to be broken.
    async fn broken(&self) {
        let mut table = self.shared.table.subscribe();
        let count = |table: &Table| {
            self.pair(table)
                .map(|(from, to)| table.broken[from][to] + table.broken[to][from])
        };
        let first = count(&table.borrow_and_update()).unwrap_or(0);
        let _ = table
            .wait_for(|now| count(now).is_some_and(|n| n > first))
            .await;
    }
}

#[tokio::test]
async fn a_cut_holds_bytes_back_in_one_direction_only() {
    let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = echo.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = echo.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    let (links, doors) = Links::before(&[port.clone(), port]).await;
    links.name(77, 0);
    let mut stream = TcpStream::connect(&doors[1]).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nX-Mainstay-From: 77\r\n\r\n";
    let mut answer = [0; 39];
    assert_eq!(request.len(), answer.len());
    stream.write_all(request).await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, request);
    // The other direction of the other pair has no part in it.
    links.set(1, 1, Link::Cut);
    stream.write_all(b"a").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'a');
    assert_eq!(links.felt(), 0);
    links.set(1, 0, Link::Cut);
    stream.write_all(b"b").await.unwrap();
    let held = Duration::from_millis(50);
    let early = tokio::time::timeout(held, stream.read_u8()).await;
    assert!(early.is_err(), "a cut let bytes through");
    links.heal(false);
    assert_eq!(stream.read_u8().await.unwrap(), b'b');
    assert_eq!(links.felt(), 1);
    links.set(0, 1, Link::Cut);
    stream.write_all(b"c").await.unwrap();
    links.heal(true);
    let ended = stream.read_u8().await;
    assert!(ended.is_err(), "a broken connection went on");
}
