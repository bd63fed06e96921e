//! Members of one group in one process, over the memory network: elections, forwarding, faults,
//! snapshots, membership. Every wait is for a state, with a bound.

mod chaos;
mod faults;
mod membership;
mod reads_and_writes;
mod snapshots;
mod support;
