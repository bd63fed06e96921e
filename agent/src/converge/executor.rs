//! Carries out what the pure core says: one task per instance, all at once; a pull never blocks
//! another start. Knows no controller: sets come in by [`Executor::accept`], observations go out by
//! [`Executor::observe`].

use super::board::Board;
use super::images::{self, Wishes};
use super::record::Records;
use super::save::{self, Disks};
use super::{Action, survey, task};
use crate::cache::{Cache, Fetch, Reserve};
use crate::driver::Driver;
use crate::wire::{DesiredInstance, DesiredSet, ImagePull, Observed};
use anyhow::Context;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// What the executor is told once.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address to show for forwarded ports.
    pub host_ip: String,
    /// Kept free on the images' disk.
    pub reserve: Reserve,
    /// How long a pull that no registry can serve is tried again before this node gives up.
    pub pull_patience: Duration,
    /// How long a push that no registry takes is tried again before the save fails.
    pub push_patience: Duration,
    /// First pause between attempts of anything.
    pub retry_pause: Duration,
    /// Before a refusal is reported, so that a node that must refuse everything is not asked in a
    /// tight loop.
    pub reject_pause: Duration,
    /// The driver is asked what is there at least this often.
    pub survey_every: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            host_ip: "127.0.0.1".to_owned(),
            reserve: Reserve::Percent(20),
            pull_patience: Duration::from_secs(60),
            push_patience: Duration::from_secs(600),
            retry_pause: Duration::from_millis(500),
            reject_pause: Duration::from_secs(1),
            survey_every: Duration::from_secs(2),
        }
    }
}

/// Shared by the tasks.
pub(super) struct Inner {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) cache: Cache,
    /// Where images come from, and where new ones go.
    pub(super) images: Arc<dyn Fetch>,
    pub(super) records: Records,
    pub(super) saves: Disks,
    pub(super) settings: Settings,
    pub(super) board: Arc<Mutex<Board>>,
    /// Images to fetch.
    pub(super) wishes: Mutex<Wishes>,
    /// Something may have to be done.
    pub(super) wake: Notify,
    /// The driver should be asked now.
    pub(super) look: Notify,
    changed: watch::Sender<u64>,
}

