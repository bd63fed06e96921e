//! Torn writes and flipped bits in log files: a tear costs nothing that was acknowledged after it was
//! synced, damage is always noticed.

use crate::support::{Random, all, append, entry, small_options, wait};
use bytes::Bytes;
use mainstay_storage::log::{Log, LogEntry, Wal};
use mainstay_storage::{Result, StorageError};
use std::path::{Path, PathBuf};

/// A record's header.
const HEADER: usize = 32;

struct Sample {
    dir: tempfile::TempDir,
    entries: Vec<LogEntry>,
}

impl Sample {
    /// A log of some segments, closed; the last ten entries are in the last segment.
    fn new(count: u64) -> Self {
        let dir = crate::support::tempdir();
        let wal = Wal::open_with(dir.path(), small_options()).unwrap();
        wait(|done| wal.save_vote(Bytes::from_static(b"vote"), done)).unwrap();
        let fill = |wal: &Wal, indexes: std::ops::Range<u64>| {
            for i in indexes {
                append(wal, i, &[&vec![i as u8; 20 + i as usize]]).unwrap();
            }
        };
        fill(&wal, 0..count - 10);
        drop(wal);
        let wal = Wal::open(dir.path()).unwrap();
        fill(&wal, count - 10..count);
        let entries = all(&wal);
        assert_eq!(entries.len() as u64, count);
        drop(wal);
        Self { dir, entries }
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|f| f.unwrap().path())
            .collect();
        files.sort();
        files
    }

    fn last(&self) -> PathBuf {
        self.files().pop().unwrap()
    }
}

/// Open a copy of the log in which one file has other bytes.
fn open_with(sample: &Sample, file: &Path, bytes: &[u8]) -> Result<(Wal, tempfile::TempDir)> {
    let dir = crate::support::tempdir();
    for other in sample.files() {
        let to = dir.path().join(other.file_name().unwrap());
        if other == file {
            std::fs::write(to, bytes).unwrap();
        } else {
            std::fs::copy(other, to).unwrap();
        }
    }
    Wal::open_with(dir.path(), small_options()).map(|wal| (wal, dir))
}

/// Offset, kind and whole length of each record.
fn records(bytes: &[u8]) -> Vec<(usize, u8, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize + HEADER;
        found.push((at, bytes[at + 8], len));
        at += len;
    }
    found
}

const KIND_ENTRY: u8 = 3;

#[test]
fn a_cut_at_any_byte_keeps_every_whole_record_before_it() {
    let sample = Sample::new(40);
    let last = sample.last();
    let bytes = std::fs::read(&last).unwrap();
    let records = records(&bytes);
    let in_last = records.iter().filter(|r| r.1 == KIND_ENTRY).count();
    assert!(in_last >= 10, "the last segment must hold some entries");
    for cut in 0..=bytes.len() {
        let lost = records
            .iter()
            .filter(|(at, kind, len)| *kind == KIND_ENTRY && at + len > cut)
            .count();
        let expected = &sample.entries[..sample.entries.len() - lost];
        let (wal, dir) = open_with(&sample, &last, &bytes[..cut]).unwrap();
        assert_eq!(all(&wal), expected, "cut {cut}");
        assert_eq!(wal.state().vote.as_deref(), Some(&b"vote"[..]));
        // It goes on from there, and the next start agrees.
        append(&wal, expected.len() as u64, &[b"next"]).unwrap();
        drop(wal);
        let wal = Wal::open_with(dir.path(), small_options()).unwrap();
        assert_eq!(all(&wal)[..expected.len()], *expected);
        assert_eq!(
            all(&wal).last(),
            Some(&entry(expected.len() as u64, b"next"))
        );
    }
}

#[test]
fn a_flipped_bit_is_damage_wherever_it_was_durable() {
    let sample = Sample::new(40);
    let mut random = Random(5);
    let files = sample.files();
    let (mut flips, mut harmless) = (0, 0);
    for file in &files {
        let bytes = std::fs::read(file).unwrap();
        let seal = records(&bytes).last().unwrap().0;
        let is_last = *file == sample.last();
        for n in 0..60 {
            // The last of them in the closing record of the newest segment, which nothing depends on.
            let byte = match n {
                0..56 => random.below(if is_last { seal } else { bytes.len() } as u64) as usize,
                _ => seal + random.below((bytes.len() - seal) as u64) as usize,
            };
            let mut flipped = bytes.clone();
            flipped[byte] ^= 1 << random.below(8);
            let opened = open_with(&sample, file, &flipped);
            flips += 1;
            if is_last && byte >= seal {
                harmless += 1;
                assert_eq!(all(&opened.unwrap().0), sample.entries);
                continue;
            }
            let error = opened
                .err()
                .unwrap_or_else(|| panic!("{} byte {byte}: not noticed", file.display()));
            assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
            assert!(
                error
                    .to_string()
                    .contains("`mainstay member repair --data-dir "),
                "{error}"
            );
        }
    }
    assert!(flips >= 200 && harmless == 4, "{flips} {harmless}");
}

