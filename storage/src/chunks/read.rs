//! Reading records: few large reads instead of many small ones.

use super::index::{Entry, Location};
use super::record::{HEADER_LEN, Header};
use super::shared::Shared;
use super::{ChunkId, Record};
use crate::{Result, StorageError};
use bytes::Bytes;

/// Longest single read.
const READ_MAX: u64 = 4 << 20;
/// Bytes between two wanted records that are read along rather than skipped.
const GAP_MAX: u64 = 64 << 10;

/// What was found where chunks should be.
#[derive(Default)]
pub(super) struct Seen {
    /// In disk order; their checksums are good.
    pub records: Vec<(Record, Location)>,
    /// Something else.
    pub damaged: Vec<Entry>,
}

impl Shared {
    /// All that are held, in disk order; neighbours are read together. They count as used. What turns
    /// out damaged is not held any more.
    pub(super) fn read_many(&self, ids: &[ChunkId]) -> Result<Seen> {
        let mut wanted: Vec<Entry> = ids
            .iter()
            .filter_map(|id| Some((*id, self.index.touch(id)?)))
            .collect();
        let mut all = Seen::default();
        while !wanted.is_empty() {
            let seen = self.read_entries(&mut wanted)?;
            all.records.extend(seen.records);
            wanted.clear();
            for (id, at) in seen.damaged {
                match self.index.peek(&id) {
                    // It was moved while it was looked for.
                    Some(now) if now != at => wanted.push((id, now)),
                    Some(_) if self.quarantine(&id, &at) => all.damaged.push((id, at)),
                    _ => {}
                }
            }
        }
        Ok(all)
    }

    /// What lies at these places; changes nothing, and nothing counts as used.
    pub(super) fn read_entries(&self, wanted: &mut Vec<Entry>) -> Result<Seen> {
        self.read_places(wanted, false)
    }

    /// The same from where it is durable, not from memory or a copy near by.
    pub(super) fn read_stored(&self, wanted: &mut Vec<Entry>) -> Result<Seen> {
        self.read_places(wanted, true)
    }

    fn read_places(&self, wanted: &mut Vec<Entry>, stored: bool) -> Result<Seen> {
        wanted.sort_unstable_by_key(|(_, at)| (at.pack, at.offset));
        wanted.dedup_by_key(|(id, _)| *id);
        let mut seen = Seen::default();
        let mut rest = wanted.as_slice();
        while !rest.is_empty() {
            let (run, after) = rest.split_at(run_len(rest));
            self.read_run(run, stored, &mut seen)?;
            rest = after;
        }
        Ok(seen)
    }

    fn read_run(&self, run: &[Entry], stored: bool, seen: &mut Seen) -> Result<()> {
        let (Some((_, first)), Some((_, last))) = (run.first(), run.last()) else {
            return Ok(());
        };
        let start = u64::from(first.offset);
        let len = usize::try_from(end(last) - start).unwrap_or(0);
        let read = match stored {
            true => self.backend.read_stored(first.pack, start, len),
            false => self.backend.read(first.pack, start, len),
        };
        let bytes = match read {
            Ok(bytes) => bytes,
            // The pack was lost, or has just been removed.
            Err(error) if gone(&error) => Bytes::new(),
            // A place that cannot be read is damage; those beside it may be sound.
            Err(error) if unreadable(&error) && run.len() == 1 => Bytes::new(),
            Err(error) if unreadable(&error) => {
                let mut alone = run.chunks(1);
                return alone.try_for_each(|one| self.read_run(one, stored, seen));
            }
            Err(error) => return Err(error),
        };
        for (id, at) in run {
            let from = usize::try_from(u64::from(at.offset) - start).unwrap_or(usize::MAX);
            match parse(&bytes, from, id, at) {
                Some(record) => seen.records.push((record, *at)),
                None => seen.damaged.push((*id, *at)),
            }
        }
        Ok(())
    }
}

/// Is it that there is no such file?
pub(super) fn gone(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

fn unreadable(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } if source.raw_os_error() == Some(EIO))
}

/// What a disk answers that cannot read a sector.
const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

/// Where the record at a place ends.
pub(super) fn end(at: &Location) -> u64 {
    u64::from(at.offset) + HEADER_LEN as u64 + u64::from(at.stored_len)
}

/// How many of the first entries are read together.
fn run_len(entries: &[Entry]) -> usize {
    let first = &entries[0].1;
    let together = |pair: &[Entry]| {
        let (a, b) = (&pair[0].1, &pair[1].1);
        a.pack == b.pack
            && u64::from(b.offset).saturating_sub(end(a)) <= GAP_MAX
            && end(b) - u64::from(first.offset) <= READ_MAX
    };
    1 + entries.windows(2).take_while(|pair| together(pair)).count()
}

pub(super) fn parse(bytes: &Bytes, from: usize, id: &ChunkId, at: &Location) -> Option<Record> {
    let to = from.checked_add(HEADER_LEN + at.stored_len as usize)?;
    let header = Header::decode(bytes.get(from..to)?)?;
    let data = bytes.slice(from + HEADER_LEN..to);
    let codec = header.codec?;
    (header.id == *id && header.matches(&data)).then_some(Record {
        id: *id,
        codec,
        raw_len: header.raw_len,
        data,
    })
}
