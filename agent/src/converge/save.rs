//! How a VM's disk becomes a tag: a script in the guest, its stop, a disk that stands by itself, the push. Every
//! step may be the last one of this process: what is on disk says where the next one goes on. What went wrong is
//! told; whether the VM is started again is the controller's to say.
//!
//! The script runs at most once: that it begins is on disk before it begins. If the agent dies while it runs, its
//! result is lost, and the save fails while the VM runs on. From the stop on nothing is lost with the agent: the
//! disk is made anew unless it was whole, and of what was pushed nothing is sent again.

use super::board::Saves;
use super::executor::Inner;
use super::record::{Record, Saving, SavingEnd, plain_id};
use super::task::{break_off, release};
use crate::agent::durable;
use crate::driver::{DriverError, SAVE_OUTPUT_KEPT, VmSeen};
use crate::transfer::api::Durability;
use crate::transfer::{PushSpec, TransferError};
use crate::wire::{DesiredInstance, SaveOrder, ScriptResult};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Progress is worth a report of its own this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long one push waits for enough copies before it looks anew.
const HELD_WAIT: Duration = Duration::from_secs(60);

/// Disks on their way to a registry: `saves/INSTANCE/disk`.
#[derive(Clone, Debug)]
pub(super) struct Disks {
    root: PathBuf,
}

impl Disks {
    /// Open the folder; whatever no save that is under way may need goes.
    pub(super) fn open(root: &Path, records: &BTreeMap<String, Record>) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let needed = |id: &str| {
            let saving = records.get(id).and_then(|r| r.saving.as_ref());
            saving.is_some_and(|s| s.end.is_none())
        };
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if plain_id(&name) && !needed(&name) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    fn folder(&self, id: &str) -> Option<PathBuf> {
        plain_id(id).then(|| self.root.join(id))
    }

    /// Where the disk of an instance goes; its folder is there, durably.
    async fn place(&self, id: &str) -> io::Result<PathBuf> {
        let folder = self.folder(id).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{id:?} is no instance id"),
            )
        })?;
        let (root, made) = (self.root.clone(), folder.clone());
        let make = move || {
            fs::create_dir_all(&made)?;
            durable::sync_dir(&root)
        };
        spawn_blocking(make).await.map_err(io::Error::other)??;
        Ok(folder.join("disk"))
    }

    /// Nothing of it is needed. What cannot be removed goes at the next start.
    pub(super) async fn remove(&self, id: &str) {
        let Some(folder) = self.folder(id) else {
            return;
        };
        let removed = spawn_blocking(move || fs::remove_dir_all(folder)).await;
        match removed.map_err(io::Error::other).and_then(|done| done) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(instance = id, %error, "cannot remove the disk of a save");
            }
            _ => {}
        }
    }
}

/// Carry out an order, from where it was left.
pub(super) async fn save(inner: Arc<Inner>, wish: DesiredInstance, order: SaveOrder, begun: Saves) {
    break_off(begun.before).await;
    let (id, ticket) = (wish.id.clone(), begun.ticket);
    let mut saver = Saver {
        inner: Arc::clone(&inner),
        wish,
        order,
        ticket,
        record: begun.record,
    };
    let end = match saver.run().await {
        Ok(()) => SavingEnd::Pushed,
        Err(why) => SavingEnd::Failed(why),
    };
    saver.settle(end).await;
    release(&inner, &id, ticket);
}

struct Saver {
    inner: Arc<Inner>,
    wish: DesiredInstance,
    order: SaveOrder,
    ticket: u64,
    record: Record,
}

impl Saver {
    async fn run(&mut self) -> Result<(), String> {
        self.script().await?;
        self.stop().await?;
        let (disk, format) = self.disk().await?;
        self.push(&disk, &format).await
    }

    fn saving(&mut self) -> &mut Saving {
        let order = &self.order;
        let begin = || Saving::begin(&order.id);
        self.record.saving.get_or_insert_with(begin)
    }

