//! Pulling a file: names first, then whatever the destination lacks, in batches spread over the
//! registries; a batch whose source fails goes on with the next one.

use super::image::{CHUNK, Slots, Target, data_ranges, hash_chunks};
use super::source::{CallError, Registry};
use super::{
    BATCH_CHUNKS, CONNECTIONS, FileEntry, Id, Manifest, SEGMENT_CHUNKS, TransferError, WireRecord,
    ZERO_CHUNK, check_segment, chunk_len_at, hex_id, segment_ids,
};
use futures::StreamExt;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a source that failed is asked last.
const PENALTY: Duration = Duration::from_secs(10);
/// Pauses between rounds over all sources; after the last the pull fails.
const PAUSES_MS: [u64; 5] = [100, 500, 1000, 2000, 4000];
/// Segments of one request: 1 MiB.
const SEGMENTS_BATCH: usize = 16;

/// Fetch the manifest with this digest (hex) and make `dest` equal to its file `index`, from any of
/// `registries` (base URLs), in parallel, every chunk verified. Whole chunks that `dest` already has
/// (from an interrupted pull) are kept. `dest` is fsynced on return. `progress(done, total)` in bytes.
pub async fn pull_file(
    client: &reqwest::Client,
    registries: &[String],
    manifest: &str,
    index: usize,
    dest: &Path,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<Manifest, TransferError> {
    let sources = Arc::new(Sources::new(client, registries)?);
    let digest = hex_id(manifest)?;
    let bytes = sources
        .fetch(&[digest], 0)
        .await?
        .remove(&digest)
        .unwrap_or_default();
    let manifest = Manifest::parse(&bytes)?;
    let file = manifest.files.get(index).ok_or_else(|| {
        TransferError::Invalid(format!("the manifest has {} files", manifest.files.len()))
    })?;
    let (path, size) = (dest.to_owned(), file.size);
    // Said before anything of that size is held in memory or on disk: who has no room drops us here.
    progress(0, size);
    tokio::task::yield_now().await;
    let names = Arc::new(fetch_names(&sources, file).await?);
    let target = Arc::new(blocking(move || Ok(Target::open(&path, size)?)).await?);
    let needed = compare(&target, &names).await?;

    let lacking: u64 = needed.iter().map(|&n| chunk_len_at(size, n)).sum();
    let mut done = size - lacking;
    progress(done, size);
    let batches: Vec<Vec<u64>> = needed.chunks(BATCH_CHUNKS).map(<[u64]>::to_vec).collect();
    let work = batches.into_iter().enumerate().map(|(turn, batch)| {
        fill(
            Arc::clone(&sources),
            Arc::clone(&target),
            Arc::clone(&names),
            batch,
            turn,
        )
    });
    let mut work = futures::stream::iter(work).buffer_unordered(CONNECTIONS);
    while let Some(filled) = work.next().await {
        done += filled?;
        progress(done, size);
    }
    drop(work);
    let path = dest.to_owned();
    blocking(move || Ok(target.sync(&path)?)).await?;
    Ok(manifest)
}

/// Names of all chunks of a file.
async fn fetch_names(sources: &Sources, file: &FileEntry) -> Result<Vec<Id>, TransferError> {
    let digests = file.segment_digests()?;
    let mut names = Vec::with_capacity(usize::try_from(file.chunks()).unwrap_or(0));
    for (batch, wanted) in digests.chunks(SEGMENTS_BATCH).enumerate() {
        let segments = sources.fetch(wanted, batch).await?;
        for (at, digest) in wanted.iter().enumerate() {
            let bytes = segments.get(digest).map_or(&[][..], Vec::as_slice);
            check_segment(file, batch * SEGMENTS_BATCH + at, bytes)?;
            names.extend(segment_ids(bytes));
        }
    }
    Ok(names)
}

/// Numbers of the chunks to fetch. What should read as zeros is made so here.
async fn compare(target: &Arc<Target>, names: &Arc<Vec<Id>>) -> Result<Vec<u64>, TransferError> {
    let (at, size) = (Arc::clone(target), target.size);
    let ranges = Arc::new(blocking(move || Ok(data_ranges(at.file(), size)?)).await?);
    let parts = (0..names.len()).step_by(SEGMENT_CHUNKS).map(|first| {
        let (target, names, ranges) = (Arc::clone(target), Arc::clone(names), Arc::clone(&ranges));
        blocking(move || {
            let wanted = &names[first..names.len().min(first + SEGMENT_CHUNKS)];
            let chunks = first as u64..(first + wanted.len()) as u64;
            let present = hash_chunks(target.file(), target.size, &ranges, chunks.clone())?;
            let mut needed = Vec::new();
            for ((number, want), have) in chunks.zip(wanted).zip(&present) {
                if want == have {
                    continue;
                }
                if *want == ZERO_CHUNK {
                    target.zero(number)?;
                } else {
                    needed.push(number);
                }
            }
            Ok(needed)
        })
    });
    let lanes = std::thread::available_parallelism().map_or(2, usize::from);
    let mut parts = futures::stream::iter(parts).buffered(lanes);
    let mut needed = Vec::new();
    while let Some(part) = parts.next().await {
        needed.extend(part?);
    }
    Ok(needed)
}

/// Fetch and write one batch of chunks; the bytes written.
async fn fill(
    sources: Arc<Sources>,
    target: Arc<Target>,
    names: Arc<Vec<Id>>,
    batch: Vec<u64>,
    turn: usize,
) -> Result<u64, TransferError> {
    let name = |number: u64| names[usize::try_from(number).unwrap_or(usize::MAX)];
    let mut seen = HashSet::new();
    let ids: Vec<Id> = batch
        .iter()
        .map(|&n| name(n))
        .filter(|id| seen.insert(*id))
        .collect();
    let chunks = sources.fetch(&ids, turn).await?;
    let names = Arc::clone(&names);
    blocking(move || write_batch(&target, &names, &batch, &chunks)).await
}

fn write_batch(
    target: &Target,
    names: &[Id],
    batch: &[u64],
    chunks: &HashMap<Id, Vec<u8>>,
) -> Result<u64, TransferError> {
    let mut slots = Slots::new(batch.len());
    for (slot, &number) in batch.iter().enumerate() {
        let id = &names[usize::try_from(number).unwrap_or(usize::MAX)];
        let bytes = chunks.get(id).map_or(&[][..], Vec::as_slice);
        if bytes.len() as u64 != chunk_len_at(target.size, number) {
            return Err(TransferError::Invalid(format!(
                "chunk {} has {} bytes, its place in the file another length",
                hex::encode(id),
                bytes.len()
            )));
        }
        slots.slot(slot)[..bytes.len()].copy_from_slice(bytes);
    }
    let mut written = 0;
    let mut from = 0;
    for run in batch.chunk_by(|a, b| a + 1 == *b) {
        let last = run.last().map_or(0, |&n| chunk_len_at(target.size, n));
        let len = (run.len() - 1) * CHUNK + usize::try_from(last).unwrap_or(0);
        target.write(run[0], &slots.get(from..from + run.len())[..len])?;
        from += run.len();
        written += len as u64;
    }
    Ok(written)
}

/// The registries, and which of them failed lately.
struct Sources {
    registries: Vec<Registry>,
    failed: Mutex<Vec<Option<Instant>>>,
}

impl Sources {
    fn new(client: &reqwest::Client, bases: &[String]) -> Result<Self, TransferError> {
        if bases.is_empty() {
            return Err(TransferError::Unavailable(
                "no registry is known".to_owned(),
            ));
        }
        let registries: Vec<_> = bases
            .iter()
            .map(|base| Registry::new(client, base))
            .collect();
        let failed = Mutex::new(vec![None; registries.len()]);
        Ok(Self { registries, failed })
    }

    /// All of these chunks, verified. What one source lacks, sends wrong or does not send is asked
    /// of the next; `turn` says who is first.
    async fn fetch(&self, ids: &[Id], turn: usize) -> Result<HashMap<Id, Vec<u8>>, TransferError> {
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
                        self.failed.lock()[number] = Some(Instant::now());
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
        let texts = said
            .iter()
            .map(|(n, why)| format!("{}: {why}", self.registries[*n].base()));
        Err(TransferError::Unavailable(
            texts.collect::<Vec<_>>().join("; "),
        ))
    }

    async fn ask(&self, number: usize, ids: &[Id]) -> Result<Vec<(Id, Vec<u8>)>, String> {
        let records = self.registries[number]
            .get(ids)
            .await
            .map_err(|e| match e {
                CallError::Passing(why) | CallError::Refused(why) | CallError::Incomplete(why) => {
                    why
                }
            })?;
        let verify = move || {
            let decode = |r: &WireRecord| Ok((r.id, r.decode()?));
            records
                .iter()
                .map(decode)
                .collect::<Result<Vec<_>, TransferError>>()
        };
        blocking(verify).await.map_err(|e| e.to_string())
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

/// Run what blocks where it may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(std::io::Error::other(e).into()),
    }
}