impl Inner {
    /// What is observed has changed.
    pub(super) fn report(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

/// The executor; cheap to clone. Dropping the future of [`Executor::run`] leaves all VMs as they are.
#[derive(Clone)]
pub struct Executor {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor").finish_non_exhaustive()
    }
}

impl Executor {
    /// Read what the last run left under `root` (`instances/`, `images/`, `saves/`).
    pub fn open(
        root: &Path,
        driver: Arc<dyn Driver>,
        fetch: Arc<dyn Fetch>,
        settings: Settings,
    ) -> anyhow::Result<Self> {
        let (records, found) =
            Records::open(&root.join("instances")).context("read instance records")?;
        let saves = Disks::open(&root.join("saves"), &found).context("open the disks of saves")?;
        let board = Arc::new(Mutex::new(Board::new(found)));
        let users = {
            let board = Arc::clone(&board);
            Arc::new(move || board.lock().manifests_in_use())
        };
        let images = Arc::clone(&fetch);
        let cache = Cache::open(&root.join("images"), fetch, settings.reserve, users)
            .context("open the image cache")?;
        let inner = Inner {
            driver,
            cache,
            images,
            records,
            saves,
            settings,
            board,
            wishes: Mutex::default(),
            wake: Notify::new(),
            look: Notify::new(),
            changed: watch::Sender::new(0),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The image cache.
    pub fn cache(&self) -> &Cache {
        &self.inner.cache
    }

    /// The driver.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.inner.driver
    }

    /// Take over a desired set. `false`: it is older than the one in force and changes nothing.
    pub fn accept(&self, set: DesiredSet) -> bool {
        let (generation, instances) = (set.generation, set.instances.len());
        match self.inner.board.lock().accept(set) {
            None => return false,
            Some(false) => return true,
            Some(true) => {}
        }
        tracing::debug!(generation, instances, "desired set");
        self.inner.wake.notify_one();
        true
    }

    /// Generation of the set in force, 0 before there is one.
    pub fn generation(&self) -> u64 {
        let board = self.inner.board.lock();
        board.desired.as_ref().map_or(0, |d| d.generation)
    }

    /// Everything there is to report. Empty until the driver was asked for the first time.
    pub fn observe(&self) -> Vec<Observed> {
        self.inner.board.lock().observe()
    }

    /// How far the desired set's images are.
    pub fn pulls(&self) -> Vec<ImagePull> {
        self.inner.wishes.lock().pulls()
    }

    /// VMs that run.
    pub fn running(&self) -> u32 {
        let board = self.inner.board.lock();
        let running = board.vms.values().filter(|v| v.facts.status == "running");
        u32::try_from(running.count()).unwrap_or(u32::MAX)
    }

    /// Told when [`Executor::observe`] has news worth telling at once.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Converge for ever.
    pub async fn run(&self) {
        let mut background = JoinSet::new();
        background.spawn(survey::run(Arc::clone(&self.inner)));
        // The tasks of instances end with this future, as the agent's process would end them.
        let _end = Reaper(Arc::clone(&self.inner));
        loop {
            self.inner.wake.notified().await;
            act(&self.inner);
        }
    }
}

struct Reaper(Arc<Inner>);

impl Drop for Reaper {
    fn drop(&mut self) {
        for local in self.0.board.lock().locals.values() {
            if let Some(task) = local.job.as_ref().and_then(|j| j.task.as_ref()) {
                task.abort();
            }
        }
        self.0.wishes.lock().end();
    }
}

/// One round: whatever must begin now, begins.
fn act(inner: &Arc<Inner>) {
    // Not under the board's lock: the cache asks the board what is in use while it makes room.
    let named = inner.board.lock().images();
    if let Some(named) = named {
        images::act(inner, &named);
    }
    let evict = inner.board.lock().evict();
    images::evict(inner, evict);
    let mut board = inner.board.lock();
    for action in board.actions() {
        tracing::info!(?action, "converge");
        match action {
            Action::Start(id) => {
                if let Some(wish) = board.wish(&id).cloned() {
                    start(inner, &mut board, wish);
                }
            }
            Action::Restart(id) => {
                if let Some(wish) = board.wish(&id).cloned() {
                    restart(inner, &mut board, wish);
                }
            }
            Action::Save(id) => {
                if let Some(wish) = board.wish(&id).cloned() {
                    save_disk(inner, &mut board, wish);
                }
            }
            Action::Delete(id) => {
                if let Some(wish) = board.wish(&id).cloned() {
                    delete(inner, &mut board, &wish);
                }
            }
            Action::Cancel(id) | Action::Forget(id) => forget(inner, &mut board, id),
        }
    }
}

fn start(inner: &Arc<Inner>, board: &mut Board, wish: DesiredInstance) {
    let id = wish.id.clone();
    let begun = board.begin_start(&wish);
    let work = task::start(Arc::clone(inner), wish, begun);
    board.employ(&id, tokio::spawn(work));
}

fn restart(inner: &Arc<Inner>, board: &mut Board, wish: DesiredInstance) {
    let id = wish.id.clone();
    let again = board.begin_restart(&wish);
    let work = task::restart(Arc::clone(inner), wish, again);
    board.employ(&id, tokio::spawn(work));
}

fn save_disk(inner: &Arc<Inner>, board: &mut Board, wish: DesiredInstance) {
    let Some(order) = wish.save.clone() else {
        return;
    };
    let id = wish.id.clone();
    let begun = board.begin_save(&wish, &order.id);
    let work = save::save(Arc::clone(inner), wish, order, begun);
    board.employ(&id, tokio::spawn(work));
}

fn delete(inner: &Arc<Inner>, board: &mut Board, wish: &DesiredInstance) {
    let ending = board.begin_delete(wish);
    let work = task::delete(Arc::clone(inner), wish.id.clone(), ending);
    board.employ(&wish.id, tokio::spawn(work));
}

fn forget(inner: &Arc<Inner>, board: &mut Board, id: String) {
    let Some(ending) = board.begin_forget(&id) else {
        return;
    };
    let work = task::forget(Arc::clone(inner), id.clone(), ending);
    board.employ(&id, tokio::spawn(work));
}
