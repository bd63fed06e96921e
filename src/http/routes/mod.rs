//! The handlers, by object. Each reads the call, asks the app, converts the answer.

mod cluster;
mod distribute;
mod group;
mod hardware;
mod health;
mod instance;
mod metrics;
mod node;
mod snapshot;
mod template;

use super::ApiState;
use super::openapi;
use axum::Router;
use axum::routing::get;
use http::header::CONTENT_TYPE;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Every route of the dialect that is served, and the document that describes them.
pub(super) fn all() -> Router<ApiState> {
    let (routes, document) = described().split_for_parts();
    let text = openapi::encode(openapi::finish(document));
    let answer = move || {
        let text = text.clone();
        async move { text.map(|text| ([(CONTENT_TYPE, "application/json")], text)) }
    };
    routes.route(openapi::PATH, get(answer))
}

fn described() -> OpenApiRouter<ApiState> {
    work().merge(machines()).merge(cluster_and_templates())
}

fn work() -> OpenApiRouter<ApiState> {
    OpenApiRouter::new()
        .routes(routes!(
            instance::get,
            instance::start,
            instance::update,
            instance::terminate
        ))
        .routes(routes!(instance::restart))
        .routes(routes!(instance::saved_images))
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
        .routes(routes!(metrics::metrics))
        .routes(routes!(health::login_methods))
        .routes(routes!(health::status))
        .routes(routes!(health::stats))
}

fn machines() -> OpenApiRouter<ApiState> {
    OpenApiRouter::new()
        .routes(routes!(node::get, node::remove))
        .routes(routes!(node::configure))
        .routes(routes!(group::join, group::leave))
        .routes(routes!(
            group::get,
            group::create,
            group::update,
            group::remove
        ))
        .routes(routes!(hardware::usb))
        .routes(routes!(hardware::vlan))
        .routes(routes!(
            hardware::mac_addresses,
            hardware::fill,
            hardware::purge
        ))
        .routes(routes!(hardware::update_agents))
}

fn cluster_and_templates() -> OpenApiRouter<ApiState> {
    OpenApiRouter::new()
        .routes(routes!(template::get, template::remove))
        .routes(routes!(template::describe, template::remove_tag))
        .routes(routes!(template::revert))
        .routes(routes!(template::disk))
        .routes(routes!(
            distribute::get,
            distribute::request,
            distribute::cancel
        ))
        .routes(routes!(distribute::evict))
        .routes(routes!(cluster::members))
        .routes(routes!(cluster::status))
        .routes(routes!(snapshot::save))
        .merge(super::members::routes())
}
