//! The handlers, by object. Each reads the call, asks the app, converts the answer.
//!
//! The table below is all that is served. It is read twice: at start, for the routes, and when somebody first
//! asks for it, for the document that describes them. A member that nobody asks never makes the document.

mod access;
mod cluster;
mod distribute;
mod group;
mod hardware;
mod health;
mod image;
mod instance;
mod metrics;
mod node;
mod snapshot;
mod template;

use super::ApiState;
use super::error::ApiError;
use super::members;
use super::openapi;
use axum::Router;
use axum::body::Bytes;
use axum::handler::Handler;
use axum::routing::{MethodRouter, get};
use http::header::CONTENT_TYPE;
use std::sync::OnceLock;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::{PathItemExt as _, paste, routes};

/// Makes of one table of handlers, by module, `served` (what axum routes) and `described` (what
/// `/openapi.json` says of it). Path and methods stand at the handler, in its `#[utoipa::path]`.
macro_rules! table {
    ($($module:ident: $($handler:ident),+;)+) => {
        fn served() -> Router<ApiState> {
            let all = Router::new();
            paste! { $($(let all = route::<$module::[<__path_ $handler>], _, _>(all, $module::$handler);)+)+ }
            all
        }

        fn described() -> OpenApi {
            let all = OpenApiRouter::<ApiState>::new();
            $($(let all = all.routes(routes!($module::$handler));)+)+
            all.into_openapi()
        }
    };
}

table! {
    instance: get, start, update, terminate, restart;
    access: exec, console, vnc, tcp, logs;
    image: get, save;
    health: alive, ready, login_methods, status, stats;
    metrics: metrics;
    node: get, remove, configure;
    group: join, leave, get, create, update, remove;
    hardware: usb, vlan, mac_addresses, fill, purge, update_agents;
    template: get, remove, describe, remove_tag, revert, disk;
    distribute: get, request, cancel, evict;
    cluster: members, status;
    snapshot: save;
    members: add, promote, update, replace, remove, transfer;
}

/// Every route of the dialect that is served, and the document that describes them.
pub(super) fn all() -> Router<ApiState> {
    let answer = || async { document().map(|text| ([(CONTENT_TYPE, "application/json")], text)) };
    served().route(openapi::PATH, get(answer))
}

/// The handler at the path and for the methods of its description.
fn route<P, H, T>(all: Router<ApiState>, handler: H) -> Router<ApiState>
where
    P: utoipa::Path,
    H: Handler<T, ApiState>,
    T: 'static,
{
    let methods = P::methods().into_iter();
    let each = methods.fold(MethodRouter::new(), |router, method| {
        router.on(method.to_method_filter(), handler.clone())
    });
    all.route(&P::path(), each)
}

/// The document as it is sent: made when it is first asked for, and kept.
fn document() -> Result<Bytes, ApiError> {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    if let Some(made) = DOCUMENT.get() {
        return Ok(made.clone());
    }
    let made = openapi::encode(openapi::finish(described()))?;
    Ok(DOCUMENT.get_or_init(|| made).clone())
}
