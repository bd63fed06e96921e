//! Who this node is: an id made once, the one cluster it serves, and where that cluster was last
//! seen. Owns the data directory's lock. Refuses to talk to anybody.

use super::durable;
use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const FORMAT: u32 = 1;

/// What is kept in `node.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    version: u32,
    node_id: String,
    /// Empty until the first registration.
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    controllers: Vec<String>,
    #[serde(default)]
    registries: Vec<String>,
}

/// The locked data directory and the identity in it.
#[derive(Debug)]
pub struct Identity {
    root: PathBuf,
    kept: Kept,
    _lock: File,
}

impl Identity {
    /// Open (or create) the data directory, lock it, and read (or make) the identity.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(root)
            .with_context(|| format!("create data directory {}", root.display()))?;
        let lock_path = root.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .with_context(|| format!("open {}", lock_path.display()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "the data directory {} is in use by another node agent; stop that one or choose another --data-dir",
                root.display()
            );
        }
        let kept = match Self::load(root)? {
            Some(kept) => kept,
            None => Self::create(root)?,
        };
        let root = root.to_owned();
        Ok(Self {
            root,
            kept,
            _lock: lock,
        })
    }

    fn load(root: &Path) -> anyhow::Result<Option<Kept>> {
        let path = root.join("node.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        };
        let kept: Kept = serde_json::from_slice(&bytes).with_context(|| {
            format!("{} is damaged; without it this node is a new one: remove the file to join as a new node", path.display())
        })?;
        if kept.version != FORMAT {
            bail!(
                "{} has format {}, this release understands {FORMAT}",
                path.display(),
                kept.version
            );
        }
        Ok(Some(kept))
    }

    fn create(root: &Path) -> anyhow::Result<Kept> {
        let kept = Kept {
            version: FORMAT,
            node_id: uuid::Uuid::new_v4().to_string(),
            ..Kept::default()
        };
        store(root, &kept)?;
        Ok(kept)
    }

    /// This node's id, for ever.
    pub fn node_id(&self) -> &str {
        &self.kept.node_id
    }

    /// API addresses that a controller told last.
    pub fn controllers(&self) -> &[String] {
        &self.kept.controllers
    }

    /// Registry addresses that a controller told last.
    pub fn registries(&self) -> &[String] {
        &self.kept.registries
    }

    /// Bind this node to the first cluster that accepts it; any other is refused with what to do.
    pub fn claim_cluster(&mut self, cluster_id: &str) -> anyhow::Result<()> {
        if cluster_id.is_empty() {
            bail!("the controller does not say which cluster it belongs to");
        }
        if self.kept.cluster_id == cluster_id {
            return Ok(());
        }
        if !self.kept.cluster_id.is_empty() {
            bail!(
                "this node belongs to cluster {} and the controller to cluster {cluster_id}; to move the node, stop its VMs and join with an empty --data-dir (now {})",
                self.kept.cluster_id,
                self.root.display()
            );
        }
        let kept = Kept {
            cluster_id: cluster_id.to_owned(),
            ..self.kept.clone()
        };
        self.keep(kept)
    }

    /// Remember where the cluster is; does nothing when nothing is new, or nothing was told.
    pub fn remember(
        &mut self,
        controllers: &[String],
        registries: &[String],
    ) -> anyhow::Result<()> {
        let mut kept = self.kept.clone();
        if !controllers.is_empty() {
            kept.controllers = controllers.to_vec();
        }
        if !registries.is_empty() {
            kept.registries = registries.to_vec();
        }
        if kept == self.kept {
            return Ok(());
        }
        self.keep(kept)
    }

    fn keep(&mut self, kept: Kept) -> anyhow::Result<()> {
        store(&self.root, &kept)?;
        self.kept = kept;
        Ok(())
    }
}

fn store(root: &Path, kept: &Kept) -> anyhow::Result<()> {
    let path = root.join("node.json");
    let bytes = serde_json::to_vec_pretty(kept)?;
    durable::write(&path, &bytes).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_and_the_cluster_survive_and_the_directory_is_locked() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Identity::open(dir.path()).unwrap();
        let id = first.node_id().to_owned();
        first.claim_cluster("c1").unwrap();
        first.remember(&["http://a".to_owned()], &[]).unwrap();
        let error = Identity::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another node agent"), "{error}");
        drop(first);
        let mut again = Identity::open(dir.path()).unwrap();
        assert_eq!(again.node_id(), id);
        assert_eq!(again.controllers(), ["http://a"]);
        again.claim_cluster("c1").unwrap();
        let error = again.claim_cluster("c2").unwrap_err().to_string();
        assert!(error.contains("belongs to cluster c1"), "{error}");
    }

    #[test]
    fn a_damaged_identity_is_not_silently_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node.json"), b"{").unwrap();
        assert!(Identity::open(dir.path()).is_err());
        assert_eq!(fs::read(dir.path().join("node.json")).unwrap(), b"{");
    }
}
