//! Pushing a file: ask whether it fits, hash it, ask one member what it lacks, send that, publish. Asking is also how a
//! push resumes: after a lost connection or in a new process only what did not arrive is sent.

use super::api::{AdmitRequest, Durability, Forward, PublishRequest, TagInfo};
use super::image::{data_ranges, hash_chunks};
use super::source::{CallError, Registry};
use super::sources::blocking;
use super::{
    BATCH_CHUNKS, CHUNK_LEN, CONNECTIONS, FileEntry, Id, Manifest, SEGMENT_CHUNKS, TransferError,
    WireRecord, ZERO_CHUNK, chunk_len_at,
};
use futures::StreamExt;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Chunks that are hashed and asked about together: 32 MiB.
const UNIT_CHUNKS: usize = 512;
/// Pauses before a batch is tried again at the same member; then another member is tried.
const PAUSES_MS: [u64; 4] = [100, 400, 1000, 2000];
/// What a record takes on disk beyond its data.
const RECORD_BYTES: u64 = 100;
/// Longest wait of one question whether a tag is visible.
const WAIT_STEP_S: u64 = 5;

/// What a pushed file shall become.
#[derive(Clone, Debug)]
pub struct PushSpec {
    /// Template name.
    pub template: String,
    /// Tag name.
    pub tag: String,
    /// Free text.
    pub description: String,
    /// `amd64`, `arm64` or empty.
    pub arch: String,
    /// `qcow2` or `raw`; `None`: look at the file.
    pub format: Option<String>,
    /// Further files of the tag: each its name in the manifest, and where it is.
    pub beside: Vec<(String, PathBuf)>,
    /// Ports that every instance gets.
    pub forwards: Vec<Forward>,
    /// Copies before it is visible; of a tag that is visible already, copies to wait for.
    pub durability: Durability,
    /// How long to wait for that.
    pub wait: Duration,
    /// For this save: then the cluster knows what the tag is called and what is said of it. Empty: for none.
    pub save: String,
}

/// What became of a push.
#[derive(Clone, Debug)]
pub struct Published {
    /// The tag.
    pub tag: TagInfo,
    /// Chunks sent.
    pub sent_chunks: u64,
    /// Bytes sent, compressed.
    pub sent_bytes: u64,
}

/// Push `path`, and what is beside it, to one of `registries` (base URLs; the next one when one is lost) and
/// publish it. `progress(done, total)` in bytes of the files. They must not change meanwhile.
pub async fn push_file(
    client: &reqwest::Client,
    registries: &[String],
    path: &Path,
    spec: &PushSpec,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<Published, TransferError> {
    let (path, asked) = (path.to_owned(), spec.clone());
    let source = Arc::new(blocking(move || Source::open(&path, &asked)).await?);
    let until = Instant::now() + spec.wait;
    let mut said = Vec::new();
    let mut published = None;
    // Twice around: a member that was away may be back, and it kept what it had.
    for base in registries.iter().chain(registries) {
        let registry = Registry::new(client, base);
        // A new id for each member: what is committed is that *this* member holds it. Publishing the
        // same content twice under one name is one tag.
        let request_id = uuid::Uuid::new_v4().to_string();
        match push_to(&registry, &source, spec, &request_id, progress).await {
            Ok(tag) => {
                let waited = wait_held(&registry, tag, until).await;
                let settled = matches!(waited, Waited::Settled(_));
                published = Some(waited.into_tag());
                if settled {
                    break;
                }
                said.push(format!("{base}: lost before another member had a copy"));
            }
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Member(why)) => said.push(format!("{base}: {why}")),
        }
    }
    let Some(tag) = published else {
        return Err(TransferError::Unavailable(said.join("; ")));
    };
    Ok(Published {
        tag,
        sent_chunks: source.sent_chunks.load(Ordering::Relaxed),
        sent_bytes: source.sent_bytes.load(Ordering::Relaxed),
    })
}

enum Failure {
    /// No member would do otherwise.
    Final(TransferError),
    /// Another member may do.
    Member(String),
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        Self::Final(error)
    }
}

