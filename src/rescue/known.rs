//! The members that a member knew, kept beside its identity: advice for `mainstay member repair`, which
//! must find the others when the member itself cannot start. Never believed by the member.

use mainstay_model::MemberId;
use mainstay_raft::{Group, Status};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Its name in the data directory.
const NAME: &str = "members";
const TEMP: &str = "members.tmp";
/// Version of the file.
const VERSION: u32 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    version: u32,
    members: Vec<KnownMember>,
}

/// A member as it was known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownMember {
    /// Name.
    pub name: String,
    /// Id.
    pub id: String,
    /// REST API.
    pub api_url: String,
}

/// Keep the file true for as long as the member runs. A failure is of no consequence but for who needs it.
pub async fn keep(root: PathBuf, group: Group) {
    let mut watch = group.watch();
    let mut written = Known::default();
    loop {
        let now = known(&watch.borrow_and_update());
        if now != written && !now.members.is_empty() {
            // It waits for the disk: not on a thread that serves requests.
            let (root, known) = (root.clone(), now.clone());
            let noted = tokio::task::spawn_blocking(move || write(&root, &known));
            if let Err(error) = noted.await.unwrap_or_else(|e| Err(e.into())) {
                tracing::debug!(%error, "cannot note the members");
            }
            written = now;
        }
        if watch.changed().await.is_err() {
            return;
        }
        // Changes of the members are rare, those of the status are not.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn known(status: &Status) -> Known {
    let members = status.members.iter().map(|(id, at)| KnownMember {
        name: at.member.name.clone(),
        id: MemberId(*id).to_string(),
        api_url: at.member.api_url.clone(),
    });
    Known {
        version: VERSION,
        members: members.collect(),
    }
}

fn write(root: &Path, known: &Known) -> std::io::Result<()> {
    let temp = root.join(TEMP);
    let mut file = File::create(&temp)?;
    file.write_all(&serde_json::to_vec(known)?)?;
    file.sync_all()?;
    std::fs::rename(&temp, root.join(NAME))?;
    File::open(root)?.sync_all()
}

/// The members that were known here; nothing if that cannot be read.
pub fn members(root: &Path) -> Vec<KnownMember> {
    let read = || -> Option<Known> {
        let bytes = std::fs::read(root.join(NAME)).ok()?;
        serde_json::from_slice(&bytes).ok()
    };
    read()
        .filter(|known| known.version == VERSION)
        .map_or_else(Vec::new, |known| known.members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_members() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(members(dir.path()), []);
        let member = KnownMember {
            name: "c1".into(),
            id: "00000000000000ff".into(),
            api_url: "http://h:1".into(),
        };
        let known = Known {
            version: VERSION,
            members: vec![member.clone()],
        };
        write(dir.path(), &known).unwrap();
        let text = std::fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert_eq!(
            text,
            r#"{"version":1,"members":[{"name":"c1","id":"00000000000000ff","api_url":"http://h:1"}]}"#
        );
        assert_eq!(members(dir.path()), [member]);
        std::fs::write(dir.path().join(NAME), text.replace(":1,", ":2,")).unwrap();
        assert_eq!(members(dir.path()), []);
        std::fs::write(dir.path().join(NAME), b"{").unwrap();
        assert_eq!(members(dir.path()), []);
    }
}
