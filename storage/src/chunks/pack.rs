//! Packs: files `pack-XXXXXXXX.mspk` of records, one block of header in front. Only the last one
//! grows. Opening reads the index files of the others and scans the last. Any but the last may be
//! missing: its chunks died, or lie in a later pack.

use super::direct::BLOCK;
use super::index::{self, Clock, Entry, Index, Location, sync_dir};
use super::record::{HEADER_LEN, Header, MAGIC};
use super::{CHUNK_LEN_MAX, ages, io};
use crate::disk::Disk;
use crate::{Result, StorageError};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// First bytes of a pack; the last is the format version.
const PACK_HEADER: [u8; 16] = *b"MAINSTAY-PACK\0\0\x01";

/// The pack that grows.
pub(super) struct Active {
    pub number: u32,
    /// Its length: a multiple of [`BLOCK`]; all before it is durable.
    pub len: u64,
    pub entries: Vec<Entry>,
}

/// What a scan found.
pub(super) struct Scan {
    pub entries: Vec<Entry>,
    /// Places where something else than a good record was found.
    pub damaged: u64,
    /// End of the last good record or padding.
    pub good_end: u64,
    /// The file ends where its last record does, at a whole block.
    pub clean: bool,
}

pub(super) fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("pack-{number:08}.mspk"))
}

pub(super) fn index_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("pack-{number:08}.idx"))
}

/// Create an empty pack; durable and findable on return.
pub(super) fn create(disk: &dyn Disk, dir: &Path, number: u32) -> Result<Active> {
    let path = path(dir, number);
    if path.exists() {
        return Err(StorageError::Foreign(format!(
            "{} is there already: is another process writing here?",
            path.display()
        )));
    }
    let mut block = [0; BLOCK];
    block[..16].copy_from_slice(&PACK_HEADER);
    let file = disk.create(&path).map_err(io("create", &path))?;
    file.write_all_at(&block, 0).map_err(io("write", &path))?;
    file.sync_data().map_err(io("fdatasync", &path))?;
    sync_dir(disk, dir)?;
    Ok(Active {
        number,
        len: BLOCK as u64,
        entries: Vec::new(),
    })
}

/// Write the index of a pack that grows no more.
pub(super) fn seal(disk: &dyn Disk, dir: &Path, pack: &Active) -> Result<()> {
    index::save(disk, &index_path(dir, pack.number), pack.len, &pack.entries)
}

/// Remove a sealed pack with its index file.
pub(super) fn remove(disk: &dyn Disk, dir: &Path, number: u32) -> Result<()> {
    let index = index_path(dir, number);
    if index.exists() {
        disk.remove(&index).map_err(io("remove", &index))?;
    }
    let path = path(dir, number);
    match disk.remove(&path) {
        // Lost already.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        removed => removed.map_err(io("remove", &path))?,
    }
    sync_dir(disk, dir)
}

/// What is in a directory of packs.
pub(super) struct Opened {
    pub index: Index,
    pub active: Active,
    /// Length of every pack, the growing one included.
    pub lens: BTreeMap<u32, u64>,
}

/// Open or create a directory of packs: everything held, and the pack to append to.
pub(super) fn open_all(disk: &dyn Disk, dir: &Path, clock: Clock) -> Result<Opened> {
    if !dir.is_dir() {
        std::fs::create_dir_all(dir).map_err(io("create", dir))?;
        sync_dir(disk, dir.parent().unwrap_or(Path::new("/")))?;
    }
    let numbers = list(dir)?;
    sweep(disk, dir, &numbers)?;
    let ages = ages::take(disk, dir)?;
    let base = ages.iter().map(|(_, age)| *age).max().unwrap_or(0);
    let index = Index::new(clock, base);
    let mut lens = BTreeMap::new();
    let Some((&last, sealed)) = numbers.split_last() else {
        let active = create(disk, dir, 1)?;
        lens.insert(1, active.len);
        return Ok(Opened {
            index,
            active,
            lens,
        });
    };
    for &number in sealed {
        let (entries, len) = entries_of(disk, dir, number)?;
        index.insert(&entries);
        lens.insert(number, len);
    }
    let mut active = open_last(disk, dir, last)?;
    index.insert(&active.entries);
    lens.insert(last, active.len);
    if index_path(dir, last).exists() || !active.len.is_multiple_of(BLOCK as u64) {
        active = create(disk, dir, last + 1)?;
        lens.insert(active.number, active.len);
    }
    index.age(&ages);
    Ok(Opened {
        index,
        active,
        lens,
    })
}