async fn push_to(
    registry: &Registry,
    source: &Arc<Source>,
    spec: &PushSpec,
    request_id: &str,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<TagInfo, Failure> {
    request_id.clone_into(&mut source.push.lock());
    admitted(registry, source, spec).await?;
    source.claimed.lock().clear();
    let mut done = 0;
    let size = source.files.iter().map(|f| f.size).sum();
    progress(0, size);
    let units = source.units();
    let units = units.map(|at| send_unit(registry.clone(), Arc::clone(source), at));
    let mut units = futures::stream::iter(units).buffer_unordered(CONNECTIONS);
    while let Some(sent) = units.next().await {
        done += sent?;
        progress(done, size);
    }
    drop(units);
    source.check_unchanged()?;
    let manifest = send_names(registry, source).await?;
    let request = PublishRequest {
        request_id: request_id.to_owned(),
        template: spec.template.clone(),
        tag: spec.tag.clone(),
        description: spec.description.clone(),
        arch: spec.arch.clone(),
        manifest: hex::encode(manifest),
        forwards: spec.forwards.clone(),
        durability: spec.durability,
        wait: 0,
        save: spec.save.clone(),
    };
    let mut pauses = PAUSES_MS.iter();
    loop {
        let why = match registry.publish(&request).await {
            Ok(tag) => return Ok(tag),
            Err(CallError::Refused(why)) => return Err(TransferError::Refused(why).into()),
            Err(CallError::Incomplete(why)) => return Err(Failure::Member(why)),
            Err(CallError::Passing(why)) => why,
        };
        let Some(&pause) = pauses.next() else {
            return Err(Failure::Member(why));
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Refused before any byte is sent, if it cannot fit. First with the most that it may take; only if that is
/// too much it is found out how much the member really lacks, compressed as it would be sent.
async fn admitted(
    registry: &Registry,
    source: &Arc<Source>,
    spec: &PushSpec,
) -> Result<(), Failure> {
    let ranges = source.files.iter().flat_map(|f| &f.ranges);
    let data: u64 = ranges.map(|r| r.end - r.start).sum();
    let segments_of = |f: &Local| f.size.div_ceil(CHUNK_LEN * SEGMENT_CHUNKS as u64);
    let segments = source.files.iter().map(segments_of).sum::<u64>() + 1;
    let names = data.div_ceil(CHUNK_LEN) * RECORD_BYTES + segments * (CHUNK_LEN + RECORD_BYTES);
    let Some(why) = ask_room(registry, source, spec, data + names).await? else {
        return Ok(());
    };
    tracing::debug!(?why, "looking how much is really lacking");
    source.claimed.lock().clear();
    let units = source.units();
    let units = units.map(|at| weigh_unit(registry.clone(), Arc::clone(source), at));
    let mut units = futures::stream::iter(units).buffer_unordered(CONNECTIONS);
    let mut lacking = names;
    while let Some(weight) = units.next().await {
        lacking += weight?;
    }
    let Some((why, anywhere)) = ask_room(registry, source, spec, lacking).await? else {
        return Ok(());
    };
    Err(match anywhere {
        true => TransferError::Refused(why).into(),
        false => Failure::Member(why),
    })
}

/// Why so many bytes do not fit, and whether that is so for every member.
async fn ask_room(
    registry: &Registry,
    source: &Source,
    spec: &PushSpec,
    bytes: u64,
) -> Result<Option<(String, bool)>, Failure> {
    let asked = AdmitRequest {
        template: spec.template.clone(),
        bytes,
        durability: spec.durability,
        push: source.push(),
    };
    let mut pauses = PAUSES_MS.iter();
    loop {
        let why = match registry.admit(&asked).await {
            Ok(None) => return Ok(None),
            Ok(Some(said)) if said.fits => return Ok(None),
            Ok(Some(said)) => return Ok(Some((said.why, said.anywhere))),
            Err(CallError::Refused(why)) => return Err(TransferError::Refused(why).into()),
            Err(CallError::Passing(why) | CallError::Incomplete(why)) => why,
        };
        let Some(&pause) = pauses.next() else {
            return Err(Failure::Member(why));
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Bytes that the member lacks of one unit, as they would be sent.
async fn weigh_unit(registry: Registry, source: Arc<Source>, unit: Unit) -> Result<u64, Failure> {
    let mut bytes = 0;
    for batch in lacking_of(&registry, &source, unit)
        .await?
        .0
        .chunks(BATCH_CHUNKS)
    {
        let (at, batch) = (Arc::clone(&source), batch.to_vec());
        let records = blocking(move || at.files[unit.0].read(&batch)).await?;
        bytes += records.iter().map(|r| r.framed_len() as u64).sum::<u64>();
    }
    Ok(bytes)
}

/// Hash one unit and send what the member lacks of it; the unit's length.
async fn send_unit(registry: Registry, source: Arc<Source>, unit: Unit) -> Result<u64, Failure> {
    let (lacking, len) = lacking_of(&registry, &source, unit).await?;
    for batch in lacking.chunks(BATCH_CHUNKS) {
        let (at, batch) = (Arc::clone(&source), batch.to_vec());
        let records = blocking(move || at.files[unit.0].read(&batch)).await?;
        send(&registry, &source, records).await?;
    }
    Ok(len)
}

/// Chunks of one unit, with their numbers, that the member lacks and no other unit takes care of; and the
/// unit's length.
async fn lacking_of(
    registry: &Registry,
    source: &Arc<Source>,
    unit: Unit,
) -> Result<(Vec<(Id, u64)>, u64), Failure> {
    let at = Arc::clone(source);
    let names = blocking(move || at.files[unit.0].names(unit.1)).await?;
    let first = (unit.1 * UNIT_CHUNKS) as u64;
    let size = source.files[unit.0].size;
    let len = (first..first + names.len() as u64)
        .map(|n| chunk_len_at(size, n))
        .sum();
    let mine: Vec<(Id, u64)> = {
        let mut claimed = source.claimed.lock();
        let numbered = names.iter().copied().zip(first..);
        numbered
            .filter(|(id, _)| *id != ZERO_CHUNK && claimed.insert(*id))
            .collect()
    };
    if mine.is_empty() {
        return Ok((mine, len));
    }
    let ids: Vec<Id> = mine.iter().map(|(id, _)| *id).collect();
    let missing = ask_missing(registry, &ids).await?;
    let lacking = mine
        .into_iter()
        .filter(|(id, _)| missing.contains(id))
        .collect();
    Ok((lacking, len))
}

async fn ask_missing(registry: &Registry, ids: &[Id]) -> Result<HashSet<Id>, Failure> {
    let mut pauses = PAUSES_MS.iter();
    loop {
        let why = match registry.missing(ids).await {
            Ok(missing) => return Ok(missing.into_iter().collect()),
            Err(CallError::Refused(why)) => return Err(TransferError::Refused(why).into()),
            Err(CallError::Passing(why) | CallError::Incomplete(why)) => why,
        };
        let Some(&pause) = pauses.next() else {
            return Err(Failure::Member(why));
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Send records; after a lost answer first ask which of them arrived.
async fn send(
    registry: &Registry,
    source: &Source,
    mut records: Vec<WireRecord>,
) -> Result<(), Failure> {
    let mut pauses = PAUSES_MS.iter();
    while !records.is_empty() {
        let body = WireRecord::frame_all(&records);
        source
            .sent_chunks
            .fetch_add(records.len() as u64, Ordering::Relaxed);
        source
            .sent_bytes
            .fetch_add(body.len() as u64, Ordering::Relaxed);
        let why = match registry.put(body, &source.push()).await {
            Ok(_) => return Ok(()),
            Err(CallError::Refused(why)) => return Err(TransferError::Refused(why).into()),
            Err(CallError::Passing(why) | CallError::Incomplete(why)) => why,
        };
        let Some(&pause) = pauses.next() else {
            return Err(Failure::Member(why));
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let ids: Vec<Id> = records.iter().map(|r| r.id).collect();
        let missing = ask_missing(registry, &ids).await?;
        records.retain(|r| missing.contains(&r.id));
    }
    Ok(())
}

/// Send segments and manifest; the manifest's digest.
async fn send_names(registry: &Registry, source: &Arc<Source>) -> Result<Id, Failure> {
    let at = Arc::clone(source);
    let (manifest, records) = blocking(move || at.describe()).await?;
    for batch in records.chunks(BATCH_CHUNKS) {
        let mut seen = HashSet::new();
        let ids: Vec<Id> = batch
            .iter()
            .map(|r| r.id)
            .filter(|id| seen.insert(*id))
            .collect();
        let mut missing = ask_missing(registry, &ids).await?;
        let lacking = batch
            .iter()
            .filter(|r| missing.remove(&r.id))
            .cloned()
            .collect();
        send(registry, source, lacking).await?;
    }
    Ok(manifest)
}

/// How the wait for copies ended.
enum Waited {
    /// Held, or deleted meanwhile, or out of time: the newest that is known.
    Settled(TagInfo),
    /// The member that took the push does not answer, and it may be the only one with the bytes; or it has
    /// lost them, and nobody holds them.
    HolderLost(TagInfo),
}

impl Waited {
    fn into_tag(self) -> TagInfo {
        match self {
            Self::Settled(tag) | Self::HolderLost(tag) => tag,
        }
    }
}

/// Ask the member that took the push until the tag is held or the time is over. If that member is
/// lost, the caller still has the bytes and can bring them to another one.
async fn wait_held(holder: &Registry, mut tag: TagInfo, until: Instant) -> Waited {
    let mut pauses = PAUSES_MS.iter();
    while !tag.is_held() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let step = u32::try_from(left.as_secs().clamp(1, WAIT_STEP_S)).unwrap_or(1);
        match holder.tag(&tag, step).await {
            Ok(newer) => {
                tag = newer;
                pauses = PAUSES_MS.iter();
                if tag.holders.is_empty() {
                    return Waited::HolderLost(tag);
                }
            }
            // Deleted meanwhile: what was published is all there is to say.
            Err(CallError::Refused(_)) => break,
            Err(_) => {
                let Some(&pause) = pauses.next() else {
                    return Waited::HolderLost(tag);
                };
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
    }
    Waited::Settled(tag)
}

/// [`FileEntry::content`] of a file as it would be pushed. Blocks.
pub fn content_of(path: &Path) -> Result<String, TransferError> {
    let file = Local::open(path, None, Some("raw".to_owned()))?;
    let (entry, _) = file.describe()?;
    file.check_unchanged()?;
    entry.content()
}

/// What is pushed.
struct Source {
    /// The disk first.
    files: Vec<Local>,
    /// Chunks that some unit takes care of in this round.
    claimed: Mutex<HashSet<Id>>,
    /// What the member that is pushed to knows this push by.
    push: Mutex<String>,
    sent_chunks: AtomicU64,
    sent_bytes: AtomicU64,
}

/// A file, and a unit of it.
type Unit = (usize, usize);

/// One file of it.
struct Local {
    file: File,
    name: String,
    format: String,
    size: u64,
    modified: std::time::SystemTime,
    ranges: Vec<Range<u64>>,
    /// Chunk names by unit, once hashed: another member needs no second look at the file.
    hashed: Mutex<Vec<Option<Arc<Vec<Id>>>>>,
}

impl Source {
    fn open(path: &Path, spec: &PushSpec) -> Result<Self, TransferError> {
        let mut files = vec![Local::open(path, None, spec.format.clone())?];
        for (name, path) in &spec.beside {
            files.push(Local::open(path, Some(name), Some("raw".to_owned()))?);
        }
        Ok(Self {
            files,
            claimed: Mutex::default(),
            push: Mutex::default(),
            sent_chunks: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        })
    }

    fn push(&self) -> String {
        self.push.lock().clone()
    }

    fn units(&self) -> impl Iterator<Item = Unit> + use<> {
        let counts: Vec<usize> = self.files.iter().map(|f| f.hashed.lock().len()).collect();
        let counts = counts.into_iter().enumerate();
        counts.flat_map(|(file, count)| (0..count).map(move |unit| (file, unit)))
    }

    fn check_unchanged(&self) -> Result<(), TransferError> {
        self.files.iter().try_for_each(Local::check_unchanged)
    }

    /// Segments and manifest, the manifest last, and its digest.
    fn describe(&self) -> Result<(Id, Vec<WireRecord>), TransferError> {
        let (mut files, mut records) = (Vec::new(), Vec::new());
        for file in &self.files {
            let (entry, segments) = file.describe()?;
            files.push(entry);
            records.extend(segments);
        }
        let manifest = Manifest { version: 1, files };
        let record = WireRecord::encode(&manifest.to_bytes()?);
        let id = record.id;
        records.push(record);
        Ok((id, records))
    }
}

impl Local {
    fn open(
        path: &Path,
        name: Option<&String>,
        format: Option<String>,
    ) -> Result<Self, TransferError> {
        let file = File::open(path)?;
        let facts = file.metadata()?;
        if !facts.is_file() {
            return Err(TransferError::Invalid(format!(
                "{} is not a file",
                path.display()
            )));
        }
        let size = facts.len();
        let format = match format {
            Some(format) => format,
            None => detect_format(&file)?,
        };
        let units = size.div_ceil(CHUNK_LEN * UNIT_CHUNKS as u64);
        let units = usize::try_from(units)
            .map_err(|_| TransferError::Invalid("the file is too long".to_owned()))?;
        let ending = if format == "qcow2" { "qcow2" } else { "img" };
        Ok(Self {
            ranges: data_ranges(&file, size)?,
            name: name.map_or_else(|| format!("disk.{ending}"), String::clone),
            format,
            size,
            modified: facts.modified()?,
            hashed: Mutex::new(vec![None; units]),
            file,
        })
    }

    fn names(&self, unit: usize) -> Result<Arc<Vec<Id>>, TransferError> {
        if let Some(names) = &self.hashed.lock()[unit] {
            return Ok(Arc::clone(names));
        }
        let first = (unit * UNIT_CHUNKS) as u64;
        let end = (first + UNIT_CHUNKS as u64).min(self.size.div_ceil(CHUNK_LEN));
        let names = Arc::new(hash_chunks(
            &self.file,
            self.size,
            &self.ranges,
            first..end,
        )?);
        self.hashed.lock()[unit] = Some(Arc::clone(&names));
        Ok(names)
    }

    /// These chunks, compressed; each must still be what it was when it was hashed.
    fn read(&self, batch: &[(Id, u64)]) -> Result<Vec<WireRecord>, TransferError> {
        let mut buffer = vec![0; super::image::CHUNK];
        let mut records = Vec::with_capacity(batch.len());
        for (id, number) in batch {
            let len = usize::try_from(chunk_len_at(self.size, *number)).unwrap_or(0);
            self.file
                .read_exact_at(&mut buffer[..len], number * CHUNK_LEN)?;
            let record = WireRecord::encode(&buffer[..len]);
            if record.id != *id {
                return Err(changed());
            }
            records.push(record);
        }
        Ok(records)
    }

    fn check_unchanged(&self) -> Result<(), TransferError> {
        let facts = self.file.metadata()?;
        if facts.len() == self.size && facts.modified()? == self.modified {
            return Ok(());
        }
        Err(changed())
    }

    /// Its entry of the manifest, and its segments.
    fn describe(&self) -> Result<(FileEntry, Vec<WireRecord>), TransferError> {
        let units = self.hashed.lock().len();
        let names: Vec<Arc<Vec<Id>>> = (0..units)
            .map(|unit| self.names(unit))
            .collect::<Result<_, _>>()?;
        let flat: Vec<Id> = names.iter().flat_map(|n| n.iter().copied()).collect();
        let records: Vec<WireRecord> = flat
            .chunks(SEGMENT_CHUNKS)
            .map(|ids| WireRecord::encode(ids.as_flattened()))
            .collect();
        let entry = FileEntry {
            name: self.name.clone(),
            format: self.format.clone(),
            size: self.size,
            segments: records.iter().map(|r| hex::encode(r.id)).collect(),
        };
        Ok((entry, records))
    }
}

fn changed() -> TransferError {
    TransferError::Invalid("the file changed while it was pushed: push it again".to_owned())
}

fn detect_format(file: &File) -> std::io::Result<String> {
    let mut head = [0; 4];
    match file.read_exact_at(&mut head, 0) {
        Ok(()) if head == *b"QFI\xfb" => Ok("qcow2".to_owned()),
        Ok(()) => Ok("raw".to_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok("raw".to_owned()),
        Err(e) => Err(e),
    }
}
