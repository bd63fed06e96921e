//! Reads the segments at start and rebuilds what the log held. Tells a torn write (the end of the last
//! segment, never acknowledged: cut off) from damage (anything that was durable: refused).

use super::LogEntry;
use super::index::{Index, Slot};
use super::record::{Bad, HEADER_LEN, Record, decode};
use super::segment::{self, Segment};
use crate::disk::{Disk, file_names, io_error};
use crate::{Result, StorageError};
use std::collections::VecDeque;
use std::path::Path;

/// What was found. `segments` is empty in a new log.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    pub(super) index: Index,
    pub(super) segments: VecDeque<Segment>,
    /// Number for the next segment when there is none.
    pub(super) next_number: u64,
    /// Oldest segment that is needed, as the log itself says.
    oldest: u64,
}

/// Rebuild from the files in `dir`.
pub(super) fn recover(disk: &dyn Disk, dir: &Path, cache_bytes: usize) -> Result<Recovered> {
    let mut numbers: Vec<u64> = file_names(dir)?
        .iter()
        .filter_map(|name| segment::number(name))
        .collect();
    let unborn = unborn(dir, &mut numbers)?;
    let mut found = Recovered {
        next_number: numbers.last().map_or(1, |n| n + 1),
        ..Recovered::default()
    };
    // Segments are deleted oldest first, but a power cut may keep any of those deletions: read the
    // unbroken run that ends with the newest, then check that the log needs nothing before it.
    let run = run_start(&numbers);
    let (stale, run) = numbers.split_at(run);
    for (i, number) in run.iter().enumerate() {
        let last = i + 1 == run.len();
        let segment = read_segment(disk, dir, *number, last, &mut found)?;
        found.segments.push_back(segment);
        found.index.evict(cache_bytes);
    }
    finish(disk, dir, stale, unborn, &mut found)?;
    Ok(found)
}

fn run_start(numbers: &[u64]) -> usize {
    (1..numbers.len())
        .rev()
        .find(|i| numbers[*i] != numbers[i - 1] + 1)
        .unwrap_or(0)
}

/// A crash while the newest segment was created leaves it without its first record: it is taken from
/// `numbers`, to be removed. It held nothing, unless a record in it says that something was durable.
fn unborn(dir: &Path, numbers: &mut Vec<u64>) -> Result<Option<u64>> {
    let Some(&number) = numbers.last() else {
        return Ok(None);
    };
    let path = segment::path(dir, number);
    let buf = std::fs::read(&path).map_err(io_error("read", &path))?;
    if !matches!(decode(&buf, 0, 0, number), Err(Bad::Noise)) {
        return Ok(None);
    }
    if durable_after(&buf, 0, number) > 0 {
        return Err(StorageError::corrupt(
            &path,
            "its first record does not match its checksum",
        ));
    }
    Ok(numbers.pop())
}

fn read_segment(
    disk: &dyn Disk,
    dir: &Path,
    number: u64,
    last: bool,
    found: &mut Recovered,
) -> Result<Segment> {
    let path = segment::path(dir, number);
    let file = disk.open(&path).map_err(io_error("open", &path))?;
    let buf = std::fs::read(&path).map_err(io_error("read", &path))?;
    let mut segment = Segment {
        number,
        path,
        file,
        len: 0,
        highest: None,
    };
    let (mut at, mut sealed) = (0, false);
    while at < buf.len() {
        match decode(&buf, at, 0, number) {
            Ok(record) => {
                sealed = matches!(record.record, Record::Synced);
                replay(record.record, at, &mut segment, found)?;
                at += record.len;
            }
            // Lengthened ahead of the records. A sealed segment was shortened again, as far as that
            // was on disk when the power went.
            Err(Bad::Noise) if (last || sealed) && tail(&buf[at..]) == Tail::Empty => {
                if last {
                    shorten(&segment, at)?;
                }
                break;
            }
            Err(Bad::Noise) if last && durable_after(&buf, at, number) <= at as u64 => {
                cut_tail(&segment, at, &buf[at..])?;
                break;
            }
            Err(bad) => return Err(refuse(&segment.path, at, &bad)),
        }
    }
    segment.len = at as u64;
    if last {
        // After a kill the tail may be in the page cache only; from here on it counts as durable.
        let path = &segment.path;
        segment.file.sync_data().map_err(io_error("sync", path))?;
    }
    Ok(segment)
}

/// The highest offset that any intact record after `from` says was durable when it was written.
fn durable_after(buf: &[u8], from: usize, number: u64) -> u64 {
    (from + 1..buf.len().saturating_sub(HEADER_LEN - 1))
        .filter_map(|at| decode(buf, at, 0, number).ok())
        .map(|found| found.durable)
        .max()
        .unwrap_or(0)
}

/// What stands behind the last record.
#[derive(Debug, PartialEq, Eq)]
enum Tail {
    /// Room that was made ahead of the records.
    Empty,
    /// The same, and one bit in it is set: no write that was cut off leaves that.
    Flipped,
    /// A write that was cut off.
    Torn,
}

fn tail(rest: &[u8]) -> Tail {
    let ones = rest.iter().filter(|b| **b != 0).map(|b| b.count_ones());
    match ones.take(2).sum() {
        0 => Tail::Empty,
        1 => Tail::Flipped,
        _ => Tail::Torn,
    }
}

