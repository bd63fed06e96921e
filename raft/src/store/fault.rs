//! The one place where a member's end is recorded: the first fault wins and is never taken back.

use std::error::Error;
use tokio::sync::watch;

/// Set once; everything that must not go on after a fault watches it.
#[derive(Clone, Debug)]
pub(crate) struct FaultCell(watch::Sender<Option<String>>);

impl FaultCell {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Record why this member stops. Later calls change nothing: the first cause is the one to fix.
    pub(crate) fn raise(&self, why: impl Into<String>) {
        let why = why.into();
        self.0.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                tracing::error!(fault = %why, "member stops");
                *slot = Some(why);
            }
            first
        });
    }

    /// Nothing is wrong: the member was told to stop.
    pub(crate) fn close(&self, why: &str) {
        self.0.send_if_modified(|slot| {
            let first = slot.is_none();
            slot.get_or_insert_with(|| why.to_owned());
            first
        });
    }

    pub(crate) fn get(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<String>> {
        self.0.subscribe()
    }
}

/// An error with its causes on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
