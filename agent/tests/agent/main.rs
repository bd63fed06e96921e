//! A whole agent on the fake driver against stub controllers over loopback.

// Helpers outside of #[test] functions may fail loudly too.
#![allow(clippy::unwrap_used)]

mod ahead;
mod life;
mod links;
mod saves;
mod stub;
