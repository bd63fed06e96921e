//! Is a snapshot file whole, and what is in it? Reads all of it, restores the state in memory, and checks
//! it as the state machine's own tests do. Changes nothing.

use super::{Header, SavedMember};
use crate::machine::supported;
use anyhow::{Context as _, anyhow, bail};
use mainstay_model::{State, invariants};
use mainstay_storage::UntilError;
use mainstay_storage::snapshot::SnapshotReader;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A snapshot file that is good, and what is in it.
#[derive(Clone, Debug, Serialize)]
pub struct Inspected {
    /// The cluster it was taken from.
    pub cluster_id: String,
    /// Release that saved it.
    pub release: String,
    /// When, RFC 3339.
    pub created: String,
    /// Member that saved it.
    pub saved_by: String,
    /// Everything up to this log index is in it.
    pub index: u64,
    /// Term at that index.
    pub term: u64,
    /// Length of the file.
    pub bytes: u64,
    /// Keys in it.
    pub entries: u64,
    /// Hash of the state alone: equal states have equal ones, whoever saved them and when.
    pub state_digest: String,
    /// Members at that index.
    pub members: Vec<SavedMember>,
    /// How many there are of each object.
    pub counts: Counts,
    /// The images that the state names, and the members that held them: their bytes are not in the file.
    pub images: Vec<Image>,
}

/// Objects in a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Instances, ended ones included.
    pub instances: usize,
    /// Instances that run or shall run.
    pub live: usize,
    /// Nodes.
    pub nodes: usize,
    /// Node groups.
    pub groups: usize,
    /// Templates.
    pub templates: usize,
    /// Their tags.
    pub tags: usize,
}

/// A manifest that tags of templates or OCI artifacts name.
#[derive(Clone, Debug, Serialize)]
pub struct Image {
    /// Its digest.
    pub manifest: String,
    /// Logical bytes of its files.
    pub size: u64,
    /// `template:tag` of each tag that names it, `repository@digest` of each artifact.
    pub tags: Vec<String>,
    /// Ids of the members with every byte.
    pub holders: BTreeSet<String>,
}

/// Check a file; an error says what is wrong with it. Memory: the state, and its encoded form entry by entry.
pub fn inspect(path: &Path) -> anyhow::Result<Inspected> {
    let mut reader = SnapshotReader::open(path).with_context(|| refused(path))?;
    let info = reader.info().clone();
    let header = Header::decode(&info.meta).with_context(|| refused(path))?;
    let state = read_state(&mut reader).with_context(|| refused(path))?;
    invariants::check(&state)
        .map_err(|why| anyhow!("an invariant does not hold: {why}"))
        .with_context(|| refused(path))?;
    Ok(Inspected {
        cluster_id: header.cluster_id,
        release: header.release,
        created: crate::http::time::Rfc3339(header.created_ms).to_string(),
        saved_by: header.saved_by,
        index: header.index,
        term: header.term,
        bytes: info.bytes,
        entries: info.entries,
        state_digest: format!("{:032x}", state.digest()),
        members: header.members,
        counts: counts(&state),
        images: images(&state),
    })
}

fn refused(path: &Path) -> String {
    format!("{} is not a good snapshot, use another one", path.display())
}

/// The state in a file; refused unless it is written again as the very same bytes.
fn read_state(reader: &mut SnapshotReader) -> anyhow::Result<State> {
    let mut entries = UntilError::new(reader.entries());
    let state = State::import(&mut entries);
    entries.outcome()?;
    let state = state?;
    supported(&state)?;
    if reader.info().entries == 0 {
        // Nothing was ever written: not even what an empty state is written as.
        return Ok(state);
    }
    reader.rewind()?;
    let mut differs = None;
    state.for_each_entry(|key, value| {
        if differs.is_none() {
            match reader.next_entry() {
                Ok(Some(found)) if found == (key, value) => {}
                Ok(_) => differs = Some(anyhow!("the state in it reads back as another")),
                Err(e) => differs = Some(e.into()),
            }
        }
    });
    match differs {
        Some(error) => Err(error),
        None if reader.next_entry()?.is_some() => bail!("it holds more than a state"),
        None => Ok(state),
    }
}