/// Remove what interrupted work left: temporary files, index files of packs that are gone.
fn sweep(disk: &dyn Disk, dir: &Path, packs: &[u32]) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(io("list", dir))? {
        let path = entry.map_err(io("list", dir))?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        let of = |end: &str| name.strip_prefix("pack-")?.strip_suffix(end)?.parse().ok();
        let orphan = of(".idx").is_some_and(|number: u32| !packs.contains(&number));
        if orphan || of(".idx.tmp").is_some() {
            disk.remove(&path).map_err(io("remove", &path))?;
        }
    }
    Ok(())
}

fn list(dir: &Path) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io("list", dir))? {
        let name = entry.map_err(io("list", dir))?.file_name();
        let number: Option<u32> = name
            .to_str()
            .and_then(|n| n.strip_prefix("pack-")?.strip_suffix(".mspk")?.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// What a sealed pack holds, and its length. Its index file is made again if it is not good.
pub(super) fn entries_of(disk: &dyn Disk, dir: &Path, number: u32) -> Result<(Vec<Entry>, u64)> {
    let path = path(dir, number);
    let len = std::fs::metadata(&path)
        .map_err(io("look at", &path))?
        .len();
    if let Some(entries) = index::load(&index_path(dir, number), number, len) {
        return Ok((entries, len));
    }
    tracing::warn!(pack = %path.display(), "chunk pack has no good index: scanning it");
    let scan = scan_pack(&path, number)?;
    report(&path, &scan);
    // Readable after a power cut as well, before the index claims it.
    disk.open(&path)
        .and_then(|f| f.sync_data())
        .map_err(io("fdatasync", &path))?;
    index::save(disk, &index_path(dir, number), len, &scan.entries)?;
    Ok((scan.entries, len))
}

/// The last pack. A torn tail is cut off; the pack is then sealed, so that nothing is ever written
/// into a block that holds something acknowledged.
fn open_last(disk: &dyn Disk, dir: &Path, number: u32) -> Result<Active> {
    let path = path(dir, number);
    let file = disk.open(&path).map_err(io("open", &path))?;
    let mut len = file.size().map_err(io("look at", &path))?;
    if let Some(entries) = index::load(&index_path(dir, number), number, len) {
        return Ok(Active {
            number,
            len,
            entries,
        });
    }
    let scan = scan_pack(&path, number)?;
    report(&path, &scan);
    if !scan.clean {
        tracing::warn!(pack = %path.display(), from = len, to = scan.good_end, "cut off a torn tail");
        len = scan.good_end;
        file.set_len(len).map_err(io("truncate", &path))?;
    }
    // What was written but never acknowledged is held from here on: it must survive.
    file.sync_data().map_err(io("fdatasync", &path))?;
    sync_dir(disk, dir)?;
    let active = Active {
        number,
        len,
        entries: scan.entries,
    };
    if !scan.clean || scan.damaged > 0 {
        seal(disk, dir, &active)?;
    }
    Ok(active)
}

fn report(path: &Path, scan: &Scan) {
    if scan.damaged > 0 {
        tracing::error!(
            pack = %path.display(),
            places = scan.damaged,
            "chunk pack is damaged; chunks in the damaged places are not held any more"
        );
    }
}

/// Read a pack from its start; every record's data is checked against its checksum.
pub(super) fn scan_pack(path: &Path, number: u32) -> Result<Scan> {
    let file = File::open(path).map_err(io("open", path))?;
    let len = file.metadata().map_err(io("look at", path))?.len();
    let mut head = [0; 16];
    if len < BLOCK as u64 {
        // A crash while it was created: nothing was ever in it.
        return Ok(Scan {
            entries: Vec::new(),
            damaged: 0,
            good_end: 0,
            clean: false,
        });
    }
    file.read_exact_at(&mut head, 0).map_err(io("read", path))?;
    if head[..15] == PACK_HEADER[..15] && head[15] != PACK_HEADER[15] {
        return Err(StorageError::Foreign(format!(
            "{} has format version {}, this release reads 1: use the release that wrote it",
            path.display(),
            head[15]
        )));
    }
    scan_records(&file, path, number, len)
}

fn scan_records(file: &File, path: &Path, number: u32, len: u64) -> Result<Scan> {
    let mut scan = Scan {
        entries: Vec::new(),
        damaged: 0,
        good_end: BLOCK as u64,
        clean: true,
    };
    let mut at = BLOCK as u64;
    let mut data = Vec::new();
    // Whether something bad lies between the last good record and `at`.
    let mut bad = false;
    while at < len {
        match read_record(file, path, at, len, &mut data)? {
            Some((header, true)) => {
                if bad {
                    scan.damaged += 1;
                    bad = false;
                }
                if header.codec.is_some() {
                    scan.entries.push(entry(&header, number, at)?);
                }
                at += (HEADER_LEN + header.stored_len as usize) as u64;
                scan.good_end = at;
            }
            Some((header, false)) => {
                bad = true;
                at += (HEADER_LEN + header.stored_len as usize) as u64;
            }
            None => {
                bad = true;
                match next_magic(file, path, at + 1, len)? {
                    Some(next) => at = next,
                    None => break,
                }
            }
        }
    }
    scan.clean = scan.good_end == len && len.is_multiple_of(BLOCK as u64);
    Ok(scan)
}

fn entry(header: &Header, pack: u32, at: u64) -> Result<Entry> {
    let offset = u32::try_from(at)
        .map_err(|_| StorageError::Foreign(format!("pack {pack} is longer than 4 GiB")))?;
    let (stored_len, raw_len) = (header.stored_len, header.raw_len);
    Ok((
        header.id,
        Location {
            pack,
            offset,
            stored_len,
            raw_len,
        },
    ))
}

/// A record's header and whether its data is good; `None` if there is no whole record at `at`.
fn read_record(
    file: &File,
    path: &Path,
    at: u64,
    len: u64,
    data: &mut Vec<u8>,
) -> Result<Option<(Header, bool)>> {
    let mut head = [0; HEADER_LEN];
    if len - at < HEADER_LEN as u64 {
        return Ok(None);
    }
    file.read_exact_at(&mut head, at)
        .map_err(io("read", path))?;
    let Some(header) = Header::decode(&head) else {
        return Ok(None);
    };
    let stored = header.stored_len as usize;
    if stored > CHUNK_LEN_MAX || len - at - (HEADER_LEN as u64) < stored as u64 {
        return Ok(None);
    }
    data.resize(stored, 0);
    file.read_exact_at(data, at + HEADER_LEN as u64)
        .map_err(io("read", path))?;
    let good = header.matches(data);
    Ok(Some((header, good)))
}

/// The next place from `at` on that begins like a header. Data may hold such bytes too: harmless,
/// for a chunk's bytes are checked against its name whenever they are read.
fn next_magic(file: &File, path: &Path, mut at: u64, len: u64) -> Result<Option<u64>> {
    let mut window = vec![0; 1 << 20];
    while at + (HEADER_LEN as u64) <= len {
        let take = usize::try_from(len - at)
            .unwrap_or(usize::MAX)
            .min(window.len());
        let window = &mut window[..take];
        file.read_exact_at(window, at).map_err(io("read", path))?;
        let hit = window
            .windows(HEADER_LEN)
            .position(|w| w[..4] == MAGIC && Header::decode(w).is_some());
        if let Some(hit) = hit {
            return Ok(Some(at + hit as u64));
        }
        at += (take - HEADER_LEN + 1) as u64;
    }
    Ok(None)
}
