//! What the store promises, tried: nothing lost that was answered, nothing served that is not whole.

use super::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Bytes that differ by seed; half of them compress.
fn raw(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if seed.is_multiple_of(2) && i % 4 != 0 {
                7
            } else {
                (state >> 32) as u8
            }
        })
        .collect()
}

fn record(seed: u64) -> Record {
    Record::encode(&raw(seed, 3000 + (seed as usize * 977) % 9000)).unwrap()
}

fn open_small(dir: &Path, pack_len: u64) -> Result<ChunkStore> {
    let options = ChunkOptions {
        pack_len,
        ..ChunkOptions::default()
    };
    ChunkStore::open_with(dir, options)
}

fn pack_file(dir: &Path) -> PathBuf {
    pack::path(dir, 1)
}

#[test]
fn holds_what_was_put_also_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let records: Vec<Record> = (0..40).map(record).collect();
    let ids: Vec<ChunkId> = records.iter().map(|r| r.id).collect();
    let store = ChunkStore::open(dir.path()).unwrap();
    let report = store.put(records.clone()).unwrap();
    assert_eq!((report.stored, report.known), (40, 0));
    let again = store.put(records.clone()).unwrap();
    assert_eq!((again.stored, again.known, again.bytes), (0, 40, 0));
    let twice = store.put(vec![record(99), record(99)]).unwrap();
    assert_eq!((twice.stored, twice.known), (1, 1));
    let stats = store.stats();
    drop(store);

    let store = ChunkStore::open(dir.path()).unwrap();
    assert_eq!(store.stats(), stats);
    for (seed, id) in ids.iter().enumerate() {
        let expected = records[seed].verify().unwrap();
        assert_eq!(store.raw_len(id), Some(expected.len() as u32));
        assert_eq!(store.get(id).unwrap().unwrap(), expected);
    }
    let absent = ChunkId([9; 32]);
    assert!(store.get(&absent).unwrap().is_none() && !store.contains(&absent));
    let mut asked = ids.clone();
    asked.push(absent);
    let found = store.records(&asked).unwrap();
    assert_eq!((found.records.len(), found.damaged.len()), (40, 0));
    assert!(
        store.put(vec![record(500)]).unwrap().stored == 1,
        "goes on in the same pack"
    );
    assert!(!pack::path(dir.path(), 2).exists());
}

#[test]
fn lies_are_refused_and_nothing_of_their_batch_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(dir.path()).unwrap();
    let good = record(2);
    let mut other_bytes = record(4);
    other_bytes.id = ChunkId([1; 32]);
    let mut zero = record(4);
    zero.id = ChunkId([0; 32]);
    let mut longer = record(4);
    longer.raw_len += 1;
    let mut shorter = record(4);
    shorter.raw_len -= 1;
    let mut huge = record(4);
    huge.raw_len = u32::MAX;
    let mut other_codec = record(4);
    other_codec.codec = Codec::Raw;
    let bomb = zstd::bulk::compress(&vec![0; CHUNK_LEN_MAX + 1], 1).unwrap();
    let bomb = Record {
        id: ChunkId::of(&vec![0; CHUNK_LEN_MAX + 1]),
        codec: Codec::Zstd,
        raw_len: CHUNK_LEN_MAX as u32,
        data: bomb.into(),
    };
    for bad in [other_bytes, zero, longer, shorter, huge, other_codec, bomb] {
        let refused = store.put(vec![good.clone(), bad]).unwrap_err();
        assert!(matches!(refused, StorageError::BadDigest(_)), "{refused}");
    }
    assert!(!store.contains(&good.id));
    assert_eq!((store.stats().chunks, store.stats().stored_bytes), (0, 0));
}

#[test]
fn incompressible_chunks_stay_raw() {
    assert_eq!(record(1).codec, Codec::Raw);
    assert_eq!(record(2).codec, Codec::Zstd);
    assert_eq!(Record::encode(&[]).unwrap().verify().unwrap().len(), 0);
}

/// Cut the pack at many lengths: what lies wholly before the cut is held, nothing else is, and the
/// store takes new chunks.
#[test]
fn a_torn_tail_costs_only_what_lies_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(dir.path()).unwrap();
    let mut ends = Vec::new();
    for seed in 0..12 {
        store.put(vec![record(seed), record(seed + 100)]).unwrap();
        for id in [record(seed).id, record(seed + 100).id] {
            let at = store.inner.shared.index.peek(&id).unwrap();
            ends.push((
                id,
                at.offset as usize + record::HEADER_LEN + at.stored_len as usize,
            ));
        }
    }
    drop(store);
    let whole = fs::read(pack_file(dir.path())).unwrap();
    let cuts = (0..whole.len())
        .step_by(1511)
        .chain(ends.iter().flat_map(|(_, e)| [e - 1, *e, e + 1]));
    for cut in cuts {
        let dir = tempfile::tempdir().unwrap();
        fs::write(pack_file(dir.path()), &whole[..cut.min(whole.len())]).unwrap();
        let store = ChunkStore::open(dir.path()).unwrap();
        for (id, end) in &ends {
            assert_eq!(
                store.contains(id),
                *end <= cut,
                "cut at {cut}, chunk ends at {end}"
            );
            assert_eq!(store.get(id).unwrap().is_some(), *end <= cut);
        }
        assert_eq!(store.put(vec![record(777)]).unwrap().stored, 1);
        drop(store);
        let store = ChunkStore::open(dir.path()).unwrap();
        assert!(store.contains(&record(777).id));
        assert_eq!(
            store.stats().chunks as usize,
            1 + ends.iter().filter(|e| e.1 <= cut).count()
        );
    }
}

