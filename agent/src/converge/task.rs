//! The life of one instance on this node: its start from image to settled, its restarts, and its end. Each task
//! writes to the board only while its ticket has the say, and can be broken off at any await.
//!
//! The startup script runs at most once per generation, also across restarts of the agent: that it
//! begins is on disk before it begins. If the agent dies while a monitored script runs, its result
//! is lost with it, and the instance fails and says so.

use super::board::{Again, Begun, Ending};
use super::executor::Inner;
use super::record::{Record, Stage};
use crate::cache::{CacheError, Image};
use crate::driver::{DriverError, OUTPUT_KEPT, VmSeen, VmSpec};
use crate::wire::{DesiredInstance, Script, ScriptResult, VmFacts};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

const RETRY_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Progress is worth a report of its own this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Why a start came to a bad end.
enum Bad {
    /// This node could not; everything of it must go.
    Reject(String),
    /// It never ran; everything of it must go.
    Broken(String),
    /// It ran and failed: the VM stays, stopped.
    Stop(String),
    /// The script failed; its policy was carried out.
    Script(String),
}

/// Start an instance, or go on with a start that is on record.
pub(super) async fn start(inner: Arc<Inner>, wish: DesiredInstance, begun: Begun) {
    let id = wish.id.clone();
    let Begun {
        ticket,
        record,
        there,
    } = begun;
    let record = resume(&wish, record, there.is_some());
    let mut starter = Starter {
        inner: Arc::clone(&inner),
        wish,
        ticket,
        record,
    };
    if let Err(bad) = starter.run(there).await {
        starter.fail(bad).await;
    }
    release(&inner, &id, ticket);
}

/// From what a start goes on.
pub(super) fn resume(wish: &DesiredInstance, record: Option<Record>, there: bool) -> Record {
    record.unwrap_or_else(|| {
        let mut record = Record::begin(&wish.id, wish.generation, &wish.image);
        // Its record is lost: whether its script ran cannot be known, so it does not run again.
        record.script_begun = there;
        record
    })
}

/// Break off what went before, end the VM, start it again on its disk and wait for its guest. Whatever
/// goes wrong, the disk stays.
pub(super) async fn restart(inner: Arc<Inner>, wish: DesiredInstance, again: Again) {
    break_off(again.before).await;
    let (id, ticket) = (wish.id.clone(), again.ticket);
    let mut starter = Starter {
        inner: Arc::clone(&inner),
        wish,
        ticket,
        record: again.record,
    };
    let stage = match starter.restart().await {
        Ok(()) => Stage::Up,
        Err(why) => Stage::Failed(format!("the VM could not be restarted: {why}")),
    };
    starter.settle(stage).await;
    inner.look.notify_one();
    release(&inner, &id, ticket);
}

/// Break off what went before, then remove everything of the instance.
pub(super) async fn delete(inner: Arc<Inner>, id: String, ending: Ending) {
    break_off(ending.before).await;
    remove_vm(&inner, &id).await;
    inner.saves.remove(&id).await;
    remove_record(&inner, &id).await;
    let (ticket, gone_at) = (ending.ticket, ending.gone_at);
    inner.board.lock().removed(&id, ticket, gone_at);
    release(&inner, &id, ticket);
}

/// Break off what went before; if no VM has come of it, nothing is remembered either.
pub(super) async fn forget(inner: Arc<Inner>, id: String, ending: Ending) {
    let begun = ending.before.is_some();
    break_off(ending.before).await;
    if begun {
        // It may have been broken off between the VM and the news of it.
        look(&inner, &id).await;
        inner.saves.remove(&id).await;
    }
    if !inner.board.lock().vms.contains_key(&id) {
        remove_record(&inner, &id).await;
        inner.board.lock().forgotten(&id, ending.ticket);
    }
    release(&inner, &id, ending.ticket);
}

