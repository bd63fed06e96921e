//! The cache's files: `<manifest digest>/{disk.part, disk, whole}`, and of a suspended VM `memory` and `machine`,
//! which come like the disk. `whole` is written last, so what has it is whole; its modification time is when the
//! image was last used.

use crate::agent::durable;
use crate::wire::ImageRef;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

const FORMAT: u32 = 1;
/// The files of an image; each ends with `.part` while it is pulled.
pub(super) const DISK: &str = "disk";
pub(super) const MEMORY: &str = "memory";
pub(super) const MACHINE: &str = "machine";
const FILES: [&str; 3] = [DISK, MEMORY, MACHINE];
/// Ends the name of a folder that is being deleted.
const DROPPED: &str = ".gone";

/// What `whole` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Whole {
    version: u32,
    format: String,
    /// There is the memory of a suspended VM, with its machine: which disk lies beside them
    /// ([`crate::transfer::FileEntry::content`]). A release that knows none leaves it out, and has pulled the
    /// disk alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    saved: Option<String>,
    /// Every template and tag under which these bytes were asked for.
    names: Vec<ImageRef>,
}

#[derive(Debug)]
struct Book {
    /// Absent while the image is only partly there.
    whole: Option<Whole>,
    used: SystemTime,
}

/// Space of a file system.
pub(super) struct Space {
    pub(super) total: u64,
    pub(super) free: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Shelf {
    root: PathBuf,
    books: Arc<Mutex<BTreeMap<String, Book>>>,
}

impl Shelf {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let mut books = BTreeMap::new();
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_suffix(DROPPED).is_some_and(is_digest) {
                fs::remove_dir_all(entry.path())?;
            } else if is_digest(&name) {
                books.insert(name, look(&entry.path()));
            }
        }
        Ok(Self {
            root: root.to_owned(),
            books: Arc::new(Mutex::new(books)),
        })
    }

    /// One of an image's files.
    pub(super) fn file(&self, digest: &str, name: &str) -> PathBuf {
        self.root.join(digest).join(name)
    }

    pub(super) fn images(&self) -> Vec<ImageRef> {
        let books = self.books.lock();
        let whole = books.values().filter_map(|b| b.whole.as_ref());
        whole.flat_map(|w| w.names.iter().cloned()).collect()
    }

    /// Digests of the whole images with this name.
    pub(super) fn named(&self, template_id: &str, number: u32) -> Vec<String> {
        let books = self.books.lock();
        let has = |book: &Book| {
            let names = book.whole.iter().flat_map(|w| &w.names);
            names.into_iter().any(|n| is_named(n, template_id, number))
        };
        let named = books.iter().filter(|(_, book)| has(book));
        named.map(|(digest, _)| digest.clone()).collect()
    }

    /// Take this name from an image; one that has no other is dropped (`true`), and its bytes go with
    /// [`Self::clear`].
    pub(super) fn unname(&self, digest: &str, template_id: &str, number: u32) -> io::Result<bool> {
        {
            let mut books = self.books.lock();
            let Some(whole) = books.get_mut(digest).and_then(|b| b.whole.as_mut()) else {
                return Ok(false);
            };
            let mut rest = whole.clone();
            rest.names.retain(|n| !is_named(n, template_id, number));
            if !rest.names.is_empty() {
                let marker = self.root.join(digest).join("whole");
                durable::write(&marker, &serde_json::to_vec(&rest)?)?;
                *whole = rest;
                return Ok(false);
            }
        }
        self.drop_image(digest).map(|()| true)
    }

    pub(super) fn used_bytes(&self) -> u64 {
        let digests: Vec<String> = self.books.lock().keys().cloned().collect();
        digests.iter().map(|d| self.bytes(d)).sum()
    }

    /// If it is whole: note its use (and this name of it), and answer its format and, with a memory, its disk's content.
    pub(super) fn touch(&self, image: &ImageRef) -> Option<(String, Option<String>)> {
        let mut books = self.books.lock();
        let book = books.get_mut(&image.manifest)?;
        let whole = book.whole.as_mut()?;
        book.used = SystemTime::now();
        let marker = self.root.join(&image.manifest).join("whole");
        if whole.names.contains(image) {
            // Losing this in a crash costs no more than a wrong order of age.
            let noted = File::options().append(true).open(&marker);
            if let Err(error) = noted.and_then(|f| f.set_modified(book.used)) {
                tracing::warn!(path = %marker.display(), %error, "cannot note an image's use");
            }
        } else {
            whole.names.push(image.clone());
            let stored = serde_json::to_vec(whole).map_err(io::Error::other);
            if let Err(error) = stored.and_then(|bytes| durable::write(&marker, &bytes)) {
                tracing::warn!(path = %marker.display(), %error, "cannot note an image's name");
            }
        }
        Some((whole.format.clone(), whole.saved.clone()))
    }

    /// Where a pull of this image writes.
    pub(super) fn begin(&self, digest: &str) -> io::Result<PathBuf> {
        let folder = self.root.join(digest);
        fs::create_dir_all(&folder)?;
        for part in FILES.map(|name| folder.join(part(name))) {
            if part.exists() {
                // A crash on the way to being whole may have left it read-only.
                fs::set_permissions(&part, Permissions::from_mode(0o644))?;
            }
        }
        let book = Book {
            whole: None,
            used: SystemTime::now(),
        };
        self.books.lock().insert(digest.to_owned(), book);
        Ok(folder.join(part(DISK)))
    }

    /// The pull has ended well (its files are fsynced): make the image whole, durably.
    pub(super) fn finish(
        &self,
        image: &ImageRef,
        format: &str,
        saved: Option<String>,
    ) -> io::Result<()> {
        let folder = self.root.join(&image.manifest);
        for name in &FILES[..if saved.is_some() { 3 } else { 1 }] {
            let part = folder.join(part(name));
            fs::set_permissions(&part, Permissions::from_mode(0o444))?;
            File::open(&part)?.sync_all()?;
            fs::rename(&part, folder.join(name))?;
        }
        durable::sync_dir(&folder)?;
        durable::sync_dir(&self.root)?;
        let whole = Whole {
            version: FORMAT,
            format: format.to_owned(),
            saved,
            names: vec![image.clone()],
        };
        durable::write(&folder.join("whole"), &serde_json::to_vec(&whole)?)?;
        let book = Book {
            whole: Some(whole),
            used: SystemTime::now(),
        };
        self.books.lock().insert(image.manifest.clone(), book);
        Ok(())
    }

    /// Drop an image; its bytes go with [`Self::clear`].
    pub(super) fn drop_image(&self, digest: &str) -> io::Result<()> {
        self.books.lock().remove(digest);
        let folder = self.root.join(digest);
        if !folder.is_dir() {
            return Ok(());
        }
        // Left by an earlier removal that was interrupted.
        self.clear(digest)?;
        fs::rename(&folder, self.dropped(digest))
    }

    /// The bytes of an image that was dropped.
    pub(super) fn clear(&self, digest: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.dropped(digest)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn dropped(&self, digest: &str) -> PathBuf {
        self.root.join(format!("{digest}{DROPPED}"))
    }

    /// Digest and bytes of each image, least recently used first.
    pub(super) fn by_age(&self) -> Vec<(String, u64)> {
        let mut all: Vec<(SystemTime, String)> = {
            let books = self.books.lock();
            books.iter().map(|(d, b)| (b.used, d.clone())).collect()
        };
        all.sort();
        let digests = all.into_iter().map(|(_, digest)| digest);
        digests.map(|d| (d.clone(), self.bytes(&d))).collect()
    }

    pub(super) fn space(&self) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(Space {
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    fn bytes(&self, digest: &str) -> u64 {
        let folder = self.root.join(digest);
        let whole = FILES.map(|name| allocated(&folder.join(name)));
        whole.iter().sum::<u64>() + self.pulled(digest)
    }

    /// Bytes on disk of what a pull has written so far.
    pub(super) fn pulled(&self, digest: &str) -> u64 {
        let folder = self.root.join(digest);
        FILES
            .map(|name| allocated(&folder.join(part(name))))
            .iter()
            .sum()
    }
}

fn look(folder: &Path) -> Book {
    let marker = folder.join("whole");
    let used = fs::metadata(&marker).and_then(|m| m.modified());
    let whole = fs::read(&marker)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Whole>(&bytes).ok())
        .filter(|whole| whole.version == FORMAT && folder.join(DISK).is_file())
        .filter(|whole| {
            let there = |name: &str| folder.join(name).is_file();
            whole.saved.is_none() || (there(MEMORY) && there(MACHINE))
        });
    Book {
        whole,
        used: used.unwrap_or(SystemTime::UNIX_EPOCH),
    }
}

fn is_named(name: &ImageRef, template_id: &str, number: u32) -> bool {
    name.template_id == template_id && name.number == number
}

fn part(name: &str) -> String {
    format!("{name}.part")
}

/// Bytes that a file really takes on disk; 0 if there is none.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

/// 64 lower-case hex digits: safe as a folder's name.
pub(crate) fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
