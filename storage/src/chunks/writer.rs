//! The one thread that writes packs. It takes every put that waits, writes them all, and makes
//! them durable with one fdatasync.

use super::direct::{Appender, BLOCK};
use super::index::{Entry, Location};
use super::record::{HEADER_LEN, Header};
use super::{ChunkId, PutReport, Record, Shared, pack};
use crate::{Result, StorageError};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc;

/// Bytes that share one fdatasync at most: bounds how long a put waits for others.
const BATCH_BYTES_MAX: usize = 64 << 20;

/// Verified records to write.
pub(super) struct Job {
    pub records: Vec<Record>,
    pub reply: mpsc::SyncSender<Result<PutReport>>,
}

/// Owns the growing pack.
pub(super) struct Writer {
    shared: Arc<Shared>,
    pack: pack::Active,
    out: Appender,
    pack_len: u64,
    /// Why nothing more is written: a failed fsync says nothing about what is on disk, so it is
    /// never tried again.
    stopped: Option<String>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, pack: pack::Active, pack_len: u64) -> Result<Self> {
        let out = Appender::open(&pack::path(&shared.dir, pack.number), pack.len)?;
        Ok(Self {
            shared,
            pack,
            out,
            pack_len,
            stopped: None,
        })
    }

    /// Serve until all senders are gone.
    pub(super) fn run(mut self, jobs: &mpsc::Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut bytes = size(&first);
            let mut batch = vec![first];
            while bytes < BATCH_BYTES_MAX {
                let Ok(job) = jobs.try_recv() else { break };
                bytes += size(&job);
                batch.push(job);
            }
            self.serve(batch);
        }
    }

    fn serve(&mut self, batch: Vec<Job>) {
        let result = match &self.stopped {
            Some(why) => Err(StorageError::Stopped(why.clone())),
            None => self.write(&batch),
        };
        // A caller that has gone does not need its answer.
        match result {
            Ok(reports) => {
                for (job, report) in batch.into_iter().zip(reports) {
                    let _ = job.reply.send(Ok(report));
                }
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "could not write chunks");
                for job in batch {
                    let _ = job.reply.send(Err(again(&error)));
                }
            }
        }
    }

    /// All jobs of a batch: durable, then held, then answered.
    fn write(&mut self, batch: &[Job]) -> Result<Vec<PutReport>> {
        let mut added: HashMap<ChunkId, Location> = HashMap::new();
        let mut order: Vec<Entry> = Vec::new();
        let mut reports = Vec::with_capacity(batch.len());
        let appended = batch.iter().try_for_each(|job| {
            let mut report = PutReport::default();
            for record in &job.records {
                if added.contains_key(&record.id) || self.shared.index.get(&record.id).is_some() {
                    continue;
                }
                let at = self.append(record)?;
                added.insert(record.id, at);
                order.push((record.id, at));
                report.stored += 1;
                report.bytes += u64::from(at.stored_len) + HEADER_LEN as u64;
            }
            reports.push(report);
            Ok(())
        });
        if let Err(error) = appended {
            // Nothing of this batch was acknowledged: the pack ends where it did (disk full).
            if let Err(worse) = self.out.rewind(self.pack.len) {
                self.stopped = Some(chain(&worse));
            }
            return Err(error);
        }
        self.commit()?;
        self.shared.index.insert(&order);
        self.pack.entries.extend(order);
        if self.pack.len >= self.pack_len
            && let Err(error) = self.roll()
        {
            // This batch is safe; the next one has nowhere to go.
            self.stopped = Some(chain(&error));
        }
        Ok(reports)
    }

    fn append(&mut self, record: &Record) -> Result<Location> {
        let full = |_| StorageError::Stopped("a pack has grown past 4 GiB".to_owned());
        let offset = u32::try_from(self.out.position()).map_err(full)?;
        let header = Header::of(record);
        self.out.push(&header.encode())?;
        self.out.push(&record.data)?;
        Ok(Location {
            pack: self.pack.number,
            offset,
            stored_len: header.stored_len,
            raw_len: header.raw_len,
        })
    }

    fn commit(&mut self) -> Result<()> {
        match self.out.commit() {
            Ok(()) => {
                self.pack.len = self.out.position();
                debug_assert_eq!(self.pack.len % BLOCK as u64, 0);
                Ok(())
            }
            Err(error) if is_full(&error) && self.out.rewind(self.pack.len).is_ok() => Err(error),
            Err(error) => {
                self.stopped = Some(chain(&error));
                Err(error)
            }
        }
    }

    fn roll(&mut self) -> Result<()> {
        pack::seal(&self.shared.dir, &self.pack)?;
        self.pack = pack::create(&self.shared.dir, self.pack.number + 1)?;
        self.out = Appender::open(
            &pack::path(&self.shared.dir, self.pack.number),
            self.pack.len,
        )?;
        Ok(())
    }
}

fn size(job: &Job) -> usize {
    job.records.iter().map(|r| r.data.len() + HEADER_LEN).sum()
}

/// A full disk refuses a write before it happens; the data written so far is as it was.
fn is_full(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { action: "append to", source, .. }
        if source.kind() == std::io::ErrorKind::StorageFull)
}

fn chain(error: &StorageError) -> String {
    match error {
        StorageError::Io { source, .. } => format!("{error}: {source}"),
        other => other.to_string(),
    }
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
        other => StorageError::Stopped(other.to_string()),
    }
}