fn cut_tail(segment: &Segment, at: usize, rest: &[u8]) -> Result<()> {
    let (path, bytes) = (segment.path.display(), rest.len());
    if tail(rest) == Tail::Flipped {
        tracing::warn!(
            %path, offset = at,
            "a bit is set in the empty room behind the log's last record: nothing is lost by it, but the disk or the memory under it is not sound"
        );
    } else {
        tracing::warn!(
            %path, offset = at, bytes,
            "cutting off a torn write at the end of the log (it was never acknowledged)"
        );
    }
    shorten(segment, at)
}

fn shorten(segment: &Segment, at: usize) -> Result<()> {
    let path = &segment.path;
    segment
        .file
        .set_len(at as u64)
        .map_err(io_error("truncate", path))
}

fn refuse(path: &Path, at: usize, bad: &Bad) -> StorageError {
    match bad {
        Bad::Newer(version) => StorageError::Foreign(format!(
            "{} holds records of format {version}, which a newer release wrote; start that release",
            path.display()
        )),
        Bad::Noise => StorageError::corrupt(
            path,
            format!("at byte {at}: a record that was durable does not match its checksum"),
        ),
        Bad::Nonsense => {
            StorageError::corrupt(path, format!("at byte {at}: a record makes no sense"))
        }
    }
}

fn replay(record: Record, at: usize, segment: &mut Segment, found: &mut Recovered) -> Result<()> {
    let index = &mut found.index;
    if (at == 0) != matches!(record, Record::Start(_)) {
        return Err(refuse(&segment.path, at, &Bad::Nonsense));
    }
    match record {
        Record::Start(start) => {
            index.vote = start.vote;
            index.committed = start.committed;
            if let Some((purged, mark)) = start.purged
                && index.purges(purged)
            {
                index.purge(purged, mark);
            }
            found.oldest = start.oldest;
        }
        Record::Vote(vote) => index.vote = Some(vote),
        Record::Entry(i, bytes) => {
            // Older segments may be gone: an empty log may go on anywhere above the purge mark.
            let follows = match index.last() {
                Some(last) => i == last + 1,
                None => index.purges(i),
            };
            if !follows {
                let what = match index.last() {
                    Some(last) if i > last + 1 => format!(
                        "at byte {at}: entries {} to {} are missing before entry {i}: this file or the one before it was cut",
                        last + 1,
                        i - 1
                    ),
                    _ => format!("at byte {at}: entry {i} does not follow the one before it"),
                };
                return Err(StorageError::corrupt(&segment.path, what));
            }
            segment.highest = segment.highest.max(Some(i));
            let slot = Slot {
                ticket: 0,
                segment: segment.number,
                offset: at as u64,
                len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            };
            index.push(LogEntry { index: i, bytes }, slot);
        }
        Record::Truncate(after) => index.truncate_after(after),
        Record::Purge {
            index: purged,
            oldest,
            mark,
        } => {
            if index.purges(purged) {
                index.purge(purged, mark);
            }
            found.oldest = oldest;
        }
        Record::Committed(mark) => index.committed = mark,
        Record::Synced => {}
    }
    Ok(())
}

/// Check that no needed segment is missing, and finish an interrupted deletion or creation.
fn finish(
    disk: &dyn Disk,
    dir: &Path,
    stale: &[u64],
    unborn: Option<u64>,
    found: &mut Recovered,
) -> Result<()> {
    if let Some(front) = found.segments.front()
        && front.number > found.oldest
    {
        // Deleted by the word of a record that stood in the newest.
        if let Some(cut) = unborn {
            return Err(StorageError::corrupt(
                &segment::path(dir, cut),
                "this log segment was cut within its first record: those before it are not whole without it",
            ));
        }
        let missing = segment::path(dir, front.number - 1);
        return Err(StorageError::corrupt(
            &missing,
            "this log segment is missing",
        ));
    }
    if let (Some(first), Some((purged, _))) = (found.index.first(), &found.index.purged)
        && first != purged + 1
    {
        let what = format!("entries {} to {} are missing", purged + 1, first - 1);
        return Err(StorageError::corrupt(dir, what));
    }
    if let Some(number) = unborn {
        tracing::warn!(
            path = %segment::path(dir, number).display(),
            "removing a log segment whose creation was interrupted"
        );
    }
    let mut gone: Vec<u64> = stale.iter().copied().chain(unborn).collect();
    while found
        .segments
        .front()
        .is_some_and(|s| s.number < found.oldest)
    {
        gone.extend(found.segments.pop_front().map(|s| s.number));
    }
    for number in &gone {
        let path = segment::path(dir, *number);
        disk.remove(&path).map_err(io_error("remove", &path))?;
    }
    if !gone.is_empty() {
        disk.sync_dir(dir)
            .map_err(io_error("sync directory", dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_is_no_torn_write() {
        assert_eq!(tail(&[]), Tail::Empty);
        assert_eq!(tail(&[0; 9]), Tail::Empty);
        let mut rest = [0; 9];
        rest[7] = 16;
        assert_eq!(tail(&rest), Tail::Flipped);
        rest[7] = 17;
        assert_eq!(tail(&rest), Tail::Torn);
        rest[7] = 16;
        rest[0] = 1;
        assert_eq!(tail(&rest), Tail::Torn);
    }
}
