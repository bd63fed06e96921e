//! Handlers of the peer port: thin; what they decide is in `founding` and `admission`.

use super::auth::{self, refuse};
use super::wire::{FoundingCall, FoundingReply, Hello, HelloReply, JoinReply, LOOK_PATH};
use super::{PeerPort, admission, dial, release};
use crate::founding::LedgerError;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::downcast;
use mainstay_raft::{Group, GroupError, PeerStream, Role};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Handle;

/// Largest JSON body: a member list is a few hundred bytes.
const BODY_MAX: usize = 256 << 10;
/// Longest wait for the newest membership before a join is judged.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(3);

/// The peer port's routes. `others` are those of the chunk transfer and the nodes' heartbeats, empty
/// while founding.
pub fn router(port: &Arc<PeerPort>, others: Router) -> Router {
    let members: Router = Router::new()
        .route("/peer/v1/join", post(join))
        .route(release::PATH, get(release::own))
        .route(LOOK_PATH, post(look))
        .route(dial::RAFT_PATH, get(raft))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(Arc::clone(port))
        .merge(others)
        .layer(middleware::from_fn_with_state(
            Arc::clone(port),
            auth::same_cluster,
        ));
    Router::new()
        .route("/peer/v1/hello", post(hello))
        .route("/peer/v1/founding", post(founding))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(Arc::clone(port))
        .merge(members)
        .layer(middleware::from_fn_with_state(
            Arc::clone(port),
            auth::token,
        ))
}

/// Why the caller cannot be one of us, and whether that is for good.
fn judge(port: &PeerPort, hello: &Hello) -> (Option<String>, bool) {
    let retired = port.retired(hello.member_id);
    let members = port
        .group
        .get()
        .map(|group| group.status().members)
        .unwrap_or_default();
    let (cluster_id, charter) = (port.ledger.cluster_id(), port.ledger.charter());
    let known = admission::Known {
        name: &port.config.name,
        id: port.ledger.member_id(),
        list: &port.config.list,
        cluster_id: cluster_id.as_deref(),
        charter: charter.as_ref(),
        members: &members,
        joining: port.joins(),
        retired,
    };
    (
        admission::refusal(&known, hello),
        admission::removed_for_good(&known, hello),
    )
}

async fn hello(State(port): State<Arc<PeerPort>>, Json(hello): Json<Hello>) -> Json<HelloReply> {
    let (refusal, removed) = judge(&port, &hello);
    if refusal.is_none() {
        if hello.cluster_id.is_some() && hello.cluster_id == port.ledger.cluster_id() {
            port.book.note(hello.member_id, &hello.member.peer_url);
        }
        port.learnt.notify_one();
    }
    Json(HelloReply {
        name: port.config.name.clone(),
        member_id: port.ledger.member_id(),
        cluster_id: port.ledger.cluster_id(),
        charter: port.ledger.charter(),
        refusal,
        joining: port.joins(),
        removed,
    })
}

async fn look(State(port): State<Arc<PeerPort>>, headers: HeaderMap) -> Response {
    if auth::id(&headers, auth::TO_HEADER) != Some(port.ledger.member_id()) {
        return refuse(StatusCode::CONFLICT, not_meant(&port));
    }
    port.look.notify_one();
    StatusCode::NO_CONTENT.into_response()
}

fn not_meant(port: &PeerPort) -> String {
    let name = &port.config.name;
    format!(
        "member {name} is not the member that was meant: its data directory was wiped or replaced (`mainstay member replace {name}`), or its address in the list is another's"
    )
}

async fn founding(State(port): State<Arc<PeerPort>>, Json(call): Json<FoundingCall>) -> Response {
    if call.list != port.config.list {
        // The greeting, which comes first, has told the operator.
        return refuse(StatusCode::CONFLICT, "the initial lists differ");
    }
    let shared = Arc::clone(&port);
    let handled = tokio::task::spawn_blocking(move || shared.ledger.handle(call.request)).await;
    let failed: String = match handled {
        Ok(Ok(reply)) => {
            port.learnt.notify_one();
            return Json(FoundingReply {
                voter: port.founder(),
                reply,
            })
            .into_response();
        }
        Ok(Err(e)) => LedgerError::to_string(&e),
        Err(e) => e.to_string(),
    };
    tracing::error!("{failed}");
    refuse(StatusCode::INTERNAL_SERVER_ERROR, failed)
}

