//! The handlers, by object. Each reads the call, asks the app, converts the answer.

mod cluster;
mod group;
mod health;
mod instance;
mod metrics;
mod node;
mod snapshot;
mod template;

use super::ApiState;
use axum::Router;
use axum::routing::{delete, get, post, put};

/// Every route of the dialect that is served.
pub(super) fn all() -> Router<ApiState> {
    let vm = get(instance::get)
        .post(instance::start)
        .put(instance::update)
        .delete(instance::terminate);
    let groups = get(group::get)
        .post(group::create)
        .put(group::update)
        .delete(group::remove);
    Router::new()
        .route("/livez", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .route("/config/v1/auth", get(health::login_methods))
        .route("/api/v1/status", get(health::status))
        .route("/api/v1/stats", get(health::stats))
        .route("/api/v1/vm", vm)
        .route("/api/v1/node", get(node::get).delete(node::remove))
        .route("/api/v1/node/config", post(node::configure))
        .route("/api/v1/node/group", post(group::join).delete(group::leave))
        .route("/api/v1/group", groups)
        .route("/api/v1/image", get(instance::saved_images))
        .route(
            "/api/v1/registry/vm",
            get(template::get).delete(template::remove),
        )
        .route(
            "/api/v1/registry/tag",
            put(template::describe).delete(template::remove_tag),
        )
        .route("/api/v1/registry/revert", delete(template::revert))
        .route("/api/v1/registry/disk", get(template::disk))
        .route("/api/v1/members", get(cluster::members))
        .route("/api/v1/cluster/status", get(cluster::status))
        .route("/api/v1/snapshot", get(snapshot::save))
        .merge(super::members::routes())
}
