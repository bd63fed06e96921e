//! Gets the chunks that a pull lacks: some batches at once, each from its member or from nodes that the member
//! names. Every chunk is verified, so that a lying source costs time only; what is written is there for other
//! nodes at once. All that fails goes back to the members.

use super::batch::{Batch, Step};
use super::image::{CHUNK, Slots, Target};
use super::source::{Asked, Given, Registry};
use super::sources::{Chunk, Sources, blocking, verify, why};
use super::{CONNECTIONS, Holding, Id, TransferError, chunk_len_at};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bad nodes that are named to a member: they stand in its request's head.
const AVOID_MAX: usize = 64;

/// What a hunt needs besides its batches.
pub(super) struct Hunt {
    pub(super) client: reqwest::Client,
    pub(super) sources: Arc<Sources>,
    pub(super) target: Arc<Target>,
    pub(super) names: Arc<Vec<Id>>,
    /// Digest (hex) of the manifest.
    pub(super) manifest: String,
    /// What of the image is here, for those who ask.
    pub(super) holding: Option<Arc<Holding>>,
    /// With other nodes: where they reach this one, and what it shows them.
    pub(super) among: Option<(String, String)>,
    /// Nodes that sent what was not asked for, or nothing.
    bad: Mutex<BTreeSet<String>>,
    said: Mutex<HashMap<usize, String>>,
}

impl Hunt {
    pub(super) fn new(
        client: reqwest::Client,
        sources: Arc<Sources>,
        target: Arc<Target>,
        names: Arc<Vec<Id>>,
        manifest: &str,
    ) -> Self {
        Self {
            client,
            sources,
            target,
            names,
            manifest: manifest.to_owned(),
            holding: None,
            among: None,
            bad: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// Until nothing is lacking; `told` gets the bytes written each time.
    pub(super) async fn run(
        &self,
        batches: Vec<Batch>,
        mut told: impl FnMut(u64),
    ) -> Result<(), TransferError> {
        let mut waiting = VecDeque::from(batches);
        let mut under_way = FuturesUnordered::new();
        loop {
            while under_way.len() < CONNECTIONS
                && let Some(batch) = take_ready(&mut waiting, Instant::now())
            {
                under_way.push(self.attempt(batch));
            }
            if under_way.is_empty() && waiting.is_empty() {
                return Ok(());
            }
            let next = waiting.iter().filter_map(|b| b.ready).min();
            let pause = next.map_or(Duration::MAX, |at| at - Instant::now());
            let idle = under_way.len() < CONNECTIONS && next.is_some();
            tokio::select! {
                Some(done) = under_way.next(), if !under_way.is_empty() => {
                    let (batch, bytes) = done?;
                    told(bytes);
                    if !batch.lacking.is_empty() {
                        waiting.push_back(batch);
                    }
                }
                () = tokio::time::sleep(pause), if idle => {}
            }
        }
    }

    /// One step for a batch; the bytes that were written.
    async fn attempt(&self, mut batch: Batch) -> Result<(Batch, u64), TransferError> {
        batch.ready = None;
        let written = match batch.next() {
            Step::Nodes(nodes) => self.ask_nodes(&mut batch, nodes).await?,
            Step::Member { place, insist } => self.ask_member(&mut batch, place, insist).await?,
        };
        Ok((batch, written))
    }

    async fn ask_member(
        &self,
        batch: &mut Batch,
        place: usize,
        insist: bool,
    ) -> Result<u64, TransferError> {
        let number = self.sources.at(place);
        let ids = self.ids(batch);
        let failure = match self.member_gives(number, batch, &ids, insist).await {
            Ok((chunks, nodes)) => {
                let written = self.write(batch, chunks).await?;
                if batch.lacking.is_empty() {
                    return Ok(written);
                }
                if !nodes.is_empty() {
                    batch.told(nodes, Instant::now());
                    return Ok(written);
                }
                let lacking = batch.lacking.len();
                self.said(number, format!("lacks {lacking} of {} chunks", ids.len()));
                (self.failed(batch), written)
            }
            Err(why) => {
                self.sources.penalize(number);
                self.said(number, why);
                (self.failed(batch), 0)
            }
        };
        match failure {
            (true, written) => Ok(written),
            (false, _) => Err(self.sources.nobody(&self.said.lock())),
        }
    }

    fn failed(&self, batch: &mut Batch) -> bool {
        batch.failed(self.sources.count(), Instant::now())
    }

    fn said(&self, number: usize, why: String) {
        self.said.lock().insert(number, why);
    }

    async fn member_gives(
        &self,
        number: usize,
        batch: &Batch,
        ids: &[Id],
        insist: bool,
    ) -> Result<(Vec<Chunk>, Vec<String>), String> {
        let registry = self.sources.registry(number);
        let given = match &self.among {
            None => Given {
                records: registry.get(ids).await.map_err(why)?,
                nodes: Vec::new(),
            },
            Some((address, _)) => {
                let bad: Vec<String> = self.bad.lock().iter().cloned().collect();
                let mut avoid: Vec<&str> = batch.avoid().collect();
                avoid.extend(bad.iter().map(String::as_str));
                avoid.sort_unstable();
                avoid.dedup();
                avoid.truncate(AVOID_MAX);
                let asked = Asked {
                    manifest: &self.manifest,
                    node: address,
                    avoid,
                    insist,
                };
                registry.give(ids, &asked).await.map_err(why)?
            }
        };
        let chunks = verify(given.records).await.map_err(|e| e.to_string())?;
        let mut nodes = given.nodes;
        if let Some((address, _)) = &self.among {
            nodes.retain(|n| n != address);
        }
        Ok((chunks, nodes))
    }

    /// Nodes were named that may all be bad by now: then the member is next again.
    async fn ask_nodes(&self, batch: &mut Batch, nodes: Vec<String>) -> Result<u64, TransferError> {
        let Some((_, key)) = &self.among else {
            return Ok(0);
        };
        let mut written = 0;
        for node in turned(nodes, batch.lacking.first().copied().unwrap_or(0)) {
            if self.bad.lock().contains(&node) {
                batch.drop_node(&node);
                continue;
            }
            let ids = self.ids(batch);
            let of_node = Registry::new(&self.client, &node);
            let answer = match of_node.of_node(&ids, &self.manifest, key).await {
                Ok((records, held)) => verify(records).await.map(|chunks| (chunks, held)),
                Err(error) => Err(TransferError::Unavailable(why(error))),
            };
            match answer {
                Ok((chunks, held)) => {
                    batch.heard(&node, held, Instant::now());
                    written += self.write(batch, chunks).await?;
                    if batch.lacking.is_empty() {
                        return Ok(written);
                    }
                }
                Err(TransferError::Io(error)) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%node, %error, "a node does not give what it should: asking others");
                    self.bad.lock().insert(node.clone());
                    batch.drop_node(&node);
                }
            }
        }
        batch.wait(Instant::now());
        Ok(written)
    }

