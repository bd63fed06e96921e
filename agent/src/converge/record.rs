//! What the agent must still know about an instance after it was killed: which image its VM stands
//! on, whether its startup script has begun, how it all ended. One fsynced JSON file per instance.

use crate::agent::durable;
use crate::wire::{ImageRef, ScriptResult, VmFacts};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;

const FORMAT: u32 = 1;

/// How far an instance got. Written before the step that it names.
///
/// ```text
/// Begun -> (script_begun) -> (script: result) -> Up | Failed
/// Begun -> Rejected
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A VM may exist; its start has not come to an end.
    Begun,
    /// Started; a monitored script ended with 0.
    Up,
    /// Failed for good.
    Failed(String),
    /// This node could not; nothing of it is left here.
    Rejected(String),
}

/// One instance at one generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Instance id.
    pub id: String,
    /// Fence.
    pub generation: u64,
    /// What its disk stands on.
    pub image: ImageRef,
    /// How far it got.
    pub stage: Stage,
    /// The startup script may have begun: it never runs again.
    pub script_begun: bool,
    /// How a monitored script ended.
    pub script: Option<ScriptResult>,
    /// The VM as last seen.
    pub vm: Option<VmFacts>,
    /// The newest save of it.
    #[serde(default)]
    pub saving: Option<Saving>,
}

/// How far a save got. Written before the step that it names, but for results.
///
/// ```text
/// (begun) -> script_begun -> script: result -> stopping -> built -> Pushed
///       \__________\______________\____________\_________\___ Failed
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saving {
    /// Which.
    pub id: String,
    /// Its script may have begun: it never runs again.
    pub script_begun: bool,
    /// How it ended.
    pub script: Option<ScriptResult>,
    /// The VM may be stopped for it.
    pub stopping: bool,
    /// The disk to be pushed is whole, and of this format.
    pub built: Option<String>,
    /// How it ended.
    pub end: Option<SavingEnd>,
}

/// How a save ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavingEnd {
    /// The tag was seen visible.
    Pushed,
    /// Why there is none.
    Failed(String),
}

impl Saving {
    /// One that begins now.
    pub fn begin(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            script_begun: false,
            script: None,
            stopping: false,
            built: None,
            end: None,
        }
    }
}

impl Record {
    /// A start that begins now.
    pub fn begin(id: &str, generation: u64, image: &ImageRef) -> Self {
        Self {
            version: FORMAT,
            id: id.to_owned(),
            generation,
            image: image.clone(),
            stage: Stage::Begun,
            script_begun: false,
            script: None,
            vm: None,
            saving: None,
        }
    }
    /// With this save, from where it was left if it was begun before.
    pub fn saving(self, id: &str) -> Self {
        let begun = self.saving.filter(|saving| saving.id == id);
        Self {
            saving: Some(begun.unwrap_or_else(|| Saving::begin(id))),
            ..self
        }
    }
    /// The save that has ended, if any has.
    pub fn saved(&self) -> Option<&str> {
        let saving = self.saving.as_ref().filter(|s| s.end.is_some())?;
        Some(&saving.id)
    }
    /// The same disk at a newer generation: to be started again, without its script.
    pub fn again(self, generation: u64) -> Self {
        if self.generation >= generation {
            return self;
        }
        Self {
            generation,
            stage: Stage::Begun,
            script_begun: true,
            ..self
        }
    }
    /// Its start came to an end, good or bad.
    pub fn settled(&self) -> bool {
        self.stage != Stage::Begun
    }
}

/// The folder of records. Writes and removals of one process happen in the order of their calls,
/// also when the calling task is cancelled half-way.
#[derive(Clone)]
pub struct Records {
    root: PathBuf,
    order: Arc<Mutex<()>>,
}

impl Records {
    /// Open the folder and read all records. A file that cannot be read stands in the way of
    /// nothing: it is reported and left.
    pub fn open(root: &Path) -> io::Result<(Self, BTreeMap<String, Record>)> {
        fs::create_dir_all(root)?;
        let mut found = BTreeMap::new();
        for file in fs::read_dir(root)? {
            let path = file?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => {
                    found.insert(record.id.clone(), record);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "unreadable instance record");
                }
            }
        }
        let records = Self {
            root: root.to_owned(),
            order: Arc::new(Mutex::new(())),
        };
        Ok((records, found))
    }

    /// Durable on return.
    pub async fn put(&self, record: &Record) -> io::Result<()> {
        let bytes = serde_json::to_vec(record)?;
        let path = self.path(&record.id)?;
        self.in_order(move || durable::write(&path, &bytes)).await
    }

    /// Forget an instance; nothing to do if it is not known.
    pub async fn remove(&self, id: &str) -> io::Result<()> {
        let path = self.path(id)?;
        self.in_order(move || durable::remove(&path)).await
    }

    async fn in_order(
        &self,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        // The guard goes with the work: a caller that is cancelled does not let a later one overtake.
        let guard = Arc::clone(&self.order).lock_owned().await;
        tokio::task::spawn_blocking(move || {
            let done = work();
            drop(guard);
            done
        })
        .await
        .map_err(io::Error::other)?
    }

    /// Ids come from the controller: only what is a plain file name becomes one.
    fn path(&self, id: &str) -> io::Result<PathBuf> {
        if !plain_id(id) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{id:?} is no instance id"),
            ));
        }
        Ok(self.root.join(format!("{id}.json")))
    }
}

/// Ids name files: letters, digits, dashes and underscores only.
pub fn plain_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 128
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn read(path: &Path) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(path)?)?;
    if record.version != FORMAT || path.file_stem().is_none_or(|s| s != record.id.as_str()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a record of another format or another instance",
        ));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn records_survive_and_strange_ids_touch_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (records, found) = Records::open(dir.path()).unwrap();
        assert!(found.is_empty());
        let mut record = Record::begin("i-1", 7, &ImageRef::default());
        record.stage = Stage::Failed("why".to_owned());
        records.put(&record).await.unwrap();
        let evil = Record::begin("../i", 7, &ImageRef::default());
        assert!(records.put(&evil).await.is_err());
        fs::write(dir.path().join("broken.json"), b"{").unwrap();
        let (_, found) = Records::open(dir.path()).unwrap();
        assert_eq!(found.into_values().collect::<Vec<_>>(), [record]);
        records.remove("i-1").await.unwrap();
        records.remove("i-1").await.unwrap();
        assert!(Records::open(dir.path()).unwrap().1.is_empty());
    }
}
