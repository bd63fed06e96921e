//! What other members ask of this one: consensus messages to the core, forwarded requests to the
//! group. Knows no socket.

use super::Inner;
use super::succession::Opened;
use crate::codec::{self, VoteV1};
use crate::store::snapshot::{Snapshot, SnapshotData};
use crate::transport::server::{Greeted, Served, Service};
use crate::transport::snapshot::{Partial, begin, conclude, receive};
use crate::transport::wire::{self, Admin, Hello, SnapshotBegin, kind};
use crate::types::{SnapshotMeta, Vote};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use mainstay_storage::snapshot::SnapshotReader;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// The serving side of a member.
pub(super) struct Requests(pub(super) Arc<Inner>);

impl Service for Requests {
    type Open = Opened;

    fn opened(&self, from: u64) -> Opened {
        self.0.streams.opened(from)
    }

    fn admit(&self, hello: &Hello) -> Result<(), String> {
        let config = &self.0.config;
        if let Some(why) = self.0.fault.get() {
            return Err(format!("member {} has stopped: {why}", config.id));
        }
        if hello.cluster_id != config.cluster_id {
            return Err(format!(
                "this member belongs to cluster {}, the peer to cluster {}",
                config.cluster_id, hello.cluster_id
            ));
        }
        if hello.to != config.id {
            return Err(format!(
                "this is member {}, the peer wants {}",
                config.id, hello.to
            ));
        }
        if hello.from == config.id {
            return Err(format!("the peer also claims to be member {}", config.id));
        }
        Ok(())
    }

    fn request(self: Arc<Self>, kind: u8, payload: Bytes) -> BoxFuture<'static, Served> {
        let inner = self.0.clone();
        match kind {
            kind::APPEND => append(inner, payload).boxed(),
            kind::VOTE | kind::PRE_VOTE => vote(inner, kind, payload).boxed(),
            kind::TRANSFER => transfer(inner, payload).boxed(),
            kind::PROPOSE => async move {
                inner
                    .propose_forwarded(payload)
                    .await
                    .map(|reply| wire::encode_proposed(&reply))
            }
            .boxed(),
            kind::READ_INDEX => {
                async move { Ok(codec::encode(&inner.read_index_forwarded().await).into()) }.boxed()
            }
            kind::FITNESS => {
                async move { Ok(codec::encode(&inner.fitness.verdict()).into()) }.boxed()
            }
            kind::ADMIN => async move {
                let request: Admin = codec::decode(&payload).map_err(text)?;
                Ok(codec::encode(&inner.admin_here(&request).await).into())
            }
            .boxed(),
            kind::CLAIM => async move { inner.claimed(&payload) }.boxed(),
            kind::DIGESTS => async move { Ok(inner.digests_for_peer()) }.boxed(),
            other => async move { Err(format!("unknown request {other}")) }.boxed(),
        }
    }

    fn snapshot(self: Arc<Self>, from: u64, stream: Greeted) -> BoxFuture<'static, io::Result<()>> {
        receive_snapshot(self.0.clone(), from, stream).boxed()
    }
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

async fn append(inner: Arc<Inner>, payload: Bytes) -> Served {
    let request = wire::decode_append(payload).map_err(text)?;
    let answer = inner.raft.append_entries(request).await.map_err(text)?;
    Ok(wire::encode_append_answer(&answer))
}

async fn vote(inner: Arc<Inner>, kind: u8, payload: Bytes) -> Served {
    let request = wire::decode_vote_request(&payload).map_err(text)?;
    let answer = if kind == kind::VOTE {
        inner.raft.vote(request).await.map_err(text)?
    } else {
        inner.raft.pre_vote(request).await.map_err(text)?
    };
    Ok(wire::encode_vote_answer(&answer))
}

async fn transfer(inner: Arc<Inner>, payload: Bytes) -> Served {
    let request = wire::decode_transfer(&payload).map_err(text)?;
    inner
        .raft
        .handle_transfer_leader(request)
        .await
        .map_err(text)?
        .map(|()| Bytes::new())
        .map_err(text)
}

async fn receive_snapshot(inner: Arc<Inner>, from: u64, mut stream: Greeted) -> io::Result<()> {
    // One at a time: the directory has room for one incoming file.
    let Ok(receiving) = inner.receiving.clone().try_lock_owned() else {
        let busy = async { Err("another snapshot is being received".to_string()) };
        return conclude(&mut stream, busy).await;
    };
    let begin = begin(&mut stream).await?;
    let name = safe_name(&begin.name)?;
    tracing::info!(
        peer = from,
        name,
        bytes = begin.bytes,
        "receiving a snapshot"
    );
    let file = Partial::new(inner.snapshots.incoming(name));
    receive(&mut stream, begin.bytes, file.path()).await?;
    // A task of its own: the sender's connection may break, the file must outlive the install.
    let install = tokio::spawn(async move {
        let outcome = install(&inner, begin, file).await;
        drop(receiving);
        outcome
    });
    conclude(&mut stream, async { install.await.map_err(text)? }).await
}

/// A name from outside becomes part of a path.
fn safe_name(name: &str) -> io::Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if !name.is_empty() && name.len() <= 64 && name.chars().all(plain) {
        return Ok(name);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "a snapshot with a strange name",
    ))
}

/// Verify the whole file before the core hears of it: a damaged one is the sender's problem and
/// must not stop this member.
async fn install(inner: &Inner, begin: SnapshotBegin, file: Partial) -> Served {
    let path: PathBuf = file.path().to_owned();
    let read = tokio::task::spawn_blocking(move || SnapshotReader::open(&path));
    let reader = read
        .await
        .map_err(text)?
        .map_err(|e| crate::store::fault::chain(&e))?;
    let mark = codec::Mark::decode(&reader.info().meta).map_err(text)?;
    let meta = SnapshotMeta {
        last_log_id: mark.applied,
        last_membership: mark.membership,
    };
    let path = file.path().to_owned();
    let data = SnapshotData {
        path,
        file: None,
        received: Some(reader),
        home: None,
    };
    let vote: Vote = begin.vote.into();
    let snapshot = Snapshot {
        meta,
        snapshot: data,
    };
    let answer = inner
        .raft
        .install_full_snapshot(vote, snapshot)
        .await
        .map_err(text)?;
    // Adopted files were renamed away; a file the core had no use for is removed with `file`.
    drop(file);
    Ok(codec::encode(&VoteV1::from(&answer.vote)).into())
}
