//! Snapshot files: written whole or not at all, verified before they are used.

use crate::disk::{Event, Luck, PowerDisk};
use crate::support::Random;
use mainstay_storage::StorageError;
use mainstay_storage::snapshot::{SnapshotDir, SnapshotReader, read, verify};
use std::path::Path;
use std::sync::Arc;

type Entries = Vec<(Vec<u8>, Vec<u8>)>;

fn entries(count: u64) -> Entries {
    let mut random = Random(3);
    (0..count)
        .map(|i| {
            let len = random.below(300) as usize;
            (i.to_be_bytes().to_vec(), random.bytes(len))
        })
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_written_comes_back_and_the_older_goes() {
    let temp = crate::support::tempdir();
    let dir = SnapshotDir::open(&temp.path().join("s")).unwrap();
    assert!(dir.current().unwrap().is_none());
    dir.write("T9-N1-100", b"m1", &mut entries(3).into_iter())
        .unwrap();
    // A name that sorts before the older one: order decides, not the name.
    let path = dir
        .write("T1-N1-200", b"m2", &mut entries(2000).into_iter())
        .unwrap();
    assert_eq!(dir.current().unwrap(), Some((path.clone(), b"m2".to_vec())));
    assert_eq!(names(&temp.path().join("s")).len(), 1);
    let content = read(&path).unwrap();
    assert_eq!(
        (content.meta, content.entries),
        (b"m2".to_vec(), entries(2000))
    );
    let info = verify(&path).unwrap();
    assert_eq!(
        (info.entries, info.bytes),
        (2000, path.metadata().unwrap().len())
    );
    drop(dir);
    let dir = SnapshotDir::open(&temp.path().join("s")).unwrap();
    assert_eq!(dir.current().unwrap(), Some((path, b"m2".to_vec())));
}

#[test]
fn a_large_value_passes_through() {
    let temp = crate::support::tempdir();
    let dir = SnapshotDir::open(temp.path()).unwrap();
    let big = vec![
        (b"k".to_vec(), Random(4).bytes(5 << 20)),
        (b"l".to_vec(), Vec::new()),
    ];
    let path = dir.write("big", &[], &mut big.clone().into_iter()).unwrap();
    let mut reader = SnapshotReader::open(&path).unwrap();
    for expected in &big {
        assert_eq!(reader.next_entry().unwrap().as_ref(), Some(expected));
    }
    assert_eq!(reader.next_entry().unwrap(), None);
}

#[test]
fn received_files_are_verified_and_leftovers_removed() {
    let temp = crate::support::tempdir();
    let (a, b) = (temp.path().join("a"), temp.path().join("b"));
    let sent = SnapshotDir::open(&a)
        .unwrap()
        .write("s", b"meta", &mut entries(50).into_iter())
        .unwrap();
    let dir = SnapshotDir::open(&b).unwrap();
    let incoming = dir.incoming("../../evil/s 1");
    assert_eq!(
        incoming.parent(),
        Some(&*b),
        "it must stay in the directory"
    );
    let bytes = std::fs::read(&sent).unwrap();
    std::fs::write(&incoming, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(
        dir.adopt(&incoming, "s"),
        Err(StorageError::Corrupt { .. })
    ));
    assert!(dir.current().unwrap().is_none());
    std::fs::write(&incoming, &bytes).unwrap();
    let adopted = dir.adopt(&incoming, "s").unwrap();
    assert_eq!(
        dir.current().unwrap(),
        Some((adopted.clone(), b"meta".to_vec()))
    );
    assert_eq!(read(&adopted).unwrap().entries, entries(50));
    std::fs::write(dir.incoming("half"), b"half").unwrap();
    std::fs::write(b.join("x.tmp"), b"half").unwrap();
    let dir = SnapshotDir::open(&b).unwrap();
    assert_eq!(names(&b).len(), 1);
    assert_eq!(dir.current().unwrap().unwrap().0, adopted);
    // Names that could leave the directory are refused.
    for bad in ["", "a/b", "a\0", "é", &"x".repeat(300)] {
        assert!(matches!(
            dir.write(bad, &[], &mut std::iter::empty()),
            Err(StorageError::Misuse(_))
        ));
    }
}

#[test]
fn every_flip_and_every_cut_is_noticed() {
    let temp = crate::support::tempdir();
    let dir = SnapshotDir::open(temp.path()).unwrap();
    let path = dir
        .write("s", b"meta", &mut entries(4).into_iter())
        .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let other = temp.path().join("other");
    let refused = |bytes: &[u8], what: &str| {
        std::fs::write(&other, bytes).unwrap();
        assert!(
            matches!(read(&other), Err(StorageError::Corrupt { .. })),
            "{what}"
        );
        assert!(SnapshotReader::open(&other).is_err(), "{what}");
    };
    for cut in 0..bytes.len() {
        refused(&bytes[..cut], &format!("cut {cut}"));
    }
    for byte in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[byte] ^= 1 << (byte % 8);
        refused(&flipped, &format!("byte {byte}"));
    }
    let mut longer = bytes;
    longer.push(0);
    refused(&longer, "a byte more");
}

