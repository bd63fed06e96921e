//! Room on the disk of the data directory: watches it, and says what this member still does with what is
//! left. Knows no log and no chunk.
//!
//! ```text
//!  free   >= mark             everything
//!         <  mark             no pushes, no copies of tags                 (507)
//!         <  mark / 2         reluctant to lead: hands over; reads and log go on
//!         <  mark / 8         the reserve (mark / 4) is given up, for the log and the state
//! ```
//!
//! A level is left upwards only with a quarter more room than it asks for, so that a disk at a mark
//! does not flap; the reserve is taken again once pushes would be taken with it. The mark is
//! `--low-disk`, by default 5% of the file system, at most 2 GiB.

use mainstay_raft::{Group, Unfit};
use mainstay_storage::reserve::Reserve;
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// The disk is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The default mark.
const PERCENT: u8 = 5;
const BYTES_MAX: u64 = 2 << 30;
/// Bounds of the length of packs.
const PACK_MIN: u64 = 16 << 20;
const PACK_MAX: u64 = 1 << 30;
/// Whose reason it is that this member does not lead.
const KEY: &str = "disk space";

/// `--low-disk`: below this much free room a member takes no pushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowDisk {
    /// So many bytes.
    Bytes(u64),
    /// This part of the file system, in percent.
    Percent(u8),
    /// 5% of the disk, at most 2 GiB.
    Default,
}

impl FromStr for LowDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "--low-disk {text}: give a size such as 2GiB, 500MiB or 1000000, or a part of the disk such as 5%"
            )
        };
        if let Some(percent) = text.strip_suffix('%') {
            let percent: u8 = percent.trim().parse().map_err(|_| wrong())?;
            if percent > 50 {
                return Err(format!(
                    "--low-disk {text} is more than half of the disk: give at most 50%"
                ));
            }
            return Ok(Self::Percent(percent));
        }
        bytes(text).map(Self::Bytes).ok_or_else(wrong)
    }
}

/// A size such as `2GiB`, `500M` or `1000000`, in bytes; `None` when it is none.
pub fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    let number: u64 = digits.trim().parse().ok()?;
    number.checked_mul(1 << shift)
}

impl LowDisk {
    fn mark(self, total: u64) -> u64 {
        let part = |percent: u8| total / 100 * u64::from(percent);
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => part(percent),
            Self::Default => part(PERCENT).min(BYTES_MAX),
        }
    }
}

/// Room on a file system, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Free for us.
    pub free: u64,
    /// All.
    pub total: u64,
}

impl Room {
    /// Of the file system that `dir` is on.
    pub fn of(dir: &Path) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(Self {
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }
}

/// What is still done, from all to least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Plenty,
    NoPushes,
    NoLead,
}

impl Level {
    /// The room that it is left at.
    fn mark(self, mark: u64) -> u64 {
        match self {
            Self::Plenty => 0,
            Self::NoPushes => mark,
            Self::NoLead => mark / 2,
        }
    }

    /// Bytes between `free` and the mark under which pushes are refused, coming from this level.
    fn left(self, free: u64, mark: u64) -> u64 {
        match self.next(free, mark) {
            Self::Plenty => free.saturating_sub(mark),
            Self::NoPushes | Self::NoLead => 0,
        }
    }

    /// The level at `free`, coming from this one.
    fn next(self, free: u64, mark: u64) -> Self {
        let holds = |level: &Self| {
            let at = level.mark(mark);
            // Whoever is at a level or below it leaves it with a quarter more.
            free < if *level <= self { at + at / 4 } else { at }
        };
        [Self::NoLead, Self::NoPushes]
            .into_iter()
            .find(holds)
            .unwrap_or(Self::Plenty)
    }
}

/// The disk of one member.
pub struct Space {
    dir: PathBuf,
    low: LowDisk,
    reserve: Arc<Reserve>,
    level: Mutex<Level>,
}

impl Space {
    /// Before anything in `dir` is opened: when the disk is full already, what an earlier process kept
    /// in reserve is what this one starts with.
    pub fn new(dir: &Path, low: LowDisk) -> io::Result<Arc<Self>> {
        let room = Room::of(dir)?;
        let space = Self {
            dir: dir.to_path_buf(),
            low,
            reserve: Arc::new(Reserve::new(dir, low.mark(room.total) / 4)),
            level: Mutex::new(Level::Plenty),
        };
        space.look(None);
        Ok(Arc::new(space))
    }

    /// For the log and the snapshots.
    pub fn reserve(&self) -> Arc<Reserve> {
        Arc::clone(&self.reserve)
    }

    /// Room now, if the disk can be asked.
    pub fn room(&self) -> Option<Room> {
        Room::of(&self.dir).ok()
    }

    /// May more chunks be stored? Asked before each batch, of the disk itself. If not: why, and what to do.
    pub fn may_store(&self) -> Result<(), String> {
        let Some(room) = self.room() else {
            return Err(format!(
                "the disk of {} cannot be asked for its room",
                self.dir.display()
            ));
        };
        let level = *self.level.lock();
        if level.next(room.free, self.low.mark(room.total)) == Level::Plenty {
            return Ok(());
        }
        Err(format!(
            "{}: push through another member, or make room in {}",
            self.says(room),
            self.dir.display()
        ))
    }

