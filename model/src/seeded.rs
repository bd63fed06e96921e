//! Bugs on purpose, which tests must find: one over real processes, the others in the simulation. Not in
//! any release.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

static FORGET: AtomicBool = AtomicBool::new(false);

/// From now on no command is known again: a retry is applied like a new command.
pub fn forget_commands() {
    FORGET.store(true, Ordering::SeqCst);
}

pub(crate) fn forgets() -> bool {
    FORGET.load(Ordering::SeqCst)
}

/// What the simulation must find, each for the thread that asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A binding is not compared with the room that its node has by now.
    Overfull,
    /// What a node says of an older generation counts.
    StaleReport,
    /// Of an instance that ends while its node is lost nothing is remembered.
    NothingLeft,
    /// A terminate does not wait for the node.
    HastyEnd,
    /// A new leader holds against nodes what it did not hear before it led.
    NoGrace,
}

thread_local! {
    static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// From now on, on this thread.
pub fn plant(bug: Option<Bug>) {
    BUG.set(bug);
}

pub(crate) fn has(bug: Bug) -> bool {
    BUG.get() == Some(bug)
}
