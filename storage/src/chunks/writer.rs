//! The one thread that writes packs. It takes every put that waits, writes them all, and makes
//! them durable together. What else changes packs (moves, seals, removals) goes through it as well,
//! one at a time, so that no two changes of a pack ever meet.

use super::bucket::{Adopted, Members};
use super::index::{Entry, Location};
use super::local::chain;
use super::record::HEADER_LEN;
use super::shared::Shared;
use super::{ChunkId, PutReport, Record};
use crate::{Result, StorageError};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc;

/// Bytes that share one append at most: bounds how long a put waits for others.
const BATCH_BYTES_MAX: usize = 64 << 20;

/// Where an answer goes.
pub(super) type Reply<T> = mpsc::SyncSender<Result<T>>;

/// What the writer is asked to do.
pub(super) enum Job {
    /// Verified records to write.
    Put(Put),
    /// Good copies of chunks that lie where it says: write them again, and let the index name the
    /// new place.
    Move(Vec<(Record, Location)>, Reply<()>),
    /// Begin another pack, unless nothing is in the growing one; the number of the growing pack.
    Seal(Reply<u32>),
    /// These records are bad: no index file may name them.
    Strike(Vec<Entry>, Reply<()>),
    /// Learn what other members have put; those of these chunks that are not held then.
    Adopt(Vec<ChunkId>, Reply<Vec<ChunkId>>),
    /// Delete from a bucket what nobody relies on.
    Tidy(Members, Reply<()>),
    /// This pack, which held these, is not needed any more, unless one of them has come to be held
    /// there again; the bytes it took.
    Remove(u32, Vec<Entry>, Reply<Option<u64>>),
}

/// Verified records to write.
pub(super) struct Put {
    pub records: Vec<Record>,
    pub reply: Reply<PutReport>,
}

/// The only one to change packs.
pub(super) struct Writer {
    shared: Arc<Shared>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Serve until all senders are gone.
    pub(super) fn run(&self, jobs: &mpsc::Receiver<Job>) {
        let mut next = None;
        while let Some(job) = next.take().or_else(|| jobs.recv().ok()) {
            match job {
                Job::Put(first) => next = self.gather(first, jobs),
                other => self.serve_other(other),
            }
        }
    }

    /// Serve a put with those that wait behind it; what came after them and is none.
    fn gather(&self, first: Put, jobs: &mpsc::Receiver<Job>) -> Option<Job> {
        let mut bytes = size(&first.records);
        let mut batch = vec![first];
        let mut other = None;
        while bytes < BATCH_BYTES_MAX {
            match jobs.try_recv() {
                Ok(Job::Put(put)) => {
                    bytes += size(&put.records);
                    batch.push(put);
                }
                Ok(job) => {
                    other = Some(job);
                    break;
                }
                Err(_) => break,
            }
        }
        self.serve(batch);
        other
    }

