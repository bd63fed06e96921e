//! A network inside one process, for tests and simulation: links between members can be cut in one
//! direction, delayed, and broken. What is cut is held back, as TCP would retransmit it, and
//! delivered after the cut heals if the connection still stands.

use super::{Dialer, Member, PeerStream};
use crate::Group;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const BUFFER: usize = 256 << 10;

/// How bytes from one member to another fare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Nothing passes.
    pub cut: bool,
    /// Everything arrives this much later.
    pub delay: Duration,
}

#[derive(Default)]
struct Board {
    members: HashMap<u64, Group>,
    ways: HashMap<(u64, u64), watch::Sender<Way>>,
    /// Members that are found at one address only.
    places: HashMap<u64, String>,
    /// Who is told that nobody listens there, though somebody may: a firewall that answers.
    refusing: HashSet<(u64, u64)>,
    /// Open connections by their two ends.
    connections: Vec<(u64, u64, CancellationToken)>,
}

impl Board {
    fn way(&mut self, from: u64, to: u64) -> &watch::Sender<Way> {
        self.ways
            .entry((from, to))
            .or_insert_with(|| watch::Sender::new(Way::default()))
    }
}

/// The network and the hand on its cables. Cheap to clone.
#[derive(Clone, Default)]
pub struct Switchboard {
    board: Arc<Mutex<Board>>,
}

impl Switchboard {
    /// A network without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// How member `id` reaches the others.
    pub fn dialer(&self, id: u64) -> Arc<dyn Dialer> {
        Arc::new(MemoryDialer {
            from: id,
            network: self.clone(),
        })
    }

    /// Let `group` be reached as member `id`.
    pub fn attach(&self, id: u64, group: Group) {
        self.board.lock().members.insert(id, group);
    }

    /// From now on member `id` is found at this `peer_url` only (before: at any); its connections
    /// break.
    pub fn place(&self, id: u64, peer_url: impl Into<String>) {
        self.board.lock().places.insert(id, peer_url.into());
        self.break_connections(|a, b| a == id || b == id);
    }

    /// Take member `id` off the network: its connections break, nobody reaches it.
    pub fn detach(&self, id: u64) {
        self.board.lock().members.remove(&id);
        self.break_connections(|a, b| a == id || b == id);
    }

    /// Set how bytes from `from` to `to` fare, from now on and on open connections.
    pub fn set(&self, from: u64, to: u64, way: Way) {
        self.board.lock().way(from, to).send_replace(way);
    }

    /// Cut (or heal) one direction.
    pub fn cut(&self, from: u64, to: u64, cut: bool) {
        self.board
            .lock()
            .way(from, to)
            .send_modify(|way| way.cut = cut);
    }

    /// Cut (or heal) both directions between `id` and every one of `others`.
    pub fn isolate(&self, id: u64, others: &[u64], cut: bool) {
        for &other in others.iter().filter(|&&o| o != id) {
            self.cut(id, other, cut);
            self.cut(other, id, cut);
        }
    }

    /// Refuse (or allow) that `from` dials `to`, as if nobody listened there. Open connections stay.
    pub fn refuse(&self, from: u64, to: u64, refuse: bool) {
        let mut board = self.board.lock();
        if refuse {
            board.refusing.insert((from, to));
        } else {
            board.refusing.remove(&(from, to));
        }
    }

    /// Break open connections between two members; they may dial again.
    pub fn reset(&self, a: u64, b: u64) {
        self.break_connections(|x, y| (x, y) == (a, b) || (x, y) == (b, a));
    }

    fn break_connections(&self, which: impl Fn(u64, u64) -> bool) {
        self.board.lock().connections.retain(|(a, b, token)| {
            let hit = which(*a, *b);
            if hit {
                token.cancel();
            }
            !hit && !token.is_cancelled()
        });
    }
}

struct MemoryDialer {
    from: u64,
    network: Switchboard,
}

#[async_trait]
impl Dialer for MemoryDialer {
    async fn dial(&self, id: u64, member: &Member) -> io::Result<Box<dyn PeerStream>> {
        let (there, back) = {
            let mut board = self.network.board.lock();
            (
                board.way(self.from, id).subscribe(),
                board.way(id, self.from).subscribe(),
            )
        };
        // A connection needs both directions; like TCP, dialing waits.
        for way in [&there, &back] {
            open(&mut way.clone()).await?;
        }
        let (near, near_relay) = tokio::io::duplex(BUFFER);
        let (far, far_relay) = tokio::io::duplex(BUFFER);
        let token = CancellationToken::new();
        let group = {
            let mut board = self.network.board.lock();
            let place = board.places.get(&id);
            let refused = board.refusing.contains(&(self.from, id));
            let here = !refused && place.is_none_or(|url| *url == member.peer_url);
            let group = board.members.get(&id).filter(|_| here).cloned();
            let group = group.ok_or(io::ErrorKind::ConnectionRefused)?;
            board.connections.push((self.from, id, token.clone()));
            group
        };
        let (near_read, near_write) = tokio::io::split(near_relay);
        let (far_read, far_write) = tokio::io::split(far_relay);
        spawn_relay(near_read, far_write, there, token.clone());
        spawn_relay(far_read, near_write, back, token);
        tokio::spawn(async move { group.serve(Box::new(far)).await });
        Ok(Box::new(near))
    }

    async fn gone(&self, id: u64, _member: &Member) -> bool {
        let mut board = self.network.board.lock();
        let cut = [(self.from, id), (id, self.from)]
            .iter()
            .any(|(a, b)| board.way(*a, *b).borrow().cut);
        let listens = board.members.contains_key(&id) && !board.refusing.contains(&(self.from, id));
        !cut && !listens
    }
}

async fn open(way: &mut watch::Receiver<Way>) -> io::Result<Way> {
    let open = way
        .wait_for(|w| !w.cut)
        .await
        .map_err(|_| io::ErrorKind::ConnectionRefused)?;
    Ok(*open)
}

/// One direction: read, hold back as told, write. Ends with its connection.
fn spawn_relay(
    mut read: ReadHalf<DuplexStream>,
    mut write: WriteHalf<DuplexStream>,
    mut way: watch::Receiver<Way>,
    token: CancellationToken,
) {
    let (tx, mut rx) = mpsc::channel::<(Instant, Vec<u8>)>(64);
    let arrivals = way.clone();
    let reading = token.clone();
    tokio::spawn(async move {
        let pump = async {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let n = read.read(&mut buffer).await.unwrap_or(0);
                let due = Instant::now() + arrivals.borrow().delay;
                if n == 0 || tx.send((due, buffer[..n].to_vec())).await.is_err() {
                    break;
                }
            }
        };
        reading.run_until_cancelled(pump).await;
    });
    tokio::spawn(async move {
        let pump = async {
            while let Some((due, bytes)) = rx.recv().await {
                tokio::time::sleep_until(due).await;
                if open(&mut way).await.is_err() || write.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        };
        token.run_until_cancelled(pump).await;
        // Whichever direction ends, ends the connection.
        token.cancel();
    });
}
