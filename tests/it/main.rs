//! Tests of the house as a whole: fences, the API contract. Real processes are in `tests/process`.

mod api;
mod api_members;
mod cluster;
mod fences;
