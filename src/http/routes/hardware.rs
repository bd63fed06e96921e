//! Calls of the dialect about what guests here do not have (USB devices, VLANs, MAC addresses out of a pool)
//! and about agents that are updated with their machines. Each is answered as by a cloud that has none, or
//! refused with the reason; none pretends.

use crate::http::envelope::{self, Call};
use crate::http::error::ApiError;
use crate::http::openapi::{Answer, Done};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::{IntoParams, ToSchema};

/// How many USB devices of a name there are.
#[derive(Serialize, ToSchema)]
pub(super) struct Devices {
    available: u64,
    busy: u64,
}

/// By device group: none can be given to a guest.
#[utoipa::path(get, path = "/api/v1/usb", tag = "hardware", operation_id = "get_usb",
    summary = "USB devices that guests can be given: none",
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<BTreeMap<String, Devices>>)))]
pub(super) async fn usb() -> Response {
    envelope::ok(&BTreeMap::<&str, Devices>::new())
}

/// Guests have a network of their own each.
#[utoipa::path(get, path = "/api/v1/vlan", tag = "hardware", operation_id = "get_vlan",
    summary = "VLANs: none",
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<Vec<String>>)))]
pub(super) async fn vlan() -> Response {
    envelope::ok::<[&str; 0]>(&[])
}

/// What is asked about the pool.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "only described")]
pub(super) struct Pool {
    /// 1: how many there are
    count: Option<u64>,
    /// 1: how many are in use
    in_use: Option<u64>,
    /// A page of at most so many
    limit: Option<u64>,
    /// After this one
    last: Option<String>,
}

/// The pool, counted or by the page.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum MacAddresses {
    /// With `count` or `in_use`.
    Counted {
        /// In the pool.
        count: u64,
        /// Of these in use.
        in_use: u64,
    },
    /// Otherwise.
    Page(Vec<String>),
}

const NO_POOL: &str = "MAC addresses are not managed: each guest has a network of its own";

/// No pool is kept: it is empty.
#[utoipa::path(get, path = "/api/v1/macaddr", tag = "hardware", operation_id = "get_macaddr",
    summary = "Managed MAC addresses: none",
    params(Pool),
    responses((status = 200, description = "OK, or FAIL and why", body = Answer<MacAddresses>)))]
pub(super) async fn mac_addresses(call: Call) -> Result<Response, ApiError> {
    let counted = call.flag_or_number("count")? || call.flag_or_number("in_use")?;
    call.int("limit", 0..=u64::MAX)?;
    Ok(envelope::ok(&if counted {
        MacAddresses::Counted {
            count: 0,
            in_use: 0,
        }
    } else {
        MacAddresses::Page(Vec::new())
    }))
}

#[utoipa::path(put, path = "/api/v1/macaddr", tag = "hardware", operation_id = "put_macaddr",
    summary = "Repopulate the MAC pool: refused, there is none",
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn fill() -> Result<Response, ApiError> {
    Err(ApiError::fail(NO_POOL))
}

#[utoipa::path(delete, path = "/api/v1/macaddr", tag = "hardware", operation_id = "delete_macaddr",
    summary = "Purge the MAC pool: refused, there is none",
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn purge() -> Result<Response, ApiError> {
    Err(ApiError::fail(NO_POOL))
}

/// An agent is updated by whoever updates its machine.
#[utoipa::path(put, path = "/api/v1/node/update", tag = "nodes", operation_id = "put_node_update",
    summary = "Reinstall agents from here: refused",
    responses((status = 200, description = "OK, or FAIL and why", body = Done)))]
pub(super) async fn update_agents() -> Result<Response, ApiError> {
    Err(ApiError::fail(
        "agents are not updated from here: put the new release on each node and restart its agent; its VMs run on",
    ))
}