#[test]
fn zeros_at_the_end_are_a_tear_and_in_the_middle_damage() {
    let sample = Sample::new(40);
    let last = sample.last();
    let bytes = std::fs::read(&last).unwrap();
    for zeros in [1, 31, 32, 33, 4096, 100_000] {
        let mut longer = bytes.clone();
        longer.resize(bytes.len() + zeros, 0);
        let (wal, _dir) = open_with(&sample, &last, &longer).unwrap();
        assert_eq!(all(&wal), sample.entries);
    }
    let records = records(&bytes);
    let entries: Vec<_> = records.iter().filter(|r| r.1 == KIND_ENTRY).collect();
    let &&(at, _, len) = entries.last().unwrap();
    // The last entry half written, zeros after it.
    let mut torn = bytes[..at + len / 2].to_vec();
    torn.resize(8192, 0);
    let (wal, _dir) = open_with(&sample, &last, &torn).unwrap();
    assert_eq!(all(&wal), sample.entries[..39]);
    // An earlier one zeroed: what follows says that it was durable.
    let &&(at, _, len) = &entries[entries.len() - 2];
    let mut holed = bytes.clone();
    holed[at..at + len].fill(0);
    let error = open_with(&sample, &last, &holed).unwrap_err();
    assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
}

/// A batch is written at once and the disk may keep its end without its start: still only a tear, for
/// nothing in it was acknowledged.
#[test]
fn a_torn_batch_whose_end_survived_is_a_tear() {
    let dir = crate::support::tempdir();
    let wal = Wal::open(dir.path()).unwrap();
    append(&wal, 0, &[b"acknowledged"]).unwrap();
    append(&wal, 1, &[b"one", b"two", b"three"]).unwrap();
    drop(wal);
    let path = std::fs::read_dir(dir.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let bytes = std::fs::read(&path).unwrap();
    let entries: Vec<_> = records(&bytes)
        .into_iter()
        .filter(|r| r.1 == KIND_ENTRY)
        .collect();
    let (one, three) = (entries[1], entries[3]);
    // As it was before the batch was synced: no record after it.
    let mut torn = bytes[..three.0 + three.2].to_vec();
    torn[one.0 + HEADER] ^= 1;
    std::fs::write(&path, &torn).unwrap();
    let wal = Wal::open(dir.path()).unwrap();
    assert_eq!(all(&wal), [entry(0, b"acknowledged")]);
    drop(wal);
    // With the records that follow the sync it is damage.
    let mut damaged = bytes;
    damaged[one.0 + HEADER] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    assert!(matches!(
        Wal::open(dir.path()),
        Err(StorageError::Corrupt { .. })
    ));
}

#[test]
fn a_missing_segment_is_damage() {
    let sample = Sample::new(40);
    let files = sample.files();
    assert!(files.len() > 3);
    for missing in 0..files.len() - 1 {
        let dir = crate::support::tempdir();
        for (i, file) in files.iter().enumerate() {
            if i != missing {
                std::fs::copy(file, dir.path().join(file.file_name().unwrap())).unwrap();
            }
        }
        let error = Wal::open_with(dir.path(), small_options()).unwrap_err();
        assert!(
            matches!(error, StorageError::Corrupt { .. }),
            "{missing}: {error}"
        );
    }
}

/// What is missing is named, and what was cut is not removed.
#[test]
fn a_cut_log_says_where_it_was_cut() {
    let sample = Sample::new(40);
    let files = sample.files();
    let middle = &files[files.len() / 2];
    let bytes = std::fs::read(middle).unwrap();
    let entries: Vec<_> = records(&bytes)
        .into_iter()
        .filter(|r| r.1 == KIND_ENTRY)
        .collect();
    let (at, _, _) = entries[entries.len() - 1];
    let error = open_with(&sample, middle, &bytes[..at])
        .unwrap_err()
        .to_string();
    assert!(error.contains("was cut"), "{error}");
    // The newest one holds the only record that says which of the older ones are gone.
    let wal = Wal::open_with(sample.dir.path(), small_options()).unwrap();
    wait(|done| wal.purge(25, Bytes::from_static(b"mark"), done)).unwrap();
    drop(wal);
    let last = sample.last();
    let bytes = std::fs::read(&last).unwrap();
    for cut in [0, 10, HEADER] {
        let dir = crate::support::tempdir();
        for file in sample.files() {
            std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
        }
        let path = dir.path().join(last.file_name().unwrap());
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let error = Wal::open_with(dir.path(), small_options()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("cut within its first record"), "{error}");
        assert!(path.exists());
    }
}

/// The newest file is longer than its records; a sealed one may still be, when the power went before
/// its shortening was on disk.
#[test]
fn zeros_behind_the_records_are_no_damage_where_a_file_was_lengthened() {
    let sample = Sample::new(40);
    for file in &sample.files() {
        let bytes = std::fs::read(file).unwrap();
        let longer = [&bytes[..], &[0; 777]].concat();
        let (wal, dir) = open_with(&sample, file, &longer).unwrap();
        assert_eq!(all(&wal), sample.entries);
        append(&wal, 40, &[b"next"]).unwrap();
        drop(wal);
        let wal = Wal::open_with(dir.path(), small_options()).unwrap();
        assert_eq!(all(&wal).last(), Some(&entry(40, b"next")));
        // Zeros in the place of records that were durable: the seal is gone as well.
        let middle = records(&bytes)[1].0;
        let zeroed = [&bytes[..middle], &vec![0; bytes.len() - middle]].concat();
        let opened = open_with(&sample, file, &zeroed).map(|(wal, _dir)| all(&wal).len());
        if *file != sample.last() {
            let error = opened.unwrap_err();
            assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
        }
    }
}

/// While it is open, so after a kill, a log's file is longer than its records; closed, it is not.
#[test]
fn a_file_is_lengthened_ahead_and_cut_when_it_is_closed() {
    let dir = crate::support::tempdir();
    let wal = Wal::open(dir.path()).unwrap();
    let length = || {
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap();
        file.unwrap().metadata().unwrap().len()
    };
    append(&wal, 0, &[b"first"]).unwrap();
    let ahead = length();
    assert_eq!(ahead, 1 << 20);
    for i in 1..100 {
        append(&wal, i, &[&[7; 100]]).unwrap();
    }
    assert_eq!(length(), ahead, "a sync would have waited for it");
    append(&wal, 100, &[&vec![7; 3 << 20]]).unwrap();
    assert_eq!(length(), 4 << 20);
    drop(wal);
    assert!(length() < 4 << 20);
    assert_eq!(all(&Wal::open(dir.path()).unwrap()).len(), 101);
}

/// An entry can hold the bytes of a log file: they are not taken for records.
#[test]
fn records_inside_an_entry_are_not_records() {
    let sample = Sample::new(40);
    let inside = std::fs::read(sample.last()).unwrap();
    let dir = crate::support::tempdir();
    let wal = Wal::open(dir.path()).unwrap();
    append(&wal, 0, &[b"before"]).unwrap();
    append(&wal, 1, &[&inside]).unwrap();
    drop(wal);
    let path = std::fs::read_dir(dir.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let bytes = std::fs::read(&path).unwrap();
    let entry_at = records(&bytes)
        .into_iter()
        .filter(|r| r.1 == KIND_ENTRY)
        .nth(1)
        .unwrap();
    let mut torn = bytes[..entry_at.0 + entry_at.2 - 1].to_vec();
    torn[entry_at.0] ^= 1;
    std::fs::write(&path, torn).unwrap();
    assert_eq!(all(&Wal::open(dir.path()).unwrap()), [entry(0, b"before")]);
}

#[test]
fn damage_under_a_running_log_is_noticed_by_the_read() {
    let dir = crate::support::tempdir();
    let wal = Wal::open_with(dir.path(), small_options()).unwrap();
    for i in 0..3u64 {
        append(&wal, i, &[&[7; 100]]).unwrap();
    }
    let path = std::fs::read_dir(dir.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&path).unwrap();
    let first = records(&bytes)
        .into_iter()
        .find(|r| r.1 == KIND_ENTRY)
        .unwrap();
    bytes[first.0 + first.2 - 1] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = wal.read(0..1, 1000).unwrap_err();
    assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
    assert_eq!(wal.read(1..3, 1000).unwrap().len(), 2);
}