    /// Bytes that may still be stored before [`Self::may_store`] says no, if the disk can be asked.
    pub fn left(&self) -> Option<u64> {
        let room = self.room()?;
        let mark = self.low.mark(room.total);
        let level = *self.level.lock();
        Some(level.left(room.free, mark))
    }

    /// Length at which packs of chunks are closed: so that, when pushes end at the mark, there is room
    /// left to copy what is needed out of any of them, and give back the rest.
    pub fn pack_len(&self) -> u64 {
        let total = self.room().map_or(0, |room| room.total);
        (self.low.mark(total) / 2).clamp(PACK_MIN, PACK_MAX)
    }

    /// What is wrong with the disk's room, if anything.
    pub fn complaint(&self) -> Option<String> {
        let low = *self.level.lock() != Level::Plenty;
        let room = self.room().filter(|_| low)?;
        Some(format!("{}: takes no pushes", self.says(room)))
    }

    fn says(&self, room: Room) -> String {
        format!(
            "the disk is almost full, {} MiB are free and pushes need {} (--low-disk)",
            room.free >> 20,
            self.low.mark(room.total) >> 20
        )
    }

    /// Watch the disk until this is dropped. Spawn it once.
    pub async fn watch(self: Arc<Self>, group: Group) {
        loop {
            let (space, at) = (Arc::clone(&self), group.clone());
            // The disk may hang, and the reserve is synced.
            let looked = tokio::task::spawn_blocking(move || space.look(Some(&at))).await;
            if let Err(error) = looked {
                tracing::error!(%error, "looking at the disk failed");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn look(&self, group: Option<&Group>) {
        let room = match Room::of(&self.dir) {
            Ok(room) => room,
            Err(error) => {
                tracing::warn!(%error, dir = %self.dir.display(), "the disk cannot be asked for its room");
                return;
            }
        };
        let mark = self.low.mark(room.total);
        if room.free < mark / 8
            && let Err(error) = self.reserve.release()
        {
            tracing::error!(error = %chain(&error), "cannot give up the reserve");
        }
        let level = self.move_to(room, mark);
        if let Some(group) = group {
            let reason = (level == Level::NoLead).then(|| Unfit::Reluctant(self.says(room)));
            group.unfit(KEY, reason);
        }
        let with_reserve = mark + mark / 4 + self.reserve.bytes();
        if level == Level::Plenty && !self.reserve.held() && room.free >= with_reserve {
            self.take_reserve();
        }
    }

    fn move_to(&self, room: Room, mark: u64) -> Level {
        let mut level = self.level.lock();
        let next = level.next(room.free, mark);
        if next > *level {
            tracing::warn!(level = ?next, "{}", self.says(room));
        } else if next < *level {
            tracing::info!(level = ?next, free = room.free, "there is room on the disk again");
        }
        *level = next;
        next
    }

    fn take_reserve(&self) {
        match self.reserve.make() {
            Ok(()) => tracing::info!(bytes = self.reserve.bytes(), "reserve taken on the disk"),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "cannot take a reserve on the disk")
            }
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_parts_are_read_and_nonsense_is_refused() {
        let read = |text: &str| text.parse::<LowDisk>();
        assert_eq!(read("5%"), Ok(LowDisk::Percent(5)));
        assert_eq!(read("2GiB"), Ok(LowDisk::Bytes(2 << 30)));
        assert_eq!(read("24m"), Ok(LowDisk::Bytes(24 << 20)));
        assert_eq!(read("1000"), Ok(LowDisk::Bytes(1000)));
        for wrong in ["", "%", "51%", "300%", "-1", "x", "2 GiBs", "99999999999t"] {
            let error = read(wrong).unwrap_err();
            assert!(error.contains("--low-disk"), "{wrong}: {error}");
        }
        assert_eq!(LowDisk::Default.mark(100 << 30), 2 << 30);
        assert_eq!(LowDisk::Default.mark(1000), 50);
    }

    #[test]
    fn levels_come_at_once_and_go_with_a_margin() {
        let mut level = Level::Plenty;
        for (free, expected) in [
            (1000, Level::Plenty),
            (999, Level::NoPushes),
            (1000, Level::NoPushes),
            (1249, Level::NoPushes),
            (1250, Level::Plenty),
            (499, Level::NoLead),
            (500, Level::NoLead),
            (624, Level::NoLead),
            (625, Level::NoPushes),
            (0, Level::NoLead),
            (2000, Level::Plenty),
        ] {
            level = level.next(free, 1000);
            assert_eq!(level, expected, "{free} free");
            let left = if expected == Level::Plenty {
                free - 1000
            } else {
                0
            };
            assert_eq!(level.left(free, 1000), left, "{free} free");
        }
    }
}
