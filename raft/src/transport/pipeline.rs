//! Appends to one member, several under way at once, answered in order; and no answer that could be
//! taken for the answer to a later one. Knows no message.
//!
//! The core takes the answer to one append for the answer to every later one that ends at the same
//! position or before it, and believes that the member was asked when the last of them was sent. An
//! append without entries ends where earlier ones do. So behind it nothing is sent until it is answered,
//! and good answers to what came before it are held until then: else a read could be confirmed by an
//! answer that was given before the read arrived, by a member that has elected another leader since.
//!
//! ```text
//!   sent       entries to 10, nothing (still 10), | waits: entries to 20
//!   answered   10 ............ held ............. both, once the second is answered
//! ```

use futures::stream::FuturesOrdered;
use futures::{Stream, StreamExt};
use std::collections::VecDeque;

/// Appends outstanding to one member.
const OUTSTANDING_MAX: usize = 32;

/// Answers in the order of the requests, of which up to [`OUTSTANDING_MAX`] are outstanding. `send` begins
/// one: is it without entries, and its answer. `good`: the other member took it.
pub(super) fn pipeline<'s, R: 's, A, F>(
    input: impl Stream<Item = R> + Unpin + Send + 's,
    send: impl FnMut(R) -> (bool, F) + Send + 's,
    good: impl Fn(&A) -> bool + Send + 's,
) -> impl Stream<Item = A> + Send + 's
where
    A: Send + 's,
    F: Future<Output = A> + Send + 's,
{
    struct Line<I, S, G, A, F: Future> {
        input: futures::stream::Fuse<I>,
        send: S,
        good: G,
        outstanding: FuturesOrdered<F>,
        /// The newest outstanding request carries no entries.
        gated: bool,
        held: VecDeque<A>,
    }
    let line = Line {
        input: input.fuse(),
        send,
        good,
        outstanding: FuturesOrdered::new(),
        gated: false,
        held: VecDeque::new(),
    };
    futures::stream::unfold(line, async |mut line| {
        loop {
            if line.outstanding.is_empty() {
                line.gated = false;
            }
            let waits = line.gated && line.held.iter().all(&line.good);
            if !waits && let Some(answer) = line.held.pop_front() {
                return Some((answer, line));
            }
            let more = !line.gated && line.outstanding.len() < OUTSTANDING_MAX;
            tokio::select! {
                biased;
                Some(answer) = line.outstanding.next(), if !line.outstanding.is_empty() => {
                    line.held.push_back(answer);
                }
                Some(request) = line.input.next(), if more => {
                    let (empty, answer) = (line.send)(request);
                    line.outstanding.push_back(answer);
                    line.gated = empty;
                }
                else => return None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use tokio::sync::oneshot;

    /// What was sent and is not answered yet.
    type Sent = Arc<Mutex<BTreeMap<u32, oneshot::Sender<bool>>>>;

    /// Requests by number, in order; those of `empty` are without entries. An answer is the number and
    /// whether it is good.
    fn line(count: u32, empty: &'static [u32]) -> (Sent, impl Stream<Item = (u32, bool)> + Unpin) {
        let sent = Sent::default();
        let wire = sent.clone();
        let send = move |n: u32| {
            let (answer, answered) = oneshot::channel();
            wire.lock().insert(n, answer);
            let answer = async move { (n, answered.await.unwrap_or(false)) };
            (empty.contains(&n), answer)
        };
        let answers = pipeline(futures::stream::iter(0..count), send, |a: &(u32, bool)| a.1);
        (sent, Box::pin(answers))
    }

    fn answer(sent: &Sent, n: u32, good: bool) {
        let waiting = sent.lock().remove(&n).expect("it was sent");
        waiting.send(good).expect("it is waited for");
    }

    /// The next answer, if there is one without anything else happening.
    async fn now(answers: &mut (impl Stream<Item = (u32, bool)> + Unpin)) -> Option<(u32, bool)> {
        let next = answers.next();
        tokio::select! {
            biased;
            answer = next => answer,
            () = tokio::task::yield_now() => None,
        }
    }

    fn outstanding(sent: &Sent) -> Vec<u32> {
        sent.lock().keys().copied().collect()
    }

    #[tokio::test]
    async fn requests_with_entries_are_under_way_together_up_to_a_bound() {
        let (sent, mut answers) = line(100, &[]);
        assert_eq!(now(&mut answers).await, None);
        assert_eq!(outstanding(&sent).len(), OUTSTANDING_MAX);
        answer(&sent, 1, true);
        assert_eq!(now(&mut answers).await, None, "not before the first");
        answer(&sent, 0, true);
        assert_eq!(now(&mut answers).await, Some((0, true)));
        assert_eq!(now(&mut answers).await, Some((1, true)));
    }

    /// Number 0 ends where number 1 does: its answer says nothing about when the other was asked.
    #[tokio::test]
    async fn an_earlier_answer_waits_for_the_empty_request_behind_it() {
        let (sent, mut answers) = line(4, &[1]);
        assert_eq!(now(&mut answers).await, None);
        assert_eq!(outstanding(&sent), [0, 1], "nothing is sent behind it");
        answer(&sent, 0, true);
        assert_eq!(now(&mut answers).await, None, "held");
        assert_eq!(outstanding(&sent), [1]);
        answer(&sent, 1, true);
        assert_eq!(now(&mut answers).await, Some((0, true)));
        assert_eq!(now(&mut answers).await, Some((1, true)));
        assert_eq!(now(&mut answers).await, None);
        assert_eq!(outstanding(&sent), [2, 3], "now the rest is sent");
    }

    /// A refusal says that the member follows another leader, or lacks entries: told at once.
    #[tokio::test]
    async fn a_refusal_is_not_held() {
        let (sent, mut answers) = line(3, &[1]);
        assert_eq!(now(&mut answers).await, None);
        answer(&sent, 0, false);
        assert_eq!(now(&mut answers).await, Some((0, false)));
    }

    #[tokio::test]
    async fn it_ends_when_all_is_answered() {
        let (sent, mut answers) = line(2, &[0, 1]);
        for n in 0..2 {
            assert_eq!(now(&mut answers).await, None);
            answer(&sent, n, true);
            assert_eq!(answers.next().await, Some((n, true)));
        }
        assert_eq!(answers.next().await, None);
    }
}
