//! Chunks in and out: which are lacking, here are some, give me some. Bounded memory whatever the
//! length of a body.

use super::answer::{Answer, Refused, bad, fail, ok};
use super::swarm::{Asked, Share};
use super::{RegistryService, answer};
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::IntoResponse;
use futures::StreamExt;
use http::{HeaderValue, StatusCode};
use http_body_util::{BodyExt, Limited};
use mainstay_agent::transfer::api::{IDS_MAX, NODES, PutAnswer};
use mainstay_agent::transfer::{CHUNK_LEN, Id, Unframer, WireRecord, ZERO_CHUNK, hex_id, node_url};
use mainstay_storage::StorageError;
use mainstay_storage::chunks::{ChunkId, Codec, Record};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Stored bytes that are verified and written together.
const BATCH_BYTES: usize = 16 << 20;
/// Records of such a batch.
const BATCH_RECORDS: usize = 1024;
/// Chunks that are read and sent together, and their bytes: names of large files are larger than chunks.
const SEND_CHUNKS: usize = 64;
const SEND_BYTES: u64 = 4 << 20;
/// Nodes that a node may name as bad in one request.
const AVOID_MAX: usize = 64;
/// Who takes nothing of an answer for so long does not get the rest: what waits for it is in memory.
pub(super) const TAKE_MAX: Duration = Duration::from_secs(STALL_S);
/// A client that sends nothing for so long has gone.
const IDLE_MAX: Duration = Duration::from_secs(STALL_S);
/// A batch must arrive within this: a slow body holds its place no longer.
const BATCH_MAX: Duration = Duration::from_secs(STALL_S);
/// Tests of slow bodies shall not be slow.
const STALL_S: u64 = if cfg!(test) { 6 } else { 60 };

/// `POST missing`: one byte per name, 1 = lacking. What another member holds is fetched first, so that the
/// client need not send it; `?local=1`: only what this member has.
pub(super) async fn missing(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    let local = is_local(&request);
    let ids = read_ids(request).await?;
    let lacking = |id: &Id| *id != ZERO_CHUNK && !service.chunks.contains(&ChunkId(*id));
    if !local && ids.iter().any(lacking) {
        if service.chunks.shared() {
            // Another member may have stored it since this one looked.
            let looked = service.see_shared(Vec::new()).await;
            looked.map_err(|why| fail(StatusCode::SERVICE_UNAVAILABLE, why))?;
        } else {
            let wanted: Vec<Id> = ids.iter().filter(|id| lacking(id)).copied().collect();
            service.bring_what_others_have(&wanted).await;
        }
    }
    let flags: Vec<u8> = ids.iter().map(|id| u8::from(lacking(id))).collect();
    Ok(flags.into_response())
}

/// Does a member ask, for what is here and nowhere else?
fn is_local(request: &Request) -> bool {
    answer::Params::from_query(request.uri())
        .get("local")
        .is_some_and(|v| v != "0")
}

async fn read_ids(request: Request) -> Result<Vec<Id>, Refused> {
    let limit = IDS_MAX * 32;
    let body = Limited::new(request.into_body(), limit).collect();
    let bytes = match tokio::time::timeout(IDLE_MAX, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) => return Err(bad(format!("at most {IDS_MAX} chunk names at once: {e}"))),
        Err(_) => return Err(fail(StatusCode::REQUEST_TIMEOUT, "the body stalled")),
    };
    let (ids, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(bad("chunk names are 32 bytes each"));
    }
    Ok(ids.to_vec())
}

/// `PUT chunks`: verify and store; answered once everything is durable. `?local=1`: a member sends them ahead.
pub(super) async fn receive(
    State(service): State<Arc<RegistryService>>,
    request: Request,
) -> Answer {
    let params = answer::Params::from_query(request.uri());
    let push = params.get("push").unwrap_or_default();
    let from_member = is_local(&request);
    let received = service.receive_all(request.into_body(), push, from_member);
    received.await.map(ok)
}

