//! A disk that remembers what was synced and what was not, so that a test can cut the power at any moment;
//! it can also fail an operation. The real files are written too.

use crate::support::Random;
use mainstay_storage::disk::{Disk, DiskFile, RealDisk};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// A disk writes whole sectors or not at all.
const SECTOR: usize = 512;

/// What happened, in order. Acknowledgements are the test's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Create(PathBuf, usize),
    Write(usize, u64, Vec<u8>),
    SetLen(usize, u64),
    Sync(usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncDir,
    /// So many changes were acknowledged.
    Acked(usize),
    /// So many changes were asked for.
    Asked(usize),
}

#[derive(Debug, Default)]
struct Journal {
    /// What is on the platter before the first event.
    base: Platter,
    names: BTreeMap<PathBuf, usize>,
    events: Vec<Event>,
    /// Writes and syncs until one fails.
    fail_in: Option<usize>,
    next_inode: usize,
}

/// What a power cut leaves.
#[derive(Clone, Debug, Default)]
struct Platter {
    names: BTreeMap<PathBuf, usize>,
    files: BTreeMap<usize, Vec<u8>>,
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct PowerDisk {
    journal: Arc<Mutex<Journal>>,
}

#[derive(Debug)]
struct PowerFile {
    real: Arc<dyn DiskFile>,
    inode: usize,
    journal: Arc<Mutex<Journal>>,
}

/// How much of what was not synced survives.
pub(crate) enum Luck<'a> {
    /// Nothing.
    None,
    /// Any sectors and names, in any order.
    Random(&'a mut Random),
}

impl PowerDisk {
    /// Everything in `dir` is on the platter already.
    pub(crate) fn over(dir: &Path) -> Self {
        let disk = Self::default();
        let mut journal = disk.journal.lock().unwrap();
        for item in std::fs::read_dir(dir).unwrap() {
            let path = item.unwrap().path();
            if path.is_file() {
                let inode = journal.next_inode;
                journal.next_inode += 1;
                journal
                    .base
                    .files
                    .insert(inode, std::fs::read(&path).unwrap());
                journal.base.names.insert(path.clone(), inode);
                journal.names.insert(path, inode);
            }
        }
        drop(journal);
        disk
    }

    pub(crate) fn note(&self, event: Event) {
        self.journal.lock().unwrap().events.push(event);
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.journal.lock().unwrap().events.clone()
    }

    /// The write or sync after so many others fails, and every one after it.
    pub(crate) fn fail_after(&self, count: usize) {
        self.journal.lock().unwrap().fail_in = Some(count);
    }

    /// Write what is left of `from` after a power cut behind the first `cut` events into `to`.
    pub(crate) fn cut_power(&self, cut: usize, luck: Luck<'_>, from: &Path, to: &Path) {
        let journal = self.journal.lock().unwrap();
        let platter = replay(journal.base.clone(), &journal.events[..cut], luck);
        drop(journal);
        drop(std::fs::remove_dir_all(to));
        std::fs::create_dir_all(to).unwrap();
        for (path, inode) in &platter.names {
            let bytes = platter.files.get(inode).cloned().unwrap_or_default();
            std::fs::write(to.join(path.strip_prefix(from).unwrap()), bytes).unwrap();
        }
    }