async fn join(State(port): State<Arc<PeerPort>>, Json(hello): Json<Hello>) -> Response {
    let Some(group) = port.group.get() else {
        return refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "the cluster is still being founded",
        );
    };
    // Judged on the newest membership, not on what this member happens to know.
    if let Err(e) = group.read_barrier(BARRIER_TIMEOUT).await {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, e.to_string());
    }
    if let (Some(sentence), _) = judge(&port, &hello) {
        return refuse(StatusCode::CONFLICT, sentence);
    }
    match admit(group, &hello).await {
        Ok(reply) => Json(reply).into_response(),
        Err(GroupError::Refused(text)) => refuse(StatusCode::CONFLICT, text),
        Err(e) => refuse(StatusCode::SERVICE_UNAVAILABLE, e.to_string()),
    }
}

/// One step towards the part it wants, with these addresses; the caller asks again until it has it.
async fn admit(group: &Group, hello: &Hello) -> Result<JoinReply, GroupError> {
    let (id, member) = (hello.member_id, &hello.member);
    let role = match group.status().members.remove(&id) {
        None => {
            tracing::info!(member = %member.name, id = %format_args!("{id:016x}"), "asks to join");
            group.add_learner(id, member.clone()).await?;
            Role::Learner
        }
        Some(known) => {
            // Not by adding: it may have been removed since we looked.
            if &known.member != member {
                group.update(id, member.clone()).await?;
            }
            known.role
        }
    };
    if role == Role::Voter {
        return Ok(JoinReply::Voter);
    }
    if hello.learner {
        return Ok(JoinReply::Learner);
    }
    match group.promote(id).await {
        Ok(()) => {
            tracing::info!(member = %member.name, "is a voter now");
            Ok(JoinReply::Voter)
        }
        // Not caught up yet, or another change is under way.
        Err(GroupError::Refused(why)) => {
            tracing::info!(member = %member.name, %why, "stays a learner for now");
            Ok(JoinReply::Learner)
        }
        Err(e) => Err(e),
    }
}

async fn raft(State(port): State<Arc<PeerPort>>, mut request: Request) -> Response {
    let ours = port.ledger.member_id();
    let headers = request.headers();
    if headers
        .get(header::UPGRADE)
        .is_none_or(|value| value != dial::UPGRADE)
    {
        return refuse(
            StatusCode::UPGRADE_REQUIRED,
            "this path takes the Raft stream only",
        );
    }
    if auth::id(headers, auth::TO_HEADER) != Some(ours) {
        return refuse(StatusCode::CONFLICT, not_meant(&port));
    }
    let Some(group) = port.group.get().cloned() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the member is starting");
    };
    let from = auth::id(headers, auth::FROM_HEADER).unwrap_or(0);
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                tracing::debug!(from = %format_args!("{from:016x}"), "Raft stream opened");
                match stream(upgraded, group.runtime()) {
                    Ok(stream) => group.serve(stream).await,
                    Err(e) => tracing::debug!(error = %e, "Raft stream was lost"),
                }
            }
            Err(e) => tracing::debug!(error = %e, "Raft stream was not opened"),
        }
    });
    let upgrade = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(dial::UPGRADE)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, upgrade).into_response()
}

/// The bare socket, registered where it is served, behind whatever was read ahead of the upgrade.
fn stream(upgraded: Upgraded, runtime: &Handle) -> std::io::Result<Box<dyn PeerStream>> {
    Ok(match downcast::<TokioIo<TcpStream>>(upgraded) {
        Ok(parts) if parts.read_buf.is_empty() => {
            let socket = parts.io.into_inner().into_std()?;
            let _there = runtime.enter();
            Box::new(TcpStream::from_std(socket)?)
        }
        Ok(parts) => {
            let (read, write) = parts.io.into_inner().into_split();
            let ahead = std::io::Cursor::new(parts.read_buf);
            Box::new(tokio::io::join(
                tokio::io::AsyncReadExt::chain(ahead, read),
                write,
            ))
        }
        Err(upgraded) => Box::new(TokioIo::new(upgraded)),
    })
}
