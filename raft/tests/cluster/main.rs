//! Members of one group in one process, over the memory network: elections, forwarding, faults,
//! snapshots, membership. Every wait is for a state, with a bound.

// The lint knows test functions, not the helpers that they call.
#![allow(clippy::unwrap_used)]

mod chaos;
mod divergence;
mod faults;
mod fitness;
mod membership;
mod reads_and_writes;
mod retries;
mod reverted;
mod snapshots;
mod support;
mod thin;
