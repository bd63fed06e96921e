//! What a member does again and again while it runs. Knows not what.

use super::Inner;
use futures::future::BoxFuture;
use std::sync::Arc;

/// `round` after `round` until the member ends; each says by itself how long it takes.
pub(super) fn repeat(
    inner: &Arc<Inner>,
    mut round: impl for<'a> FnMut(&'a Inner) -> BoxFuture<'a, ()> + Send + 'static,
) {
    let inner = inner.clone();
    tokio::spawn(async move {
        let cancel = inner.cancel.clone();
        let rounds = async {
            loop {
                round(&inner).await;
            }
        };
        cancel.run_until_cancelled(rounds).await;
    });
}