/// Flip bits in the growing pack: never a wrong byte served, and everything else still there.
#[test]
fn a_flipped_bit_is_never_served_and_costs_at_most_one_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(dir.path()).unwrap();
    let records: Vec<Record> = (0..20).map(record).collect();
    store.put(records[..10].to_vec()).unwrap();
    store.put(records[10..].to_vec()).unwrap();
    drop(store);
    let whole = fs::read(pack_file(dir.path())).unwrap();
    for at in (direct::BLOCK..whole.len()).step_by(1777) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(pack_file(dir.path()), bytes).unwrap();
        let store = ChunkStore::open(dir.path()).unwrap();
        let held = records.iter().filter(|r| store.contains(&r.id)).count();
        assert!(held >= records.len() - 1, "flip at {at}: {held} held");
        for record in &records {
            if let Some(bytes) = store.get(&record.id).unwrap() {
                assert_eq!(bytes, record.verify().unwrap());
            }
        }
        store.put(records.clone()).unwrap();
        assert_eq!(
            store.records(&ids(&records)).unwrap().records.len(),
            records.len()
        );
    }
}

fn ids(records: &[Record]) -> Vec<ChunkId> {
    records.iter().map(|r| r.id).collect()
}

#[test]
fn damage_under_an_open_store_is_reported_and_can_be_healed() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(dir.path()).unwrap();
    let (bad, good) = (record(1), record(2));
    store.put(vec![bad.clone(), good.clone()]).unwrap();
    let at = store.inner.shared.index.peek(&bad.id).unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(pack_file(dir.path()))
        .unwrap();
    let inside = u64::from(at.offset) + record::HEADER_LEN as u64 + 5;
    file.write_all_at(&[bad.data[5] ^ 0x40], inside).unwrap();

    assert!(matches!(
        store.get(&bad.id),
        Err(StorageError::Corrupt { .. })
    ));
    assert!(store.record(&bad.id).unwrap().is_none());
    let found = store.records(&[bad.id, good.id]).unwrap();
    assert_eq!((found.records.len(), found.damaged.len()), (1, 0));
    assert!(!store.contains(&bad.id), "it is not held any more");
    assert_eq!(store.damaged(&[bad.id, good.id]), [bad.id]);
    assert_eq!(store.put(vec![bad.clone()]).unwrap().stored, 1);
    assert_eq!(store.get(&bad.id).unwrap().unwrap(), bad.verify().unwrap());
    assert_eq!(store.stats().damaged, 0);
    drop(store);
    let store = ChunkStore::open(dir.path()).unwrap();
    assert_eq!(store.get(&bad.id).unwrap().unwrap(), bad.verify().unwrap());
}

#[test]
fn full_packs_are_sealed_and_their_indexes_rebuilt_when_lost_or_bad() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_small(dir.path(), 30_000).unwrap();
    let records: Vec<Record> = (0..30).map(record).collect();
    for record in &records {
        store.put(vec![record.clone()]).unwrap();
    }
    let stats = store.stats();
    drop(store);
    assert!(pack::path(dir.path(), 3).exists());
    fs::remove_file(pack::index_path(dir.path(), 1)).unwrap();
    let second = pack::index_path(dir.path(), 2);
    let mut bytes = fs::read(&second).unwrap();
    bytes[40] ^= 1;
    fs::write(&second, bytes).unwrap();

    let store = open_small(dir.path(), 30_000).unwrap();
    assert_eq!(store.stats(), stats);
    assert_eq!(store.records(&ids(&records)).unwrap().records.len(), 30);
    assert!(pack::index_path(dir.path(), 1).exists());
    let len = fs::metadata(pack::path(dir.path(), 2)).unwrap().len();
    assert!(index::load(&second, 2, len).is_some());
}

/// A crash between sealing a pack and creating the next one.
#[test]
fn a_sealed_last_pack_is_not_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_small(dir.path(), 4096).unwrap();
    store.put(vec![record(3)]).unwrap();
    drop(store);
    fs::remove_file(pack::path(dir.path(), 2)).unwrap();
    let len = fs::metadata(pack_file(dir.path())).unwrap().len();
    let store = ChunkStore::open(dir.path()).unwrap();
    store.put(vec![record(5)]).unwrap();
    assert!(store.contains(&record(3).id) && store.contains(&record(5).id));
    assert_eq!(fs::metadata(pack_file(dir.path())).unwrap().len(), len);
}

#[test]
fn concurrent_puts_of_the_same_and_other_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(dir.path()).unwrap();
    let stored: u64 = std::thread::scope(|scope| {
        let put = |t: u64| {
            let store = &store;
            move || -> u64 {
                (0..10u64)
                    .map(|i| {
                        store
                            .put(vec![record(i), record(1000 + t * 100 + i)])
                            .unwrap()
                            .stored
                    })
                    .sum()
            }
        };
        let threads: Vec<_> = (0..8).map(|t| scope.spawn(put(t))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(stored, 10 + 80, "each chunk is stored by exactly one put");
    assert_eq!(store.stats().chunks, 90);
    let expected: u64 = store.stats().stored_bytes;
    drop(store);
    assert_eq!(
        ChunkStore::open(dir.path()).unwrap().stats().stored_bytes,
        expected
    );
}

#[test]
fn a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(ChunkStore::open(dir.path()).unwrap());
    let file = fs::OpenOptions::new()
        .write(true)
        .open(pack_file(dir.path()))
        .unwrap();
    file.write_all_at(&[2], 15).unwrap();
    assert!(matches!(
        ChunkStore::open(dir.path()),
        Err(StorageError::Foreign(_))
    ));
}
