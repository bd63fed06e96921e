//! Tests of the house as a whole: fences, the API contract. Real processes are in `tests/process`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall panic")]

mod api;
mod api_bad_input;
mod api_distribute;
mod api_images;
mod api_instances;
mod api_members;
mod api_templates;
mod cluster;
mod fences;
mod homes;
mod membership;
mod openapi;
mod tunnels;
