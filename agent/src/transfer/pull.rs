//! Pulling a file: names first, then whatever the destination lacks: from other images that are here, then in
//! batches from the registries and from other nodes.

use super::batch::batches;
use super::hunt::{Hunt, write_chunks};
use super::image::{Target, data_ranges, hash_chunks};
use super::sources::{Sources, blocking};
use super::{
    BATCH_CHUNKS, FileEntry, Holding, Id, Manifest, SEGMENT_CHUNKS, TransferError, ZERO_CHUNK,
    check_segment, chunk_len_at, hex_id, segment_ids,
};
use futures::StreamExt;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Segments of one request: 1 MiB.
const SEGMENTS_BATCH: usize = 16;

/// What surrounds a node that pulls.
pub struct Company<'a> {
    /// Where other nodes reach what this one has; empty if they cannot.
    pub address: String,
    /// What nodes of a cluster show each other; empty: no other node is asked.
    pub key: String,
    /// This node's own number: each takes what it lacks in another order.
    pub seed: u64,
    /// Whole images that are here.
    pub images: Vec<Arc<Holding>>,
    /// Told once for each file what of it is here; it grows.
    pub offer: &'a (dyn Fn(&Arc<Holding>) + Send + Sync),
}

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
    let alone = |_: &Manifest| Ok(vec![(index, dest.to_owned(), None)]);
    pull(client, registries, manifest, &alone, progress).await
}

/// The same for a whole image, by a node among others: chunks of images that are here are not fetched, those
/// that other nodes have come from these, and other nodes get what this one has. `dest` becomes the disk, and
/// if there is the memory of a suspended VM, it becomes `memory.part` and its machine `machine.part` beside it.
pub async fn pull_among(
    client: &reqwest::Client,
    registries: &[String],
    manifest: &str,
    dest: &Path,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
    company: &Company<'_>,
) -> Result<Manifest, TransferError> {
    let all = |manifest: &Manifest| {
        let mut wanted = vec![(0, dest.to_owned(), Some(company))];
        if let Some((memory, machine)) = manifest.saved()? {
            wanted.push((memory, dest.with_file_name("memory.part"), Some(company)));
            // A chunk: not worth a question to other nodes.
            wanted.push((machine, dest.with_file_name("machine.part"), None));
        }
        Ok(wanted)
    };
    pull(client, registries, manifest, &all, progress).await
}

/// A file of the manifest, what shall become equal to it, and who is asked besides the members.
type Wanted<'a, 'b> = (usize, PathBuf, Option<&'a Company<'b>>);

async fn pull<'a, 'b>(
    client: &reqwest::Client,
    registries: &[String],
    digest: &str,
    wanted: &(dyn Fn(&Manifest) -> Result<Vec<Wanted<'a, 'b>>, TransferError> + Send + Sync),
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<Manifest, TransferError> {
    let sources = Arc::new(Sources::new(client, registries)?);
    let id = hex_id(digest)?;
    let bytes = sources.fetch(&[id], 0).await?.remove(&id);
    let manifest = Manifest::parse(&bytes.unwrap_or_default())?;
    let mut files = Vec::new();
    for (index, dest, company) in wanted(&manifest)? {
        let file = manifest.files.get(index).ok_or_else(|| {
            TransferError::Invalid(format!("the manifest has {} files", manifest.files.len()))
        })?;
        files.push((file, dest, company));
    }
    let total = files.iter().map(|(file, _, _)| file.size).sum();
    // Said before anything of that size is held in memory or on disk: who has no room drops us here.
    progress(0, total);
    tokio::task::yield_now().await;
    let mut before = 0;
    for (file, dest, company) in files {
        let told = |done: u64| progress(before + done, total);
        let (from, of) = ((client, &sources), (digest, file));
        pull_one(from, of, &dest, &told, company).await?;
        before += file.size;
    }
    Ok(manifest)
}

/// Make `dest` equal to one file, durably; `told` gets the bytes that are right.
async fn pull_one(
    (client, sources): (&reqwest::Client, &Arc<Sources>),
    (digest, file): (&str, &FileEntry),
    dest: &Path,
    told: &(dyn Fn(u64) + Send + Sync),
    company: Option<&Company<'_>>,
) -> Result<(), TransferError> {
    let (path, size) = (dest.to_owned(), file.size);
    let names = Arc::new(fetch_names(sources, file).await?);
    let target = Arc::new(blocking(move || Ok(Target::open(&path, size)?)).await?);
    let mut needed = compare(&target, &names).await?;

    let bytes_of = |needed: &[u64]| needed.iter().map(|&n| chunk_len_at(size, n)).sum::<u64>();
    let mut done = size - bytes_of(&needed);
    told(done);
    let mut hunt = Hunt::new(
        client.clone(),
        Arc::clone(sources),
        Arc::clone(&target),
        Arc::clone(&names),
        digest,
    );
    if let Some(company) = company {
        needed = take_what_is_here(&target, &names, needed, &company.images).await?;
        done = size - bytes_of(&needed);
        told(done);
        let (path, names, lacking) = (dest.to_owned(), Arc::clone(&names), needed.clone());
        let open = move || Ok(Holding::new(File::open(&path)?, size, names, &lacking));
        let holding = Arc::new(blocking(open).await?);
        (company.offer)(&holding);
        hunt.holding = Some(holding);
        if !company.key.is_empty() {
            hunt.among = Some((company.address.clone(), company.key.clone()));
        }
    }
    let seed = hunt.among.as_ref().and(company).map(|c| c.seed);
    let plan = batches(&needed, sources.count(), seed);
    let written = |bytes: u64| {
        done += bytes;
        told(done);
    };
    hunt.run(plan, written).await?;
    drop(hunt);
    let path = dest.to_owned();
    blocking(move || Ok(target.sync(&path)?)).await
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
    gather(parts).await
}

/// Copy chunks that other images here have; the numbers of those that none has.
async fn take_what_is_here(
    target: &Arc<Target>,
    names: &Arc<Vec<Id>>,
    needed: Vec<u64>,
    images: &[Arc<Holding>],
) -> Result<Vec<u64>, TransferError> {
    if images.is_empty() {
        return Ok(needed);
    }
    let images = Arc::new(images.to_vec());
    let parts: Vec<Vec<u64>> = needed.chunks(BATCH_CHUNKS).map(<[u64]>::to_vec).collect();
    let parts = parts.into_iter().map(|numbers| {
        let (target, names, images) = (Arc::clone(target), Arc::clone(names), Arc::clone(&images));
        blocking(move || {
            let name = |n: &u64| names[usize::try_from(*n).unwrap_or(usize::MAX)];
            let mut chunks = HashMap::new();
            for number in &numbers {
                let id = name(number);
                if let Some(bytes) = images.iter().find_map(|image| image.read(&id)) {
                    chunks.insert(id, bytes);
                }
            }
            let (here, lacking): (Vec<u64>, Vec<u64>) =
                numbers.iter().partition(|n| chunks.contains_key(&name(n)));
            write_chunks(&target, &names, &here, &chunks)?;
            Ok(lacking)
        })
    });
    gather(parts).await
}

/// A few at once, their results in order.
async fn gather(
    parts: impl Iterator<Item = impl Future<Output = Result<Vec<u64>, TransferError>>>,
) -> Result<Vec<u64>, TransferError> {
    let lanes = std::thread::available_parallelism().map_or(2, usize::from);
    let mut parts = futures::stream::iter(parts).buffered(lanes);
    let mut out = Vec::new();
    while let Some(part) = parts.next().await {
        out.extend(part?);
    }
    Ok(out)
}
