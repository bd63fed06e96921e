//! The command line's parts. Each talks to a cluster over its public ports only; none opens a data directory of a running member.

pub mod bench;
pub mod client;
pub mod instance;
pub mod load;
pub mod table;
