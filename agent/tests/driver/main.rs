//! One suite for every driver: `conformance` says what a driver is, `fake` and `qemu` run it and add
//! what is theirs alone. The QEMU tests boot real VMs from the tiny guest.
#![allow(clippy::unwrap_used, clippy::cognitive_complexity)]

mod conformance;
mod fake;
mod guest;
mod qemu;
mod suspended;