/// The bytes on disk, and between members of different releases.
#[test]
fn golden_file() {
    let temp = crate::support::tempdir();
    let dir = SnapshotDir::open(temp.path()).unwrap();
    let entries = vec![(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), Vec::new())];
    let path = dir.write("s", b"meta", &mut entries.into_iter()).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let (content, digest) = bytes.split_at(bytes.len() - 32);
    assert_eq!(
        hex::encode(content),
        "4d5354534e41500001000000040000002bd2c5446d6574610101000000010000000000000061310101000000000000000000000062000200000000000000"
    );
    assert_eq!(digest, blake3::hash(content).as_bytes());
}

#[test]
fn disorder_is_refused() {
    let temp = crate::support::tempdir();
    let dir = SnapshotDir::open(temp.path()).unwrap();
    let mut twice = vec![(b"k".to_vec(), vec![]), (b"k".to_vec(), vec![])].into_iter();
    assert!(matches!(
        dir.write("s", &[], &mut twice),
        Err(StorageError::Misuse(_))
    ));
    assert!(dir.current().unwrap().is_none());
}

/// Whenever the power goes, the newest snapshot that was returned to the caller, or a newer, is whole.
#[test]
fn power_cuts_leave_a_whole_snapshot() {
    let temp = crate::support::tempdir();
    let (from, image) = (temp.path().join("s"), temp.path().join("image"));
    std::fs::create_dir(&from).unwrap();
    let disk = PowerDisk::over(&from);
    let dir = SnapshotDir::open_on(&from, Arc::new(disk.clone())).unwrap();
    for n in 1..=4usize {
        disk.note(Event::Asked(n));
        dir.write(
            &format!("s{n}"),
            &[n as u8],
            &mut entries(n as u64 * 20).into_iter(),
        )
        .unwrap();
        disk.note(Event::Acked(n));
    }
    let events = disk.events();
    let mut random = Random(9);
    let (mut acked, mut asked) = (0, 0);
    for cut in 0..=events.len() {
        match cut.checked_sub(1).map(|last| &events[last]) {
            Some(Event::Acked(n)) => acked = *n,
            Some(Event::Asked(n)) => asked = *n,
            _ => {}
        }
        for _ in 0..20 {
            disk.cut_power(cut, Luck::Random(&mut random), &from, &image);
            let found = SnapshotDir::open(&image).unwrap().current().unwrap();
            let number = found.as_ref().map_or(0, |(_, meta)| meta[0] as usize);
            assert!((acked..=asked).contains(&number), "cut {cut}: {number}");
            if let Some((path, _)) = found {
                assert_eq!(read(&path).unwrap().entries, entries(number as u64 * 20));
            }
        }
    }
}
