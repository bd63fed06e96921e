//! The wire framing and the manifest's checks. Transfers are tested where there is a server.

use super::*;

fn record(len: usize) -> WireRecord {
    WireRecord::encode(&(0..len).map(|i| ((i * i) >> 3) as u8).collect::<Vec<u8>>())
}

#[test]
fn framing_survives_any_cut_and_notices_the_last() {
    let records = vec![record(70_000), record(0), record(1), record(5000)];
    let body = WireRecord::frame_all(&records);
    for step in [1, 7, 40, 41, 42, 4096, body.len()] {
        let mut unframer = Unframer::default();
        let mut got = Vec::new();
        for piece in body.chunks(step) {
            unframer.push(piece);
            while let Some(record) = unframer.next_record().unwrap() {
                got.push(record);
            }
        }
        unframer.finish().unwrap();
        assert_eq!(got, records);
    }
    let mut unframer = Unframer::default();
    unframer.push(&body[..body.len() - 1]);
    while unframer.next_record().unwrap().is_some() {}
    assert!(unframer.finish().is_err());
}

#[test]
fn a_record_that_claims_too_much_is_refused_before_it_is_read() {
    for (at, value) in [(32, 2_u8), (36, 0xff), (40, 0xff)] {
        let mut body = WireRecord::frame_all(&[record(100)]).to_vec();
        body[at] = value;
        let mut unframer = Unframer::default();
        unframer.push(&body);
        assert!(unframer.next_record().is_err(), "byte {at}");
    }
}

#[test]
fn decoding_checks_length_form_and_name() {
    let good = record(3000);
    assert_eq!(good.decode().unwrap().len(), 3000);
    for bad in [
        WireRecord {
            id: [1; 32],
            ..good.clone()
        },
        WireRecord {
            raw_len: 2999,
            ..good.clone()
        },
        WireRecord {
            raw_len: 3001,
            ..good.clone()
        },
        WireRecord {
            raw_len: u32::MAX,
            ..good.clone()
        },
        WireRecord {
            codec: 1 - good.codec,
            ..good.clone()
        },
        WireRecord {
            codec: 7,
            ..good.clone()
        },
    ] {
        assert!(bad.decode().is_err(), "{bad:?}");
    }
}

fn manifest() -> Manifest {
    Manifest {
        version: 1,
        files: vec![FileEntry {
            name: "disk.qcow2".to_owned(),
            format: "qcow2".to_owned(),
            size: CHUNK_LEN * SEGMENT_CHUNKS as u64 + 1,
            segments: vec!["00".repeat(32), "11".repeat(32)],
        }],
    }
}

#[test]
fn a_manifest_is_read_back_and_checks_its_segments() {
    let manifest = manifest();
    assert_eq!(
        Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(),
        manifest
    );
    let file = &manifest.files[0];
    check_segment(file, 0, &vec![0; SEGMENT_CHUNKS * 32]).unwrap();
    check_segment(file, 1, &[0; 32]).unwrap();
    assert!(check_segment(file, 0, &[0; 32]).is_err());
    assert!(check_segment(file, 1, &[0; 64]).is_err());
    assert!(check_segment(file, 2, &[0; 32]).is_err());
}

#[test]
fn lies_in_a_manifest_are_refused() {
    let names = [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0",
        ".x",
        "a b",
        "é",
    ];
    for name in names {
        let mut bad = manifest();
        name.clone_into(&mut bad.files[0].name);
        assert!(bad.to_bytes().is_err(), "{name:?}");
        let bytes = serde_json::to_vec(&bad).unwrap();
        assert!(Manifest::parse(&bytes).is_err(), "{name:?}");
    }
    let spoil: [fn(&mut Manifest); 8] = [
        |m| m.version = 2,
        |m| m.files.clear(),
        |m| m.files.push(m.files[0].clone()),
        |m| m.files[0].size += CHUNK_LEN * SEGMENT_CHUNKS as u64,
        |m| m.files[0].size = u64::MAX,
        |m| m.files[0].format = "vmdk".to_owned(),
        |m| m.files[0].segments[0] = "xyz".to_owned(),
        |m| m.files[0].segments[1].push('0'),
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        let mut bad = manifest();
        spoil(&mut bad);
        let bytes = serde_json::to_vec(&bad).unwrap();
        assert!(Manifest::parse(&bytes).is_err(), "case {number}");
    }
    assert!(Manifest::parse(b"not json").is_err());
}

#[test]
fn holes_cost_nothing_and_zeros_have_their_name() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().unwrap();
    let size = 40 * CHUNK_LEN + 5;
    file.set_len(size).unwrap();
    file.write_all_at(&[1], 20 * CHUNK_LEN + 77).unwrap();
    file.write_all_at(&[0; 100], 30 * CHUNK_LEN).unwrap();
    file.write_all_at(&[9], size - 1).unwrap();
    let ranges = image::data_ranges(&file, size).unwrap();
    let ids = image::hash_chunks(&file, size, &ranges, 0..41).unwrap();
    let whole = std::iter::once(0..size).collect::<Vec<_>>();
    assert_eq!(ids, image::hash_chunks(&file, size, &whole, 0..41).unwrap());
    let named: Vec<usize> = (0..41).filter(|&n| ids[n] != ZERO_CHUNK).collect();
    assert_eq!(named, [20, 40]);
    assert_eq!(ids[40], *blake3::hash(&[0, 0, 0, 0, 9]).as_bytes());
}
