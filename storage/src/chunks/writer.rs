//! The one thread that writes packs. It takes every put that waits, writes them all, and makes
//! them durable with one fdatasync. What else changes files of packs (moves, seals, removals) goes
//! through it as well, one at a time, so that no two changes of a pack ever meet.

use super::direct::{Appender, BLOCK};
use super::index::{Entry, Location};
use super::record::{HEADER_LEN, Header};
use super::shared::Shared;
use super::{ChunkId, PutReport, Record, pack};
use crate::{Result, StorageError};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

/// Bytes that share one fdatasync at most: bounds how long a put waits for others.
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
    /// What the growing pack holds.
    Entries(Reply<(u32, Vec<Entry>)>),
    /// These records are bad: no index file may name them.
    Strike(Vec<Entry>),
    /// Nothing in this pack is needed any more; the bytes it took.
    Remove(u32, Reply<u64>),
}

/// Verified records to write.
pub(super) struct Put {
    pub records: Vec<Record>,
    pub reply: Reply<PutReport>,
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
        let path = pack::path(&shared.dir, pack.number);
        let out = Appender::open(&shared.disk, &path, pack.len)?;
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
        let mut next = None;
        while let Some(job) = next.take().or_else(|| jobs.recv().ok()) {
            match job {
                Job::Put(first) => next = self.gather(first, jobs),
                other => self.serve_other(other),
            }
        }
    }

    /// Serve a put with those that wait behind it; what came after them and is none.
    fn gather(&mut self, first: Put, jobs: &mpsc::Receiver<Job>) -> Option<Job> {
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

    fn serve(&mut self, batch: Vec<Put>) {
        match self.working().and_then(|()| self.write(&batch)) {
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

    fn serve_other(&mut self, job: Job) {
        match job {
            Job::Put(put) => self.serve(vec![put]),
            Job::Move(records, reply) => {
                answer(
                    &reply,
                    self.working().and_then(|()| self.move_here(&records)),
                );
            }
            Job::Seal(reply) => answer(&reply, self.working().and_then(|()| self.seal())),
            Job::Entries(reply) => {
                answer(&reply, Ok((self.pack.number, self.pack.entries.clone())));
            }
            Job::Strike(entries) => {
                if let Err(error) = self.strike(&entries) {
                    tracing::error!(error = %chain(&error), "could not take damaged chunks out of an index file; a restart finds them again");
                }
            }
            Job::Remove(number, reply) => {
                answer(
                    &reply,
                    self.working().and_then(|()| self.remove_pack(number)),
                );
            }
        }
    }

    fn working(&self) -> Result<()> {
        match &self.stopped {
            Some(why) => Err(StorageError::Stopped(why.clone())),
            None => Ok(()),
        }
    }

    /// All puts of a batch: durable, then held, then answered.
    fn write(&mut self, batch: &[Put]) -> Result<Vec<PutReport>> {
        let mut added: HashMap<ChunkId, Location> = HashMap::new();
        let mut order: Vec<Entry> = Vec::new();
        let mut reports = Vec::with_capacity(batch.len());
        let appended = batch.iter().try_for_each(|put| {
            let mut report = PutReport::default();
            for record in &put.records {
                // Told to be held: it counts as used.
                if added.contains_key(&record.id) || self.shared.index.touch(&record.id).is_some() {
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
        self.finish(appended)?;
        self.shared.index.insert(&order);
        self.shared.healed(&order);
        self.extend(order);
        Ok(reports)
    }

    /// The copies are durable before the index names them, and it names them before anything
    /// removes the pack that they came from.
    fn move_here(&mut self, records: &[(Record, Location)]) -> Result<()> {
        let mut order: Vec<(Location, Entry)> = Vec::with_capacity(records.len());
        let appended = records.iter().try_for_each(|(record, from)| {
            // Put again elsewhere, or found damaged, since it was read.
            if self.shared.index.peek(&record.id) == Some(*from) {
                order.push((*from, (record.id, self.append(record)?)));
            }
            Ok(())
        });
        self.finish(appended)?;
        for (from, (id, to)) in &order {
            self.shared.index.relocate(id, from, *to);
        }
        self.extend(order.into_iter().map(|(_, entry)| entry).collect());
        Ok(())
    }

    /// Make what was appended durable, or let the pack end where it did.
    fn finish(&mut self, appended: Result<()>) -> Result<()> {
        if let Err(error) = appended {
            // Nothing of this batch was acknowledged (disk full).
            if let Err(worse) = self.out.rewind(self.pack.len) {
                self.stopped = Some(chain(&worse));
            }
            return Err(error);
        }
        self.commit()
    }

    fn extend(&mut self, order: Vec<Entry>) {
        self.pack.entries.extend(order);
        self.shared.note_pack(self.pack.number, self.pack.len);
        if self.pack.len >= self.pack_len
            && let Err(error) = self.roll()
        {
            // This batch is safe; the next one has nowhere to go.
            self.stopped = Some(chain(&error));
        }
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
        let (disk, dir) = (&self.shared.disk, &self.shared.dir);
        pack::seal(&**disk, dir, &self.pack)?;
        self.pack = pack::create(&**disk, dir, self.pack.number + 1)?;
        let path = pack::path(dir, self.pack.number);
        self.out = Appender::open(disk, &path, self.pack.len)?;
        self.shared.note_pack(self.pack.number, self.pack.len);
        self.shared
            .active
            .store(self.pack.number, Ordering::Relaxed);
        Ok(())
    }

    fn seal(&mut self) -> Result<u32> {
        if self.pack.len > BLOCK as u64 {
            self.roll().inspect_err(|error| {
                self.stopped = Some(chain(error));
            })?;
        }
        Ok(self.pack.number)
    }

    fn strike(&mut self, bad: &[Entry]) -> Result<()> {
        let bad: HashSet<(ChunkId, u32, u32)> = bad
            .iter()
            .map(|(id, at)| (*id, at.pack, at.offset))
            .collect();
        let good = |(id, at): &Entry| !bad.contains(&(*id, at.pack, at.offset));
        self.pack.entries.retain(good);
        let mut packs: Vec<u32> = bad.iter().map(|(_, pack, _)| *pack).collect();
        packs.sort_unstable();
        packs.dedup();
        for number in packs {
            let (disk, dir) = (&*self.shared.disk, &self.shared.dir);
            let len = self.shared.packs.lock().get(&number).copied();
            let (Some(len), true) = (len, number != self.pack.number) else {
                continue;
            };
            let path = pack::index_path(dir, number);
            if let Some(mut entries) = super::index::load(&path, number, len) {
                entries.retain(good);
                super::index::save(disk, &path, len, &entries)?;
            }
        }
        Ok(())
    }

    /// The index file first: a pack without one is scanned, an index file without a pack is nothing.
    fn remove_pack(&mut self, number: u32) -> Result<u64> {
        if number == self.pack.number {
            let why = format!("pack {number} still grows");
            return Err(StorageError::Misuse(why));
        }
        let (disk, dir) = (&*self.shared.disk, &self.shared.dir);
        let len = self.shared.forget_pack(number);
        let removed = pack::remove(disk, dir, number);
        // Behind the removal, so that nobody opens it again.
        self.shared.close(number);
        if removed.is_err() {
            self.shared.note_pack(number, len);
        }
        removed.map(|()| len)
    }
}

/// A caller that has gone does not need its answer.
fn answer<T>(reply: &Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}

fn size(records: &[Record]) -> usize {
    records.iter().map(|r| r.data.len() + HEADER_LEN).sum()
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