impl RegistryService {
    async fn receive_all(
        &self,
        body: Body,
        push: &str,
        from_member: bool,
    ) -> Result<PutAnswer, Refused> {
        (self.room)().map_err(full)?;
        let turn = self.readers.acquire().await.map_err(|_| stopping())?;
        let mut stream = body.into_data_stream();
        let mut unframer = Unframer::default();
        let mut batch = Vec::new();
        let (mut bytes, mut moved) = (0, 0);
        let mut total = PutAnswer::default();
        let mut due = Instant::now() + BATCH_MAX;
        loop {
            let piece = match tokio::time::timeout_at(due, stream.next()).await {
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(e))) => return Err(bad(format!("the body was cut off: {e}"))),
                Ok(None) => break,
                Err(_) => return Err(fail(StatusCode::REQUEST_TIMEOUT, "the body is too slow")),
            };
            unframer.push(&piece);
            while let Some(record) = unframer.next_record().map_err(|e| bad(e.to_string()))? {
                bytes += record.framed_len();
                moved += record.framed_len() as u64;
                batch.push(to_stored(record).map_err(bad)?);
                if bytes >= BATCH_BYTES || batch.len() >= BATCH_RECORDS {
                    let full = std::mem::take(&mut batch);
                    self.store(full, &mut total, from_member).await?;
                    self.reserved.came(push, bytes as u64);
                    bytes = 0;
                    due = Instant::now() + BATCH_MAX;
                }
            }
        }
        unframer.finish().map_err(|e| bad(e.to_string()))?;
        self.store(batch, &mut total, from_member).await?;
        self.reserved.came(push, bytes as u64);
        drop(turn);
        if from_member {
            // It is a part of a copy: what another one may send on is bounded by what it waits for.
            tokio::time::sleep(self.pace.spend(moved)).await;
        }
        Ok(total)
    }

    async fn store(
        &self,
        batch: Vec<Record>,
        total: &mut PutAnswer,
        from_member: bool,
    ) -> Result<(), Refused> {
        // Each time: a body has no end that would be known, and others write as well.
        let bytes = batch.iter().map(|r| r.data.len() as u64).sum();
        let _room = self.room_for(bytes).await.map_err(full)?;
        let _turn = self.writers.acquire().await.map_err(|_| stopping())?;
        let new = match from_member {
            true => Vec::new(),
            false => self.new_here(&batch),
        };
        let chunks = self.chunks.clone();
        let put = tokio::task::spawn_blocking(move || chunks.put(batch)).await;
        match put {
            Ok(Ok(report)) => {
                self.send_ahead(new);
                total.stored += report.stored;
                total.known += report.known;
                Ok(())
            }
            Ok(Err(error @ StorageError::BadDigest(_))) => Err(bad(error.to_string())),
            Ok(Err(error)) => {
                tracing::error!(error = %answer::chain(&error), "could not store chunks");
                Err(answer::storage(&error))
            }
            Err(_) => Err(stopping()),
        }
    }
}

impl RegistryService {
    /// Those that are not held yet.
    pub(super) fn new_here(&self, records: &[Record]) -> Vec<Record> {
        let new = records.iter().filter(|r| !self.chunks.contains(&r.id));
        new.cloned().collect()
    }

    /// These are durable here now: let others have them as well.
    pub(super) fn send_ahead(&self, new: Vec<Record>) {
        if let Some(ahead) = &self.ahead
            && !new.is_empty()
        {
            ahead.send(new, &self.catalog.watch().borrow());
        }
    }
}

fn full(why: String) -> Refused {
    fail(StatusCode::INSUFFICIENT_STORAGE, why)
}

fn stopping() -> Refused {
    fail(StatusCode::SERVICE_UNAVAILABLE, "this member is stopping")
}

