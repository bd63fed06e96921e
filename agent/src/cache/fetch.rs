//! Where an image's bytes come from.

use crate::transfer::{self, Manifest, TransferError};
use crate::wire::ImageRef;
use async_trait::async_trait;
use parking_lot::RwLock;
use std::path::Path;
use std::sync::Arc;

/// Told (bytes done, bytes in all).
pub type Told<'a> = dyn Fn(u64, u64) + Send + Sync + 'a;

/// Makes a file equal to an image's disk.
#[async_trait]
pub trait Fetch: Send + Sync + 'static {
    /// Fill `dest` (what it has already is kept where it fits) and fsync it. Dropping the future
    /// stops the work.
    async fn fetch(
        &self,
        image: &ImageRef,
        dest: &Path,
        told: &Told<'_>,
    ) -> Result<Manifest, TransferError>;
}

/// The registries that are known now; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    urls: Arc<RwLock<Vec<String>>>,
}

impl Sources {
    /// Known from the last run.
    pub fn new(urls: &[String]) -> Self {
        let sources = Self::default();
        sources.set(urls);
        sources
    }
    /// A controller told a new list; an empty one tells nothing.
    pub fn set(&self, urls: &[String]) {
        if !urls.is_empty() {
            *self.urls.write() = urls.to_vec();
        }
    }
    /// Base addresses.
    pub fn get(&self) -> Vec<String> {
        self.urls.read().clone()
    }
}

/// Pulls from any of the members' registries.
#[derive(Debug)]
pub struct RegistryFetch {
    client: reqwest::Client,
    sources: Sources,
}

impl RegistryFetch {
    /// `sources` may change at any time.
    pub fn new(client: reqwest::Client, sources: Sources) -> Self {
        Self { client, sources }
    }
}

#[async_trait]
impl Fetch for RegistryFetch {
    async fn fetch(
        &self,
        image: &ImageRef,
        dest: &Path,
        told: &Told<'_>,
    ) -> Result<Manifest, TransferError> {
        let registries = self.sources.get();
        transfer::pull_file(&self.client, &registries, &image.manifest, 0, dest, told).await
    }
}