    /// Names of what a batch lacks, each once.
    fn ids(&self, batch: &Batch) -> Vec<Id> {
        let mut seen = HashSet::new();
        let names = batch.lacking.iter().map(|n| *self.name(*n));
        names.filter(|id| seen.insert(*id)).collect()
    }

    fn name(&self, number: u64) -> &Id {
        &self.names[usize::try_from(number).unwrap_or(usize::MAX)]
    }

    /// Write what came and strike it off; the bytes.
    async fn write(&self, batch: &mut Batch, chunks: Vec<Chunk>) -> Result<u64, TransferError> {
        if chunks.is_empty() {
            return Ok(0);
        }
        let (records, bytes): (Vec<_>, Vec<_>) = chunks
            .into_iter()
            .map(|(r, b)| (r.clone(), (r.id, b)))
            .unzip();
        let chunks: HashMap<Id, Vec<u8>> = bytes.into_iter().collect();
        let come = |n: &u64| chunks.contains_key(self.name(*n));
        let (here, lacking): (Vec<u64>, Vec<u64>) = batch.lacking.iter().partition(|n| come(n));
        if let Some(holding) = &self.holding {
            holding.warm(records);
        }
        let (target, names) = (Arc::clone(&self.target), Arc::clone(&self.names));
        let numbers = here.clone();
        let write = move || write_chunks(&target, &names, &numbers, &chunks);
        let written = blocking(write).await?;
        batch.lacking = lacking;
        if let Some(holding) = &self.holding {
            here.iter().for_each(|n| holding.mark(*n));
        }
        Ok(written)
    }
}

/// The first that may be worked on now.
fn take_ready(waiting: &mut VecDeque<Batch>, now: Instant) -> Option<Batch> {
    let at = waiting
        .iter()
        .position(|b| b.ready.is_none_or(|ready| ready <= now))?;
    waiting.remove(at)
}

/// Beginning elsewhere for each batch, so that not all turn to the same node first.
fn turned(mut nodes: Vec<String>, by: u64) -> Vec<String> {
    if !nodes.is_empty() {
        let by = usize::try_from(by / super::BATCH_CHUNKS as u64).unwrap_or(0) % nodes.len();
        nodes.rotate_left(by);
    }
    nodes
}

/// Write these chunks, all of which have come; the bytes. Blocks.
pub(super) fn write_chunks(
    target: &Target,
    names: &[Id],
    numbers: &[u64],
    chunks: &HashMap<Id, Vec<u8>>,
) -> Result<u64, TransferError> {
    let mut slots = Slots::new(numbers.len());
    for (slot, &number) in numbers.iter().enumerate() {
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
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        let last = run.last().map_or(0, |&n| chunk_len_at(target.size, n));
        let len = (run.len() - 1) * CHUNK + usize::try_from(last).unwrap_or(0);
        target.write(run[0], &slots.get(from..from + run.len())[..len])?;
        from += run.len();
        written += len as u64;
    }
    Ok(written)
}
