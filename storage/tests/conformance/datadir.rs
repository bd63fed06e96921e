//! The data directory: whose it is, and what it refuses.

use crate::disk::{Event, Luck, PowerDisk};
use crate::support::Random;
use mainstay_storage::StorageError;
use mainstay_storage::datadir::{DataDir, Identity};
use std::sync::Arc;

fn identity(member_id: u64) -> Identity {
    Identity {
        member_id,
        name: "m1".into(),
        cluster_id: None,
        created_by: "0.1.0".into(),
        founding: None,
    }
}

fn unexpected() -> Identity {
    panic!("it has an identity")
}

#[test]
fn an_identity_is_made_once_and_kept() {
    let temp = crate::support::tempdir();
    let root = temp.path().join("deep").join("data");
    let (dir, made) = DataDir::open(&root, || identity(7)).unwrap();
    assert_eq!(made, identity(7));
    for part in ["log", "state", "snapshots", "chunks"] {
        assert!(dir.path(part).is_dir());
    }
    let founded = Identity {
        cluster_id: Some("c".into()),
        founding: Some(vec![1, 2]),
        ..made
    };
    dir.save(&founded).unwrap();
    drop(dir);
    let (_dir, found) = DataDir::open(&root, unexpected).unwrap();
    assert_eq!(found, founded);
}

#[test]
fn only_one_may_have_it() {
    let temp = crate::support::tempdir();
    let (dir, _) = DataDir::open(temp.path(), || identity(1)).unwrap();
    let second = DataDir::open(temp.path(), unexpected);
    assert!(matches!(second, Err(StorageError::Locked(_))), "{second:?}");
    drop(dir);
    DataDir::open(temp.path(), unexpected).unwrap();
}

#[test]
fn a_stranger_is_refused_and_not_touched() {
    let temp = crate::support::tempdir();
    std::fs::write(temp.path().join("thesis.txt"), b"years of work").unwrap();
    let error = DataDir::open(temp.path(), unexpected).unwrap_err();
    assert!(matches!(error, StorageError::Foreign(_)), "{error:?}");
    assert!(
        error.to_string().contains("empty or new directory"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1);
    let error = DataDir::open(&temp.path().join("thesis.txt"), unexpected).unwrap_err();
    assert!(matches!(error, StorageError::Foreign(_)), "{error:?}");
    // Our own parts without the identity are not ours to take over either.
    let temp = crate::support::tempdir();
    drop(DataDir::open(temp.path(), || identity(1)).unwrap());
    std::fs::remove_file(temp.path().join("identity")).unwrap();
    let error = DataDir::open(temp.path(), unexpected).unwrap_err();
    assert!(
        error.to_string().contains("restore the missing file"),
        "{error}"
    );
}

#[test]
fn a_new_file_system_and_an_interrupted_creation_are_fine() {
    let temp = crate::support::tempdir();
    std::fs::create_dir(temp.path().join("lost+found")).unwrap();
    std::fs::write(temp.path().join("lock"), b"").unwrap();
    std::fs::write(temp.path().join("identity.tmp"), b"MAINS").unwrap();
    DataDir::open(temp.path(), || identity(1)).unwrap();
}

#[test]
fn another_format_and_damage_are_told_apart() {
    let temp = crate::support::tempdir();
    drop(DataDir::open(temp.path(), || identity(1)).unwrap());
    let path = temp.path().join("identity");
    let bytes = std::fs::read(&path).unwrap();
    // Golden: magic, format 1, checksum, body.
    assert_eq!(
        hex::encode(&bytes),
        "4d41494e5354415901000000890ff81101026d310005302e312e3000"
    );
    for byte in 8..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[byte] ^= 4;
        std::fs::write(&path, flipped).unwrap();
        let error = DataDir::open(temp.path(), unexpected).unwrap_err();
        assert!(
            matches!(error, StorageError::Corrupt { .. }),
            "byte {byte}: {error}"
        );
    }
    let mut newer = bytes.clone();
    newer[8] = 2;
    let crc = crc32fast::hash(&[&newer[8..12], &newer[16..]].concat());
    newer[12..16].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&path, newer).unwrap();
    let error = DataDir::open(temp.path(), unexpected).unwrap_err();
    assert!(matches!(error, StorageError::Foreign(_)), "{error:?}");
    assert!(error.to_string().contains("format 2"), "{error}");
    std::fs::write(&path, b"something else entirely").unwrap();
    let error = DataDir::open(temp.path(), unexpected).unwrap_err();
    assert!(matches!(error, StorageError::Foreign(_)), "{error:?}");
    std::fs::write(&path, bytes).unwrap();
    DataDir::open(temp.path(), unexpected).unwrap();
}

#[test]
fn a_saved_identity_survives_a_power_cut() {
    let temp = crate::support::tempdir();
    let (root, image) = (temp.path().join("d"), temp.path().join("image"));
    std::fs::create_dir(&root).unwrap();
    let disk = PowerDisk::over(&root);
    let (dir, _) = DataDir::open_on(&root, Arc::new(disk.clone()), || identity(1)).unwrap();
    disk.note(Event::Acked(1));
    for n in 2..=5u64 {
        disk.note(Event::Asked(n as usize));
        dir.save(&identity(n)).unwrap();
        disk.note(Event::Acked(n as usize));
    }
    let events = disk.events();
    let mut random = Random(21);
    let (mut acked, mut asked) = (0, 1);
    for cut in 0..=events.len() {
        match cut.checked_sub(1).map(|last| &events[last]) {
            Some(Event::Acked(n)) => acked = *n as u64,
            Some(Event::Asked(n)) => asked = *n as u64,
            _ => {}
        }
        for _ in 0..20 {
            disk.cut_power(cut, Luck::Random(&mut random), &root, &image);
            // 0 = none was found: a new one is made.
            let (_dir, found) = DataDir::open(&image, || identity(0)).unwrap();
            assert!(
                (acked..=asked).contains(&found.member_id),
                "cut {cut}: {found:?}"
            );
        }
    }
}
