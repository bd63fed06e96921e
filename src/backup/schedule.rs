//! A member that saves snapshots by itself, and keeps the newest ones. An old one is removed only after a
//! newer one was read again, found good, and is durable.

use super::export::{self, Saver};
use super::file::Partial;
use super::inspect::Inspected;
use crate::app::REQUEST_DEADLINE;
use crate::stamp;
use anyhow::Context as _;
use mainstay_raft::Group;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Ends the name of a saved file.
const SUFFIX: &str = ".mainstay-snapshot";
/// Pause after a save that failed; shorter where saves are more frequent.
const RETRY: Duration = Duration::from_secs(60);

/// Where, how often, how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Where they are kept; created when missing.
    pub dir: PathBuf,
    /// From the end of one to the start of the next.
    pub every: Duration,
    /// How many of this member's are kept.
    pub keep: usize,
}

/// Save for ever. The first one is due at once: a member that restarts often must not never save.
pub async fn run(schedule: Schedule, group: Group, saver: Saver) {
    loop {
        let pause = match save(&schedule, &group, &saver).await {
            Ok(saved) => {
                tracing::info!(index = saved.index, bytes = saved.bytes, dir = %schedule.dir.display(), "snapshot saved");
                schedule.every
            }
            Err(error) => {
                tracing::warn!(dir = %schedule.dir.display(), "cannot save a snapshot: {error:#}; the older ones are kept");
                schedule.every.min(RETRY)
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Save one, then remove what is beyond those to keep.
pub async fn save(schedule: &Schedule, group: &Group, saver: &Saver) -> anyhow::Result<Inspected> {
    let export = export::take(group, saver, REQUEST_DEADLINE).await?;
    let prefix = format!("{}-", saver.name);
    let file = format!(
        "{prefix}{:014}-{:020}{SUFFIX}",
        stamp::now_ms(),
        export.header.index
    );
    let (dir, keep) = (schedule.dir.clone(), schedule.keep);
    let work = move || {
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        let mut partial = Partial::create(&dir.join(file), false)?;
        let mut failed = None;
        export.pour(|piece| match partial.write(&piece) {
            Ok(()) => true,
            Err(e) => {
                failed = Some(e);
                false
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let saved = partial.check()?;
        partial.finish()?;
        retain(&dir, &prefix, keep)?;
        Ok(saved)
    };
    tokio::task::spawn_blocking(work).await?
}

/// Remove the oldest of those whose names begin with `prefix`, until `keep` are left.
fn retain(dir: &Path, prefix: &str, keep: usize) -> anyhow::Result<()> {
    let list = || format!("cannot list {}", dir.display());
    let mut names = Vec::new();
    for item in std::fs::read_dir(dir).with_context(list)? {
        let name = item.with_context(list)?.file_name();
        if let Some(name) = name.to_str()
            && ours(name, prefix)
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    let old = names.len().saturating_sub(keep);
    for name in &names[..old] {
        let path = dir.join(name);
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// `PREFIX<14 digits>-<20 digits>SUFFIX`: nothing else is ever removed.
fn ours(name: &str, prefix: &str) -> bool {
    let numbers = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_suffix(SUFFIX))
        .and_then(|numbers| numbers.split_once('-'));
    let digits = |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_digit());
    numbers.is_some_and(|(time, index)| digits(time, 14) && digits(index, 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_oldest_files_go() {
        let dir = tempfile::tempdir().unwrap();
        let name = |member: &str, n: u64| format!("{member}-{n:014}-{:020}{SUFFIX}", 9 - n);
        let others = [
            name("c2", 1),
            "c1-notes.txt".to_owned(),
            format!("c1-{:014}-{:020}{SUFFIX}.partial", 1, 1),
            // Another member, whose name goes on where ours ends.
            format!("c1-x-{:014}-{:020}{SUFFIX}", 1, 1),
        ];
        for n in 1..=5 {
            std::fs::write(dir.path().join(name("c1", n)), b"x").unwrap();
        }
        for other in &others {
            std::fs::write(dir.path().join(other), b"x").unwrap();
        }
        retain(dir.path(), "c1-", 2).unwrap();
        let left = |name: &String| dir.path().join(name).exists();
        assert!(others.iter().all(left));
        assert_eq!(
            (1..=5)
                .filter(|n| left(&name("c1", *n)))
                .collect::<Vec<_>>(),
            [4, 5]
        );
    }
}