fn counts(state: &State) -> Counts {
    Counts {
        instances: state.instances.len(),
        live: state.instances.values().filter(|i| i.live()).count(),
        nodes: state.nodes.len(),
        groups: state.groups.len(),
        templates: state.templates.len(),
        tags: state.templates.values().map(|t| t.tags.len()).sum(),
    }
}

fn images(state: &State) -> Vec<Image> {
    let mut images: BTreeMap<_, Image> = BTreeMap::new();
    for template in state.templates.values() {
        for tag in template.tags.values() {
            let image = images.entry(tag.content.manifest).or_insert_with(|| Image {
                manifest: tag.content.manifest.to_string(),
                size: tag.content.size,
                tags: Vec::new(),
                holders: BTreeSet::new(),
            });
            image.tags.push(format!("{}:{}", template.name, tag.name));
            image
                .holders
                .extend(tag.holders.iter().map(ToString::to_string));
        }
    }
    for (name, repository) in &state.repositories {
        for (digest, artifact) in &repository.artifacts {
            let content = &artifact.content;
            let sizes = content.blobs.iter().map(|blob| blob.size);
            let size = sizes.fold(content.size, u64::saturating_add);
            let image = images.entry(content.bundle).or_insert_with(|| Image {
                manifest: content.bundle.to_string(),
                size,
                tags: Vec::new(),
                holders: BTreeSet::new(),
            });
            image.tags.push(format!("{name}@{digest}"));
            let holders = artifact.holders.iter().map(ToString::to_string);
            image.holders.extend(holders);
        }
    }
    images.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_model::group::Group;
    use mainstay_model::{Command, CommandId, Envelope, GroupId};
    use mainstay_raft::offline::Point;
    use mainstay_storage::snapshot::SnapshotDir;

    fn state() -> State {
        let mut state = State::default();
        for n in 0..10 {
            state.apply(&Envelope {
                id: CommandId(n),
                stamp_ms: 5,
                command: Command::PutGroup {
                    group: Group {
                        id: GroupId::from(format!("g{n}")),
                        name: format!("group {n}"),
                        description: "d".repeat(50),
                        fallback: None,
                    },
                },
            });
        }
        state
    }

    fn file(dir: &Path, state: &State) -> std::path::PathBuf {
        let header = Header {
            cluster_id: "c".into(),
            ..Header::new(Point::default())
        };
        let dir = SnapshotDir::open(dir).unwrap();
        let mut entries = state.export().into_iter();
        dir.write("s", &header.encode().unwrap(), &mut entries)
            .unwrap()
    }

    #[test]
    fn a_good_file_is_described_and_every_damage_refused() {
        let temp = tempfile::tempdir().unwrap();
        let state = state();
        let path = file(temp.path(), &state);
        let found = inspect(&path).unwrap();
        assert_eq!(found.counts.groups, 10);
        assert_eq!(found.state_digest, format!("{:032x}", state.digest()));
        let bytes = std::fs::read(&path).unwrap();
        let bad = temp.path().join("bad");
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            std::fs::write(&bad, flipped).unwrap();
            assert!(inspect(&bad).is_err(), "flip at {at}");
            std::fs::write(&bad, &bytes[..at]).unwrap();
            assert!(inspect(&bad).is_err(), "cut at {at}");
        }
    }

    /// Whole by its hash, and yet no state: one that a bug wrote.
    #[test]
    fn what_is_no_sound_state_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str, entries: Vec<(Vec<u8>, Vec<u8>)>| {
            let dir = SnapshotDir::open(&temp.path().join(name)).unwrap();
            let header = Header::new(Point::default()).encode().unwrap();
            dir.write("s", &header, &mut entries.into_iter()).unwrap()
        };
        assert!(inspect(&path("empty", Vec::new())).is_ok());
        let good = state().export();
        assert!(inspect(&path("good", good.clone())).is_ok());
        let mut strange = good.clone();
        strange.push((vec![0xff; 3], vec![1]));
        assert!(inspect(&path("strange", strange)).is_err());
        let mut longer = good.clone();
        longer[1].1.push(0);
        assert!(inspect(&path("longer", longer)).is_err());
        // A key that names another group than its value holds.
        let mut moved = good;
        let value = moved[1].1.clone();
        moved[2].1 = value;
        assert!(inspect(&path("moved", moved)).is_err());
    }
}
