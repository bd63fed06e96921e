//! Where an image's bytes come from, and where those of a new one go.

use crate::share::{Key, Offer, Shares};
use crate::transfer::api::TagInfo;
use crate::transfer::{self, Company, Manifest, PushSpec, TransferError};
use crate::wire::ImageRef;
use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};
use std::path::Path;
use std::sync::Arc;

/// Told (bytes done, bytes in all).
pub type Told<'a> = dyn Fn(u64, u64) + Send + Sync + 'a;

/// Makes a file equal to an image's disk.
#[async_trait]
pub trait Fetch: Send + Sync + 'static {
    /// Fill `dest` (what it has already is kept where it fits) and fsync it. The memory of a suspended VM
    /// goes to `memory.part` beside it, its machine to `machine.part`. Dropping the future stops the work.
    async fn fetch(
        &self,
        image: &ImageRef,
        dest: &Path,
        told: &Told<'_>,
    ) -> Result<Manifest, TransferError>;

    /// Make a tag of `disk`, which does not change, for a save: push it to a registry and wait for copies for as
    /// long as `spec` says. What arrived once is not sent again by a later try.
    async fn deliver(
        &self,
        disk: &Path,
        spec: &PushSpec,
        told: &Told<'_>,
    ) -> Result<TagInfo, TransferError>;

    /// An image is not in the cache any more.
    fn dropped(&self, _manifest: &str) {}
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

/// How this node takes part among others.
#[derive(Clone, Debug)]
pub struct Party {
    /// What it has.
    pub shares: Arc<Shares>,
    /// What nodes show each other.
    pub key: Key,
    /// Where others reach it; empty if they cannot.
    pub address: String,
}

/// Pulls from the members' registries, from images that are here, and from other nodes.
#[derive(Debug)]
pub struct RegistryFetch {
    client: reqwest::Client,
    sources: Sources,
    party: Party,
    seed: u64,
}

impl RegistryFetch {
    /// `sources` may change at any time.
    pub fn new(client: reqwest::Client, sources: Sources, party: Party) -> Self {
        let (seed, _) = uuid::Uuid::new_v4().as_u64_pair();
        Self {
            client,
            sources,
            party,
            seed,
        }
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
        let (shares, digest) = (Arc::clone(&self.party.shares), image.manifest.clone());
        let images = tokio::task::spawn_blocking(move || shares.others(&digest)).await;
        let offered: Mutex<Option<Offer>> = Mutex::new(None);
        let company = Company {
            address: self.party.address.clone(),
            key: self.party.key.get(),
            seed: self.seed,
            images: images.unwrap_or_default(),
            offer: &|holding| match &mut *offered.lock() {
                Some(offer) => offer.add(holding),
                none => *none = Some(self.party.shares.offer(&image.manifest, holding)),
            },
        };
        let digest = &image.manifest;
        let pulled =
            transfer::pull_among(&self.client, &registries, digest, dest, told, &company).await;
        drop(company);
        let manifest = pulled?;
        if let (Some(offer), Some(folder)) = (offered.into_inner(), dest.parent()) {
            offer.cool_later();
            let folder = folder.to_owned();
            let noted = tokio::task::spawn_blocking(move || offer.whole(&folder)).await;
            if let Ok(Err(error)) = noted {
                // The image is whole without it; the next tag is pulled in full.
                tracing::warn!(%error, "cannot note the chunks of an image");
            }
        }
        Ok(manifest)
    }

    async fn deliver(
        &self,
        disk: &Path,
        spec: &PushSpec,
        told: &Told<'_>,
    ) -> Result<TagInfo, TransferError> {
        let registries = self.sources.get();
        let pushed = transfer::push_file(&self.client, &registries, disk, spec, told).await?;
        tracing::info!(
            chunks = pushed.sent_chunks,
            bytes = pushed.sent_bytes,
            "a saved disk was pushed"
        );
        Ok(pushed.tag)
    }

    fn dropped(&self, manifest: &str) {
        self.party.shares.forget(manifest);
    }
}