    fn may_fail(journal: &Mutex<Journal>) -> io::Result<()> {
        match &mut journal.lock().unwrap().fail_in {
            Some(0) => Err(io::Error::from_raw_os_error(5)),
            Some(count) => {
                *count -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn replay(mut platter: Platter, events: &[Event], mut luck: Luck<'_>) -> Platter {
    let mut pending: BTreeMap<usize, Vec<&Event>> = BTreeMap::new();
    let mut names = Vec::new();
    for event in events {
        match event {
            Event::Write(inode, ..) | Event::SetLen(inode, _) => {
                pending.entry(*inode).or_default().push(event);
            }
            Event::Sync(inode) => {
                let file = platter.files.entry(*inode).or_default();
                for event in pending.remove(inode).unwrap_or_default() {
                    apply(file, event, &mut |_| true);
                }
            }
            Event::Create(..) | Event::Rename(..) | Event::Remove(_) => names.push(event),
            Event::SyncDir => {
                for event in names.drain(..) {
                    rename(&mut platter, event);
                }
            }
            Event::Acked(_) | Event::Asked(_) => {}
        }
    }
    if let Luck::Random(random) = &mut luck {
        // One cut in four keeps everything, as a kill does; the others lose about half.
        let all = random.below(4) == 0;
        let mut keep = |_: usize| all || random.below(2) == 0;
        for (inode, events) in pending {
            let file = platter.files.entry(inode).or_default();
            for event in events {
                apply(file, event, &mut keep);
            }
        }
        for event in names {
            if keep(0) {
                rename(&mut platter, event);
            }
        }
    }
    platter
}

fn apply(file: &mut Vec<u8>, event: &Event, keep: &mut dyn FnMut(usize) -> bool) {
    match event {
        Event::SetLen(_, len) if keep(0) => file.resize(*len as usize, 0),
        Event::Write(_, offset, bytes) => {
            let mut at = 0;
            while at < bytes.len() {
                let place = *offset as usize + at;
                let len = (SECTOR - place % SECTOR).min(bytes.len() - at);
                if keep(place) {
                    file.resize(file.len().max(place + len), 0);
                    file[place..place + len].copy_from_slice(&bytes[at..at + len]);
                }
                at += len;
            }
        }
        _ => {}
    }
}

fn rename(platter: &mut Platter, event: &Event) {
    match event {
        Event::Create(path, inode) => {
            platter.names.insert(path.clone(), *inode);
        }
        Event::Rename(from, to) => {
            if let Some(inode) = platter.names.remove(from) {
                platter.names.insert(to.clone(), inode);
            }
        }
        Event::Remove(path) => {
            platter.names.remove(path);
        }
        _ => {}
    }
}

impl Disk for PowerDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let real = RealDisk.create(path)?;
        let mut journal = self.journal.lock().unwrap();
        let inode = journal.next_inode;
        journal.next_inode += 1;
        journal.names.insert(path.to_path_buf(), inode);
        journal
            .events
            .push(Event::Create(path.to_path_buf(), inode));
        Ok(self.file(real, inode))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let real = RealDisk.open(path)?;
        let mut journal = self.journal.lock().unwrap();
        let unknown = journal.next_inode;
        // A file that something else made (sled does) is known from here on.
        let inode = *journal.names.entry(path.to_path_buf()).or_insert(unknown);
        journal.next_inode += usize::from(inode == unknown);
        drop(journal);
        Ok(self.file(real, inode))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)?;
        let mut journal = self.journal.lock().unwrap();
        let inode = journal.names.remove(from).unwrap();
        journal.names.insert(to.to_path_buf(), inode);
        journal
            .events
            .push(Event::Rename(from.to_path_buf(), to.to_path_buf()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)?;
        let mut journal = self.journal.lock().unwrap();
        journal.names.remove(path);
        journal.events.push(Event::Remove(path.to_path_buf()));
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        self.note(Event::SyncDir);
        Ok(())
    }
}

impl PowerDisk {
    fn file(&self, real: Arc<dyn DiskFile>, inode: usize) -> Arc<dyn DiskFile> {
        Arc::new(PowerFile {
            real,
            inode,
            journal: Arc::clone(&self.journal),
        })
    }
}

impl PowerFile {
    fn note(&self, event: Event) {
        self.journal.lock().unwrap().events.push(event);
    }
}

impl DiskFile for PowerFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.real.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if let Err(error) = PowerDisk::may_fail(&self.journal) {
            // A failed write may have written some of it.
            let half = &buf[..buf.len() / 2];
            self.real.write_all_at(half, offset)?;
            self.note(Event::Write(self.inode, offset, half.to_vec()));
            return Err(error);
        }
        self.real.write_all_at(buf, offset)?;
        self.note(Event::Write(self.inode, offset, buf.to_vec()));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.real.set_len(len)?;
        self.note(Event::SetLen(self.inode, len));
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.real.size()
    }

    /// Only says so in the journal: the test needs no durability of its own files.
    fn sync_data(&self) -> io::Result<()> {
        PowerDisk::may_fail(&self.journal)?;
        self.note(Event::Sync(self.inode));
        Ok(())
    }
}
