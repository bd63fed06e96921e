//! What this node has for other nodes: chunks of whole images, and of those that it is just pulling. Refuses to
//! know who asks (`server` does) and what is kept how long (the cache does).

mod server;

pub use server::{Key, bind, serve};

use crate::transfer::{Holding, MEMORY_NAMES_FILE, NAMES_FILE};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Whole images whose names are kept in memory: about 36 bytes a chunk, 1.2 MB for 2 GB.
const OPEN_MAX: usize = 8;
/// What came lately stays in memory so long after a pull: others of the same burst may be a little later.
const COOL_AFTER: Duration = Duration::from_secs(30);

/// The images of one node, as far as others may have them.
#[derive(Debug)]
pub struct Shares {
    /// The image cache's folder.
    root: PathBuf,
    shelf: Mutex<Shelf>,
}

/// The files of an image: its disk, and the memory of a suspended VM.
pub type Files = Vec<Arc<Holding>>;

#[derive(Debug, Default)]
struct Shelf {
    /// Being pulled, by manifest.
    flying: BTreeMap<String, Files>,
    /// Whole, the one used last at the end.
    whole: Vec<(String, Files)>,
}

impl Shares {
    /// Of the images below this folder.
    pub fn new(root: &Path) -> Arc<Self> {
        Arc::new(Self {
            root: root.to_owned(),
            shelf: Mutex::default(),
        })
    }

    /// An image that is being pulled can be had in part, until the answer is dropped.
    pub fn offer(self: &Arc<Self>, manifest: &str, holding: &Arc<Holding>) -> Offer {
        let files = vec![Arc::clone(holding)];
        let mut shelf = self.shelf.lock();
        shelf.forget(manifest);
        shelf.flying.insert(manifest.to_owned(), files.clone());
        Offer {
            shares: Arc::clone(self),
            manifest: manifest.to_owned(),
            files,
        }
    }

    /// What is here of an image. Blocks.
    pub fn find(&self, manifest: &str) -> Option<Files> {
        if let Some(found) = self.shelf.lock().find(manifest) {
            return Some(found);
        }
        if !crate::cache::is_digest(manifest) {
            return None;
        }
        let found = Holding::open(&self.root.join(manifest)).ok()?;
        let found: Files = found.into_iter().map(Arc::new).collect();
        let mut shelf = self.shelf.lock();
        // Another may have opened it, or begun to pull it anew, meanwhile.
        if let Some(found) = shelf.find(manifest) {
            return Some(found);
        }
        // One that was dropped meanwhile would keep its room on the disk.
        if self.root.join(manifest).join("disk").exists() {
            shelf.keep(manifest, &found);
        }
        Some(found)
    }

    /// Whole images but this one, those that came last first. Blocks.
    pub fn others(&self, manifest: &str) -> Vec<Arc<Holding>> {
        let age = |entry: &std::fs::DirEntry| {
            let names = std::fs::metadata(entry.path().join(NAMES_FILE)).ok()?;
            names.modified().ok()
        };
        let Ok(entries) = std::fs::read_dir(&self.root) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .flatten()
            .filter_map(|e| Some((age(&e)?, e.file_name().into_string().ok()?)))
            .filter(|(_, name)| name != manifest && crate::cache::is_digest(name))
            .collect();
        names.sort_unstable();
        let newest = names.iter().rev().take(OPEN_MAX);
        newest
            .filter_map(|(_, name)| self.find(name))
            .flatten()
            .collect()
    }

    /// The image has gone: its file must not be held open.
    pub fn forget(&self, manifest: &str) {
        self.shelf.lock().forget(manifest);
    }
}

impl Shelf {
    fn find(&mut self, manifest: &str) -> Option<Files> {
        if let Some(flying) = self.flying.get(manifest) {
            return Some(flying.clone());
        }
        let at = self.whole.iter().position(|(m, _)| m == manifest)?;
        let found = self.whole.remove(at);
        let files = found.1.clone();
        self.whole.push(found);
        Some(files)
    }

    fn keep(&mut self, manifest: &str, files: &Files) {
        self.whole.push((manifest.to_owned(), files.clone()));
        if self.whole.len() > OPEN_MAX {
            self.whole.remove(0);
        }
    }

    fn forget(&mut self, manifest: &str) {
        self.flying.remove(manifest);
        self.whole.retain(|(m, _)| m != manifest);
    }
}

/// A pull under way whose chunks others may have.
#[derive(Debug)]
pub struct Offer {
    shares: Arc<Shares>,
    manifest: String,
    files: Files,
}

impl Offer {
    /// The next file of it is on its way.
    pub fn add(&mut self, holding: &Arc<Holding>) {
        let mut shelf = self.shares.shelf.lock();
        if let Some(flying) = self.flying(&mut shelf) {
            flying.push(Arc::clone(holding));
        }
        self.files.push(Arc::clone(holding));
    }

    /// All of it has come and is durable: note its chunks' names in `folder`, and go on offering it. Blocks.
    pub fn whole(self, folder: &Path) -> io::Result<()> {
        for (file, name) in self.files.iter().zip([NAMES_FILE, MEMORY_NAMES_FILE]) {
            crate::agent::durable::write(&folder.join(name), &file.to_bytes())?;
        }
        let mut shelf = self.shares.shelf.lock();
        shelf.forget(&self.manifest);
        shelf.keep(&self.manifest, &self.files);
        Ok(())
    }

    /// Later, give back the memory of what came lately.
    pub fn cool_later(&self) {
        let files: Vec<_> = self.files.iter().map(Arc::downgrade).collect();
        tokio::spawn(async move {
            tokio::time::sleep(COOL_AFTER).await;
            for file in files.iter().filter_map(std::sync::Weak::upgrade) {
                file.cool();
            }
        });
    }

    /// What is offered, unless another pull of it has begun.
    fn flying<'a>(&self, shelf: &'a mut Shelf) -> Option<&'a mut Files> {
        let ours = |files: &&mut Files| Arc::ptr_eq(&files[0], &self.files[0]);
        shelf.flying.get_mut(&self.manifest).filter(ours)
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut shelf = self.shares.shelf.lock();
        if self.flying(&mut shelf).is_some() {
            shelf.flying.remove(&self.manifest);
        }
    }
}
