//! The registries of a pull, and which of them failed lately.

use super::source::{CallError, Registry};
use super::{Id, TransferError, WireRecord};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a source that failed is asked last.
const PENALTY: Duration = Duration::from_secs(10);
/// Pauses between rounds over all sources; after the last the pull fails.
const PAUSES_MS: [u64; 5] = [100, 500, 1000, 2000, 4000];

/// A chunk as it came, and its bytes, verified.
pub(super) type Chunk = (WireRecord, Vec<u8>);

pub(super) struct Sources {
    registries: Vec<Registry>,
    failed: Mutex<Vec<Option<Instant>>>,
}

impl Sources {
    /// In the order of their addresses, which is the same on every node.
    pub(super) fn new(client: &reqwest::Client, bases: &[String]) -> Result<Self, TransferError> {
        if bases.is_empty() {
            let why = "no registry is known".to_owned();
            return Err(TransferError::Unavailable(why));
        }
        let mut bases: Vec<&str> = bases.iter().map(String::as_str).collect();
        bases.sort_unstable();
        bases.dedup();
        let registries: Vec<_> = bases.iter().map(|b| Registry::new(client, b)).collect();
        let failed = Mutex::new(vec![None; registries.len()]);
        Ok(Self { registries, failed })
    }

    pub(super) fn count(&self) -> usize {
        self.registries.len()
    }

    pub(super) fn registry(&self, number: usize) -> &Registry {
        &self.registries[number]
    }

    /// It did not answer as it should.
    pub(super) fn penalize(&self, number: usize) {
        self.failed.lock()[number] = Some(Instant::now());
    }

    /// The one with this place in the order, or the next that did not fail lately.
    pub(super) fn at(&self, place: usize) -> usize {
        self.order(place).first().copied().unwrap_or(0)
    }

    /// All of these chunks, verified. What one source lacks, sends wrong or does not send is asked
    /// of the next; `turn` says who is first.
    pub(super) async fn fetch(
        &self,
        ids: &[Id],
        turn: usize,
    ) -> Result<HashMap<Id, Vec<u8>>, TransferError> {
        let mut got = HashMap::with_capacity(ids.len());
        let mut said: HashMap<usize, String> = HashMap::new();
        for pause in std::iter::once(0).chain(PAUSES_MS) {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            for number in self.order(turn) {
                let rest: Vec<Id> = ids
                    .iter()
                    .filter(|id| !got.contains_key(*id))
                    .copied()
                    .collect();
                match self.ask(number, &rest).await {
                    Ok(chunks) => got.extend(chunks),
                    Err(why) => {
                        self.penalize(number);
                        said.insert(number, why);
                        continue;
                    }
                }
                let lacking = ids.iter().filter(|id| !got.contains_key(*id)).count();
                if lacking == 0 {
                    return Ok(got);
                }
                said.insert(number, format!("lacks {lacking} of {} chunks", rest.len()));
            }
        }
        Err(self.nobody(&said))
    }

    /// Nobody could serve it: what each said.
    pub(super) fn nobody(&self, said: &HashMap<usize, String>) -> TransferError {
        let texts = said
            .iter()
            .map(|(n, why)| format!("{}: {why}", self.registries[*n].base()));
        TransferError::Unavailable(texts.collect::<Vec<_>>().join("; "))
    }

    async fn ask(&self, number: usize, ids: &[Id]) -> Result<Vec<(Id, Vec<u8>)>, String> {
        let records = self.registries[number].get(ids).await.map_err(why)?;
        let chunks = verify(records).await.map_err(|e| e.to_string())?;
        Ok(chunks.into_iter().map(|(r, bytes)| (r.id, bytes)).collect())
    }

    /// Everyone, beginning at `turn`, those that failed lately last.
    fn order(&self, turn: usize) -> Vec<usize> {
        let count = self.registries.len();
        let failed = self.failed.lock();
        let bad = |n: &usize| failed[*n].is_some_and(|at| at.elapsed() < PENALTY);
        let mut order: Vec<usize> = (0..count).map(|n| (turn + n) % count).collect();
        order.sort_by_key(bad);
        order
    }
}

/// In a sentence.
pub(super) fn why(error: CallError) -> String {
    match error {
        CallError::Passing(why) | CallError::Refused(why) | CallError::Incomplete(why) => why,
    }
}

/// The chunks' bytes; an error if one is not what its name says.
pub(super) async fn verify(records: Vec<WireRecord>) -> Result<Vec<Chunk>, TransferError> {
    let decode = |record: WireRecord| {
        let bytes = record.decode()?;
        Ok((record, bytes))
    };
    blocking(move || records.into_iter().map(decode).collect()).await
}

/// Run what blocks where it may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(std::io::Error::other(e).into()),
    }
}
