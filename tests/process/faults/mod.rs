//! Disks that are full, fail, are slow or lie, under real members. What is injected is real: a small file
//! system that is filled, a preloaded library that lets chosen calls fail (`tests/faults/shim.c`),
//! flipped bits in the files of a stopped member, SIGSTOP.
//!
//! A run that did not meet its fault proves nothing and fails.

mod commands;
mod flips;
mod full;
mod overload;
mod shim;
mod slow;
mod sweep;