    async fn script(&mut self) -> Result<(), String> {
        let Some(script) = self.order.script.clone() else {
            return Ok(());
        };
        if self.saving().script.is_none() {
            if self.saving().script_begun {
                return Err(
                    "the node agent was restarted while the script ran; its result is lost"
                        .to_owned(),
                );
            }
            self.saving().script_begun = true;
            self.put().await?;
            let run = self
                .inner
                .driver
                .run_script(&self.wish.id, &script, SAVE_OUTPUT_KEPT);
            let ended = run.await;
            let ended = ended.map_err(|e| format!("the script could not be run: {e}"))?;
            self.saving().script = Some(ended);
            self.put().await?;
            self.inner.report();
        }
        let failed = self.saving().script.as_ref().and_then(failure);
        match failed.filter(|_| self.order.cancel_on_script_failure) {
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    async fn stop(&mut self) -> Result<(), String> {
        if !self.saving().stopping {
            self.saving().stopping = true;
            self.put().await?;
        }
        let stopped = self.inner.driver.stop(&self.wish.id).await;
        self.inner.look.notify_one();
        stopped.map_err(|e| format!("the VM could not be stopped: {e}"))?;
        if let Some(mut facts) = self.record.vm.clone() {
            facts.status = "stopped".to_owned();
            let mut board = self.inner.board.lock();
            let generation = board.generations().get(&self.wish.id).copied();
            board.vm_is(VmSeen {
                id: self.wish.id.clone(),
                generation: generation.unwrap_or(self.wish.generation),
                facts,
                message: String::new(),
            });
        }
        self.inner.report();
        Ok(())
    }

    /// The disk to push and its format, made unless it is whole.
    async fn disk(&mut self) -> Result<(PathBuf, String), String> {
        let place = self.inner.saves.place(&self.wish.id).await;
        let place = place.map_err(|e| format!("cannot make a folder for the disk: {e}"))?;
        if let Some(format) = self.saving().built.clone()
            && place.is_file()
        {
            return Ok((place, format));
        }
        let text = |e: DriverError| format!("the disk could not be written: {e}");
        let driver = &self.inner.driver;
        let bytes = driver.export_bytes(&self.wish.id).await.map_err(text)?;
        let room = self.inner.cache.make_room(bytes).await;
        room.map_err(|e| e.to_string())?;
        let format = driver.export(&self.wish.id, &place).await.map_err(text)?;
        let folder = place.parent().map(Path::to_owned).unwrap_or_default();
        let synced = spawn_blocking(move || durable::sync_dir(&folder)).await;
        let synced = synced.map_err(io::Error::other).and_then(|done| done);
        synced.map_err(|e| format!("the disk could not be written: {e}"))?;
        self.saving().built = Some(format.clone());
        self.put().await?;
        Ok((place, format))
    }

    /// To any member, until enough of them hold it. Once it is published, nothing but its deletion ends that.
    async fn push(&self, disk: &Path, format: &str) -> Result<(), String> {
        let spec = PushSpec {
            template: self.order.template.clone(),
            tag: self.order.tag.clone(),
            description: String::new(),
            arch: String::new(),
            format: Some(format.to_owned()),
            beside: Vec::new(),
            forwards: Vec::new(),
            durability: Durability::Majority,
            wait: HELD_WAIT,
            save: self.order.id.clone(),
        };
        let told = parking_lot::Mutex::new(None);
        // How far it came, and when: a push that goes on is no failure, however long it takes.
        let furthest = parking_lot::Mutex::new((0, Instant::now()));
        let progress = |done: u64, total: u64| {
            {
                let mut furthest = furthest.lock();
                if done > furthest.0 {
                    *furthest = (done, Instant::now());
                }
            }
            self.pushing(done, total, &mut told.lock());
        };
        let patience = self.inner.settings.push_patience;
        let mut published = false;
        let mut pause = self.inner.settings.retry_pause;
        loop {
            match self.inner.images.deliver(disk, &spec, &progress).await {
                Ok(tag) if tag.visible => return Ok(()),
                Ok(tag) => {
                    published = true;
                    tracing::warn!(
                        instance = self.wish.id,
                        holders = tag.holders.len(),
                        "a saved disk waits for copies"
                    );
                }
                Err(TransferError::Unavailable(why))
                    if published || furthest.lock().1.elapsed() < patience =>
                {
                    tracing::warn!(instance = self.wish.id, why, "push failed; trying again");
                }
                Err(error) => return Err(error.to_string()),
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    fn pushing(&self, done: u64, total: u64, told: &mut Option<Instant>) {
        #[allow(clippy::cast_precision_loss)]
        let part = done as f32 / total.max(1) as f32;
        let mut board = self.inner.board.lock();
        board.pushing(&self.wish.id, self.ticket, part);
        drop(board);
        if told.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            *told = Some(Instant::now());
            self.inner.report();
        }
    }

    /// On disk, then on the board.
    async fn put(&mut self) -> Result<(), String> {
        let put = self.inner.records.put(&self.record).await;
        put.map_err(|e| format!("cannot write an instance record: {e}"))?;
        self.inner.board.lock().show(self.ticket, &self.record);
        Ok(())
    }

    async fn settle(&mut self, end: SavingEnd) {
        tracing::info!(
            instance = self.wish.id,
            save = self.order.id,
            ?end,
            "save ended"
        );
        self.saving().end = Some(end);
        if let Err(why) = self.put().await {
            // Told to the controller now, and found out again after a restart.
            tracing::error!(instance = self.wish.id, why);
            self.inner.board.lock().show(self.ticket, &self.record);
        }
        self.inner.saves.remove(&self.wish.id).await;
        self.inner.report();
    }
}

/// Did it fail, and how is that said?
fn failure(result: &ScriptResult) -> Option<String> {
    let code = result.return_code;
    match result.did_timeout {
        true => Some(format!("script exit code {code} (timed out)")),
        false => (code != 0).then(|| format!("script exit code {code}")),
    }
}