    fn serve(&self, batch: Vec<Put>) {
        match self.write(&batch) {
            Ok(reports) => {
                for (put, report) in batch.into_iter().zip(reports) {
                    answer(&put.reply, Ok(report));
                }
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "could not write chunks");
                for put in batch {
                    answer(&put.reply, Err(again(&error)));
                }
            }
        }
    }

    fn serve_other(&self, job: Job) {
        let backend = &self.shared.backend;
        match job {
            Job::Put(put) => self.serve(vec![put]),
            Job::Move(records, reply) => answer(&reply, self.move_here(&records)),
            Job::Seal(reply) => answer(&reply, backend.seal()),
            Job::Strike(entries, reply) => answer(&reply, backend.strike(&entries)),
            Job::Adopt(ids, reply) => answer(&reply, self.adopt(&ids)),
            Job::Tidy(members, reply) => {
                let tidied = backend.common().map_or(Ok(()), |b| b.tidy(&members));
                answer(&reply, tidied);
            }
            Job::Remove(number, entries, reply) => {
                // Nobody else adds to the index: what is not there now does not come before the removal.
                let held = |(id, at): &Entry| self.shared.index.peek(id) == Some(*at);
                let removed = match entries.iter().any(held) {
                    true => Ok(None),
                    false => backend.remove(number).map(Some),
                };
                answer(&reply, removed);
            }
        }
    }

    /// All puts of a batch: durable, then held, then answered.
    fn write(&self, batch: &[Put]) -> Result<Vec<PutReport>> {
        let mut added: HashSet<ChunkId> = HashSet::new();
        let mut fresh: Vec<&Record> = Vec::new();
        let mut reports = Vec::with_capacity(batch.len());
        for put in batch {
            let mut report = PutReport::default();
            for record in &put.records {
                // Told to be held: it counts as used.
                if added.contains(&record.id) || self.shared.index.touch(&record.id).is_some() {
                    continue;
                }
                added.insert(record.id);
                fresh.push(record);
                report.stored += 1;
                report.bytes += (record.data.len() + HEADER_LEN) as u64;
            }
            reports.push(report);
        }
        if fresh.is_empty() {
            return Ok(reports);
        }
        let places = self.shared.backend.append(&fresh)?;
        let ids = fresh.iter().map(|record| record.id);
        let order: Vec<Entry> = ids.zip(places).collect();
        self.shared.index.insert(&order);
        self.shared.healed(&order);
        self.shared.backend.settle();
        Ok(reports)
    }

    /// What others put; then, only for those that are still lacking, a look at everything.
    fn adopt(&self, ids: &[ChunkId]) -> Result<Vec<ChunkId>> {
        let index = &self.shared.index;
        let lacking = || -> Vec<ChunkId> {
            let absent = |id: &&ChunkId| index.touch(id).is_none();
            ids.iter().filter(absent).copied().collect()
        };
        let Some(bucket) = self.shared.backend.common() else {
            return Ok(lacking());
        };
        let take = |adopted: Vec<Adopted>| {
            for pack in adopted {
                index.insert_better(&pack.entries, |new, old| bucket.better(new, old));
                self.shared.healed(&pack.entries);
                self.shared.packs().note(pack.number, pack.len);
            }
        };
        take(bucket.look()?);
        let rest = lacking();
        if !rest.is_empty() {
            take(bucket.dig(&rest.into_iter().collect())?);
        }
        Ok(lacking())
    }

    /// The copies are durable before the index names them, and it names them before anything
    /// removes the pack that they came from.
    fn move_here(&self, records: &[(Record, Location)]) -> Result<()> {
        // Not those that were put again elsewhere, or found damaged, since they were read.
        let is_there = |(record, from): &&(Record, Location)| {
            self.shared.index.peek(&record.id) == Some(*from)
        };
        let moved: Vec<&(Record, Location)> = records.iter().filter(is_there).collect();
        if moved.is_empty() {
            return Ok(());
        }
        let copies: Vec<&Record> = moved.iter().map(|(record, _)| record).collect();
        let places = self.shared.backend.append(&copies)?;
        for ((record, from), to) in moved.into_iter().zip(places) {
            self.shared.index.relocate(&record.id, from, to);
        }
        self.shared.backend.settle();
        Ok(())
    }
}

/// A caller that has gone does not need its answer.
fn answer<T>(reply: &Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}

fn size(records: &[Record]) -> usize {
    records.iter().map(|r| r.data.len() + HEADER_LEN).sum()
}

/// The same error for another caller.
fn again(error: &StorageError) -> StorageError {
    match error {
        StorageError::Io {
            action,
            path,
            source,
        } => StorageError::Io {
            action,
            path: path.clone(),
            source: std::io::Error::new(source.kind(), source.to_string()),
        },
        StorageError::Unavailable { action, source } => StorageError::Unavailable {
            action,
            source: Arc::clone(source),
        },
        StorageError::Foreign(why) => StorageError::Foreign(why.clone()),
        other => StorageError::Stopped(other.to_string()),
    }
}
