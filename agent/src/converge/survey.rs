//! Asks the driver, again and again, what is really there: a VM that dies by itself is found here.

use super::executor::Inner;
use std::sync::Arc;

/// Never returns.
pub(super) async fn run(inner: Arc<Inner>) {
    loop {
        let asked = inner.board.lock().tick();
        match inner.driver.list().await {
            Ok(list) => {
                let (news, evict) = {
                    let mut board = inner.board.lock();
                    (board.surveyed(asked, list), !board.evict().is_empty())
                };
                if news {
                    inner.report();
                }
                // What could not be dropped is tried again.
                if news || evict {
                    inner.wake.notify_one();
                }
            }
            Err(error) => {
                tracing::warn!(driver = inner.driver.name(), %error, "cannot list VMs; asking again");
            }
        }
        let pause = inner.settings.survey_every;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = inner.look.notified() => {}
        }
    }
}
