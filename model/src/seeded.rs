//! A bug on purpose, which the tests over real processes must find. Not in any release.

use std::sync::atomic::{AtomicBool, Ordering};

static FORGET: AtomicBool = AtomicBool::new(false);

/// From now on no command is known again: a retry is applied like a new command.
pub fn forget_commands() {
    FORGET.store(true, Ordering::SeqCst);
}

pub(crate) fn forgets() -> bool {
    FORGET.load(Ordering::SeqCst)
}