/// Ask the driver what is there, until it says so.
async fn look(inner: &Inner, id: &str) {
    let mut pause = inner.settings.retry_pause;
    loop {
        let asked = inner.board.lock().tick();
        match inner.driver.list().await {
            Ok(list) => {
                inner.board.lock().surveyed(asked, list);
                return;
            }
            Err(error) => {
                tracing::warn!(instance = id, %error, "cannot list VMs; asking again");
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

pub(super) async fn break_off(before: Option<JoinHandle<()>>) {
    if let Some(task) = before {
        task.abort();
        // Only once it has really stopped can it do no more.
        let _ = task.await;
    }
}

pub(super) fn release(inner: &Inner, id: &str, ticket: u64) {
    inner.board.lock().release(id, ticket);
    inner.report();
    inner.wake.notify_one();
}

async fn remove_vm(inner: &Inner, id: &str) {
    let mut pause = inner.settings.retry_pause;
    while let Err(error) = inner.driver.delete(id).await {
        tracing::warn!(instance = id, %error, "cannot remove a VM; trying again");
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
    inner.board.lock().vm_is_gone(id);
}

async fn remove_record(inner: &Inner, id: &str) {
    let mut pause = inner.settings.retry_pause;
    while let Err(error) = inner.records.remove(id).await {
        if error.kind() == std::io::ErrorKind::InvalidInput {
            return;
        }
        tracing::warn!(instance = id, %error, "cannot remove an instance record; trying again");
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

struct Starter {
    inner: Arc<Inner>,
    wish: DesiredInstance,
    ticket: u64,
    record: Record,
}

impl Starter {
    async fn run(&mut self, there: Option<VmFacts>) -> Result<(), Bad> {
        if let (Some(script), Some(why)) = (
            self.wish.script.clone(),
            self.record.script.as_ref().and_then(failure),
        ) {
            return Err(self.script_failed(&script, why).await);
        }
        let facts = match there {
            Some(facts) => facts,
            None if self.record.script_begun => {
                let why = "the VM was lost while it was being started";
                return Err(Bad::Broken(why.to_owned()));
            }
            None => self.make_vm().await?,
        };
        self.record.vm = Some(facts.clone());
        if self.record.script.is_none() && facts.status != "running" {
            let why = "the VM stopped while it was being started";
            return Err(Bad::Stop(why.to_owned()));
        }
        match self.wish.script.clone() {
            Some(script) if script.monitored => self.monitored(&script).await,
            Some(script) => self.unmonitored(&script).await,
            None => {
                self.ready(true).await?;
                self.settle(Stage::Up).await;
                Ok(())
            }
        }
    }

    /// What this node cannot do now is tried again for a while; a restart goes nowhere else.
    async fn restart(&mut self) -> Result<(), String> {
        let since = Instant::now();
        let mut pause = self.inner.settings.retry_pause;
        loop {
            match self.restart_once().await {
                Err(DriverError::Busy(why))
                    if since.elapsed() < self.inner.settings.pull_patience =>
                {
                    tracing::warn!(instance = self.wish.id, why, "restart failed; trying again");
                }
                done => return done.map_err(|e| e.to_string()),
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn restart_once(&mut self) -> Result<(), DriverError> {
        let busy = |e| DriverError::Busy(format!("cannot write an instance record: {e}"));
        self.inner.records.put(&self.record).await.map_err(busy)?;
        let (id, generation) = (&self.wish.id, self.wish.generation);
        let facts = self.inner.driver.restart(id, generation).await?;
        self.saw(facts);
        let facts = self.inner.driver.ready(&self.wish.id, true).await?;
        self.record.vm = Some(facts.clone());
        self.saw(facts);
        Ok(())
    }

    async fn make_vm(&mut self) -> Result<VmFacts, Bad> {
        let image = self.image().await?;
        self.put().await?;
        let settings = &self.inner.settings;
        let spec = VmSpec {
            id: self.wish.id.clone(),
            generation: self.wish.generation,
            name: self.wish.name.clone(),
            base: image.disk.clone(),
            base_format: image.format.clone(),
            saved: image.saved.clone(),
            vcpu: self.wish.vcpu,
            ram_mb: self.wish.ram_mb,
            forwards: self.wish.forwards.clone(),
            host_ip: settings.host_ip.clone(),
        };
        let facts = self.inner.driver.start(&spec).await.map_err(|e| match e {
            DriverError::Busy(why) => Bad::Reject(why),
            DriverError::Failed(why) => Bad::Broken(why),
        })?;
        self.saw(facts.clone());
        Ok(facts)
    }

    /// The image, tried again for a while if no registry can serve it.
    async fn image(&self) -> Result<Image, Bad> {
        let since = Instant::now();
        let mut pause = self.inner.settings.retry_pause;
        loop {
            let told = parking_lot::Mutex::new(None);
            let progress = |part: f32| self.pulling(part, &mut told.lock());
            match self.inner.cache.ensure(&self.wish.image, &progress).await {
                Ok(image) => return Ok(image),
                Err(CacheError::Invalid(why)) => return Err(Bad::Broken(why)),
                Err(CacheError::Unavailable(why))
                    if since.elapsed() < self.inner.settings.pull_patience =>
                {
                    tracing::warn!(instance = self.wish.id, why, "pull failed; trying again");
                }
                Err(other) => return Err(Bad::Reject(other.to_string())),
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    fn pulling(&self, part: f32, told: &mut Option<Instant>) {
        let mut board = self.inner.board.lock();
        board.pulling(&self.wish.id, self.ticket, part);
        drop(board);
        if told.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            *told = Some(Instant::now());
            self.inner.report();
        }
    }

    async fn monitored(&mut self, script: &Script) -> Result<(), Bad> {
        if self.record.script.is_none() {
            if self.record.script_begun {
                let why =
                    "the node agent was restarted while the startup script ran; its result is lost";
                return Err(self.script_failed(script, why.to_owned()).await);
            }
            self.ready(!script.at_boot).await?;
            self.script_begins().await?;
            let run = self
                .inner
                .driver
                .run_script(&self.wish.id, script, OUTPUT_KEPT);
            match run.await {
                Ok(result) => self.record.script = Some(result),
                Err(error) => {
                    let why = format!("startup script could not be run: {error}");
                    return Err(self.script_failed(script, why).await);
                }
            }
            self.put().await?;
        }
        if let Some(why) = self.record.script.as_ref().and_then(failure) {
            return Err(self.script_failed(script, why).await);
        }
        if script.at_boot {
            self.ready(true).await?;
        }
        self.settle(Stage::Up).await;
        Ok(())
    }

    /// Nobody waits for the script: the instance is up as soon as its VM is.
    async fn unmonitored(&mut self, script: &Script) -> Result<(), Bad> {
        let fresh = !self.record.script_begun;
        self.ready(!(script.at_boot && fresh)).await?;
        if fresh {
            self.script_begins().await?;
        }
        let (inner, id) = (Arc::clone(&self.inner), self.wish.id.clone());
        let run = async move {
            if fresh && let Err(error) = inner.driver.run_script(&id, script, OUTPUT_KEPT).await {
                tracing::warn!(instance = id, %error, "startup script could not be run");
            }
        };
        let up = async {
            if script.at_boot {
                self.ready(true).await?;
            }
            self.settle(Stage::Up).await;
            Ok(())
        };
        let ((), up) = tokio::join!(run, up);
        up
    }

    async fn script_failed(&self, script: &Script, why: String) -> Bad {
        let id = &self.wish.id;
        match script.on_failure {
            1 => {}
            2 => remove_vm(&self.inner, id).await,
            _ => self.stop().await,
        }
        Bad::Script(why)
    }

    async fn fail(&mut self, bad: Bad) {
        let stage = match bad {
            Bad::Reject(why) => {
                remove_vm(&self.inner, &self.wish.id).await;
                sleep(self.inner.settings.reject_pause).await;
                Stage::Rejected(why)
            }
            Bad::Broken(why) => {
                remove_vm(&self.inner, &self.wish.id).await;
                Stage::Failed(why)
            }
            Bad::Stop(why) => {
                self.stop().await;
                Stage::Failed(why)
            }
            Bad::Script(why) => Stage::Failed(why),
        };
        self.settle(stage).await;
    }

    async fn stop(&self) {
        if let Err(error) = self.inner.driver.stop(&self.wish.id).await {
            tracing::warn!(instance = self.wish.id, %error, "cannot stop a VM");
        } else if let Some(mut vm) = self.record.vm.clone() {
            vm.status = "stopped".to_owned();
            self.saw(vm);
        }
        self.inner.look.notify_one();
    }

    async fn ready(&mut self, need_network: bool) -> Result<(), Bad> {
        let ready = self.inner.driver.ready(&self.wish.id, need_network).await;
        let facts = ready.map_err(|e| match e {
            DriverError::Busy(why) => Bad::Reject(why),
            DriverError::Failed(why) => Bad::Stop(why),
        })?;
        self.record.vm = Some(facts.clone());
        self.saw(facts);
        Ok(())
    }

    async fn script_begins(&mut self) -> Result<(), Bad> {
        self.record.script_begun = true;
        self.put().await
    }

    /// On disk, then on the board. A node that cannot remember must not run anything new.
    async fn put(&mut self) -> Result<(), Bad> {
        if let Err(error) = self.inner.records.put(&self.record).await {
            return Err(Bad::Reject(format!(
                "cannot write an instance record: {error}"
            )));
        }
        self.show();
        Ok(())
    }

    async fn settle(&mut self, stage: Stage) {
        tracing::info!(
            instance = self.wish.id,
            generation = self.wish.generation,
            ?stage,
            "settled"
        );
        self.record.stage = stage;
        if let Err(error) = self.inner.records.put(&self.record).await {
            // It is as it is: told to the controller now, and found out again after a restart.
            tracing::error!(instance = self.wish.id, %error, "cannot write an instance record");
        }
        self.show();
        self.inner.report();
    }

    fn show(&self) {
        self.inner.board.lock().show(self.ticket, &self.record);
    }

    fn saw(&self, facts: VmFacts) {
        self.inner.board.lock().vm_is(VmSeen {
            id: self.wish.id.clone(),
            generation: self.wish.generation,
            facts,
            message: String::new(),
        });
        self.inner.report();
    }
}

/// Did it fail, and how is that said?
fn failure(result: &ScriptResult) -> Option<String> {
    if result.did_timeout {
        let code = result.return_code;
        return Some(format!("startup script exit code {code} (timed out)"));
    }
    (result.return_code != 0).then(|| format!("startup script exit code {}", result.return_code))
}