/// `POST chunks/get`: the records that this member has or can get from another; `?local=1`: has. A node that pulls
/// an image (`?manifest=`) may be sent to other nodes for some of them.
pub(super) async fn send(State(service): State<Arc<RegistryService>>, request: Request) -> Answer {
    let local = is_local(&request);
    let params = answer::Params::from_query(request.uri());
    let mut ids = read_ids(request).await?;
    if !local {
        service.pulls.notice(&ids);
    }
    let mut nodes = Vec::new();
    let mut turn = None;
    if let Some(manifest) = params.get("manifest") {
        let manifest = hex_id(manifest).map_err(|e| bad(e.to_string()))?;
        let share = service.share(&manifest, &ids, &params);
        (ids, nodes) = (share.given, share.nodes);
        if !ids.is_empty() {
            let served = Arc::clone(&service.nodes_served);
            turn = Some(served.acquire_owned().await.map_err(|_| stopping())?);
        }
    }
    let (sender, receiver) = mpsc::channel::<std::io::Result<Bytes>>(2);
    tokio::spawn(async move {
        let _turn = turn;
        let mut rest = ids.as_slice();
        while !rest.is_empty() {
            let (wanted, after) = rest.split_at(service.piece_len(rest));
            rest = after;
            let piece = service.gather(wanted, local).await.map_err(|why| {
                tracing::error!(why, "could not read chunks");
                std::io::Error::other(why)
            });
            let bytes = piece.as_ref().map_or(0, Bytes::len);
            let failed = piece.is_err();
            // An error cuts the answer off; a client that has gone wants no more, and one that takes nothing
            // for so long has gone as well.
            let sent = tokio::time::timeout(TAKE_MAX, sender.send(piece)).await;
            if !matches!(sent, Ok(Ok(()))) || failed {
                return;
            }
            if !local {
                service.swarm.sent(wanted.len(), bytes);
            }
        }
    });
    let stream = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    let mut response = Body::from_stream(stream.fuse()).into_response();
    if let Ok(named) = HeaderValue::try_from(nodes.join(","))
        && !nodes.is_empty()
    {
        response.headers_mut().insert(NODES, named);
    }
    Ok(response)
}

impl RegistryService {
    /// What a node that pulls gets here, and where it gets the rest.
    fn share(&self, manifest: &Id, ids: &[Id], params: &answer::Params) -> Share {
        let avoid = params.get("avoid").unwrap_or_default().split(',');
        let avoid: Vec<&str> = avoid.filter_map(node_url).take(AVOID_MAX).collect();
        let asked = Asked {
            node: params.get("node").and_then(node_url).unwrap_or_default(),
            avoid: &avoid,
            insist: params.get("insist").is_some_and(|v| v != "0"),
        };
        let now = std::time::Instant::now();
        self.swarm.ask(manifest, ids, asked, now)
    }
}

impl RegistryService {
    /// How many of the first of these are read and sent together.
    fn piece_len(&self, ids: &[Id]) -> usize {
        let mut bytes = 0;
        let fits = |id: &&Id| {
            let known = self.chunks.lens(&ChunkId(**id));
            bytes += known.map_or(CHUNK_LEN, |(stored, _)| u64::from(stored));
            bytes <= SEND_BYTES
        };
        let first = &ids[..ids.len().min(SEND_CHUNKS)];
        first.iter().take_while(fits).count().max(1)
    }

    /// These chunks, framed; those that cannot be had are left out.
    async fn gather(&self, ids: &[Id], local: bool) -> Result<Bytes, String> {
        let ids: Vec<Id> = ids.iter().copied().filter(|id| *id != ZERO_CHUNK).collect();
        let mut records = self.read_good(ids.clone()).await?;
        if records.len() < ids.len() && !local {
            let mut rest = ids;
            rest.retain(|id| !records.iter().any(|r| r.id == *id));
            let turn = self
                .read_through
                .acquire()
                .await
                .map_err(|e| e.to_string())?;
            self.fetch(&rest, &self.sources(&[], 0)).await;
            drop(turn);
            records.extend(self.read_good(rest).await?);
        }
        Ok(WireRecord::frame_all(&records))
    }

    /// Those that are held; a damaged one is not held any more.
    async fn read_good(&self, ids: Vec<Id>) -> Result<Vec<WireRecord>, String> {
        let chunks = self.chunks.clone();
        let read = move || {
            let ids: Vec<ChunkId> = ids.into_iter().map(ChunkId).collect();
            chunks.records(&ids).map_err(|e| answer::chain(&e))
        };
        let found = tokio::task::spawn_blocking(read)
            .await
            .map_err(|e| e.to_string())??;
        if !found.damaged.is_empty() {
            self.damage.notify_one();
        }
        Ok(found.records.into_iter().map(to_wire).collect())
    }
}

pub(super) fn to_wire(record: Record) -> WireRecord {
    WireRecord {
        id: record.id.0,
        codec: record.codec as u8,
        raw_len: record.raw_len,
        data: record.data,
    }
}

/// From the wire's form to the store's, not yet verified.
pub(super) fn to_stored(record: WireRecord) -> Result<Record, String> {
    let codec = Codec::from_byte(record.codec).ok_or("a record of unknown form")?;
    Ok(Record {
        id: ChunkId(record.id),
        codec,
        raw_len: record.raw_len,
        data: record.data,
    })
}
